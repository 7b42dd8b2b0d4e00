# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Thresholds above which an image or a pixel is called abnormal, and normalisation that keeps the order of scores.

Two rules set thresholds: ``"f1"`` (anomalib's: largest F1) needs normal and abnormal validation images; ``"fpr"`` needs
normal images alone and bounds the false-positive rate.
"""

import logging
import math
from typing import Any

import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.metrics import F1AdaptiveThreshold
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from anomalib_mvfa.metrics import squash
from anomalib_mvfa.model.fusion import Float32Buffers
from anomalib_mvfa.processes import gather_objects, is_first

__all__ = ["THRESHOLDS", "MVFAPostProcessor", "ScoreThreshold", "false_positive_threshold"]

logger = logging.getLogger(__name__)

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

    Example:
        >>> threshold = ScoreThreshold("fpr", target_fpr=0.2)
        >>> threshold.update(torch.arange(1.0, 10.0), torch.zeros(9))
        >>> threshold.compute()
        tensor(8.)
    """

    default_fields = ("pred_score", "gt_label")

    def __init__(self, rule: str, target_fpr: float, limit: int = SAMPLE_LIMIT, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rule, self.target_fpr, self.limit = rule, target_fpr, limit
        self.normal = torch.empty(0)  # scores ``(N,)`` that the last threshold was computed with
        self.fell_back = False  # whether that threshold came from ``"fpr"`` because a class was missing
        self.add_state("keys", default=[], dist_reduce_fx="cat")
        self.keys: list[Tensor]

    def update(self, scores: Tensor, labels: Tensor) -> None:  # type: ignore[override]  # no batch: pixels may be chosen
        """Add scores and labels (1 for abnormal) of any one shape.

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
        """Return the threshold; NaN without a normal score."""
        scores, labels = self._sample()
        self.normal = scores[labels == 0]
        self.fell_back = self.rule != "fpr" and not 0 < len(self.normal) < len(scores)
        if not len(self.normal):
            return torch.full((), float("nan"), device=scores.device)
        if self.rule == "fpr" or self.fell_back:
            return false_positive_threshold(self.normal, self.target_fpr)
        return super().compute()


class MVFAPostProcessor(Float32Buffers, PostProcessor):
    """anomalib's normalisation with soft ends, and a choice of thresholds.

    anomalib clips normalised scores to [0, 1], so that all scores beyond those of the validation set become equal, and
    computes its metrics after that. Here the outermost two hundredths on either side bend asymptotically: scores stay
    in [0, 1], the threshold stays at one half, and no two different scores become equal, so that AUROC and AUPR are
    those of the raw scores. Without anything to take a range from, scores are squashed into (0, 1) in their order.

    Thresholds come from the validation part. Where it holds no normal image, the supports (see :meth:`set_support`)
    take the place of its normal images; where a rule lacks abnormal images, ``"fpr"`` takes its place.

    Args:
        threshold: ``"f1"`` or ``"fpr"``. Defaults to ``"f1"``.
        target_fpr: For ``"fpr"``: share of new normal images, and of their pixels, that is expected above the
            threshold. Defaults to ``0.01``.
        **kwargs: Arguments of anomalib's post-processor.

    Raises:
        ValueError: If the rule is unknown or the rate is not in (0, 1).
    """

    BEND = 0.02

    _image_threshold_metric: ScoreThreshold
    _pixel_threshold_metric: ScoreThreshold

    def __init__(self, threshold: str = "f1", target_fpr: float = 0.01, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._support: tuple[InferenceBatch, Tensor] | None = None
        self._explained: set[str] = set()
        self.set_rule(threshold, target_fpr)

    def set_rule(self, threshold: str, target_fpr: float) -> None:
        """Choose the rule by which the next validation sets the thresholds; the arguments are the constructor's."""
        if threshold not in THRESHOLDS:
            msg = f"threshold must be one of {', '.join(THRESHOLDS)}, got '{threshold}'."
            raise ValueError(msg)
        if not 0 < target_fpr < 1:
            msg = f"target_fpr is a share between 0 and 1, such as 0.01; got {target_fpr}."
            raise ValueError(msg)
        self.threshold, self.target_fpr = threshold, target_fpr
        self._image_threshold_metric = ScoreThreshold(threshold, target_fpr)
        self._pixel_threshold_metric = ScoreThreshold(threshold, target_fpr)

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "threshold", "target_fpr")

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore the options of a checkpoint."""
        super().load_checkpoint_config(config)
        self.set_rule(self.threshold, self.target_fpr)

    def reset(self) -> None:
        """Drop thresholds and ranges, as a new training has none."""
        for value in self.buffers():
            value.fill_(torch.nan)
        self._explained.clear()

    def set_support(self, predictions: InferenceBatch, labels: Tensor) -> None:
        """Provide predictions of K supports, for use where the validation part has no normal images.

        Normal ones must have been compared with the bank of the others. Abnormal ones, whose ``labels`` ``(K,)`` are
        true, serve the range of the normalisation only.
        """
        self._support = predictions, labels

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop what an interrupted validation has left."""
        self._support = None
        for name in ("image_threshold", "pixel_threshold", "image_min_max", "pixel_min_max"):
            getattr(self, f"_{name}_metric").reset()

    def on_validation_batch_end(  # type: ignore[override]  # as anomalib's own
        self, trainer: Trainer, pl_module: LightningModule, outputs: ImageBatch, *args: Any, **kwargs: Any
    ) -> None:
        """Add the predictions of a batch."""
        self._observe_range(outputs)
        if outputs.gt_label is not None:
            self._observe_scores(outputs.pred_score, outputs.anomaly_map, outputs.gt_label.bool(), outputs.gt_mask)

    def _observe_range(self, predictions: ImageBatch | InferenceBatch) -> None:
        if self.enable_normalization:
            self._image_min_max_metric.update(predictions)  # type: ignore[arg-type]
            self._pixel_min_max_metric.update(predictions)  # type: ignore[arg-type]

    def _observe_scores(self, scores: Tensor | None, maps: Tensor | None, labels: Tensor, masks: Tensor | None) -> None:
        if not self.enable_thresholding:
            return
        if scores is not None:
            self._image_threshold_metric.update(scores, labels)
        if maps is not None:
            if masks is None or self.threshold == "fpr":  # then only the pixels of normal images count
                maps = maps[~labels]
                masks = torch.zeros_like(maps)
            self._pixel_threshold_metric.update(maps, masks)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set thresholds and range; MVFA also calls this at the end of a training without validation.

        Raises:
            ValueError: If the rule is ``"fpr"`` and there was no normal image.
        """
        metric = self._image_threshold_metric
        from_support = self._support is not None and not metric.has_normal
        if self._support is not None and from_support:
            predictions, labels = self._support
            self._observe_range(predictions)
            normal = ~labels & is_first()  # every process has all supports: those of one count
            scores, maps = (
                None if values is None else values[normal]
                for values in (predictions.pred_score, predictions.anomaly_map)
            )
            self._observe_scores(scores, maps, labels[normal], None)
        self._support = None
        observed = metric.update_called
        super().on_validation_epoch_end(trainer, pl_module)  # computes, stores and resets
        if not self.enable_thresholding:
            return
        if observed:
            self._explain(metric, from_support=from_support)
        if not self._image_threshold.isnan():
            return
        if self.threshold == "fpr":
            msg = (
                "threshold='fpr' is set by normal images, but there are none: neither in the validation part nor, as "
                "supports of the memory, in the training part. Add normal validation images, or take another threshold."
            )
            raise ValueError(msg)
        self._warn_once("There is no normal image to set a threshold with: predictions have scores but no labels.")

    def _explain(self, metric: ScoreThreshold, *, from_support: bool) -> None:
        """Warn where the image threshold rests on other images than asked for, or on too few."""
        count = len(metric.normal)
        if not count:
            return
        if from_support:
            self._warn_once(
                f"No normal validation images: the {count} normal supports, each compared with the others, take their "
                "place. The model was trained on them, so that on new images more may be called abnormal."
            )
        if metric.fell_back:
            self._warn_once(
                f"No abnormal validation images, which threshold='{self.threshold}' needs: in its place the threshold "
                f"is set to a false-positive rate of {self.target_fpr:g} on normal images (threshold='fpr')."
            )
        elif self._pixel_threshold_metric.fell_back:
            self._warn_once(
                f"No masks of abnormal validation images: {self.target_fpr:g} of the pixels of normal images are above "
                "the threshold of the maps."
            )
        if (metric.fell_back or self.threshold == "fpr") and self.target_fpr < 1 / (count + 1):
            self._warn_once(
                f"target_fpr={self.target_fpr:g} is less than {count} normal image(s) can show, which is about "
                f"1 / {count + 1} = {1 / (count + 1):.2g}. The threshold is the largest of their scores."
            )

    def _warn_once(self, message: str) -> None:
        if message not in self._explained:
            logger.warning(message)
            self._explained.add(message)

    @classmethod
    def _normalize(cls, preds: Tensor | None, norm_min: Tensor, norm_max: Tensor, threshold: Tensor) -> Tensor | None:
        if preds is None:
            return None
        middle = torch.where(torch.isnan(threshold), (norm_max + norm_min) / 2, threshold)
        span = torch.where(norm_max > norm_min, norm_max - norm_min, torch.ones_like(norm_max))
        centred = (preds - middle) / span
        linear = 0.5 - cls.BEND
        excess = (centred.abs() - linear).clamp(min=0) / cls.BEND
        bent = centred.clamp(-linear, linear) + centred.sign() * cls.BEND * excess / (1 + excess)
        calibrated = ~torch.isnan(norm_min) & ~torch.isnan(norm_max)
        return torch.where(calibrated, bent + 0.5, squash(preds))
