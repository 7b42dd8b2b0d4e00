# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Names of files that are being written."""

from anomalib_mvfa.files import partial_name


def test_long_names_with_one_ending_are_written_under_names_of_their_own(tmp_path):
    names = [f"{first}{'long' * 60}.png" for first in "ab"]
    partial = [partial_name(tmp_path / name) for name in names]
    assert len(set(partial)) == 2
    assert all(path.parent == tmp_path and path.suffix == ".png" and len(path.name) < 100 for path in partial)
    assert partial_name(tmp_path / "predictions.csv").name == "partial-predictions.csv"
