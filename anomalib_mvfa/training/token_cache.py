# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Tokens below the first adapter, kept for the epochs of a small training set."""

import hashlib
import logging
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["TokenCache"]

logger = logging.getLogger(__name__)


class TokenCache:
    """Keeps the output of a frozen network by the content of its images.

    Nothing below the first adapter is trained, so that the tokens of an image stay the same. Each image is computed by
    itself: its tokens do not depend on the rest of the batch.

    Args:
        max_bytes: Largest total size of the tokens.
        max_images: Largest number of different images; beyond it the images change at random, and nothing is kept.

    Example:
        >>> cache = TokenCache(max_bytes=2**20, max_images=8)
        >>> images = torch.rand(2, 3, 4, 4)
        >>> bool((cache(images, lambda image: 2 * image) == 2 * images).all()), len(cache)
        (True, 2)
    """

    def __init__(self, max_bytes: int, max_images: int) -> None:
        self.max_bytes, self.max_images = max_bytes, max_images
        self.open = True
        self._tokens: dict[bytes, Tensor] = {}
        self._met: set[bytes] = set()
        self._bytes = 0

    def __len__(self) -> int:
        """Return the number of images whose tokens are kept."""
        return len(self._tokens)

    def __call__(self, images: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the tokens ``(B, L, D)`` of images ``(B, 3, H, W)``; ``compute`` computes those of one image."""
        if not self.open:
            return compute(images)
        return torch.cat([self._get(image, compute) for image in images.split(1)])

    def _get(self, image: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        # Tokens depend on the precision of autocast.
        kind = image.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else image.dtype
        content = image.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        key = hashlib.blake2b(content, digest_size=16, salt=str(dtype).encode()[:16]).digest()
        if key in self._tokens:
            return self._tokens[key]
        tokens = compute(image).detach()
        size = tokens.numel() * tokens.element_size()
        if key not in self._met and len(self._met) == self.max_images:
            logger.info("The training images change from epoch to epoch: their tokens are no longer kept.")
            self.open = False
            self._tokens.clear()
            return tokens
        self._met.add(key)
        if self._bytes + size <= self.max_bytes:
            self._tokens[key] = tokens
            self._bytes += size
        return tokens

    def state(self) -> tuple[bool, list[str]]:
        """Return what a resumed training needs for the same numbers: whether the cache is open, and its keys."""
        return self.open, sorted(key.hex() for key in self._met)

    def restore(self, state: tuple[bool, list[str]]) -> None:
        """Restore what :meth:`state` returned; the tokens are computed again."""
        self.open, self._met = state[0], {bytes.fromhex(key) for key in state[1]}
