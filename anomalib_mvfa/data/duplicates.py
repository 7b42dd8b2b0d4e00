# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Images that are in two parts of a data set, found by their decoded pixels, so that re-saved copies are found too."""

import hashlib
import logging
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from pandas import DataFrame
from PIL import Image

from .readers import ImageRef, read_pixels

__all__ = ["drop_copies", "pixel_digest"]

logger = logging.getLogger(__name__)


def pixel_digest(ref: ImageRef) -> str | None:
    """Return a digest of the decoded pixels of an image, the same for every lossless format that holds them.

    Args:
        ref: The image.

    Returns:
        The digest; ``None`` for an unreadable image and for one of a single colour, which says nothing.
    """
    with suppress(OSError, ValueError):
        status = ref.path.stat()
        return _digest(replace(ref, path=ref.path.resolve()), status.st_mtime_ns, status.st_size)
    return None


@lru_cache(maxsize=2**18)
def _digest(ref: ImageRef, *_: int) -> str | None:
    pixels = read_pixels(ref)
    if (pixels[..., :1] == pixels).all():  # grey, whatever the number of channels
        pixels = pixels[..., :1]
    if (pixels == pixels[:1, :1]).all():
        return None
    values = np.ascontiguousarray(pixels, dtype=np.float32)
    return hashlib.blake2b(str(values.shape).encode() + values.tobytes(), digest_size=16).hexdigest()


def sample_refs(samples: DataFrame, like: ImageRef | None = None) -> list[ImageRef]:
    """Return references to the images of a table; a column ``frame`` holds -1 for files that are one image."""
    frames = samples["frame"] if "frame" in samples else [-1] * len(samples)
    template = like or ImageRef(Path())
    rows = zip(samples["image_path"], frames, strict=True)
    return [replace(template, path=Path(path), frame=None if frame < 0 else int(frame)) for path, frame in rows]


def _size(ref: ImageRef) -> tuple[int, int] | None:
    """Return width and height as far as Pillow knows them without decoding."""
    with suppress(OSError, ValueError, Image.DecompressionBombError), Image.open(ref.path) as image:
        return image.size
    return None


def drop_copies(samples: DataFrame, taken: DataFrame, part: str, of: str, like: ImageRef | None = None) -> list[int]:
    """Find the rows that are neither taken, nor have the same pixels, nor are other images of the same groups.

    Only images of equal size are decoded.

    Args:
        samples: Samples as anomalib keeps them, with a column ``group`` where images belong together.
        taken: Samples that must not be among them.
        part: What the samples are, for the log: ``"test"``.
        of: What the taken images are, for the log: ``"supports"``.
        like: How the images are read.

    Returns:
        Positions of the rows to keep, ascending.
    """
    refs, others = sample_refs(samples, like), sample_refs(taken, like)
    groups = set(taken["group"]) if "group" in samples and "group" in taken else set()
    same = {replace(ref, path=ref.path.resolve()) for ref in others}
    sizes, other_sizes = [_size(ref) for ref in refs], [_size(ref) for ref in others]
    common = set(sizes) if None in other_sizes else set(sizes) & {*other_sizes, None}
    digests = {
        pixel_digest(ref)
        for ref, size in zip(others, other_sizes, strict=True)
        if size is None or None in sizes or size in common
    } - {None}
    keep, copies, relatives = [], 0, 0
    for position, (ref, size) in enumerate(zip(refs, sizes, strict=True)):
        if replace(ref, path=ref.path.resolve()) in same:
            continue
        if groups and samples["group"].iloc[position] in groups:
            relatives += 1
        elif digests and size in common and pixel_digest(ref) in digests:
            copies += 1
        else:
            keep.append(position)
    if relatives:
        logger.info("%d images of the %s part belong to groups of %s and were left out.", relatives, part, of)
    if copies:
        logger.warning("%d images of the %s part are copies of %s and were left out.", copies, part, of)
    return keep
