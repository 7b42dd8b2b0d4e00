# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Few-shot episodes on any anomalib datamodule."""

import copy
import logging
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset, ImageItem, get_datamodule
from anomalib.data.utils import LabelName
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.tv_tensors import Image, Mask

from anomalib_mvfa.model.memory import Support
from anomalib_mvfa.model.prompts import prompt_name
from anomalib_mvfa.training.lesions import LesionSynthesizer

from .augmentation import NUM_VERSIONS, support_version, support_versions
from .base import SplitDataModule, check_choice
from .medical_dataset import read_by_us
from .splits import drop_copies, parse_pattern, pattern_groups

__all__ = ["FewShot", "SupportDataset", "find_support", "read_support_list"]

logger = logging.getLogger(__name__)

ABNORMAL_SOURCES = ("auto", "validation", "test", "synthetic")


class SupportDataset(AnomalibDataset):
    """The eleven versions of each support image, the abnormal ones first, as the released code orders them.

    Without abnormal rows the normal ones get synthetic lesions under the seed. The source reads the images.
    """

    def __init__(
        self, normal: pd.DataFrame, abnormal: pd.DataFrame, task: str, seed: int, source: AnomalibDataset | None = None
    ) -> None:
        self.images = AnomalibDataset() if source is None else copy.copy(source)  # the supports unchanged
        # Set directly: the setter of anomalib would sort by path and lose the order of the draw.
        self.images._samples = pd.concat([abnormal, normal], ignore_index=True)
        self.images.samples.attrs["task"] = task
        self.images.augmentations = None
        self._cache: dict[int, ImageItem] = {}  # decoded and resized supports; there are few of them
        super().__init__()
        self._samples = self.images.samples
        self.num_normal, self.num_abnormal = len(normal), len(abnormal)
        self.seed = seed
        self.epoch = 0
        self.lesions = None if self.num_abnormal else LesionSynthesizer()

    @property
    def has_anomalous(self) -> bool:
        """Always: real ones, or normal supports with synthetic lesions."""
        return True

    def __len__(self) -> int:
        """Return eleven times the number of supports, half of them abnormal when lesions are synthetic."""
        return NUM_VERSIONS * ((self.num_abnormal or self.num_normal) + self.num_normal)

    def support(self, index: int) -> ImageItem:
        """Return a support unchanged but for the augmentations, the model's resize as a rule; abnormal ones first."""
        if self.images.augmentations is not self.augmentations:
            self.images.augmentations, self._cache = self.augmentations, {}
        if index not in self._cache:
            self._cache[index] = self.images[index]  # type: ignore[assignment]
        return self._cache[index]

    def __getitem__(self, index: int) -> ImageItem:
        """Return one version: all versions of the abnormal block, then of the normal block."""
        block = self.num_abnormal or self.num_normal
        abnormal = index < NUM_VERSIONS * block
        first = 0 if abnormal else NUM_VERSIONS * block
        version, position = divmod(index - first, block if abnormal else self.num_normal)
        position += 0 if abnormal else self.num_abnormal
        item, mask = self.support(position), None
        image = support_version(_plain(item.image)[None], version)[0]
        if item.gt_mask is not None:
            mask = support_version(_plain(item.gt_mask)[None, None].float(), version)[0, 0] > 0.5
        if abnormal and self.lesions is not None:
            generator = torch.Generator().manual_seed(hash((self.seed, self.epoch, index)) % 2**63)  # the same anywhere
            donor = _plain(self.support((position + 1) % self.num_normal).image)
            image, mask = self.lesions(image, generator, donor)
        return ImageItem(
            image=Image(image),
            gt_mask=None if mask is None else Mask(mask),
            gt_label=torch.tensor(int(abnormal)),
            image_path=item.image_path,
            mask_path=item.mask_path,
        )


