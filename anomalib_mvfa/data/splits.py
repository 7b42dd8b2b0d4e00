# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""What goes into which part: groups of images that belong together, as those of one patient do, and copies.

Copies are found by their decoded pixels, so that re-saved ones are found too.
"""

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from anomalib.data.utils import LabelName, Split
from pandas import DataFrame
from PIL import Image
from sklearn.model_selection import train_test_split

from .base import enumerate_some
from .readers import ImageRef, read_pixels
from .readers.files import stamp

__all__ = ["drop_copies", "parse_pattern", "pattern_groups", "pixel_digest", "split_groups"]

logger = logging.getLogger(__name__)


def parse_pattern(pattern: str) -> re.Pattern[str]:
    r"""Compile a pattern of file names whose first group is what images that belong together share.

    Example:
        >>> parse_pattern(r"(?P<patient>\d+)_\d+").search("0012_7.png")[1]
        '0012'
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        msg = f"group_by='{pattern}' is no regular expression: {error}."
        raise ValueError(msg) from None
    if not compiled.groups:
        msg = (
            f"group_by='{pattern}' needs one group in parentheses, the part of a file name that all images of a "
            r"patient share, such as '(?P<patient>\d+)_\d+'."
        )
        raise ValueError(msg)
    return compiled


def pattern_groups(paths: Iterable[str], pattern: str) -> list[str]:
    """Return the text of a pattern's first group in each file name; a ValueError lists names without."""
    compiled = parse_pattern(pattern)
    matches = [(path, compiled.search(Path(path).name)) for path in paths]
    others = [path for path, match in matches if match is None or match[1] is None]
    if others:
        msg = (
            f"group_by='{pattern}' does not match the names of {len(others)} of {len(matches)} images: "
            f"{enumerate_some(others)}. Correct the pattern."
        )
        raise ValueError(msg)
    return [match[1] for _, match in matches if match is not None]


def split_groups(
    samples: DataFrame, shares: Mapping[Split, float], seed: int, train_abnormal: bool, remedy: str
) -> list[str]:
    """Return the part of each row: whole groups, those with and those without abnormal images each in proportion.

    Args:
        samples: With the columns ``group`` and ``label_index``, and if wanted ``abnormal``, whether an image counts as
            one of an abnormal group whatever its own label.
        shares: Share of the groups of each part; they sum to 1. A part with a share of 0 stays empty.
        seed: Seed of the draw.
        train_abnormal: Whether groups with abnormal images may be in the training part.
        remedy: Last sentence of the error message.

    Raises:
        ValueError: If there are fewer groups of a kind than parts that need one.
    """
    is_abnormal = samples["label_index"] == LabelName.ABNORMAL.value
    if "abnormal" in samples:
        is_abnormal |= samples["abnormal"]
    abnormal = is_abnormal.groupby(samples["group"]).any()
    parts: dict[object, str] = {}
    for kind in (False, True):
        left = groups = sorted(abnormal.index[abnormal == kind])
        no_train = kind and not train_abnormal
        wanted = {split: share for split, share in shares.items() if share and not (no_train and split == Split.TRAIN)}
        if groups and len(groups) < len(wanted):
            what = "abnormal" if kind else "normal"
            msg = (
                f"{len(groups)} {what} group(s) (patients, series or files) cannot be split into "
                f"{', '.join(wanted)}: each part needs one, so {len(wanted) - len(groups)} more {what} group(s) are "
                f"missing. {remedy}"
            )
            raise ValueError(msg)
        for later, (split, share) in zip(reversed(range(len(wanted))), wanted.items(), strict=True):
            chosen = left
            if left and later:  # one group at least to each part
                count = min(max(1, round(share / sum(wanted.values()) * len(groups))), len(left) - later)
                chosen, left = train_test_split(left, train_size=count, random_state=seed)
            parts.update(dict.fromkeys(chosen, split.value))
    return [parts[group] for group in samples["group"]]


def drop_copies(
    samples: DataFrame,
    taken: DataFrame,
    part: str,
    of: str,
    like: ImageRef | None = None,
    then: str = "were left out",
) -> list[int]:
    """Find the rows that are neither taken, nor have the same pixels, nor are other images of the same groups.

    Only images of equal size are decoded, read as ``like`` is. Images that belong together have one value in the column
    ``group``. For the log ``part`` is what the samples are (``"test"``), ``of`` what is taken (``"supports"``), and
    ``then`` what is done with copies. The result are the positions of the rows to keep, ascending.
    """
    refs, others = (_refs(table, like or ImageRef(Path())) for table in (samples, taken))
    groups = set(taken["group"]) if "group" in samples and "group" in taken else set()
    sizes = {ref: _size(ref) for ref in (*refs, *others)}
    common = {sizes[ref] for ref in refs} & {sizes[ref] for ref in others}
    if None in sizes.values():  # which any other may equal
        common = set(sizes.values())
    digests = {pixel_digest(ref) for ref in others if sizes[ref] in common} - {None}
    same = set(others)
    keep, copies, relatives = [], 0, 0
    for position, ref in enumerate(refs):
        if ref in same:
            continue
        if groups and samples["group"].iloc[position] in groups:
            relatives += 1
        elif digests and sizes[ref] in common and pixel_digest(ref) in digests:
            copies += 1
        else:
            keep.append(position)
    if relatives:
        logger.info("%d images of the %s part belong to groups of %s and were left out.", relatives, part, of)
    if copies:
        logger.warning("%d images of the %s part are copies of %s and %s.", copies, part, of, then)
    return keep


def _refs(samples: DataFrame, like: ImageRef) -> list[ImageRef]:
    frames = samples["frame"] if "frame" in samples else [-1] * len(samples)
    rows = zip(samples["image_path"], frames, strict=True)
    return [replace(like, path=Path(path).resolve(), frame=None if frame < 0 else int(frame)) for path, frame in rows]


def _size(ref: ImageRef) -> tuple[int, int] | None:
    """Return width and height as far as Pillow knows them without decoding."""
    with suppress(OSError, ValueError, Image.DecompressionBombError), Image.open(ref.path) as image:
        return image.size
    return None


def pixel_digest(ref: ImageRef) -> str | None:
    """Return a digest of the decoded pixels; ``None`` for an unreadable image and for one of a single colour."""
    with suppress(OSError, ValueError):
        return _pixel_digest(ref, stamp(ref.path))
    return None


@lru_cache(maxsize=2**18)
def _pixel_digest(ref: ImageRef, _: object) -> str | None:
    pixels = read_pixels(ref)
    if (pixels[..., :1] == pixels).all():  # grey, whatever the number of channels
        pixels = pixels[..., :1]
    if (pixels == pixels[:1, :1]).all():
        return None
    values = np.ascontiguousarray(pixels, dtype=np.float32)
    return hashlib.blake2b(str(values.shape).encode() + values.tobytes(), digest_size=16).hexdigest()
