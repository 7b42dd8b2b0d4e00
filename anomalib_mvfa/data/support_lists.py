# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Support lists: text files that fix which images are the supports of a few-shot run.

The format is that of the lists released with MVFA (https://github.com/MediaBrain-SJTU/MVFA-AD), one file a set and
shot. A draw of supports has one line for its normal and one for its abnormal images, file names separated by blanks::

    n-0: 17.png 203.png
    a-0: 8.png 54.png
    n-1: ...
"""

import re
from collections.abc import Sequence
from pathlib import Path

from anomalib.data.utils import LabelName
from pandas import DataFrame

__all__ = ["find_support", "read_support_list"]


def read_support_list(path: Path | str, draw: int = 0) -> tuple[list[str], list[str]]:
    """Read one draw: the file names of its normal and of its abnormal supports, none without an ``a`` line.

    Raises:
        ValueError: If a line is malformed, a key or a name stands twice, or the draw has no ``n`` line.
    """
    lines: dict[str, list[str]] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        key, _, rest = line.partition(":")
        key, names = key.strip(), rest.split()
        if not re.fullmatch(r"[na]-\d+", key):
            msg = f"{path}, line {number}: expected 'n-<draw>: names' or 'a-<draw>: names', found {line[:60]!r}."
            raise ValueError(msg)
        if key in lines or len(set(names)) != len(names):
            msg = f"{path}, line {number}: {key} or one of its file names stands twice; keep one of them."
            raise ValueError(msg)
        lines[key] = names
    if f"n-{draw}" not in lines:
        msg = f"{path} has no line 'n-{draw}:', it has {', '.join(lines) or 'no lines'}. Pass one of its draws."
        raise ValueError(msg)
    return lines[f"n-{draw}"], lines.get(f"a-{draw}", [])


def find_support(
    samples: DataFrame, names: Sequence[str], label: int, *, path: Path | str = "the support list", draw: int = 0
) -> list[int]:
    """Find the rows of listed supports of one label in a split, by file name, or by stem without an extension.

    ``path`` and ``draw`` are for the error message.

    Raises:
        ValueError: If a name matches no image of that label, or several.
    """
    rows: dict[str, list[int]] = {}
    for row, (image_path, label_index) in enumerate(zip(samples["image_path"], samples["label_index"], strict=True)):
        if label_index == label:
            for key in {Path(image_path).name, Path(image_path).stem}:
                rows.setdefault(key, []).append(row)
    matches = [rows.get(Path(name).name, []) for name in names]
    wrong = [f"{name} ({len(found)} matches)" for name, found in zip(names, matches, strict=True) if len(found) != 1]
    if wrong:
        kind = "normal" if label == LabelName.NORMAL else "abnormal"
        msg = (
            f"{path}, line {kind[0]}-{draw}: {len(wrong)} of {len(names)} names do not name one {kind} image "
            f"of the split: {', '.join(wrong[:5])}. Use the list of this set, or correct the names."
        )
        raise ValueError(msg)
    return [found[0] for found in matches]
