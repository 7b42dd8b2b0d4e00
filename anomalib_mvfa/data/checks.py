# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Checks of data sets that come before any training, and what our datamodules have in common."""

import copy
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.utils import LabelName
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from pandas import DataFrame
from PIL import Image
from rich.progress import track
from torch.utils.data import DataLoader

from .readers import JPEG_SUFFIXES, UnreadableImageError, has_burned_in_text, is_volume, read_image, read_mask

__all__ = ["CheckedDataModule", "SplitDataModule", "check_images", "check_masks", "enumerate_some"]

logger = logging.getLogger(__name__)

CHECKED_PARTS = {
    TrainerFn.FITTING: ("train", "val", "test"),  # a damaged test image is not to be found after hours of training
    TrainerFn.VALIDATING: ("val",),
    TrainerFn.TESTING: ("test",),
}
PROGRESS_FROM = 200  # files; fewer are read before a bar could be followed
_READABLE: set[tuple[object, ...]] = set()  # what this process has found in order, by the files' time and size


class CheckedDataModule(AnomalibDataModule):
    """A datamodule that reads every image of a stage once before it begins, and warns of text in images to be shown."""

    def setup(self, stage: str | None = None) -> None:
        """List the images; before ``"fit"``, ``"validate"`` and ``"test"`` also read each that will be used once.

        Raises:
            FileNotFoundError: If a file or folder does not exist.
            ValueError: If images cannot be used or do not suffice.
            ImportError: If the reader of a format that is there is not installed.
        """
        super().setup(stage)
        names = next((names for fn, names in CHECKED_PARTS.items() if stage == fn), ())
        parts = (self._checked_part(name) for name in names)
        check_images(*(part for part in parts if part is not None), num_workers=self.num_workers)
        shown = getattr(self, "predict_data", None) or getattr(self, "test_data", None)
        if stage in {TrainerFn.TESTING, TrainerFn.PREDICTING} and shown is not None:
            warn_of_text(shown)

    def _checked_part(self, name: str) -> AnomalibDataset | None:
        return getattr(self, f"{name}_data", None)


