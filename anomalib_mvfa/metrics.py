# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Pixel metrics, exact at any size, and the score by which the published protocol selects its epoch."""

from array import array
from typing import Any, ClassVar

import numpy as np
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUPR, AUROC, Evaluator, F1Score
from lightning.pytorch import LightningModule, Trainer
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.metrics import auc
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryAUROC

from anomalib_mvfa.processes import gather_objects

__all__ = ["MVFAEvaluator", "PixelFigures", "SelectionScore", "squash"]

PRO_LIMIT = 0.3
NEIGHBOURS = np.ones((3, 3), dtype=int)  # regions touch at corners, too, as in anomalib's metric
BLOCK = 2**24  # pixels that are sorted together


def squash(values: Tensor) -> Tensor:
    """Map real numbers into (0, 1) and keep their order: ``x`` to ``(1 + x / (1 + |x|)) / 2``.

    torchmetrics applies a sigmoid to each batch that leaves [0, 1], which would put the scores of different batches
    into a false order.

    Example:
        >>> squash(torch.tensor([-3.0, 0.0, 1.0]))
        tensor([0.1250, 0.5000, 0.7500])
    """
    return 0.5 + 0.5 * values / (1 + values.abs())


class PixelFigures:
    """AUROC, average precision, AUPRO and best Dice over all pixels, exact, four bytes a pixel.

    Curves over pixels change direction only at the scores of abnormal pixels, which are few. Normal pixels are kept in
    blocks, in which those above and at each abnormal score are counted; they are never sorted together, nor sent
    between processes. AUPRO: Bergmann et al., "Uninformed Students" (CVPR 2020), each pixel weighted by one over the
    size of its region.

    Example:
        >>> figures = PixelFigures()
        >>> figures.update(torch.tensor([[[0.1, 0.4], [0.35, 0.8]]]), torch.tensor([[[0, 0], [1, 1]]]))
        >>> figures.compute()["pixel_AUROC"]
        0.75
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Drop all values."""
        self._normal = array("f")  # scores
        self._abnormal = array("f")  # scores
        self._shares = array("f")  # one over the size of the region of each abnormal pixel
        self._regions = 0

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Add the pixels of a batch: scores and truth ``(B, H, W)``, abnormal where not zero.

        Raises:
            ValueError: If a score is not finite.
        """
        scores, truth = maps.detach().float().cpu().numpy(), masks.detach().cpu().bool().numpy()
        if not np.isfinite(scores).all():
            msg = (
                f"{int((~np.isfinite(scores)).sum())} of {scores.size} pixel scores of a batch are not finite numbers: "
                "the training has diverged, or an image holds values that are none."
            )
            raise ValueError(msg)
        self._normal.frombytes(scores[~truth].tobytes())
        self._abnormal.frombytes(scores[truth].tobytes())
        for mask in truth[truth.any(axis=(1, 2))]:
            regions, count = ndimage.label(mask, structure=NEIGHBOURS)
            numbers = regions[mask]
            self._shares.frombytes((1 / np.bincount(numbers)[numbers]).astype(np.float32).tobytes())
            self._regions += count

    def compute(self) -> dict[str, float]:
        """Compute the metrics in [0, 1] over the pixels of all processes, each of which has to call this.

        The result, by name, is empty while one class of pixels is missing.
        """
        own = (np.array(self._abnormal), np.array(self._shares), self._regions)
        abnormal, shares, regions = zip(*gather_objects(own), strict=True)
        scores, ranks, true = np.unique(np.concatenate(abnormal), return_inverse=True, return_counts=True)
        overlap = np.bincount(ranks, np.concatenate(shares), minlength=len(scores))
        numbers, above, at_or_above = zip(*gather_objects(self._normal_above(scores)), strict=True)
        number = sum(numbers)
        if not number or not len(scores):
            return {}
        # From here on thresholds fall.
        above, at_or_above, true = sum(above)[::-1], sum(at_or_above)[::-1], true[::-1]
        recalled = true.cumsum()
        return {
            "pixel_AUROC": float((true * (number - (above + at_or_above) / 2)).sum() / (number * recalled[-1])),
            "pixel_AP": float((true * (recalled / (recalled + at_or_above))).sum() / recalled[-1]),
            "pixel_AUPRO": _overlap_area(above / number, at_or_above / number, overlap[::-1].cumsum() / sum(regions)),
            "pixel_Dice": float((2 * recalled / (recalled + at_or_above + recalled[-1])).max()),
        }

    def _normal_above(self, scores: NDArray[np.float32]) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
        """Count the normal pixels of this process: all, above each score, and at or above it."""
        number, above, at_or_above = 0, np.zeros(len(scores), np.int64), np.zeros(len(scores), np.int64)
        for start in range(0, len(self._normal), BLOCK):
            block = np.asarray(self._normal)[start : start + BLOCK]
            block.sort()  # in place
            number += len(block)
            above += len(block) - np.searchsorted(block, scores, side="right")
            at_or_above += len(block) - np.searchsorted(block, scores, side="left")
        return number, above, at_or_above


def _overlap_area(above: NDArray[np.float64], at_or_above: NDArray[np.float64], overlap: NDArray[np.float64]) -> float:
    """Integrate overlap over the false positive rate up to the limit, as a share of what is possible.

    The rates and the mean overlap with the regions ``(T,)`` are those just above and at each threshold, falling.
    """
    before = np.append(0, overlap[:-1])
    rate = np.concatenate([[0], np.stack([above, at_or_above], axis=1).ravel(), [1]])
    height = np.concatenate([[0], np.stack([before, overlap], axis=1).ravel(), [1]])
    end = int(np.searchsorted(rate, PRO_LIMIT))  # the first point at or beyond the limit
    last = np.interp(PRO_LIMIT, rate[end - 1 : end + 1], height[end - 1 : end + 1])
    rate, height = np.append(rate[:end], PRO_LIMIT), np.append(height[:end], last)
    return float(auc(rate, height) / PRO_LIMIT)


class MVFAEvaluator(Evaluator):
    """anomalib's evaluator with exact pixel metrics of large sets; its own sort all pixels together.

    Args:
        **kwargs: Arguments of anomalib's evaluator. ``test_metrics`` default to AUROC, AUPR and F1 of images and F1 of
            pixels.
    """

    NAMES: ClassVar = {"pixel_AUROC": "pixel_AUROC", "pixel_AP": "pixel_AUPR", "pixel_AUPRO": "pixel_AUPRO"}
    """anomalib's names of the pixel metrics."""

    def __init__(self, **kwargs: Any) -> None:
        if "test_metrics" not in kwargs:
            kwargs["test_metrics"] = [
                AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
                AUPR(fields=["pred_score", "gt_label"], prefix="image_"),
                F1Score(fields=["pred_label", "gt_label"], prefix="image_"),
                F1Score(fields=["pred_mask", "gt_mask"], prefix="pixel_", strict=False),
            ]
        super().__init__(**kwargs)
        self.pixels = PixelFigures()

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop what an interrupted test has left."""
        super().on_test_epoch_start(trainer, pl_module)
        self.pixels.reset()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: ImageBatch, *args: Any, **kwargs: Any
    ) -> None:
        """Add a batch."""
        super().on_test_batch_end(trainer, pl_module, outputs, batch, *args, **kwargs)
        if batch.anomaly_map is not None and batch.gt_mask is not None:
            self.pixels.update(batch.anomaly_map, batch.gt_mask)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute and log all metrics."""
        super().on_test_epoch_end(trainer, pl_module)
        found = self.pixels.compute()
        self.pixels.reset()
        for name, known_as in self.NAMES.items():
            if name in found:
                self.log(known_as, found[name])  # type: ignore[operator]  # Lightning's, of every callback


