# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Tables and pictures: names of files, and images that cannot be read."""

from pathlib import Path

from anomalib_mvfa.visualization import claim_name


def test_names_are_given_out_once_and_again_to_the_same_source():
    taken: dict[Path, str] = {}
    names = [claim_name(Path("x/a.b.png"), source, taken) for source in ("one", "two", "three", "two")]
    assert names == [Path("x/a.b.png"), Path("x/a.b_2.png"), Path("x/a.b_3.png"), Path("x/a.b_2.png")]
    volumes = [claim_name(Path("v.1_anomaly.nii.gz"), source, taken) for source in ("one", "two")]
    assert volumes == [Path("v.1_anomaly.nii.gz"), Path("v.1_anomaly_2.nii.gz")]
