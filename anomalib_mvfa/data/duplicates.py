# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Images that must not stand in two parts of a data set, found by content."""

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path

from pandas import DataFrame

__all__ = ["drop_copies"]

logger = logging.getLogger(__name__)


def drop_copies(samples: DataFrame, paths: Iterable[str | Path], part: str, of: str) -> list[int]:
    """Find the rows that are neither given images nor files with the same content.

    Only files of equal size are read.

    Args:
        samples: Samples as anomalib keeps them.
        paths: The images that must not be among them.
        part: What the samples are, for the log: ``"test"``.
        of: What the given images are, for the log: ``"supports"``.

    Returns:
        Positions of the rows to keep, ascending.
    """
    taken = {Path(path).resolve() for path in paths}
    by_size: dict[int, list[Path]] = {}
    for path in sorted(taken):
        by_size.setdefault(path.stat().st_size, []).append(path)
    digests: dict[int, set[str]] = {}
    keep, copies = [], 0
    for position, image_path in enumerate(samples["image_path"]):
        path = Path(image_path).resolve()
        if path in taken:
            continue
        size = path.stat().st_size
        if size in by_size:
            if size not in digests:
                digests[size] = {_digest(same_size) for same_size in by_size[size]}
            if _digest(path) in digests[size]:
                copies += 1
                continue
        keep.append(position)
    if copies:
        logger.warning("%d images of the %s part are copies of %s and were left out.", copies, part, of)
    return keep


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
