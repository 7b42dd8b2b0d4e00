# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Several processes that train, test or predict together give what one process gives.

Lightning shares the images out. What it leaves to a model is done here: no image is counted twice when they do not
divide evenly, adapters that an image does not move are no error, all processes write into one folder, and all read the
same data.
"""

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any, TypeVar

from torch import distributed

__all__ = ["gather_objects", "interleave", "is_first"]

T = TypeVar("T")


def gather_objects(value: T) -> list[T]:
    """Collect a value of every process, in all of them; alone, a list of the value.

    Args:
        value: Anything that can be pickled.

    Returns:
        One value a process, in their order.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def is_first() -> bool:
    """Tell whether this is the first of the processes, or the only one."""
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def interleave(parts: Iterable[Iterable[T]]) -> Iterator[T]:
    """Bring what was dealt out one by one back into its order.

    Example:
        >>> list(interleave([[0, 2, 4], [1, 3]]))
        [0, 1, 2, 3, 4]
    """
    absent = object()
    for row in zip_longest(*parts, fillvalue=absent):
        yield from (value for value in row if value is not absent)  # type: ignore[misc]
