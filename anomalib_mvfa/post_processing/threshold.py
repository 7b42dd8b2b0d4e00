# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Thresholds above which an image or a pixel is called abnormal.

Two rules: ``"f1"`` (anomalib's: largest F1) needs normal and abnormal validation images; ``"fpr"`` needs normal images
alone and bounds the false-positive rate.
"""

import math
from typing import Any

import torch
from anomalib.metrics import F1AdaptiveThreshold
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from anomalib_mvfa.processes import gather_objects

__all__ = ["THRESHOLDS", "ScoreThreshold", "false_positive_threshold"]

THRESHOLDS = ("f1", "fpr")
SAMPLE_LIMIT = 2**20
"""Scores kept for a threshold. A rate of 1 % among a million pixels is known to a hundredth of its value."""


def false_positive_threshold(normal: Tensor, target_fpr: float) -> Tensor:
    """Compute the least threshold that a new normal score exceeds with at most a given probability.

    A new score is equally likely to take any rank among the n known ones, so it exceeds the k-th smallest with
    probability (n + 1 - k) / (n + 1), or less if there are ties (split conformal prediction, Vovk et al. 2005). The
    smallest rate that n scores can promise is therefore 1 / (n + 1); for less than that the largest score is returned.

    Args:
        normal: ``(N,)`` scores of normal images or pixels, at least one.
        target_fpr: The probability, in (0, 1).

    Returns:
        One of the scores; what is *larger* is called abnormal.

    Example:
        >>> false_positive_threshold(torch.arange(1.0, 20.0), target_fpr=0.1)  # 19 scores, 2 / 20 are above the 18th
        tensor(18.)
    """
    count = len(normal)
    above = math.floor((count + 1) * target_fpr + 1e-9)  # 0.1 * 30 is a little less than 3
    rank = min(max(count + 1 - above, 1), count)
    return torch.kthvalue(normal, rank).values


class ScoreThreshold(F1AdaptiveThreshold):
    """Threshold by one of the rules, from a bounded number of scores.

    Where a class is missing ``"fpr"`` takes the place of ``"f1"``. Beyond ``limit`` scores a random sample of
    them is kept, the same in every run, so that memory does not grow with the number of pixels.

    Args:
        rule: ``"f1"`` or ``"fpr"``.
        target_fpr: Probability with which a new normal score may exceed the threshold of ``"fpr"``.
        limit: Number of scores that are kept.

    Attributes:
        normal: ``(N,)`` scores of the normal class that the last threshold was computed with.
        fell_back: Whether it came from ``"fpr"`` because a class was missing.

    Example:
        >>> threshold = ScoreThreshold("fpr", target_fpr=0.2)
        >>> threshold.update(torch.arange(1.0, 10.0), torch.zeros(9))
        >>> threshold.compute()
        tensor(8.)
    """

    default_fields = ("pred_score", "gt_label")

    def __init__(self, rule: str, target_fpr: float, limit: int = SAMPLE_LIMIT, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rule = rule
        self.target_fpr = target_fpr
        self.limit = limit
        self.normal = torch.empty(0)
        self.fell_back = False
        self.add_state("keys", default=[], dist_reduce_fx="cat")
        self.keys: list[Tensor]

    def update(self, scores: Tensor, labels: Tensor) -> None:  # type: ignore[override]  # no batch: pixels may be chosen
        """Add scores.

        Args:
            scores: Of any shape.
            labels: Of the same shape, 1 for abnormal.

        Raises:
            ValueError: If a score is not finite.
        """
        scores = scores.detach().flatten().float()
        if not bool(scores.isfinite().all()):
            msg = (
                "The scores of the model are not finite, so no threshold can be set: training has diverged. "
                "Lower --model.learning_rate, or train with --trainer.precision 32 or bf16-mixed."
            )
            raise ValueError(msg)
        keys = torch.rand(len(scores), generator=torch.Generator().manual_seed(self._update_count))
        self.preds.append(scores)
        self.target.append(labels.detach().flatten().int())
        self.keys.append(keys.to(scores.device))
        if sum(map(len, self.preds)) > 2 * self.limit:
            self._sample()

    def _sample(self) -> tuple[Tensor, Tensor]:
        """Return scores and labels, and keep only those with the smallest keys."""
        scores, labels, keys = (dim_zero_cat(state) for state in (self.preds, self.target, self.keys))
        if len(keys) > self.limit:
            kept = keys.topk(self.limit, largest=False).indices
            scores, labels, keys = scores[kept], labels[kept], keys[kept]
        self.preds, self.target, self.keys = [scores], [labels], [keys]
        return scores, labels

    @property
    def has_normal(self) -> bool:
        """Whether any process has a normal score."""
        seen = any(bool((labels == 0).any()) for labels in self.target)
        return any(gather_objects(seen))

    def compute(self) -> Tensor:  # type: ignore[override]  # as anomalib's own
        """Apply the rule.

        Returns:
            The threshold; NaN without a normal score.
        """
        scores, labels = self._sample()
        self.normal = scores[labels == 0]
        self.fell_back = self.rule != "fpr" and not 0 < len(self.normal) < len(scores)
        if not len(self.normal):
            return torch.full((), float("nan"), device=scores.device)
        if self.rule == "fpr" or self.fell_back:
            return false_positive_threshold(self.normal, self.target_fpr)
        return super().compute()
