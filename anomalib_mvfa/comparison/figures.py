# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The figures of the images of one cell, from their raw scores."""

from torch import Tensor

from .statistics import image_metrics

__all__ = ["image_figures"]


def image_figures(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Compute the figures of images.

    Args:
        scores: Raw scores ``(N,)``, higher for more abnormal images.
        labels: ``(N,)``, 1 for abnormal images.

    Returns:
        AUROC, average precision, greatest F1 and sensitivity at 95 % specificity, in [0, 1].

    Raises:
        ValueError: If a score is not finite, or one class is missing.

    Example:
        >>> import torch
        >>> figures = image_figures(torch.tensor([-3.0, 2.0, 1.0, 9.0]), torch.tensor([0, 0, 1, 1]))
        >>> figures["image_AUROC"], round(figures["image_F1Max"], 2)
        (0.75, 0.8)
    """
    if not bool(scores.isfinite().all()):
        msg = f"{int((~scores.isfinite()).sum())} of {len(scores)} image scores are not finite numbers."
        raise ValueError(msg)
    if labels.unique().numel() < 2:
        msg = "The test images are all normal or all abnormal: nothing can be compared on them."
        raise ValueError(msg)
    values = image_metrics(labels.bool().numpy(), scores.double().numpy())
    return {name: float(value[0]) for name, value in values.items()}
