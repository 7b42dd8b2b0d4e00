# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Several processes that train, test or predict together give what one process gives.

Lightning shares the images out. What it leaves to a model is done here: no image is counted twice when they do not
divide evenly, adapters that an image does not move are no error, all processes write into one folder, and all read the
same data.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed
from torch.utils.data import DistributedSampler

from .reading import ReportingDataset, read_ahead

__all__ = ["gather_objects", "interleave", "is_first", "prepare_processes"]

T = TypeVar("T")


def gather_objects(value: T) -> list[T]:
    """Collect a value of every process, in all of them; alone, a list of the value.

    Args:
        value: Anything that can be pickled.

    Returns:
        One value a process, in their order.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def is_first() -> bool:
    """Tell whether this is the first of the processes, or the only one."""
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def interleave(parts: Iterable[Iterable[T]]) -> Iterator[T]:
    """Bring what was dealt out one by one back into its order.

    Example:
        >>> list(interleave([[0, 2, 4], [1, 3]]))
        [0, 1, 2, 3, 4]
    """
    absent = object()
    for row in zip_longest(*parts, fillvalue=absent):
        yield from (value for value in row if value is not absent)  # type: ignore[misc]


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
