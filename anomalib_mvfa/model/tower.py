# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""A frozen image tower, divided into stages of transformer blocks.

MVFA reads the tokens after a few *levels* (blocks 6, 12, 18 and 24 of ViT-L/14) and changes them on their way to the
next stage. The tower therefore offers its parts separately: :meth:`FrozenTower.embed` computes tokens from images,
:meth:`FrozenTower.run_stage` runs the blocks between two levels.
"""

from collections.abc import Sequence

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn

from anomalib_mvfa.backbones.towers import ImageTower

__all__ = ["FrozenTower", "resolve_levels"]


def resolve_levels(levels: Sequence[int] | str | None, depth: int) -> tuple[int, ...]:
    """Return the one-based numbers of the blocks that are read.

    ``None`` takes the ends of the quarters (every block of a tower of fewer than four), ``"half"`` the first two of
    them and ``"middle"`` the second alone: no block behind it runs, which halves the cost.

    Raises:
        ValueError: If the preset is unknown.

    Example:
        >>> resolve_levels(None, 24), resolve_levels("half", 24), resolve_levels("middle", 24), resolve_levels(None, 2)
        ((6, 12, 18, 24), (6, 12), (12,), (1, 2))
    """
    quarters = tuple(sorted({max(1, depth * quarter // 4) for quarter in range(1, 5)}))
    presets = {"half": quarters[:2], "middle": quarters[1:2]}
    if isinstance(levels, str):
        if levels not in presets:
            msg = f"levels must be block numbers, 'half' or 'middle', got '{levels}'."
            raise ValueError(msg)
        return presets[levels]
    return tuple(levels) if levels else quarters


class FrozenTower(nn.Module):
    """Image tower of CLIP, frozen and always in evaluation mode.

    Blocks behind the last level are dropped: nothing reads their output.

    Args:
        tower: Image tower. Its parameters are frozen in place.
        levels: One-based numbers of the blocks after which tokens are read, ascending; see :func:`resolve_levels`.
        normalize_input: Whether to apply mean and standard deviation to the images. The released MVFA does not.
        mean: Mean of each channel of the images that the weights were trained with. Defaults to OpenAI's.
        std: Their standard deviation. Defaults to OpenAI's.

    Attributes:
        grid_size: Patch rows and columns ``(h, w)``.
        prefix: Number ``p`` of tokens before the patches: the class token, where there is one, and registers.
        width: Size ``D`` of a token.

    Raises:
        ValueError: If the levels are not ascending block numbers of this tower.
    """

    def __init__(
        self,
        tower: ImageTower,
        levels: Sequence[int] | str | None = None,
        normalize_input: bool = False,
        mean: Sequence[float] = OPENAI_DATASET_MEAN,
        std: Sequence[float] = OPENAI_DATASET_STD,
    ) -> None:
        super().__init__()
        depth = len(tower.blocks)
        self.levels = levels = resolve_levels(levels, depth)
        if list(levels) != sorted(set(levels)) or levels[0] < 1 or levels[-1] > depth:
            msg = f"levels must be ascending block numbers between 1 and {depth} for this backbone, got {list(levels)}."
            raise ValueError(msg)
        self.grid_size, self.image_size = tower.grid_size, tower.image_size
        self.width, self.prefix = tower.width, tower.prefix
        tower.drop_behind(levels[-1])
        self.tower = tower

        self.normalize_input = normalize_input
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

        self.requires_grad_(requires_grad=False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenTower":
        """Stay in evaluation mode."""
        del mode
        return super().train(mode=False)

    def embed(self, images: Tensor) -> Tensor:
        """Compute the tokens ``(B, p + h * w, D)`` that enter the first block from images ``(B, 3, H, W)`` in [0, 1].

        Raises:
            ValueError: If the images have another size.
        """
        if tuple(images.shape[-2:]) != self.image_size:
            (height, width), (rows, columns) = self.image_size, images.shape[-2:]
            msg = (
                f"This model reads images of {height} x {width} pixels, got {rows} x {columns}. Resize them, or build "
                f"the model with image_size=({rows}, {columns})."
            )
            raise ValueError(msg)
        if self.normalize_input:
            images = (images - self.mean) / self.std
        return self.tower.embed(images)

    def run_stage(self, tokens: Tensor, stage: int) -> Tensor:
        """Compute the tokens ``(B, L, D)`` after block ``levels[stage]`` from those after the level before it."""
        first = self.levels[stage - 1] if stage else 0
        for block in self.tower.blocks[first : self.levels[stage]]:
            tokens = self.tower.run_block(block, tokens)
        return tokens
