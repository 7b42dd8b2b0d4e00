# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Scaling and blending of the language branch and the memory branch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["Float32Buffers", "Fusion"]


class Float32Buffers(nn.Module):
    """A module whose buffers keep their precision when the module is converted: ranges and thresholds need it."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float32Buffers":
        moved: Float32Buffers = super()._apply(lambda value: value.to(fn(value).device), recurse)  # type: ignore[no-untyped-call]
        return moved


class Fusion(Float32Buffers):
    """Min-max scale each branch, then blend them.

    The ranges are buffers, so that checkpoints and exported models contain them. They come from the supports, or as
    in the released code from the whole test set. Values outside the range are extrapolated, not clipped.

    Args:
        language_weight: Share of the language branch; the memory branch has the rest.
    """

    def __init__(self, language_weight: float = 0.5) -> None:
        super().__init__()
        self.language_weight = language_weight
        for name in ("language_map", "memory_map", "language_score", "memory_score"):
            self.register_buffer(name, torch.tensor([0.0, 1.0]))

    def fit(self, **values: Tensor) -> None:
        """Set ranges from tensors of any shape named ``language_map``, ``memory_map``, ``language_score``, ....

        A constant tensor has a range of width one.
        """
        for name, value in values.items():
            low, high = value.min(), value.max()
            high = torch.where(high > low, high, low + 1)
            setattr(self, name, torch.stack([low, high]).float())

    def forward(self, language: Tensor, memory: Tensor, kind: str) -> Tensor:
        """Blend values of the two branches, of any one shape, by the ranges of ``"map"`` or ``"score"``."""
        scaled_language = self._scale(language, getattr(self, f"language_{kind}"))
        scaled_memory = self._scale(memory, getattr(self, f"memory_{kind}"))
        return self.language_weight * scaled_language + (1 - self.language_weight) * scaled_memory

    @staticmethod
    def _scale(values: Tensor, value_range: Tensor) -> Tensor:
        return (values - value_range[0]) / (value_range[1] - value_range[0])
