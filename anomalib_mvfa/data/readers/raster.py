# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""PNG, JPEG, BMP, TIFF and WebP, read through Pillow."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from .files import IMAGE_SUFFIXES, ImageRef, Pixels, UnreadableImageError, finite, unreadable
from .intensity import IntensityRule, limits, refuse_dicom_rule, scale

BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
UNSIGNED, SIGNED = 1, 2  # values of SAMPLE_FORMAT
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")


def is_wide(mode: str) -> bool:
    """Return whether a mode of Pillow has more than 8 bits a channel."""
    return mode in {"I", "F"} or mode.startswith("I;")


def raster_pixels(ref: ImageRef, *, exact: bool = False) -> Pixels:
    """Return uint8 colours ``(H, W, 3)``, or stored values ``(H, W, 1)`` of a grey image of more than 8 bits.

    Of colours of 16 bits, which Pillow does not read, these are the upper 8, unless ``exact`` refuses them.
    """
    ref.index(1)
    path = ref.path
    with unreadable(path, "truncated, damaged or of an unsupported pixel format"):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=FORMATS) as image:
                _refuse_cut_bits(image, path, exact=exact)
                if is_wide(image.mode):
                    return _wide_pixels(image)[..., None]
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


def _refuse_cut_bits(image: Image.Image, path: Path, *, exact: bool) -> None:
    """Refuse what Pillow would read with other values than the file has, and stacks, of which it would read a page."""
    raw = " ".join(str(tile[3]) for tile in getattr(image, "tile", ()))
    if ";16" in raw and not is_wide(image.mode) and (exact or "LA;16" in raw):
        raise UnreadableImageError(path, "holds colours or transparency of 16 bits; save it as grey or with 8 bits")
    if not is_wide(image.mode) and _tag(image, SAMPLE_FORMAT, UNSIGNED) == SIGNED:
        raise UnreadableImageError(path, "holds signed numbers of 8 bits; save it with 16 bits")
    size, pages = image.size, getattr(image, "n_frames", 1)
    if pages > 1 and image.format == "TIFF":  # pages of other sizes are previews
        image.seek(1)
        if image.size == size:
            raise UnreadableImageError(
                path, f"holds {pages} pages of one size; save each as a file, or all as a volume"
            )
        image.seek(0)


def _wide_pixels(image: Image.Image) -> Pixels:
    """Return stored values ``(H, W)``, larger ones brighter; TIFF files may say that 0 is white or have no sign."""
    pixels = np.array(image)
    if pixels.dtype == np.int32 and _tag(image, SAMPLE_FORMAT, UNSIGNED) == UNSIGNED and _tag(image, BITS, 0) == 32:
        pixels = pixels.view(np.uint32)
    return np.invert(pixels) if _tag(image, PHOTOMETRIC, 1) == 0 and pixels.dtype.kind in "ui" else pixels


def _tag(image: Image.Image, tag: int, default: int) -> int:
    """Return the first value of a TIFF tag; the default for other files and absent tags."""
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)


def raster_image(ref: ImageRef, rule: IntensityRule) -> Pixels:
    """Return 8-bit colours, or grey levels in [0, 1] of an image of more bits."""
    refuse_dicom_rule(rule, ref.path)
    pixels = raster_pixels(ref)
    if pixels.dtype == np.uint8 and rule.kind in {"auto", "window"}:
        return pixels  # read_image divides it by 255
    values = finite(pixels.astype(np.float64), ref.path)
    return scale(values, *limits(values, rule))
