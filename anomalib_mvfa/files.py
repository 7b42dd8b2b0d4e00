# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Files that are complete under their own name, or absent, and digests of their content."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["content_digest", "partial_name", "replacing"]

DIGITS = 16  # hexadecimal, of a digest
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


def content_digest(path: str | Path) -> str:
    """Return the first 16 hexadecimal digits of a file's SHA-256, as ``sha256sum`` prints them."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()[:DIGITS]