class SplitDataModule(CheckedDataModule):
    """A datamodule that makes its parts itself, by other rules than anomalib's."""

    def _create_test_split(self) -> None: ...

    def _create_val_split(self) -> None: ...

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Return the validation images; nothing without a validation part."""
        return super().val_dataloader() if len(getattr(self, "val_data", ())) else []

    def _train_loader(self, sampler: type, num_workers: int = 0, **options: Any) -> DataLoader[Any]:
        """Return the training images in the order of a sampler, shared among the processes."""
        replicas, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return DataLoader(
            self.train_data,
            batch_size=self.train_batch_size,
            sampler=sampler(self.train_data, num_replicas=replicas, rank=rank, seed=self.seed or 0, **options),
            num_workers=num_workers,
            collate_fn=self.external_collate_fn or self.train_data.collate_fn,
        )


def warn_of_text(data: AnomalibDataset) -> None:
    """Warn once of text burned into images whose heatmaps will be written, unless parts of them are blacked out."""
    count = sum(has_burned_in_text(path) for path in data.samples["image_path"].unique())
    if count and not getattr(data, "blackout", ()):
        logger.warning(
            "%d DICOM files may have text such as a patient's name burned into their pixels, which heatmaps then show. "
            "Look at them, and set blackout to the rectangles with text.",
            count,
        )


def check_images(*parts: AnomalibDataset, num_workers: int = 0) -> None:
    """Decode every image and mask of some data sets once: nothing less finds a file that was cut short.

    A volume is read once, not once a slice. Files that this process has read before and that have not changed since are
    passed over, so that further draws of supports cost nothing.

    Raises:
        ValueError: If an image or mask cannot be read, a mask has another size than its image, or an abnormal image
            lacks a mask in a set that has masks. The message lists every file with its reason.
    """
    units = [unit for part in parts for unit in _units(part)]
    paths = {path for part in parts for path in part.samples.get("mask_path", ()) if isinstance(path, str)}
    masks = [path for path in paths if path.lower().endswith(JPEG_SUFFIXES)]
    if masks:
        logger.warning(
            "%d masks are JPEG files, whose edges are blurred: values above half count as lesion. Save masks as PNG.",
            len(masks),
        )
    loader: DataLoader[list[str]] = DataLoader(
        units,  # type: ignore[arg-type]  # a list is a data set
        batch_size=None,
        num_workers=min(num_workers, len(units) // PROGRESS_FROM),
        collate_fn=_problems,  # type: ignore[arg-type]  # called with one unit
        generator=torch.Generator(),  # its own: whether files are read must not change the course of a seeded training
    )
    problems: dict[str, None] = {}
    results = track(loader, "Reading the images", len(units), transient=True, disable=len(units) < PROGRESS_FROM)
    for (_, _, key), found in zip(units, results, strict=True):
        problems.update(dict.fromkeys(found))
        if not found:
            _READABLE.add(key)
    if problems:
        count = "1 file" if len(problems) == 1 else f"{len(problems)} files"
        msg = "\n  ".join([f"{count} cannot be used. Repair or remove what is listed:", *problems])
        raise ValueError(msg)


_Unit = tuple[AnomalibDataset, list[int], tuple[object, ...]]


def _units(part: AnomalibDataset) -> list[_Unit]:
    """Gather the positions of each file, a single one for a volume, with a key that changes when the file does."""
    reading = copy.copy(part)
    reading.augmentations = None  # images and masks at their own size
    columns = [column for column in ("image_path", "mask_path") if column in part.samples]
    files: dict[tuple[str, ...], list[int]] = {}
    for position, paths in enumerate(zip(*(part.samples[column].fillna("") for column in columns), strict=True)):
        files.setdefault(paths, []).append(position)
    how = (type(part), *(str(getattr(part, name, "")) for name in ("rule", "like")), part.samples.attrs.get("task"))
    units = [
        (reading, positions[:1] if is_volume(paths[0]) else positions, (*how, *map(_stamp, paths)))
        for paths, positions in files.items()
    ]
    return [unit for unit in units if unit[2] not in _READABLE]


def _stamp(path: str) -> tuple[object, ...]:
    with suppress(OSError):
        status = Path(path).stat()
        return path, status.st_mtime_ns, status.st_size
    return (path, None)


def _problems(unit: _Unit) -> list[str]:
    part, positions, _ = unit
    return [problem for position in positions if (problem := _problem(part, position))]


def _problem(part: AnomalibDataset, position: int) -> str | None:
    """Read one image with its mask and return what is wrong, or ``None``."""
    row = part.samples.iloc[position]
    image_path, mask_path = row["image_path"], row.get("mask_path") or ""
    abnormal = row["label_index"] == LabelName.ABNORMAL.value
    try:
        item: Any = part[position]
    except UnreadableImageError as error:
        return str(error)
    except Exception as error:  # whatever the set's own reader raises
        return _reason(image_path, mask_path if abnormal else None) or f"{image_path}: {type(error).__name__}"
    if abnormal and item.gt_mask is not None and item.gt_mask.shape[-2:] != item.image.shape[-2:]:
        return f"{mask_path}: {size_difference(item.gt_mask.shape, item.image.shape)}"
    return None


def _reason(image_path: str, mask_path: str | None) -> str | None:
    """Return why an image or its mask cannot be read, according to the readers of this package."""
    try:
        read_image(image_path)
        if mask_path == "":
            return f"{image_path}: abnormal, but without a mask of the same stem, while the set has masks"
        if mask_path:
            read_mask(mask_path)
    except FileNotFoundError as error:
        return f"{error.filename}: no such file"
    except ValueError as error:
        return str(error)
    return None


def size_difference(mask: Sequence[int], image: Sequence[int]) -> str:
    """Return a message that a mask ``(..., H, W)`` has another size than its image ``(..., H, W)``."""
    return (
        f"this mask is {mask[-1]}x{mask[-2]} (width x height), its image {image[-1]}x{image[-2]}; "
        "resample it onto the image, nearest neighbour"
    )


def check_masks(samples: DataFrame) -> None:
    """Check by the headers of the files that every abnormal image has a mask of its own size, if any has one.

    Raises:
        ValueError: If masks are missing or differ in size from their images. The message has the count and five files.
    """
    abnormal = samples[samples["label_index"] == LabelName.ABNORMAL.value]
    absent = abnormal["mask_path"].fillna("") == ""
    if absent.all():
        return
    missing = abnormal.loc[absent, "image_path"].tolist()
    if missing:
        msg = (
            f"{len(missing)} of {len(abnormal)} abnormal images have no mask of the same stem: "
            f"{enumerate_some(missing)}. "
            "Add the masks, or remove every mask folder to use the set with image labels only."
        )
        raise ValueError(msg)
    differing = []
    for image_path, mask_path in zip(abnormal["image_path"], abnormal["mask_path"], strict=True):
        with suppress(OSError), Image.open(image_path) as image, Image.open(mask_path) as mask:
            if mask.size != image.size:
                differing.append("{} ({}x{}, image {}x{})".format(mask_path, *mask.size, *image.size))
    if differing:
        msg = (
            f"{len(differing)} of {len(abnormal)} masks differ in size (width x height) from their image: "
            f"{enumerate_some(differing)}. Resample these masks onto their images, nearest neighbour."
        )
        raise ValueError(msg)


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise a ValueError for an argument that is none of the choices."""
    if value not in set(choices):
        msg = f"{name} must be one of {', '.join(choices)}, got '{value}'."
        raise ValueError(msg)


def enumerate_some(items: Sequence[str], limit: int = 5) -> str:
    """Return the first items, and the number of the others."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
