# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Files that are complete under their own name, or absent."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["partial_name", "replacing"]

LONGEST_NAME = 50  # characters that are kept while the file is written


def partial_name(path: str | Path) -> Path:
    """Return the name under which a file is written until it is complete.

    It is in the same folder, keeps the suffix, is no longer than file systems allow, and is unique there.
    """
    path = Path(path)
    name = path.name
    if len(name) > LONGEST_NAME:
        name = f"{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}-{name[-LONGEST_NAME:]}"
    return path.with_name(f"partial-{name}")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file under another name and rename it when it is complete.

    An interruption or a full disk leaves an earlier file as it was, and nothing under the other name. The folder is
    created.

    Example:
        >>> with replacing(getfixture("tmp_path") / "table.csv") as partial:
        ...     _ = partial.write_text("score", encoding="utf-8")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(path)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
