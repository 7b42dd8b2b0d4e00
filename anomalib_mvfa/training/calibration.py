# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""What bank and fusion are made from: the supports of a datamodule, and what the branches say of whole sets."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from anomalib_mvfa.model.memory import Support
from anomalib_mvfa.model.torch_model import BranchOutput, MVFAModel
from anomalib_mvfa.processes import gather_objects

__all__ = ["branch_extremes", "find_support"]

logger = logging.getLogger(__name__)


def find_support(
    datamodule: object,
    train_data: Any,  # noqa: ANN401 - any dataset
    max_support: int,
    pre_process: Callable[[Tensor], Tensor],
) -> Support | None:
    """Ask a datamodule for its supports, or take a sample of its normal training images.

    Args:
        datamodule: Any datamodule, or ``None``; one with ``support`` knows its own.
        train_data: Its training set.
        max_support: How many normal training images are taken, evenly over them.
        pre_process: Brings an image ``(3, H, W)`` to the size that the model reads.

    Returns:
        The supports; ``None`` where there are no normal training images.
    """
    if hasattr(datamodule, "support"):
        support: Support | None = datamodule.support
        return support
    samples = getattr(train_data, "samples", None)
    if samples is None:
        logger.warning("The training data have no samples to remember: the memory branch is off.")
        return None
    normal = [position for position, label in enumerate(samples.label_index) if label == 0]
    if not normal:
        return None
    count = min(len(normal), max_support)
    chosen = [normal[position * len(normal) // count] for position in range(count)]
    images = torch.stack([pre_process(train_data[position].image) for position in chosen])
    return Support(images.unsqueeze(0), images[:0])


@torch.no_grad()
def branch_extremes(
    model: MVFAModel,
    loaders: DataLoader[Any] | Sequence[DataLoader[Any]] | None,
    pre_process: Callable[[Tensor], Tensor],
    device: torch.device,
) -> list[tuple[BranchOutput, BranchOutput]]:
    """Find the least and the largest values of both branches over all images of a set, in all processes.

    Args:
        model: With a bank.
        loaders: Loaders of the set.
        pre_process: Brings images to the size that the model reads.
        device: Where the model is.

    Returns:
        Language and memory branch of each batch, two values in each field, which is all that a range needs; nothing
        while the bank is empty.
    """
    extremes: list[tuple[BranchOutput, BranchOutput]] = []
    for loader in [loaders] if isinstance(loaders, DataLoader) else loaders or []:
        for batch in loader:
            language, memory = model.branches(pre_process(batch.image).to(device))
            if memory is None:
                return []
            extremes.append((_extremes(language), _extremes(memory)))
    return [pair for part in gather_objects(extremes) for pair in part]


def _extremes(output: BranchOutput) -> BranchOutput:
    return BranchOutput(*(torch.stack([values.min(), values.max()]).cpu() for values in output))
