# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Values of several processes that train, test or predict together."""

from typing import Any, TypeVar

from torch import distributed

__all__ = ["gather_objects", "is_first"]

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
