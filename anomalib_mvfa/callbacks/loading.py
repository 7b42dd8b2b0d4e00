# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Loading of images: ahead of the model, past files that cannot be read, distributed among processes."""

import logging
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from anomalib.data import ImageBatch, ImageItem, PredictDataset
from anomalib.data.utils import LabelName
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

__all__ = ["ReportedBatch", "ReportingDataset", "prepare_processes", "read_ahead"]

logger = logging.getLogger(__name__)

MAX_READERS = 4


@dataclass
class ReportedBatch(ImageBatch):
    """A batch whose images with an ``explanation`` could not be read, and have no prediction.

    Their scores and maps are NaN, their labels ``LabelName.UNKNOWN`` (-1; ``pred_label`` then holds integers), their
    masks empty. Their items have ``None`` for label and mask.
    """

    item_class = ImageItem

    def _withhold(self, values: Tensor | None, fill: float, dtype: torch.dtype | None = None) -> Tensor | None:
        unread = torch.tensor([bool(reason) for reason in self.__dict__.get("explanation") or ()], dtype=torch.bool)
        if values is None or not unread.any():
            return values
        return values.to(dtype).masked_fill(unread.to(values.device).view(-1, *(1,) * (values.ndim - 1)), fill)

    def validate_pred_score(self, pred_score: Tensor | None) -> Tensor | None:
        """Validate scores ``(B,)``."""
        return self._withhold(ImageBatch.validate_pred_score(pred_score), torch.nan)

    def validate_anomaly_map(self, anomaly_map: Tensor | None) -> Tensor | None:
        """Validate maps ``(B, H, W)``."""
        return self._withhold(ImageBatch.validate_anomaly_map(anomaly_map), torch.nan)

    def validate_pred_label(self, pred_label: Tensor | None) -> Tensor | None:
        """Validate labels ``(B,)``."""
        return self._withhold(ImageBatch.validate_pred_label(pred_label), LabelName.UNKNOWN.value, torch.int8)

    @property
    def items(self) -> list[ImageItem]:
        """The items; those of unreadable images have neither label nor mask."""
        items: list[ImageItem] = super().items
        for item in items:
            if item.explanation:
                item.pred_label = item.pred_mask = None
        return items


class ReportingDataset(Dataset[ImageItem]):
    """anomalib's data set of a folder, with a black image in the place of each file that cannot be read.

    Its ``explanation`` is the reason; the other explanations are empty.
    """

    collate_fn = staticmethod(ReportedBatch.collate)

    def __init__(self, source: PredictDataset) -> None:
        self.source = source

    @property
    def image_paths(self) -> list[str]:
        """The ``image_path`` of every item."""
        return [str(path) for path in self.source.image_filenames]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> ImageItem:
        """Read one image, or report why it cannot be read."""
        path = Path(self.source.image_filenames[index])
        try:
            with Image.open(path) as image:
                wide = image.mode in {"I", "F"} or image.mode.startswith("I;")
            if not wide:  # anomalib would clip it to white
                item: ImageItem = self.source[index]
                item.explanation = ""
                return item
            reason = "has more than 8 bits a pixel; --data MedicalFolder --data.path FOLDER reads it"
        except Exception as error:  # Pillow raises many kinds on damaged files
            reason = _why_unreadable(path, error)
        return ImageItem(image=torch.zeros(3, 1, 1), image_path=str(path), explanation=reason)


def _why_unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "permission denied"
    if not path.is_file():
        return "no such file"
    return "truncated, damaged or not an image" if path.stat().st_size else "the file is empty"


def read_ahead(loader: Any) -> Any:
    """Report unreadable images of a plain folder, and let other processes read while the model computes.

    Other loaders are returned unchanged; none reads ahead where a new process would import everything again.
    """
    if type(loader) is not DataLoader or type(loader.dataset) is not PredictDataset:
        return loader
    readers = min(MAX_READERS, (os.cpu_count() or 1) - 1, len(loader.dataset))
    if multiprocessing.get_start_method() != "fork":
        readers = 0
    dataset = ReportingDataset(loader.dataset)
    return DataLoader(
        dataset,
        batch_sampler=loader.batch_sampler,  # numbers the images, for Lightning
        collate_fn=dataset.collate_fn,
        num_workers=loader.num_workers or readers,
        pin_memory=loader.pin_memory,
    )


def prepare_processes(trainer: Trainer) -> None:
    """Prepare a trainer before it wraps the model and makes the loaders."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        # The last level's outputs and, without masks, the segmentation adapters have no gradients. The buffers are
        # computed from the same supports everywhere; broadcasting them would require equal numbers of batches.
        strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
        strategy._ddp_kwargs.setdefault("broadcast_buffers", False)
    if not isinstance(strategy.process_dataloader, partial):
        strategy.process_dataloader = partial(  # type: ignore[method-assign]
            _process_loader, trainer, strategy.process_dataloader
        )
    if trainer.world_size > 1:
        _share_folder(trainer)


def _process_loader(trainer: Trainer, process: Callable[[object], object], loader: object) -> object:
    """Distribute the images of an evaluation without repetition, and order those of a resumed training by its epoch."""
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        if sampler.shuffle or trainer.training:
            sampler.set_epoch(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        else:
            count = len(sampler.dataset)  # type: ignore[arg-type]  # Lightning distributes sized sets only
            if count < sampler.num_replicas:
                msg = (
                    f"{count} images cannot be shared by {sampler.num_replicas} processes. "
                    f"Set --trainer.devices to {max(count, 1)} or less."
                )
                raise ValueError(msg)
            sampler.total_size = count
            sampler.num_samples = len(range(sampler.rank, count, sampler.num_replicas))
    return process(read_ahead(loader) if trainer.predicting else loader)


def _share_folder(trainer: Trainer) -> None:
    """Let every process write into the folder of the first, and remove the empty ones that the others have made."""
    own = Path(trainer.default_root_dir)
    shared = Path(trainer.strategy.broadcast(str(own)))
    if own != shared:
        trainer._default_root_dir = str(shared)  # type: ignore[attr-defined]  # there is no setter
        if own.parent == shared.parent and own.is_dir() and not any(own.iterdir()):
            own.rmdir()
    trainer.strategy.barrier("folder")
    latest = shared.parent / "latest"
    if trainer.is_global_zero and latest.is_symlink() and latest.resolve() != shared and trainer.training:
        fresh = latest.with_name("partial-latest")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(shared, target_is_directory=True)
        fresh.replace(latest)
