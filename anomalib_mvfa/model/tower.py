# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""A frozen CLIP image tower seen as stages of transformer blocks.

MVFA reads the tokens after a few *levels* (blocks 6, 12, 18 and 24 of ViT-L/14) and changes them on their way to the
next stage. The tower therefore offers its parts separately: :meth:`FrozenTower.embed` computes tokens from images,
:meth:`FrozenTower.run_stage` runs the blocks between two levels.
"""

from collections.abc import Sequence

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

__all__ = ["FrozenTower", "quarter_levels", "resolve_levels"]


def quarter_levels(depth: int) -> tuple[int, ...]:
    """Return the blocks that end each quarter of a transformer.

    Args:
        depth: Number of blocks.

    Returns:
        One-based block numbers, ``(6, 12, 18, 24)`` for the 24 blocks of ViT-L/14. A tower of fewer than four blocks
        gives every block.

    Example:
        >>> quarter_levels(24)
        (6, 12, 18, 24)
        >>> quarter_levels(2)
        (1, 2)
    """
    return tuple(sorted({max(1, depth * quarter // 4) for quarter in range(1, 5)}))


def resolve_levels(levels: Sequence[int] | str | None, depth: int) -> tuple[int, ...]:
    """Return the blocks that are read.

    Args:
        levels: One-based block numbers; ``None`` for the ends of the quarters; ``"half"`` for the first two of them and
            ``"middle"`` for the second alone: no block behind it runs, which halves the cost.
        depth: Number of blocks.

    Returns:
        One-based block numbers.

    Raises:
        ValueError: If the preset is unknown.

    Example:
        >>> resolve_levels("half", 24), resolve_levels("middle", 24)
        ((6, 12), (12,))
    """
    quarters = quarter_levels(depth)
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
        visual: Vision transformer of open_clip. Its parameters are frozen in place.
        levels: One-based numbers of the blocks after which tokens are read, ascending.
        normalize_input: Whether to apply mean and standard deviation to the images. The released MVFA does not.
        mean: Mean of the images that the weights were trained with, a number a channel. Defaults to OpenAI's.
        std: Their standard deviation. Defaults to OpenAI's.

    Attributes:
        grid_size: Patch rows and columns ``(h, w)``.
        width: Size ``D`` of a token.
        text_width: Size ``E`` of CLIP's common space of images and texts.

    Raises:
        ValueError: If the levels are not ascending block numbers of this tower.
    """

    def __init__(
        self,
        visual: VisionTransformer,
        levels: Sequence[int],
        normalize_input: bool = False,
        mean: Sequence[float] = OPENAI_DATASET_MEAN,
        std: Sequence[float] = OPENAI_DATASET_STD,
    ) -> None:
        super().__init__()
        depth = len(visual.transformer.resblocks)
        if not levels or list(levels) != sorted(set(levels)) or levels[0] < 1 or levels[-1] > depth:
            msg = f"levels must be ascending block numbers between 1 and {depth} for this backbone, got {list(levels)}."
            raise ValueError(msg)
        self.levels = tuple(levels)
        self.depth = depth
        self.grid_size = tuple(visual.grid_size)
        self.image_size = tuple(visual.image_size)
        self.width = visual.transformer.width
        self.text_width = visual.output_dim

        self.conv1 = visual.conv1
        self.class_embedding = visual.class_embedding
        self.positional_embedding = visual.positional_embedding
        self.ln_pre = visual.ln_pre
        self.blocks = nn.ModuleList(visual.transformer.resblocks[: levels[-1]])

        self.normalize_input = normalize_input
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

        self.requires_grad_(requires_grad=False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenTower":
        """Stay in evaluation mode: a frozen tower has no training mode."""
        del mode
        return super().train(mode=False)

    def embed(self, images: Tensor) -> Tensor:
        """Turn images into the tokens that enter the first block.

        Args:
            images: Images ``(B, 3, H, W)`` in [0, 1], of the tower's image size.

        Returns:
            Tokens ``(B, 1 + h * w, D)``, the class token first.

        Raises:
            ValueError: If the images have another size.
        """
        if tuple(images.shape[-2:]) != self.image_size:
            msg = (
                f"This model reads images of {self.image_size[0]} x {self.image_size[1]} pixels, got "
                f"{images.shape[-2]} x {images.shape[-1]}. Resize them, or build the model with image_size="
                f"({images.shape[-2]}, {images.shape[-1]})."
            )
            raise ValueError(msg)
        if self.normalize_input:
            images = (images - self.mean) / self.std
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # (B, h * w, D)
        class_token = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)  # (B, 1, D)
        tokens = torch.cat([class_token, patches], dim=1) + self.positional_embedding.to(patches.dtype)
        embedded: Tensor = self.ln_pre(tokens)
        return embedded

    def run_stage(self, tokens: Tensor, stage: int) -> Tensor:
        """Run the blocks that lead to a level.

        Args:
            tokens: Tokens ``(B, L, D)`` that enter the stage.
            stage: Zero-based index into ``levels``.

        Returns:
            Tokens ``(B, L, D)`` after block ``levels[stage]``.
        """
        first = self.levels[stage - 1] if stage else 0
        for block in self.blocks[first : self.levels[stage]]:
            # open_clip up to 2.24 attends over (L, B, D), later releases over (B, L, D).
            batch_first = block.attn.batch_first  # type: ignore[union-attr]
            tokens = block(tokens) if batch_first else block(tokens.transpose(0, 1)).transpose(0, 1)
        return tokens
