# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""What happens to images before and to scores after the model."""

from typing import Any

import torch
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, Resize
from torchvision.transforms.v2 import functional as image_functional
from torchvision.tv_tensors import Mask

__all__ = ["EightBitResize", "MVFAPostProcessor", "MVFAPreProcessor"]


class EightBitResize(Resize):  # type: ignore[misc]  # torchvision has no types
    """Bicubic resize through eight bits, value for value what the released code reads from its files.

    CLIP was trained on images that Pillow had resized in eight bits; torch's own antialiased resize differs from it by
    up to 14 of 255 grey levels beside sharp edges. Masks are resized to the nearest pixel centre, as Pillow does. An
    exported graph resizes in floating point instead (anomalib switches ``antialias`` off for export).

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


class MVFAPreProcessor(PreProcessor):
    """Resizes images and masks to the size that the model reads.

    Nothing else is done here: CLIP's mean and standard deviation, where wanted, are part of the model.

    Args:
        image_size: Height and width in pixels.
    """

    def __init__(self, image_size: tuple[int, int]) -> None:
        super().__init__(transform=EightBitResize(image_size))
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


class MVFAPostProcessor(PostProcessor):
    """anomalib's thresholds and normalisation, with soft ends instead of clipping.

    anomalib clips normalised scores to [0, 1], so that all scores beyond those of the validation set become equal, and
    computes its metrics after that. Here the outermost two hundredths on either side bend asymptotically: scores stay
    in [0, 1], the threshold stays at one half, and no two different scores become equal, so that AUROC and AUPR are
    those of the raw scores.
    """

    BEND = 0.02

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
        return torch.where(calibrated, bent + 0.5, preds)
