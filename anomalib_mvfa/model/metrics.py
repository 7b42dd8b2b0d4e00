# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The figure by which the published protocol chooses its epoch."""

import torch
from anomalib.data import ImageBatch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryAUROC

__all__ = ["PixelAUROC", "SelectionScore", "squash"]


def squash(values: Tensor) -> Tensor:
    """Map any real numbers into (0, 1) and keep their order.

    torchmetrics takes a batch that leaves [0, 1] for logits and applies a sigmoid to that batch alone, which would put
    the scores of different batches into a false order. What was squashed is left alone.

    Args:
        values: Scores of any shape.

    Returns:
        Values of the same shape: one half for zero, ``1 - 1 / (2 + 2 x)`` for positive ``x``.

    Example:
        >>> squash(torch.tensor([-3.0, 0.0, 1.0]))
        tensor([0.1250, 0.5000, 0.7500])
    """
    return 0.5 + 0.5 * values / (1 + values.abs())


class PixelAUROC(Metric):
    """Area under the ROC curve over all pixels, in constant memory.

    Pixels are counted in a million bins of their squashed score; pixels in one bin count as tied.

    Example:
        >>> metric = PixelAUROC()
        >>> metric.update(torch.tensor([[0.1, 0.4], [0.35, 0.8]]), torch.tensor([[0, 0], [1, 1]]))
        >>> metric.compute()
        tensor(0.7500)
    """

    BINS = 2**20
    full_state_update = False

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(2, self.BINS, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Count pixels.

        Args:
            maps: Scores of any shape.
            masks: Truth of the same shape, abnormal where not zero.
        """
        bins = (squash(maps.float()) * self.BINS).long().clamp(0, self.BINS - 1)
        labelled = (bins + self.BINS * masks.bool()).flatten()
        self.counts += torch.bincount(labelled, minlength=2 * self.BINS).view(2, self.BINS)

    def compute(self) -> Tensor:
        """Give the area; not a number while one class is missing."""
        normal, abnormal = self.counts.double()
        below = normal.cumsum(dim=0) - normal / 2  # normal pixels that score lower, ties by half
        area: Tensor = (abnormal * below).sum() / (abnormal.sum() * normal.sum())
        return area.float()


class SelectionScore(Metric):
    """Image AUROC, plus pixel AUROC where there are masks: what the released code keeps its best epoch by."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.image = BinaryAUROC()
        self.pixel = PixelAUROC()

    def update(self, batch: ImageBatch) -> None:
        """Add a batch of predictions.

        Args:
            batch: With ``pred_score`` and ``gt_label`` ``(B,)``, and ``anomaly_map`` and ``gt_mask`` ``(B, H, W)`` for
                sets that have masks.
        """
        if batch.pred_score is None or batch.gt_label is None:
            return
        self.image.update(squash(batch.pred_score.flatten()), batch.gt_label.flatten().int())
        if batch.gt_mask is not None and batch.anomaly_map is not None:
            self.pixel.update(batch.anomaly_map, batch.gt_mask)

    def compute(self) -> Tensor:
        """Give the sum of the areas, from 0 to 2 with masks and from 0 to 1 without.

        Raises:
            ValueError: If the validation part lacks normal or abnormal images.
        """
        # What other processes have seen counts, and all of them must come to the same decisions.
        with self.image.sync_context(), self.pixel.sync_context():
            labels = torch.cat([values.flatten() for values in _list(self.image.target)])
            with_pixels = bool(self.pixel.counts.any())
        if not (bool((labels == 0).any()) and bool((labels == 1).any())):
            msg = (
                "The best epoch cannot be chosen: the validation part has no normal or no abnormal images. Give a "
                "validation part with both, or keep the last epoch with --model.selection last."
            )
            raise ValueError(msg)
        area: Tensor = self.image.compute()
        if with_pixels:
            area = area + self.pixel.compute()
        return area

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.image.reset()
        self.pixel.reset()


def _list(state: list[Tensor] | Tensor) -> list[Tensor]:
    return state if isinstance(state, list) else [state]
