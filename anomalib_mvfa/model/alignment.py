# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Language branch: patches compared with the text features of the two states.

Everything here works on one level; :class:`~anomalib_mvfa.model.torch_model.MVFAModel` adds the levels up.
"""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["TEMPERATURE", "abnormal_map", "abnormal_score", "patch_windows", "state_logits", "upsample"]

TEMPERATURE = 100.0
"""Factor on the cosine similarities, the rounded exponential of OpenAI CLIP's ``logit_scale``."""


def state_logits(patches: Tensor, text_features: Tensor) -> Tensor:
    """Compare patches ``(B, P, E)`` of one level, without the class token, with the two states.

    Args:
        patches: Hidden vectors.
        text_features: ``(E, 2)``, or ``(B, E, 2)`` when each image has its own class; columns of unit length.

    Returns:
        Logits ``(B, P, 2)``: normal, abnormal.
    """
    return TEMPERATURE * functional.normalize(patches, dim=-1) @ text_features


def upsample(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge maps ``(B, C, h, w)`` to ``(B, C, H, W)`` bilinearly, corners aligned, as the released code does."""
    return functional.interpolate(grid, size=size, mode="bilinear", align_corners=True)


def abnormal_map(logits: Tensor, grid_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Compute probabilities ``(B, 2, H, W)`` that sum to one over the states from logits ``(B, h * w, 2)``."""
    grid = logits.transpose(1, 2).unflatten(2, grid_size)  # (B, 2, h, w)
    return upsample(grid, size).softmax(dim=1)


def abnormal_score(logits: Tensor, pooling: str = "mean") -> Tensor:
    """Compute image scores ``(B,)`` in [0, 1] from logits ``(B, P, 2)``: ``"mean"`` of the patches, or ``"max"``."""
    abnormal = logits.softmax(dim=-1)[..., 1]  # (B, P)
    return abnormal.amax(dim=1) if pooling == "max" else abnormal.mean(dim=1)


def patch_windows(patches: Tensor, grid_size: tuple[int, int], window_sizes: tuple[int, ...]) -> Tensor:
    """Average each patch of ``(B, h * w, E)`` with its neighbours within windows, which are cut at the border.

    Args:
        patches: Hidden vectors.
        grid_size: Patch rows and columns ``(h, w)``.
        window_sizes: Odd side lengths, over which the mean is taken; ``(1,)`` changes nothing. Source: MoECLIP.
    """
    if window_sizes == (1,):
        return patches
    grid = patches.transpose(1, 2).unflatten(2, grid_size)  # (B, E, h, w)
    means = [
        functional.avg_pool2d(grid, side, stride=1, padding=side // 2, count_include_pad=False) for side in window_sizes
    ]
    return torch.stack(means).mean(dim=0).flatten(2).transpose(1, 2)
