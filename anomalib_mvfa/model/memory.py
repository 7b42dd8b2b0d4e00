# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Memory branch: patches compared with a bank of normal patches."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from anomalib.models.components import DynamicBufferMixin, KCenterGreedy
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["MemoryBank", "Support", "bank_distance"]

BANK_CHUNK = 8192


class Support(NamedTuple):
    """The labelled images that few-shot MVFA learns from and remembers.

    Args:
        normal: ``(V, K, 3, H, W)``: V versions of K normal images, the unchanged version first.
        abnormal: ``(A, 3, H, W)``: abnormal images, unchanged. May be empty.
    """

    normal: Tensor
    abnormal: Tensor


def bank_distance(queries: Tensor, bank: Tensor, excluded: Tensor | None = None) -> Tensor:
    """Compute the cosine distance ``(B, P)`` of each query from the nearest entry of the bank.

    The matrix of all distances is never held at once: the bank is read in chunks.

    Args:
        queries: ``(B, P, E)``, of any length.
        bank: ``(N, E)`` of unit length.
        excluded: ``(B, N)``, true for the entries that a query must not be compared with.

    Raises:
        RuntimeError: If the bank is empty.
    """
    if not bank.numel():
        msg = "The memory bank is empty: build it from normal images before it is searched."
        raise RuntimeError(msg)
    queries = functional.normalize(queries, dim=-1)
    nearest = []
    for start in range(0, len(bank), BANK_CHUNK):
        entries = slice(start, start + BANK_CHUNK)
        similarity = queries @ bank[entries].to(queries.dtype).T  # (B, P, chunk)
        if excluded is not None:
            similarity = similarity.masked_fill(excluded[:, None, entries], -torch.inf)
        nearest.append(similarity.amax(dim=-1))
    return 1 - torch.stack(nearest).amax(dim=0)


class MemoryBank(DynamicBufferMixin, nn.Module):
    """One bank per level of the hidden vectors of normal images.

    The entries are stored at unit length. The class token of each image is an entry, as in the released code.

    Args:
        num_levels: Number of levels.
        coreset: Share of the entries that is kept, in (0, 1], chosen by anomalib's greedy search for the k centres
            that cover the others best.

    Raises:
        ValueError: If the share is not in (0, 1].
    """

    def __init__(self, num_levels: int, coreset: float = 1.0) -> None:
        super().__init__()
        if not 0 < coreset <= 1:
            msg = f"coreset is the share of the bank that is kept, in (0, 1], got {coreset}."
            raise ValueError(msg)
        self.num_levels, self.coreset = num_levels, coreset
        for level in range(num_levels):
            self.register_buffer(f"level_{level}", torch.empty(0))

    @property
    def is_empty(self) -> bool:
        """Whether it has no entries."""
        return self[0].numel() == 0

    def __getitem__(self, level: int) -> Tensor:
        """Return the entries ``(N, E)`` of a level."""
        entries: Tensor = getattr(self, f"level_{level}")
        return entries

    def remember(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """Replace the entries by hidden vectors ``(..., E)``, one tensor a level.

        Returns the positions ``(N,)`` of the entries that are kept among the flattened tokens of each level.
        """
        kept = []
        for level, hidden in enumerate(tokens):
            entries = functional.normalize(hidden.detach().flatten(0, -2).float(), dim=-1)
            positions = torch.arange(len(entries), device=entries.device)
            if self.coreset < 1:
                positions = positions[self._coreset(entries, seed=level)]
                entries = entries[positions]
            setattr(self, f"level_{level}", entries)
            kept.append(positions)
        return kept

    def _coreset(self, entries: Tensor, seed: int) -> list[int]:
        devices = [entries.device] if entries.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            search = KCenterGreedy(entries, self.coreset)
            search.model.random_state = seed
            return search.select_coreset_idxs()
