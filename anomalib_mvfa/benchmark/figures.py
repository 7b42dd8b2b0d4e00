# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The figures of one cell: of images from their raw scores, of pixels in constant memory."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from anomalib_mvfa.model.metrics import PixelAUROC, squash

from .statistics import image_metrics

__all__ = ["PixelFigures", "image_figures"]

PRO_LIMIT = 0.3
NEIGHBOURS = np.ones((3, 3), dtype=int)  # regions touch at corners, too, as in anomalib's metric


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


class PixelFigures:
    """AUROC, average precision, AUPRO and best Dice over all pixels, in memory that does not grow with the set.

    Pixels are counted in the bins of :class:`~anomalib_mvfa.model.metrics.PixelAUROC`. For AUPRO (Bergmann et al.,
    "Uninformed Students", CVPR 2020) every pixel of a region counts by one over the size of its region.
    """

    def __init__(self) -> None:
        self._auroc = PixelAUROC()
        self._overlap = np.zeros(PixelAUROC.BINS)
        self._regions = 0

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Count the pixels of a batch.

        Args:
            maps: Raw scores ``(B, H, W)``.
            masks: ``(B, H, W)``, abnormal where not zero.
        """
        maps, masks = maps.cpu(), masks.cpu().bool()
        self._auroc.update(maps, masks)
        bins = (squash(maps.float()) * PixelAUROC.BINS).long().clamp(0, PixelAUROC.BINS - 1).numpy()
        for scores, mask in zip(bins, masks.numpy(), strict=True):
            if not mask.any():
                continue
            regions, count = ndimage.label(mask, structure=NEIGHBOURS)
            numbers = regions[mask]
            np.add.at(self._overlap, scores[mask], 1 / np.bincount(numbers)[numbers])
            self._regions += count

    def compute(self) -> dict[str, float]:
        """Give the figures in [0, 1]; nothing while one class of pixels is missing."""
        normal, abnormal = (counts.flip(0).cumsum(0).double().numpy() for counts in self._auroc.counts)
        if not normal[-1] or not abnormal[-1]:
            return {}
        recall = abnormal / abnormal[-1]
        precision = abnormal / np.maximum(normal + abnormal, 1)
        overlap = self._overlap[::-1].cumsum() / self._regions
        return {
            "pixel_AUROC": float(self._auroc.compute()),
            "pixel_AP": float((np.diff(recall, prepend=0) * precision).sum()),
            "pixel_AUPRO": _area_below(normal / normal[-1], overlap, PRO_LIMIT),
            "pixel_Dice": float((2 * abnormal / (normal + abnormal + abnormal[-1])).max()),
        }


def _area_below(rate: NDArray[np.float64], overlap: NDArray[np.float64], limit: float) -> float:
    """Integrate overlap over the false positive rate from 0 to the limit, as a share of what is possible."""
    rate, overlap = np.append(0, rate), np.append(0, overlap)
    end = int(np.searchsorted(rate, limit))  # the first entry at or beyond the limit
    last = np.interp(limit, rate[end - 1 : end + 1], overlap[end - 1 : end + 1])
    rate, overlap = np.append(rate[:end], limit), np.append(overlap[:end], last)
    return float((np.diff(rate) * (overlap[1:] + overlap[:-1]) / 2).sum() / limit)
