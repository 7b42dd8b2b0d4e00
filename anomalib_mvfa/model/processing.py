# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""What happens to images before and to scores after the model."""

import logging
from typing import Any

import numpy as np
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.models.components import DynamicBufferMixin
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode, Resize
from torchvision.transforms.v2 import functional as image_functional
from torchvision.tv_tensors import Mask

from .metrics import squash
from .processes import is_first
from .thresholds import THRESHOLDS, ScoreThreshold

__all__ = ["EightBitResize", "ExportableResize", "MVFAPostProcessor", "MVFAPreProcessor"]

logger = logging.getLogger(__name__)

MAX_NORMAL_SCORES = 1000


class EightBitResize(Resize):  # type: ignore[misc]  # torchvision has no types
    """Bicubic resize through eight bits, value for value what the released code reads from its files.

    CLIP was trained on images that Pillow had resized in eight bits; torch's own antialiased resize differs from it by
    up to 14 of 255 grey levels beside sharp edges. Masks are resized to the nearest pixel centre, as Pillow does. In an
    exported graph :class:`ExportableResize` takes its place.

    Args:
        size: Height and width in pixels.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__(size, interpolation=InterpolationMode.BICUBIC, antialias=True)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:  # noqa: ANN401 - torchvision's signature
        """Resize an image ``(..., 3, H, W)`` in [0, 1] or a mask ``(..., H, W)``, unless it has the size."""
        if not isinstance(inpt, Tensor) or list(inpt.shape[-2:]) == list(self.size):
            return inpt
        if isinstance(inpt, Mask):
            mask = inpt.unsqueeze(-3)
            resized = image_functional.resize(mask.as_subclass(Tensor), self.size, InterpolationMode.NEAREST_EXACT)
            return Mask(resized.squeeze(-3))
        if not self.antialias or not inpt.is_floating_point():
            return super().transform(inpt, params)
        images = [self._resize_image(image) for image in inpt.reshape(-1, *inpt.shape[-3:])]
        return torch.stack(images).reshape(*inpt.shape[:-2], *self.size).to(inpt.device)

    def _resize_image(self, image: Tensor) -> Tensor:
        levels = (image.detach().clamp(0, 1) * 255).round().to("cpu", torch.uint8).as_subclass(Tensor)
        picture = image_functional.to_pil_image(levels)
        height, width = self.size
        resized = picture.resize((width, height), resample=3)  # Pillow's bicubic
        result: Tensor = image_functional.pil_to_tensor(resized).to(image.dtype) / 255
        return result


class ExportableResize(nn.Module):
    """:class:`EightBitResize` in operations that ONNX and OpenVINO have, to one grey level in 255.

    Pillow resizes the rows, rounds to eight bits, then does the same with the columns; here each is a product with a
    matrix of weights.

    Args:
        size: Height and width in pixels.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Resize images ``(B, 3, H, W)`` in [0, 1], unless they have the size."""
        height, width = images.shape[-2:]
        if (height, width) == tuple(self.size):
            return images
        rows, columns = (
            torch.tensor(_bicubic_weights(old, new), dtype=images.dtype, device=images.device)
            for old, new in ((height, self.size[0]), (width, self.size[1]))
        )
        levels = (images.clamp(0, 1) * 255).round()
        levels = (levels @ columns.T).round().clamp(0, 255)
        levels = (rows @ levels).round().clamp(0, 255)
        return levels / 255


def _bicubic_weights(old: int, new: int) -> list[list[float]]:
    """Give the weights ``(new, old)`` of Pillow's antialiased bicubic resize of a row (Keys 1981, a = -0.5)."""
    scale = old / new
    stretch = max(scale, 1.0)
    offset = (np.arange(old) + 0.5 - (np.arange(new)[:, None] + 0.5) * scale) / stretch
    distance = np.abs(offset)
    weights = np.where(
        distance < 1,
        (1.5 * distance - 2.5) * distance**2 + 1,
        np.where(distance < 2, ((-0.5 * distance + 2.5) * distance - 4) * distance + 2, 0.0),
    )
    normalised: list[list[float]] = (weights / weights.sum(axis=1, keepdims=True)).tolist()
    return normalised


