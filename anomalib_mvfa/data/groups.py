# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Groups of images that belong together, as those of one patient do, and splits that keep them together."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from anomalib.data.utils import LabelName, Split
from pandas import DataFrame
from sklearn.model_selection import train_test_split

from .checks import enumerate_some

__all__ = ["parse_pattern", "pattern_groups", "split_groups"]


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
        groups = sorted(abnormal.index[abnormal == kind])
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
        parts.update(_deal(groups, wanted, seed))
    return [parts[group] for group in samples["group"]]


def _deal(groups: Sequence[object], shares: Mapping[Split, float], seed: int) -> dict[object, str]:
    """Assign each group to a part, one at least to each."""
    parts: dict[object, str] = {}
    left, total = list(groups), sum(shares.values())
    for later, (split, share) in zip(reversed(range(len(shares))), shares.items(), strict=True):
        chosen = left
        if left and later:
            count = min(max(1, round(share / total * len(groups))), len(left) - later)
            chosen, left = train_test_split(left, train_size=count, random_state=seed)
        parts.update(dict.fromkeys(chosen, split.value))
    return parts