class FewShot(SplitDataModule):
    r"""Keeps k normal and k abnormal supports of any anomalib datamodule for training.

    Training batches are the eleven versions of each support. Supports, images with the same pixels, and other images of
    their groups are taken out of validation and test. Supports come from different groups as far as there are enough;
    normal ones from the training images, abnormal ones from the validation part (of the sets of BMAD: from their
    ``valid`` split), or, with a warning, from the test part where that is all there is. Data sets that are read in
    anomalib's default way, such as ``Folder``'s, are read by our readers.

    Args:
        source: The datamodule to draw from, or its ``class_path`` and ``init_args`` as a mapping. Its splits get the
            seed 0 unless it has one, so that the test part is the same for every draw of supports.
        k_shot: Number of supports of each class.
        seed: Seed of the draw. The supports for a small ``k_shot`` are among those for a larger one.
        support_list: File in the published text format that names the supports, of the sets of BMAD those in their
            ``valid`` split; ``k_shot`` and ``seed`` are then not used.
        draw: Which draw of the file.
        abnormal_source: ``"auto"`` as described above, ``"validation"``, ``"test"``, or ``"synthetic"``: the normal
            supports get synthetic lesions.
        group_by: Regular expression whose first group is the part of a file name that all images of a patient share,
            such as ``"(?P<patient>\d+)_\d+"``. By default the groups are those of the source, if it has any.
        shuffle: Whether to shuffle the training images in each epoch. The order depends on seed and epoch alone.
        train_batch_size: Images per training step; the released code can only do one.

    Raises:
        ValueError: In ``setup``, if there are fewer images than shots, or the source cannot be read.

    Example:
        >>> from anomalib.data import Folder
        >>> folder = Folder("mri", normal_dir="normal", abnormal_dir="abnormal", mask_dir="masks", root="DATA")
        >>> FewShot(folder, k_shot=4).k_shot
        4
    """

    def __init__(
        self,
        source: AnomalibDataModule,
        k_shot: int = 4,
        seed: int = 0,
        support_list: str | Path | None = None,
        draw: int = 0,
        abnormal_source: str = "auto",
        group_by: str | None = None,
        shuffle: bool = True,
        train_batch_size: int = 1,
    ) -> None:
        source = get_datamodule(dict(source)) if isinstance(source, Mapping) else source
        if not isinstance(source, AnomalibDataModule):
            msg = f"source must be an anomalib datamodule such as Folder or MVTecAD, got {type(source).__name__}."
            raise TypeError(msg)
        if k_shot < 1:
            msg = f"k_shot must be at least 1, got {k_shot}."
            raise ValueError(msg)
        check_choice("abnormal_source", abnormal_source, ABNORMAL_SOURCES)
        if group_by is not None:
            parse_pattern(group_by)
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=source.eval_batch_size,
            num_workers=source.num_workers,
            val_augmentations=source.val_augmentations,
            test_augmentations=source.test_augmentations,
            val_split_mode=source.val_split_mode,
            test_split_mode=source.test_split_mode,
            seed=seed,
        )
        self.source = source
        self.category = source.category
        self.k_shot = k_shot
        self.support_list = support_list
        self.draw = draw
        self.abnormal_source = abnormal_source
        self.group_by = group_by
        self.shuffle = shuffle

    @property
    def name(self) -> str:  # type: ignore[override]  # as anomalib's own datamodules
        """Name of the source."""
        return self.source.name

    @property
    def class_name(self) -> str | None:
        """Name for the prompts, the source's own, or that of its category; ``None`` if it has neither."""
        own = getattr(self.source, "class_name", None)
        return own or (prompt_name(self.category) if self.category else None)

    @property
    def intensity(self) -> str | None:
        """Intensity rule of the source, as text; ``None`` if it has none."""
        return getattr(self.source, "intensity", None)

    @property
    def support(self) -> Support:
        """Eleven versions of the normal supports, and the abnormal supports or the normal ones with lesions."""
        data: SupportDataset = self.train_data  # type: ignore[assignment]
        normal = [_plain(data.support(data.num_abnormal + index).image) for index in range(data.num_normal)]
        abnormal = [_plain(data[index].image) for index in range(data.num_abnormal or data.num_normal)]
        return Support(support_versions(torch.stack(normal)), torch.stack(abnormal))

    def prepare_data(self) -> None:
        """Let the source fetch its data."""
        self.source.prepare_data()

    def _setup(self, _stage: str | None = None) -> None:
        train, val, test = self._source_parts()
        normal, abnormal = self._draw_supports(train, val, test)
        supports = pd.concat([normal, abnormal])
        task = "segmentation" if abnormal.empty else str(test.samples.attrs["task"])
        self.train_data = SupportDataset(normal, abnormal, task, seed=self.seed or 0, source=train)
        drop = partial(drop_copies, taken=supports, of="supports", like=getattr(test, "like", None))
        self.test_data: AnomalibDataset = test.subsample(drop(test.samples, part="test"))
        if val is not None:
            self.val_data: AnomalibDataset = val.subsample(drop(val.samples, part="validation"))
        logger.info(
            "Supports: %d normal, %s; %d validation and %d test images remain.",
            len(normal),
            "with synthetic lesions" if abnormal.empty else f"{len(abnormal)} abnormal",
            0 if val is None else len(self.val_data),
            len(self.test_data),
        )

    def _source_parts(self) -> tuple[AnomalibDataset, AnomalibDataset | None, AnomalibDataset]:
        """Set up the source and return its train, validation and test parts."""
        source = self.source
        if source.seed is None:
            source.seed = 0
        try:
            source.setup()
        except Exception as error:
            where = getattr(source, "root", None)
            msg = f"{type(source).__name__}{f' at {where}' if where else ''} could not be read: {error}"
            raise ValueError(msg) from error
        found = [getattr(source, f"{name}_data", None) for name in ("train", "val", "test")]
        files = [path for part in found if part is not None for path in part.samples["image_path"]]
        root = Path(os.path.commonpath([Path(path).parent for path in files]) if files else "")
        parts = tuple(None if part is None else read_by_us(part, root) for part in found)
        for part in parts:
            if part is not None:
                part._samples = self._grouped(part.samples)
        return parts  # type: ignore[return-value]  # every source has a training and a test part

    def _grouped(self, samples: pd.DataFrame) -> pd.DataFrame:
        """Return samples with the groups that the pattern of file names defines, if there is one."""
        if self.group_by is None:
            return samples
        return samples.assign(group=pattern_groups(samples["image_path"], self.group_by))

    def _draw_supports(
        self, train: AnomalibDataset, val: AnomalibDataset | None, test: AnomalibDataset
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Choose the rows of the normal and of the abnormal supports."""
        # Sets that keep a split for supports and validation are asked for it: the validation part may be another one.
        pool: pd.DataFrame | None = getattr(self.source, "support_pool", None)
        pool = None if pool is None else self._grouped(pool)
        if self.support_list is not None:
            if pool is None:
                parts = [part.samples for part in (val, train, test) if part is not None]
                pool = pd.concat(parts).drop_duplicates("image_path", ignore_index=True)
            listed = read_support_list(self.support_list, self.draw)
            find = partial(find_support, pool, path=self.support_list, draw=self.draw)
            normal, abnormal = map(find, listed, (LabelName.NORMAL, LabelName.ABNORMAL))
            return pool.iloc[normal], pool.iloc[abnormal]

        normal_images = train.samples[train.samples.label_index == LabelName.NORMAL]
        supports = self._choose(normal_images, "normal", "training")
        if self.abnormal_source == "synthetic":
            return supports, supports.iloc[:0]
        if pool is None:
            pool = test.samples.iloc[:0] if val is None else val.samples
        candidates, part = pool[pool.label_index == LabelName.ABNORMAL], "validation"
        if self.abnormal_source == "test" or (self.abnormal_source == "auto" and candidates.empty):
            candidates, part = test.samples[test.samples.label_index == LabelName.ABNORMAL], "test"
        abnormal_supports = self._choose(candidates, "abnormal", part)
        if in_test := abnormal_supports.image_path.isin(test.samples.image_path).sum():
            logger.warning(
                "%d abnormal supports were taken from the test part, which no longer holds them, because no other part "
                "has abnormal images or because that was asked for.",
                in_test,
            )
        return supports, abnormal_supports

    def _choose(self, candidates: pd.DataFrame, kind: str, part: str) -> pd.DataFrame:
        """Draw ``k_shot`` rows."""
        if len(candidates) < self.k_shot:
            msg = (
                f"{self.k_shot} {kind} supports were asked for, but the {part} part of {self.name} {self.category} has "
                f"{len(candidates)} {kind} images. Lower k_shot"
            )
            msg += ", or set abnormal_source to 'test' or 'synthetic'." if kind == "abnormal" else ", or add images."
            raise ValueError(msg)
        order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(self.seed or 0))
        drawn = candidates.iloc[order.tolist()]
        if "group" in drawn:  # one of each group before a second of any
            drawn = drawn.iloc[drawn.groupby("group").cumcount().argsort(kind="stable")]
            if drawn["group"].nunique() < self.k_shot:
                logger.warning(
                    "The %d %s supports come from %d groups (patients, series or files) alone: there are no more.",
                    self.k_shot,
                    kind,
                    drawn["group"].nunique(),
                )
        return drawn.iloc[: self.k_shot]

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training images, read in this process, which keeps the decoded supports."""
        return self._train_loader(shuffle=self.shuffle)


def _plain(image: Any) -> Tensor:
    """Drop torchvision's wrapper."""
    return torch.as_tensor(image).as_subclass(Tensor)


def read_support_list(path: Path | str, draw: int = 0) -> tuple[list[str], list[str]]:
    """Read one draw: the file names of its normal and of its abnormal supports, none without an ``a`` line.

    The format is that of the lists released with MVFA (https://github.com/MediaBrain-SJTU/MVFA-AD), one file a set and
    shot. A draw of supports has one line for its normal and one for its abnormal images, separated by blanks::

        n-0: 17.png 203.png
        a-0: 8.png 54.png
        n-1: ...

    Raises:
        ValueError: If a line is malformed, a key or a name stands twice, or the draw has no ``n`` line.
    """
    lines: dict[str, list[str]] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        key, _, rest = line.partition(":")
        key, names = key.strip(), rest.split()
        if not re.fullmatch(r"[na]-\d+", key):
            msg = f"{path}, line {number}: expected 'n-<draw>: names' or 'a-<draw>: names', found {line[:60]!r}."
            raise ValueError(msg)
        if key in lines or len(set(names)) != len(names):
            msg = f"{path}, line {number}: {key} or one of its file names stands twice; keep one of them."
            raise ValueError(msg)
        lines[key] = names
    if f"n-{draw}" not in lines:
        msg = f"{path} has no line 'n-{draw}:', it has {', '.join(lines) or 'no lines'}. Pass one of its draws."
        raise ValueError(msg)
    return lines[f"n-{draw}"], lines.get(f"a-{draw}", [])


def find_support(
    samples: pd.DataFrame, names: Sequence[str], label: int, *, path: Path | str = "the support list", draw: int = 0
) -> list[int]:
    """Find the rows of listed supports of one label in a split, by file name, or by stem without an extension.

    A ValueError, which ``path`` and ``draw`` are for, lists names that match no image of that label, or several.
    """
    rows: dict[str, list[int]] = {}
    for row, (image_path, label_index) in enumerate(zip(samples["image_path"], samples["label_index"], strict=True)):
        if label_index == label:
            for key in {Path(image_path).name, Path(image_path).stem}:
                rows.setdefault(key, []).append(row)
    matches = [rows.get(Path(name).name, []) for name in names]
    wrong = [f"{name} ({len(found)} matches)" for name, found in zip(names, matches, strict=True) if len(found) != 1]
    if wrong:
        kind = "normal" if label == LabelName.NORMAL else "abnormal"
        msg = (
            f"{path}, line {kind[0]}-{draw}: {len(wrong)} of {len(names)} names do not name one {kind} image "
            f"of the split: {', '.join(wrong[:5])}. Use the list of this set, or correct the names."
        )
        raise ValueError(msg)
    return [found[0] for found in matches]
