# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Scores that use no knowledge of anomalies. A method that does not beat them has learned nothing useful."""

from anomalib.data import InferenceBatch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

__all__ = ["DistanceToMean", "GreyLevels"]


class GreyLevels(nn.Module):
    """Scores an image by the mean of its values, or by their variance.

    Example:
        >>> import torch
        >>> images = torch.full((1, 3, 8, 8), 0.25)
        >>> GreyLevels()(images).pred_score, GreyLevels(variance=True)(images).pred_score
        (tensor([0.2500]), tensor([0.]))
    """

    def __init__(self, variance: bool = False) -> None:
        super().__init__()
        self.variance = variance

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score images ``(B, 3, H, W)`` in [0, 1]; there is no map."""
        axes = (1, 2, 3)
        return InferenceBatch(pred_score=images.var(axes, correction=0) if self.variance else images.mean(axes))


class DistanceToMean(nn.Module):
    """Scores an image by its mean absolute difference from the mean of normal images.

    Args:
        normal: Normal images ``(K, 3, H, W)`` in [0, 1].
        blur: Standard deviation in pixels of the blur of the map, which allows for images that are not aligned.

    Example:
        >>> import torch
        >>> model = DistanceToMean(torch.zeros(2, 3, 32, 32))
        >>> model(torch.full((1, 3, 32, 32), 0.25)).pred_score
        tensor([0.2500])
    """

    mean: Tensor

    def __init__(self, normal: Tensor, blur: float = 4.0) -> None:
        super().__init__()
        self.register_buffer("mean", normal.mean(dim=0))
        self.blur = blur

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score images ``(B, 3, H, W)``, with the blurred difference as map ``(B, H, W)``."""
        difference = (images - self.mean).abs().mean(dim=1, keepdim=True)
        size = 2 * round(2 * self.blur) + 1
        blurred = functional.gaussian_blur(difference, [size, size], [self.blur, self.blur])
        return InferenceBatch(pred_score=difference.mean(dim=(1, 2, 3)), anomaly_map=blurred[:, 0])
