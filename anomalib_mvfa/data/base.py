# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""What our datamodules have in common: checks that come before any training, and the order of the training images."""

import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from rich.progress import track
from torch.utils.data import DataLoader, DistributedSampler

from .readers import ImageRef, UnreadableImageError
from .readers.dicom import dicom_header
from .readers.files import JPEG_SUFFIXES, is_volume

__all__ = ["CheckedDataModule", "EpochSampler", "SplitDataModule", "check_images", "enumerate_some"]

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
        parts = [getattr(self, f"{name}_data", None) for name in names]
        check_images(*(part for part in parts if part is not None), num_workers=self.num_workers)
        shown = getattr(self, "test_data", None)
        if stage not in {TrainerFn.TESTING, TrainerFn.PREDICTING} or shown is None or getattr(shown, "blackout", False):
            return
        if count := sum(dicom_header(ImageRef(Path(path))).burned_in for path in shown.samples["image_path"].unique()):
            logger.warning(
                "%d DICOM files may have text such as a patient's name burned into their pixels, which heatmaps then "
                "show. Look at them, and set blackout to the rectangles with text.",
                count,
            )


class SplitDataModule(CheckedDataModule):
    """A datamodule that makes its parts itself, by other rules than anomalib's."""

    def _create_test_split(self) -> None: ...

    def _create_val_split(self) -> None: ...

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Return the validation images; nothing without a validation part."""
        return super().val_dataloader() if len(getattr(self, "val_data", ())) else []

    def _train_loader(self, num_workers: int = 0, **options: Any) -> DataLoader[Any]:
        """Return the training images, shared among the processes, in the order of an :class:`EpochSampler`."""
        replicas, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return DataLoader(
            self.train_data,
            batch_size=self.train_batch_size,
            sampler=EpochSampler(self.train_data, num_replicas=replicas, rank=rank, seed=self.seed or 0, **options),
            num_workers=num_workers,
            collate_fn=self.external_collate_fn or self.train_data.collate_fn,
        )


class EpochSampler(DistributedSampler):  # type: ignore[type-arg]
    """An order that depends on seed and epoch alone; the data set learns the epoch, in case its images depend on it.

    A resumed training continues the same order, and several processes agree without communication.
    """

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch, from 0, as Lightning does."""
        super().set_epoch(epoch)
        self.dataset.epoch = epoch  # type: ignore[attr-defined]


def check_images(*parts: AnomalibDataset, num_workers: int = 0) -> None:
    """Decode every image and mask of some data sets once: nothing less finds a file that was cut short.

    A volume is read once, not once a slice. Files that this process has read before and that have not changed since are
    passed over, so that further draws of supports cost nothing. A ValueError lists every file with its reason.
    """
    units = [unit for part in parts for unit in _units(part) if unit[2] not in _READABLE]
    paths = {path for part in parts for path in part.samples.get("mask_path", ()) if isinstance(path, str)}
    if masks := sum(path.lower().endswith(JPEG_SUFFIXES) for path in paths):
        logger.warning(
            "%d masks are JPEG files, whose edges are blurred: values above half count as lesion. Save masks as PNG.",
            masks,
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


def _units(part: AnomalibDataset) -> Iterator[_Unit]:
    """Yield the positions of each file, a single one for a volume, with a key that changes when the file does."""
    reading = copy.copy(getattr(part, "images", part))  # of few-shot supports their images, not eleven versions
    reading.augmentations = None  # images and masks at their own size
    how = (
        type(reading),
        *(str(getattr(reading, name, "")) for name in ("rule", "like")),
        reading.samples.attrs["task"],
    )
    paths = reading.samples.reindex(columns=["image_path", "mask_path"]).fillna("")
    files: dict[tuple[str, ...], list[int]] = {}
    for position, pair in enumerate(paths.itertuples(index=False, name=None)):
        files.setdefault(pair, []).append(position)
    for pair, positions in files.items():
        yield reading, positions[:1] if is_volume(pair[0]) else positions, (*how, *map(_stamp, pair))


def _stamp(path: str) -> tuple[object, ...]:
    status = Path(path).stat() if Path(path).is_file() else None
    return path, status and status.st_mtime_ns, status and status.st_size


def _problems(unit: _Unit) -> list[str]:
    """Read the images of a file with their masks and return what is wrong."""
    part, positions, _ = unit
    problems = []
    for position in positions:
        try:
            part[position]
        except UnreadableImageError as error:
            problems.append(str(error))
        except Exception as error:  # whatever the set's own reader raises, whose text may quote a header
            problems.append(f"{part.samples.iloc[position]['image_path']}: {type(error).__name__}")
    return problems


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise a ValueError for an argument that is none of the choices."""
    if value not in set(choices):
        msg = f"{name} must be one of {', '.join(choices)}, got '{value}'."
        raise ValueError(msg)


def enumerate_some(items: Sequence[str], limit: int = 5) -> str:
    """Return the first items, and the number of the others."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
