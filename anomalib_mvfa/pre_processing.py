# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The resize of images to the size that the model reads."""

import logging
from typing import Any

import torch
from anomalib.pre_processing import PreProcessor
from PIL import Image
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torchvision.transforms.v2 import InterpolationMode, Resize
from torchvision.transforms.v2 import functional as image_functional
from torchvision.tv_tensors import Mask

__all__ = ["EightBitResize", "ExportableResize", "MVFAPreProcessor", "check_intensity"]

logger = logging.getLogger(__name__)


class EightBitResize(Resize):  # type: ignore[misc]  # torchvision has no types
    """Bicubic resize through eight bits, with the same values as in the released code.

    CLIP was trained on images that Pillow had resized in eight bits; torch's own antialiased resize differs from it by
    up to 14 of 255 grey levels beside sharp edges. Masks are resized to the nearest pixel centre, as Pillow does. In an
    exported graph :class:`ExportableResize` takes its place.

    ``size`` is height and width in pixels.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__(size, interpolation=InterpolationMode.BICUBIC, antialias=True)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
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
        height, width = self.size
        resized = image_functional.to_pil_image(levels).resize((width, height), Image.Resampling.BICUBIC)
        result: Tensor = image_functional.pil_to_tensor(resized).to(image.dtype) / 255
        return result


class ExportableResize(nn.Module):
    """:class:`EightBitResize` in operations of ONNX and OpenVINO, for height and width that are known at run time only.

    Pillow resizes the rows, rounds to eight bits, then does the same with the columns; here each is a product with a
    matrix of weights. The results agree to one grey level in 255. Images of the right size pass unchanged.

    ``size`` is height and width in pixels.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Resize images ``(B, 3, H, W)`` in [0, 1], unless they have the size."""
        sizes = list(zip(images.shape[-2:], self.size, strict=True))
        if all(statically_known_true(old == new) for old, new in sizes):
            return images
        # A graph with dynamic sizes cannot branch: weights of equal sizes are the identity, and nothing is rounded.
        equal = torch.stack([torch.scalar_tensor(old, dtype=torch.int64) == new for old, new in sizes]).all()
        equal = equal.to(images.device)

        def eight_bits(levels: Tensor) -> Tensor:
            return torch.where(equal, levels, (levels.clamp(0, 1) * 255).round() / 255)

        rows, columns = (_bicubic_weights(old, new).to(images) for old, new in sizes)
        return eight_bits(rows @ eight_bits(eight_bits(images) @ columns.T))


def _bicubic_weights(old: int, new: int) -> Tensor:
    """Compute the weights ``(new, old)`` of Pillow's antialiased bicubic resize of a row (Keys 1981, a = -0.5)."""
    # Twice the pixel centres in units of 1 / (old * new): integers, which stay exact where floats have sixteen bits.
    source, target = (2 * torch.arange(old) + 1) * new, (2 * torch.arange(new)[:, None] + 1) * old
    longer: Any = torch.sym_max(old, new)
    distance = (source - target).abs().clamp(max=4 * longer) / (2 * longer)  # in [0, 2], the width of the kernel
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, far)
    return weights / weights.sum(dim=1, keepdim=True)


class MVFAPreProcessor(PreProcessor):
    """Resizes images and masks to the size that the model reads.

    Nothing else is done here: the backbone's mean and standard deviation, where wanted, are part of the model.
    """

    def __init__(self, image_size: tuple[int, int]) -> None:
        super().__init__(transform=EightBitResize(image_size))
        self.export_transform = ExportableResize(image_size)  # anomalib's would resize without antialiasing
        self.image_size = image_size

    def checkpoint_config(self) -> dict[str, Any]:
        """Return the image size."""
        return {"image_size": list(self.image_size)}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore what :meth:`checkpoint_config` returned.

        The transform stays the same object: datasets that were set up before the checkpoint was read hold it, too, and
        would otherwise resize to the size that this model was built with first.
        """
        height, width = config["image_size"]
        self.image_size = (height, width)
        for resize in (self.transform, self.export_transform):
            if isinstance(resize, EightBitResize | ExportableResize):
                resize.size = self.image_size


def check_intensity(trained: str | None, given: str | None) -> None:
    """Raise a ValueError for images that are read by another intensity rule than those of the training.

    ``None`` is no rule, of images that show grey levels already.
    """
    if given is None and trained not in {None, "auto"}:
        logger.warning(
            "The model was trained on images read with the intensity rule '%s', which these images were not: they must "
            "show the same grey levels already. --data MedicalFolder applies the rule.",
            trained,
        )
    elif given is not None and trained not in {None, given}:
        msg = (
            f"The model was trained on images read with the intensity rule '{trained}', but these are read with "
            f"'{given}'. Set the datamodule's intensity to '{trained}' (for prediction it may be left out), or train "
            "with the other rule."
        )
        raise ValueError(msg)
