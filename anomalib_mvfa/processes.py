# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Values of several processes that train, test or predict together."""

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any, TypeVar

from torch import distributed

__all__ = ["gather_objects", "interleave", "is_first"]

T = TypeVar("T")


def gather_objects(value: T) -> list[T]:
    """Collect a value that can be pickled from every process, in all of them and in their order."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def is_first() -> bool:
    """Return whether this is the first of the processes, or the only one."""
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def interleave(parts: Iterable[Iterable[T]]) -> Iterator[T]:
    """Merge what was distributed in turn, in its original order.

    Example:
        >>> list(interleave([[0, 2, 4], [1, 3]]))
        [0, 1, 2, 3, 4]
    """
    absent = object()
    for row in zip_longest(*parts, fillvalue=absent):
        yield from (value for value in row if value is not absent)  # type: ignore[misc]
