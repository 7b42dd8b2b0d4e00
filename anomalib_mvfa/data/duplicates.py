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

__all__ = ["drop_copies"]

logger = logging.getLogger(__name__)


def _pixel_digest(ref: ImageRef) -> str | None:
    """Return a digest of the decoded pixels; ``None`` for an unreadable image and for one of a single colour."""
    with suppress(OSError, ValueError):
        status = ref.path.stat()
        return _digest(ref, status.st_mtime_ns, status.st_size)
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


def _refs(samples: DataFrame, like: ImageRef) -> list[ImageRef]:
    frames = samples["frame"] if "frame" in samples else [-1] * len(samples)
    rows = zip(samples["image_path"], frames, strict=True)
    return [replace(like, path=Path(path).resolve(), frame=None if frame < 0 else int(frame)) for path, frame in rows]


def _size(ref: ImageRef) -> tuple[int, int] | None:
    """Return width and height as far as Pillow knows them without decoding."""
    with suppress(OSError, ValueError, Image.DecompressionBombError), Image.open(ref.path) as image:
        return image.size
    return None


def drop_copies(
    samples: DataFrame,
    taken: DataFrame,
    part: str,
    of: str,
    like: ImageRef | None = None,
    then: str = "were left out",
) -> list[int]:
    """Find the rows that are neither taken, nor have the same pixels, nor are other images of the same groups.

    Only images of equal size are decoded.

    Args:
        samples: Samples as anomalib keeps them, with a column ``group`` where images belong together.
        taken: Samples that must not be among them.
        part: What the samples are, for the log: ``"test"``.
        of: What the taken images are, for the log: ``"supports"``.
        like: How the images are read.
        then: What is done with copies, for the log.

    Returns:
        Positions of the rows to keep, ascending.
    """
    refs, others = (_refs(table, like or ImageRef(Path())) for table in (samples, taken))
    groups = set(taken["group"]) if "group" in samples and "group" in taken else set()
    sizes, other_sizes = [_size(ref) for ref in refs], [_size(ref) for ref in others]
    common = set(sizes) & set(other_sizes)
    if None in sizes + other_sizes:
        common = {*sizes, *other_sizes}
    decoded = (ref for ref, size in zip(others, other_sizes, strict=True) if size in common)
    digests = {_pixel_digest(ref) for ref in decoded} - {None}
    same = set(others)
    keep, copies, relatives = [], 0, 0
    for position, (ref, size) in enumerate(zip(refs, sizes, strict=True)):
        if ref in same:
            continue
        if groups and samples["group"].iloc[position] in groups:
            relatives += 1
        elif digests and size in common and _pixel_digest(ref) in digests:
            copies += 1
        else:
            keep.append(position)
    if relatives:
        logger.info("%d images of the %s part belong to groups of %s and were left out.", relatives, part, of)
    if copies:
        logger.warning("%d images of the %s part are copies of %s and %s.", copies, part, of, then)
    return keep
