# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""PNG, JPEG, BMP, TIFF and WebP, read through Pillow."""

import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from .files import IMAGE_SUFFIXES, ImageRef, Pixels, UnreadableImageError, finite, unreadable
from .intensity import IntensityRule, limits, refuse_dicom_rule, scale

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")


def is_wide(mode: str) -> bool:
    """Return whether a mode of Pillow has more than 8 bits a channel."""
    return mode in {"I", "F"} or mode.startswith("I;")


def raster_pixels(ref: ImageRef) -> Pixels:
    """Return uint8 colours ``(H, W, 3)``, or stored values ``(H, W, 1)`` of an image of more than 8 bits.

    Raises:
        UnreadableImageError: If the file holds no image, or more pixels than Pillow's limit.
        ValueError: If another frame than the first is asked for.
    """
    ref.index(1)
    path = ref.path
    with unreadable(path, "truncated, damaged or of an unsupported pixel format"):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=FORMATS) as image:
                if is_wide(image.mode):
                    return np.array(image)[..., None]
                if image.has_transparency_data:
                    black = Image.new("RGBA", image.size, "black")
                    return np.array(Image.alpha_composite(black, image.convert("RGBA")).convert("RGB"))
                return np.array(image.convert("RGB"))
        except UnidentifiedImageError:
            reason = f"not an image of a supported format ({', '.join(IMAGE_SUFFIXES)})"
            raise UnreadableImageError(path, reason) from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            reason = f"more pixels than PIL.Image.MAX_IMAGE_PIXELS ({Image.MAX_IMAGE_PIXELS}) allows"
            raise UnreadableImageError(path, reason) from None


def raster_image(ref: ImageRef, rule: IntensityRule) -> Pixels:
    """Return 8-bit colours, or grey levels in [0, 1] of an image of more bits."""
    refuse_dicom_rule(rule, ref.path)
    pixels = raster_pixels(ref)
    if pixels.dtype == np.uint8 and rule.kind in {"auto", "window"}:
        return pixels  # read_image divides it by 255
    values = finite(pixels.astype(np.float64), ref.path)
    return scale(values, *limits(values, rule))