class MVFAPreProcessor(PreProcessor):
    """Resizes images and masks to the size that the model reads.

    Nothing else is done here: CLIP's mean and standard deviation, where wanted, are part of the model.

    Args:
        image_size: Height and width in pixels.
    """

    def __init__(self, image_size: tuple[int, int]) -> None:
        super().__init__(transform=EightBitResize(image_size))
        self.export_transform = ExportableResize(image_size)  # anomalib's would resize without antialiasing
        self.image_size = image_size

    def checkpoint_config(self) -> dict[str, Any]:
        """Give the image size, which is all there is to restore."""
        return {"image_size": list(self.image_size)}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore what :meth:`checkpoint_config` gave.

        The transform stays the same object: datasets that were set up before the checkpoint was read hold it, too, and
        would otherwise resize to the size that this model was built with first.
        """
        resize = self.transform
        height, width = config["image_size"]
        MVFAPreProcessor.__init__(self, (height, width))
        if isinstance(resize, EightBitResize):
            resize.size = [height, width]
            self.transform = resize


class MVFAPostProcessor(DynamicBufferMixin, PostProcessor):
    """anomalib's normalisation with soft ends, and a choice of thresholds.

    anomalib clips normalised scores to [0, 1], so that all scores beyond those of the validation set become equal, and
    computes its metrics after that. Here the outermost two hundredths on either side bend asymptotically: scores stay
    in [0, 1], the threshold stays at one half, and no two different scores become equal, so that AUROC and AUPR are
    those of the raw scores. Without anything to take a range from, scores are squashed into (0, 1) in their order.

    Thresholds come from the validation part. Where it holds no normal image, the supports (see :meth:`set_support`)
    take the place of its normal images; where a rule lacks abnormal images, ``"fpr"`` takes its place.

    Args:
        threshold: ``"f1"`` (anomalib's), ``"youden"``, or ``"fpr"``: normal images alone are used, and the share
            ``target_fpr`` of new ones (of their pixels) is expected above the threshold. Defaults to ``"f1"``.
        target_fpr: Share of normal images, and of their pixels, that may be called abnormal. Defaults to ``0.01``.
        **kwargs: Arguments of anomalib's post-processor.

    Attributes:
        normal_scores: Sorted raw scores of the normal images that the threshold was set with, at most 1000 quantiles.

    Raises:
        ValueError: If the rule is unknown or the rate is not in (0, 1).
    """

    BEND = 0.02

    normal_scores: Tensor
    _image_threshold_metric: ScoreThreshold
    _pixel_threshold_metric: ScoreThreshold

    def __init__(self, threshold: str = "f1", target_fpr: float = 0.01, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self._support: tuple[InferenceBatch, Tensor] | None = None
        self._told: set[str] = set()
        self.register_buffer("normal_scores", torch.empty(0))
        self._set_rule(threshold, target_fpr)

    def _set_rule(self, threshold: str, target_fpr: float) -> None:
        if threshold not in THRESHOLDS:
            msg = f"threshold must be one of {', '.join(THRESHOLDS)}, got '{threshold}'."
            raise ValueError(msg)
        if not 0 < target_fpr < 1:
            msg = f"target_fpr is a share between 0 and 1, such as 0.01; got {target_fpr}."
            raise ValueError(msg)
        self.threshold = threshold
        self.target_fpr = target_fpr
        self._image_threshold_metric = ScoreThreshold(threshold, target_fpr)
        self._pixel_threshold_metric = ScoreThreshold(threshold, target_fpr)

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "threshold", "target_fpr")

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore the options of a checkpoint, the rule of the threshold among them."""
        super().load_checkpoint_config(config)
        self._set_rule(self.threshold, self.target_fpr)

    def set_support(self, predictions: InferenceBatch, labels: Tensor) -> None:
        """Give what is predicted of the supports, for use where the validation part has no normal images.

        Args:
            predictions: Maps ``(K, H, W)`` and scores ``(K,)``; normal supports compared with the bank of the others.
            labels: ``(K,)``, true for abnormal supports. They serve the range of the normalisation only.
        """
        self._support = predictions, labels

    def on_validation_batch_end(  # type: ignore[override]  # as anomalib's own
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: ImageBatch,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Take in the predictions of a batch."""
        del trainer, pl_module, args, kwargs
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
        """Set thresholds, range and normal reference.

        MVFA also calls this at the end of a training without validation.

        Raises:
            ValueError: If the rule is ``"fpr"`` and there was no normal image.
        """
        metric = self._image_threshold_metric
        from_support = self._support is not None and not metric.has_normal
        if self._support is not None and from_support:
            predictions, labels = self._support
            self._observe_range(predictions)
            normal = ~labels
            if not is_first():  # every process has all supports: one of them counts
                normal = torch.zeros_like(normal)
            maps = None if predictions.anomaly_map is None else predictions.anomaly_map[normal]
            scores = None if predictions.pred_score is None else predictions.pred_score[normal]
            self._observe_scores(scores, maps, labels[normal], None)
        self._support = None
        observed = metric.update_called
        super().on_validation_epoch_end(trainer, pl_module)  # computes, stores and resets
        if not self.enable_thresholding:
            return
        if observed:
            self._keep_normal_scores(metric.normal)
            self._explain(metric, from_support=from_support)
        if not self._image_threshold.isnan():
            return
        if self.threshold == "fpr":
            msg = (
                "threshold='fpr' is set by normal images, but there are none: neither in the validation part nor, as "
                "supports of the memory, in the training part. Add normal validation images, or take another threshold."
            )
            raise ValueError(msg)
        self._tell("There is no normal image to set a threshold with: predictions have scores but no labels.")

    def _keep_normal_scores(self, scores: Tensor) -> None:
        scores = scores.sort().values
        if len(scores) > MAX_NORMAL_SCORES:
            positions = torch.linspace(0, len(scores) - 1, MAX_NORMAL_SCORES, dtype=torch.float64)
            scores = scores[positions.round().long().to(scores.device)]
        self.normal_scores = scores.to(self.image_min.device)

    def _explain(self, metric: ScoreThreshold, *, from_support: bool) -> None:
        """Say what the image threshold rests on, and what it cannot promise."""
        count = len(metric.normal)
        if not count:
            return
        if from_support:
            self._tell(
                f"No normal validation images: the {count} normal supports, each compared with the others, take their "
                "place. The model was trained on them, so that on new images more may be called abnormal.",
            )
        if metric.fell_back:
            self._tell(
                f"No abnormal validation images, which threshold='{self.threshold}' needs: in its place the threshold "
                f"is set to a false-positive rate of {self.target_fpr:g} on normal images (threshold='fpr').",
            )
        elif self._pixel_threshold_metric.fell_back:
            self._tell(
                f"No masks of abnormal validation images: {self.target_fpr:g} of the pixels of normal images are above "
                "the threshold of the maps.",
            )
        if (metric.fell_back or self.threshold == "fpr") and self.target_fpr < 1 / (count + 1):
            self._tell(
                f"target_fpr={self.target_fpr:g} is less than {count} normal image(s) can show, which is about "
                f"1 / {count + 1} = {1 / (count + 1):.2g}. The threshold is the largest of their scores.",
            )

    def _tell(self, message: str) -> None:
        """Warn once, not after each of many validations."""
        if message not in self._told:
            logger.warning(message)
            self._told.add(message)

    def normal_percentile(self, scores: Tensor) -> Tensor | None:
        """Give the share of normal reference images that score lower.

        Args:
            scores: ``(B,)`` scores as this post-processor gives them.

        Returns:
            ``(B,)`` in [0, 1]; ``None`` if there is no reference.
        """
        if not len(self.normal_scores):
            return None
        reference = self.normal_scores
        if self.enable_normalization:
            limits = (self.image_min, self.image_max, self.image_threshold)
            reference = self._normalize(reference, *limits)  # type: ignore[assignment]  # None for None only
        return torch.searchsorted(reference, scores.contiguous()) / len(reference)

    @classmethod
    def _normalize(
        cls,
        preds: Tensor | None,
        norm_min: Tensor,
        norm_max: Tensor,
        threshold: Tensor,
    ) -> Tensor | None:
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
