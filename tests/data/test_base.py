# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""How messages list files."""

from anomalib_mvfa.data.base import enumerate_some


def test_enumeration_counts_only_what_it_leaves_out():
    assert enumerate_some(["a", "b"], 2) == "a, b"
    assert enumerate_some(["a", "b", "c"], 2) == "a, b and 1 more"
