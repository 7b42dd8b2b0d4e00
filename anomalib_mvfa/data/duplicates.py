# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Images that must not stand in two parts of a data set, found by content."""

import hashlib
import logging
from pathlib import Path

from pandas import DataFrame

__all__ = ["drop_copies"]

logger = logging.getLogger(__name__)


def drop_copies(samples: DataFrame, taken: DataFrame, part: str, of: str) -> list[int]:
    """Find the rows that are neither taken, nor files with the same content, nor other images of the same groups.

    Only files of equal size are read.

    Args:
        samples: Samples as anomalib keeps them, with a column ``group`` where images belong together.
        taken: Samples that must not be among them.
        part: What the samples are, for the log: ``"test"``.
        of: What the taken images are, for the log: ``"supports"``.

    Returns:
        Positions of the rows to keep, ascending.
    """
    paths = {Path(path).resolve() for path in taken["image_path"]}
    grouped = "group" in samples and "group" in taken
    groups = set(taken["group"]) if grouped else set()
    by_size: dict[int, list[Path]] = {}
    for path in sorted(paths):
        by_size.setdefault(path.stat().st_size, []).append(path)
    digests: dict[int, set[str]] = {}
    keep, copies, relatives = [], 0, 0
    for position, image_path in enumerate(samples["image_path"]):
        path = Path(image_path).resolve()
        if path in paths:
            continue
        if grouped and samples["group"].iloc[position] in groups:
            relatives += 1
            continue
        size = path.stat().st_size
        if size in by_size:
            if size not in digests:
                digests[size] = {_digest(same_size) for same_size in by_size[size]}
            if _digest(path) in digests[size]:
                copies += 1
                continue
        keep.append(position)
    if relatives:
        logger.info("%d images of the %s part belong to groups of %s and were left out.", relatives, part, of)
    if copies:
        logger.warning("%d images of the %s part are copies of %s and were left out.", copies, part, of)
    return keep


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
