# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""How images are read: with the grey levels of the training, ahead of the model, past files that cannot be read."""

import logging
import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from anomalib.data import ImageBatch, ImageItem, PredictDataset
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler

__all__ = ["ReportingDataset", "prepare_processes", "read_ahead", "withhold"]

logger = logging.getLogger(__name__)

MAX_READERS = 4


class ReportingDataset(PredictDataset):
    """anomalib's dataset of a folder, in which a file that cannot be read does not end the prediction.

    Such a file becomes a black image whose ``explanation`` is the reason; the other explanations are empty.
    """

    @classmethod
    def adopt(cls, dataset: Any) -> None:  # noqa: ANN401 - any dataset
        """Turn a dataset of anomalib into one of these; leave others alone."""
        if type(dataset) is PredictDataset:
            dataset.__class__ = cls

    def __getitem__(self, index: int) -> ImageItem:
        """Read one image, or report why it cannot be read."""
        path = Path(self.image_filenames[index])
        try:
            item = super().__getitem__(index)
        except Exception as error:  # Pillow raises many kinds on damaged files
            reason = _why_unreadable(path, error)
            return ImageItem(image=torch.zeros(3, 1, 1), image_path=str(path), explanation=reason)
        item.explanation = ""
        return item


def _why_unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "permission denied"
    if not path.is_file():
        return "no such file"
    if path.stat().st_size == 0:
        return "the file is empty"
    return "truncated, damaged or not an image"


def withhold(batch: ImageBatch) -> None:
    """Replace the predictions of images that could not be read by NaN, in place.

    Args:
        batch: Predictions. Images with an ``explanation`` are those that could not be read.
    """
    unread = torch.tensor([bool(reason) for reason in batch.explanation or [""] * len(batch)])
    for name in ("pred_score", "anomaly_map"):
        values = getattr(batch, name)
        if values is not None and unread.any():
            values = values.clone()
            values[unread.to(values.device)] = torch.nan
            setattr(batch, name, values)


def read_ahead(loader: Any) -> Any:  # noqa: ANN401 - any loader
    """Let other processes read the images of a plain folder while the model computes.

    anomalib's loader for them reads one after the other. Loaders that have readers, and other data sets, stay as they
    are; so do all where starting a process would import everything anew.

    Args:
        loader: Any loader.

    Returns:
        A loader of the same batches.
    """
    if type(loader) is not DataLoader or not isinstance(loader.dataset, PredictDataset) or loader.num_workers:
        return loader
    readers = min(MAX_READERS, (os.cpu_count() or 1) - 1, len(loader.dataset))
    if multiprocessing.get_start_method() != "fork" or readers < 1:
        return loader
    return DataLoader(
        loader.dataset,
        batch_sampler=loader.batch_sampler,  # numbers the images, for Lightning
        collate_fn=loader.collate_fn,
        num_workers=readers,
        pin_memory=loader.pin_memory,
    )


def prepare_processes(trainer: Trainer) -> None:
    """Prepare Lightning before it wraps the model and makes the loaders.

    Args:
        trainer: In its ``setup`` phase.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        # The last level's outputs and, without masks, the segmentation adapters never learn. The buffers are made from
        # the same supports everywhere; sending them around would only tie evaluations to equal numbers of batches.
        strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
        strategy._ddp_kwargs.setdefault("broadcast_buffers", False)
    if not isinstance(strategy.process_dataloader, partial):
        strategy.process_dataloader = partial(  # type: ignore[method-assign]
            _process_loader, trainer, strategy.process_dataloader
        )
    if trainer.world_size > 1:
        _share_folder(trainer)


def _process_loader(trainer: Trainer, process: Callable[[object], object], loader: object) -> object:
    """Deal the images of an evaluation out without repeating any, and start a resumed training in its epoch's order.

    Images of a plain folder are read ahead, and those that cannot be read are reported.
    """
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        if sampler.shuffle or trainer.training:
            sampler.set_epoch(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        else:
            count = len(sampler.dataset)  # type: ignore[arg-type]  # Lightning deals sized sets out only
            if count < sampler.num_replicas:
                msg = (
                    f"{count} images cannot be shared by {sampler.num_replicas} processes. "
                    f"Set --trainer.devices to {max(count, 1)} or less."
                )
                raise ValueError(msg)
            sampler.total_size = count
            sampler.num_samples = len(range(sampler.rank, count, sampler.num_replicas))
    if trainer.predicting:
        ReportingDataset.adopt(getattr(loader, "dataset", None))
        loader = read_ahead(loader)
    return process(loader)


def _share_folder(trainer: Trainer) -> None:
    """Let every process write into the folder of the first.

    Each process of a training has made a folder of its own, with the next number; it is removed again.
    """
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
