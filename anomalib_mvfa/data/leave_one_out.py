# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Leave one set out: train on the other sets, test on the target, which is never seen in training."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from anomalib.data import ImageBatch, ImageItem
from anomalib.data.utils import LabelName, Split, TestSplitMode, ValSplitMode
from torch import Tensor
from torch.utils.data import DataLoader

from anomalib_mvfa.model.prompts import prompt_name

from .base import SplitDataModule, check_choice
from .bmad import available_sets, find_set, read_samples, read_set
from .medical_dataset import MedicalDataset
from .splits import drop_copies, parse_pattern, pattern_groups, split_groups

__all__ = ["LeaveOneOut", "SetBatch", "SetItem"]

logger = logging.getLogger(__name__)

TRAIN_SPLITS = {"valid": Split.VAL.value, "test": Split.TEST.value}
VAL_SPLIT_MODES = ("from_train", "from_dir", "same_as_test", "none")


@dataclass
class SetItem(ImageItem):
    """An image with the name for its prompts, and whether its set has masks, a Boolean scalar."""

    class_name: str | None = None
    has_mask: Tensor | None = None


@dataclass
class SetBatch(ImageBatch):
    """A batch of images of several sets, with ``has_mask`` of shape ``(B,)``."""

    item_class = SetItem
    class_name: list[str] | None = None
    has_mask: Tensor | None = None


class SetsDataset(MedicalDataset):
    """Images of several sets, those of sets without masks with an empty one."""

    epoch = 0

    def __init__(self, samples: pd.DataFrame) -> None:
        super().__init__(samples.sort_values("image_path"))
        self.samples.attrs["task"] = "segmentation" if samples["has_mask"].any() else "classification"

    @property
    def collate_fn(self) -> Any:
        """Collate into batches that keep the sets' names."""
        return SetBatch.collate

    def __getitem__(self, index: int) -> SetItem:
        """Read one image, with the prompts' name and whether its set has masks."""
        row, item = self.samples.iloc[index], super().__getitem__(index)
        return SetItem(**vars(item), class_name=row["class_name"], has_mask=torch.tensor(bool(row["has_mask"])))