class SelectionScore(Metric):
    """Image AUROC, plus pixel AUROC where there are masks, by which the released code selects its epoch."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.image = BinaryAUROC()
        self.pixels = PixelFigures()

    def update(self, batch: ImageBatch) -> None:
        """Add ``pred_score`` and ``gt_label`` ``(B,)``; with masks also ``anomaly_map``, ``gt_mask`` ``(B, H, W)``."""
        if batch.pred_score is None or batch.gt_label is None:
            return
        self.image.update(squash(batch.pred_score.flatten()), batch.gt_label.flatten().int())
        if batch.gt_mask is not None and batch.anomaly_map is not None:
            self.pixels.update(batch.anomaly_map, batch.gt_mask)

    def compute(self) -> Tensor:
        """Compute the sum of the areas, from 0 to 2 with masks and from 0 to 1 without.

        Raises:
            ValueError: If the validation part lacks normal or abnormal images.
        """
        # The labels of all processes count, so that all of them decide alike.
        with self.image.sync_context():
            target = self.image.target  # a list, or after the synchronisation one tensor
            labels = torch.cat(target) if isinstance(target, list) else target
        if not (bool((labels == 0).any()) and bool((labels == 1).any())):
            msg = (
                "The best epoch cannot be chosen: the validation part has no normal or no abnormal images. Give a "
                "validation part with both, or keep the last epoch with --model.selection last."
            )
            raise ValueError(msg)
        return self.image.compute() + self.pixels.compute().get("pixel_AUROC", 0.0)

    def reset(self) -> None:
        """Drop all values."""
        super().reset()
        self.image.reset()
        self.pixels.reset()
