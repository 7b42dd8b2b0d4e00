# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The eleven versions of a support image.

In the order of the released code: the image itself, rotations by -pi/8, -pi/16, pi/16 and pi/8, shifts by a tenth of
half the width along the four diagonals, and the two flips. What comes in at a border is reflected.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["NUM_VERSIONS", "support_version", "support_versions"]

ANGLES = (-math.pi / 8, -math.pi / 16, math.pi / 16, math.pi / 8)
SHIFTS = ((0.1, 0.1), (-0.1, 0.1), (-0.1, -0.1), (0.1, -0.1))
NUM_VERSIONS = 1 + len(ANGLES) + len(SHIFTS) + 2


def support_version(images: Tensor, version: int) -> Tensor:
    """Make version 0 to 10 of images or masks ``(N, C, H, W)``, floating point.

    A mask changed so has values between 0 and 1; the released code takes what exceeds one half.
    """
    if version == 0:
        return images
    if version == NUM_VERSIONS - 2:
        return images.flip(-1)
    if version == NUM_VERSIONS - 1:
        return images.flip(-2)
    if version <= len(ANGLES):
        # In single precision like the released code: training amplifies what a double would change.
        angle = torch.tensor(ANGLES[version - 1])
        cos, sin = angle.cos().item(), angle.sin().item()
        matrix = [[cos, -sin, 0.0], [sin, cos, 0.0]]
    else:
        x, y = SHIFTS[version - 1 - len(ANGLES)]
        matrix = [[1.0, 0.0, x], [0.0, 1.0, y]]
    affine = torch.tensor(matrix, dtype=images.dtype, device=images.device).expand(len(images), 2, 3)
    grid = functional.affine_grid(affine, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def support_versions(images: Tensor) -> Tensor:
    """Make all versions ``(11, N, C, H, W)`` of images or masks ``(N, C, H, W)``, floating point.

    Example:
        >>> support_versions(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([11, 2, 3, 8, 8])
    """
    return torch.stack([support_version(images, version) for version in range(NUM_VERSIONS)])
