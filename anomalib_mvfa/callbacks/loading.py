# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Loading of images: ahead of the model, distributed among processes."""

import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from anomalib.data import PredictDataset
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler

from anomalib_mvfa.data.medical_dataset import ReportingDataset

__all__ = ["prepare_processes", "read_ahead"]

MAX_READERS = 4


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