class LeaveOneOut(SplitDataModule):
    r"""Zero-shot across sets: the adapters learn from all sets but the target.

    The sets lie under ``root`` in any of the layouts that :mod:`~anomalib_mvfa.data.bmad` reads. Batches mix sets; each
    image meets the prompts of its own set, and images of sets without masks train the detection adapters only. No image
    of the target, and none with the same pixels, is in training.

    Args:
        target: The set to test on.
        root: Folder that holds the sets.
        sets: The sets to train on. Defaults to all others under ``root``.
        train_split: ``"valid"`` trains on the other sets' validation splits; ``"test"`` on their test splits, as
            published.
        val_split_mode: Where thresholds come from. ``"from_train"`` holds a part of the training images out, so that
            nothing of the target is used; ``"from_dir"`` takes the target's ``valid`` split, ``"same_as_test"`` its
            test split, as in the published choice of the epoch; ``"none"`` goes without.
        val_split_ratio: Share of the groups of each training set, with and without abnormal images, that
            ``"from_train"`` holds out.
        group_by: Regular expression whose first group is the part of a file name that all images of a patient share,
            such as ``"(?P<patient>\d+)_\d+"``, or one for each set that has such names. By default none share any.
        train_batch_size: Images per training step; published with 1.
        eval_batch_size: Images in one step of evaluation.
        num_workers: Processes that decode images ahead of the model.
        seed: Seed of the held-out part and of the order.

    Raises:
        ValueError: If an argument is unknown, no set is left to train on, or images cannot be used.
        FileNotFoundError: In ``setup``, if a set is not there.

    Example:
        >>> LeaveOneOut(target="Retina_RESC", root="DATA").class_name
        'retinal OCT'
    """

    def __init__(
        self,
        target: str,
        root: str | Path = "./datasets/BMAD",
        sets: Sequence[str] | None = None,
        train_split: str = "valid",
        val_split_mode: ValSplitMode | str = ValSplitMode.FROM_TRAIN,
        val_split_ratio: float = 0.2,
        group_by: str | dict[str, str] | None = None,
        train_batch_size: int = 1,
        eval_batch_size: int = 16,
        num_workers: int = 2,
        seed: int = 0,
    ) -> None:
        check_choice("train_split", train_split, TRAIN_SPLITS)
        check_choice("val_split_mode", val_split_mode, VAL_SPLIT_MODES)
        if not 0 < val_split_ratio < 1:
            msg = f"val_split_ratio is a share between 0 and 1, got {val_split_ratio}."
            raise ValueError(msg)
        for pattern in [group_by] if isinstance(group_by, str) else (group_by or {}).values():
            parse_pattern(pattern)
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            test_split_mode=TestSplitMode.FROM_DIR,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )
        self.target = target
        self.root = Path(root)
        self.sets = sets
        self.train_split = train_split
        self.group_by = group_by
        self._category = target

    @property
    def class_name(self) -> str:
        """What the prompts call the images of the target."""
        return prompt_name(self.target)

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the prompts call the images of the training sets, once set up."""
        names = getattr(self, "train_data", None)
        return () if names is None else tuple(sorted(set(names.samples["class_name"])))

    def _training_sets(self) -> list[str]:
        sets = list(self.sets or available_sets(self.root))
        others = [name for name in sets if find_set(self.root, name) != find_set(self.root, self.target)]
        if not others:
            msg = (
                f"No set but the target '{self.target}' to train on under {self.root}: found "
                f"{', '.join(sets) or 'none'}. Put at least one more set there, or name it in sets."
            )
            raise ValueError(msg)
        if self.sets and len(others) < len(sets):
            msg = f"The target '{self.target}' is among the sets to train on ({', '.join(sets)}). Leave it out."
            raise ValueError(msg)
        return others

    def _setup(self, _stage: str | None = None) -> None:
        folder = find_set(self.root, self.target)
        target = self._grouped(self.target, read_samples(folder))
        pool = pd.concat([self._pool_of(name) for name in self._training_sets()], ignore_index=True)
        pool = pool.iloc[drop_copies(pool, target, "training", f"images of {self.target}")].copy()
        test = target[target["split"] == Split.TEST.value]
        self.test_data = read_set(test, folder)
        if self.val_split_mode == ValSplitMode.FROM_TRAIN:
            shares = {Split.VAL: self.val_split_ratio, Split.TRAIN: 1 - self.val_split_ratio}
            for name, rows in pool.groupby("set"):
                remedy = f"Add some to {name}, leave it out with sets, or choose another val_split_mode."
                pool.loc[rows.index, "split"] = split_groups(rows, shares, self.seed or 0, True, remedy)
            held_out = pool["split"] == Split.VAL.value
            self.val_data = SetsDataset(pool[held_out])
            pool = pool[~held_out]
        elif self.val_split_mode != ValSplitMode.NONE:
            from_dir = self.val_split_mode == ValSplitMode.FROM_DIR
            rows = target[target["split"] == Split.VAL.value] if from_dir else test
            self.val_data = read_set(rows, folder)
        self.train_data = SetsDataset(pool)
        logger.info(
            "Training on the %s splits of %s; %d validation images; testing on %d images of %s.",
            self.train_split,
            ", ".join(f"{name} ({count})" for name, count in pool.groupby("set").size().items()),
            len(getattr(self, "val_data", ())),
            len(test),
            self.target,
        )

    def _pool_of(self, name: str) -> pd.DataFrame:
        """List the training images of a set."""
        folder = find_set(self.root, name)
        samples = read_samples(folder)
        samples = samples[samples["split"] == TRAIN_SPLITS[self.train_split]]
        labels = set(samples["label_index"])
        if labels != {LabelName.NORMAL.value, LabelName.ABNORMAL.value}:
            msg = (
                f"The {self.train_split} split of {folder} has no normal or no abnormal images, both of which "
                "training needs. Add them, or leave the set out with sets."
            )
            raise ValueError(msg)
        samples = self._grouped(name, samples)
        return samples.assign(set=name, class_name=prompt_name(name), has_mask=samples.attrs["task"] == "segmentation")

    def _grouped(self, name: str, samples: pd.DataFrame) -> pd.DataFrame:
        """Return the samples of a set with a column ``group``, by default a group for each image."""
        pattern = self.group_by if isinstance(self.group_by, str) else (self.group_by or {}).get(name)
        groups = pattern_groups(samples["image_path"], pattern) if pattern else samples["image_path"]
        return samples.assign(group=[f"{name}/{group}" for group in groups])

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training images of all other sets."""
        return self._train_loader(self.num_workers)
