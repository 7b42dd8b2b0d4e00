# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Orders of the training images that depend on seed and epoch alone.

A resumed training continues the same order, and several processes agree without communication.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, DistributedSampler

__all__ = ["BalancedSampler", "EpochSampler"]


class EpochSampler(DistributedSampler):  # type: ignore[type-arg]
    """Passes the epoch, which Lightning sets, on to the data set, in case the images depend on it."""

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch, from 0."""
        super().set_epoch(epoch)
        self.dataset.epoch = epoch  # type: ignore[attr-defined]


class BalancedSampler(EpochSampler):
    """Draws every group equally often on average, with replacement; an epoch is as long as the data set.

    Args:
        dataset: The training images.
        groups: Name of the group of each image.
        **kwargs: ``num_replicas``, ``rank`` and ``seed`` of :class:`torch.utils.data.DistributedSampler`.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.arange(100))
        >>> sampler = BalancedSampler(data, ["large"] * 99 + ["small"], num_replicas=1, rank=0, seed=0)
        >>> 30 < sum(index == 99 for index in sampler) < 70
        True
    """

    def __init__(self, dataset: Dataset[Any], groups: Sequence[str], **kwargs: Any) -> None:
        super().__init__(dataset, shuffle=True, **kwargs)
        counts = Counter(groups)
        self.weights = torch.tensor([1 / counts[group] for group in groups])

    def __iter__(self) -> Iterator[int]:
        """Draw the indices of this process."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        drawn = torch.multinomial(self.weights, self.total_size, replacement=True, generator=generator)
        return iter(drawn[self.rank :: self.num_replicas].tolist())
