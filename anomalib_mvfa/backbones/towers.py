# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Image towers of open_clip and of timm behind one interface: embed, blocks, width."""

from abc import ABC, abstractmethod
from functools import cache
from typing import Any

import timm
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

__all__ = ["ImageTower", "OpenClipTower", "TimmTower", "image_tower", "timm_patch_size"]

TIMM_NEEDS = {
    "blocks": "transformer blocks, all of one width",
    "_pos_embed": "position embeddings that are added before the first block",
    "norm_pre": "a place before the first block",
    "set_input_size": "a size that can be changed",
}
"""What a trunk of timm must have, by attribute: convolutional and hierarchical ones have not."""


class ImageTower(ABC, nn.Module):
    """What MVFA needs of an image tower.

    Attributes:
        width: Size ``D`` of a token.
        prefix: Number of tokens before the patches, such as the class token and registers.
        image_size: Height and width of the images in pixels.
        grid_size: Patch rows and columns ``(h, w)``.
    """

    width: int
    prefix: int
    image_size: tuple[int, int]
    grid_size: tuple[int, int]

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks."""

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Compute the tokens ``(B, prefix + h * w, D)`` that enter the first block from images ``(B, 3, H, W)``."""

    @abstractmethod
    def run_block(self, block: nn.Module, tokens: Tensor, patches: Tensor | None = None) -> Tensor:
        """Run one of the blocks on tokens ``(B, L, D)``; ``patches`` holds the indices of the patches if not all."""

    @abstractmethod
    def pool(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Compute CLIP's embedding ``(B, E)`` and normalised tokens ``(B, L, D)`` from those after the last block."""

    @abstractmethod
    def drop_behind(self, depth: int) -> None:
        """Drop all blocks but the first ``depth``, and the pooling."""


class OpenClipTower(ImageTower):
    """open_clip's own vision transformer, with a class token; changed in place."""

    prefix = 1

    def __init__(self, visual: VisionTransformer) -> None:
        super().__init__()
        self.visual = visual
        self.width = visual.transformer.width
        self.image_size = tuple(visual.image_size)
        self.grid_size = tuple(visual.grid_size)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks."""
        blocks: nn.ModuleList = self.visual.transformer.resblocks
        return blocks

    def embed(self, images: Tensor) -> Tensor:
        """Compute the tokens ``(B, 1 + h * w, D)`` that enter the first block."""
        visual = self.visual
        patches = visual.conv1(images).flatten(2).transpose(1, 2)  # (B, h * w, D)
        class_token = visual.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)  # (B, 1, D)
        tokens = torch.cat([class_token, patches], dim=1) + visual.positional_embedding.to(patches.dtype)
        embedded: Tensor = visual.ln_pre(tokens)
        return embedded

    def run_block(self, block: nn.Module, tokens: Tensor, patches: Tensor | None = None) -> Tensor:
        """Run one of the blocks on tokens ``(B, L, D)``, whichever patches they are of."""
        del patches
        # open_clip up to 2.24 attends over (L, B, D), later releases over (B, L, D).
        batch_first = block.attn.batch_first  # type: ignore[union-attr]
        result: Tensor = block(tokens) if batch_first else block(tokens.transpose(0, 1)).transpose(0, 1)
        return result

    def pool(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the embedding as open_clip pools, and the normalised tokens."""
        visual = self.visual
        if visual.attn_pool is not None:
            tokens = visual.attn_pool(tokens)
        tokens = tokens if visual.final_ln_after_pool else visual.ln_post(tokens)
        pooled = visual._global_pool(tokens)[0]
        pooled = visual.ln_post(pooled) if visual.final_ln_after_pool else pooled
        return pooled @ visual.proj, tokens

    def drop_behind(self, depth: int) -> None:
        """Drop all blocks but the first ``depth``, and the pooling."""
        self.visual.transformer.resblocks = self.blocks[:depth]
        self.visual.attn_pool = self.visual.proj = None
        self.visual.ln_post = nn.Identity()


class TimmTower(ImageTower):
    """A vision transformer of timm: with or without class token, registers, rotary positions, pooling by attention.

    The trunk in open_clip's wrapper is changed in place.
    """

    def __init__(self, visual: TimmModel) -> None:
        super().__init__()
        self.visual = visual
        self.width = self.trunk.embed_dim
        self.prefix = self.trunk.num_prefix_tokens
        self.image_size = tuple(self.trunk.patch_embed.img_size)
        self.grid_size = tuple(self.trunk.patch_embed.grid_size)

    @property
    def trunk(self) -> Any:
        """The part of the tower that is timm's."""
        return self.visual.trunk

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks."""
        blocks: nn.ModuleList = self.trunk.blocks
        return blocks

    def embed(self, images: Tensor) -> Tensor:
        """Compute the tokens ``(B, prefix + h * w, D)`` that enter the first block."""
        tokens = self.trunk._pos_embed(self.trunk.patch_embed(images))
        if isinstance(tokens, tuple):  # together with rotary positions
            tokens = tokens[0]
        embedded: Tensor = self.trunk.norm_pre(tokens)
        return embedded

    def run_block(self, block: nn.Module, tokens: Tensor, patches: Tensor | None = None) -> Tensor:
        """Run one of the blocks on tokens ``(B, L, D)``, with the rotary positions of these patches."""
        options = {}
        if getattr(self.trunk, "rope", None) is not None:
            positions = self.trunk.rope.get_embed(shape=self.grid_size)  # (h * w, ...)
            options["rope"] = positions if patches is None else positions[patches]
        result: Tensor = block(tokens, **options)
        return result

    def pool(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the embedding as timm pools, and the normalised tokens."""
        tokens = self.trunk.norm(tokens)
        return self.visual.head(self.trunk.forward_head(tokens)), tokens

    def drop_behind(self, depth: int) -> None:
        """Drop all blocks but the first ``depth``, and the pooling."""
        self.trunk.blocks = self.blocks[:depth]
        self.trunk.attn_pool = None
        self.trunk.norm = self.trunk.fc_norm = self.trunk.head = self.visual.head = nn.Identity()


def image_tower(visual: nn.Module) -> ImageTower:
    """Return the image tower of a CLIP model of open_clip behind the common interface."""
    return TimmTower(visual) if isinstance(visual, TimmModel) else OpenClipTower(visual)


@cache
def timm_patch_size(name: str) -> int:
    """Return the patch size of a trunk of timm that has what MVFA needs, without allocating it.

    Raises:
        ValueError: If timm has no such model, or if it lacks something.
    """
    try:
        with torch.device("meta"):
            trunk: Any = timm.create_model(name)
    except RuntimeError as error:
        msg = f"timm {timm.__version__} has no model '{name}'. Update timm, or correct timm_model_name."
        raise ValueError(msg) from error
    lacking = [need for attribute, need in TIMM_NEEDS.items() if not hasattr(trunk, attribute)]
    if getattr(trunk, "rope_mixed", False):
        lacking.append("positions that are the same for all blocks")
    if lacking:
        msg = f"The image tower '{name}' cannot hold adapters between its blocks: it lacks {', '.join(lacking)}."
        raise ValueError(msg)
    return int(trunk.patch_embed.patch_size[0])
