# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The check of masks: what passes, and what the refusal says."""

import re

import pytest
from pandas import DataFrame
from PIL import Image

from anomalib_mvfa.data.checks import check_masks, enumerate_some


@pytest.fixture
def make_samples(tmp_path):
    """Write images with labels and masks of given sizes; a size of ``None`` stands for no mask."""

    def make(rows: list[tuple[int, tuple[int, int] | None]]) -> DataFrame:
        samples = []
        for index, (label, mask_size) in enumerate(rows):
            image, mask = tmp_path / f"{index}.png", tmp_path / f"{index}_mask.png"
            Image.new("RGB", (30, 20)).save(image)
            if mask_size:
                Image.new("L", mask_size).save(mask)
            mask_path = str(mask) if mask_size else ""
            samples.append({"image_path": str(image), "label_index": label, "mask_path": mask_path})
        return DataFrame(samples)

    return make


@pytest.mark.parametrize(
    "rows",
    [
        [(0, None), (1, (30, 20)), (1, (30, 20))],
        [(0, None), (1, None), (1, None)],  # image labels only
        [(0, None)],
        [(0, (7, 7)), (1, (30, 20))],  # a normal image's mask is not read
    ],
)
def test_whole_sets_of_masks_pass(make_samples, rows):
    check_masks(make_samples(rows))


def test_missing_values_count_as_no_masks(make_samples):
    samples = make_samples([(1, None), (1, None)])
    samples["mask_path"] = None
    check_masks(samples)


def test_missing_masks_are_counted_and_named(make_samples):
    samples = make_samples([(0, None), (1, (30, 20)), (1, None), (1, None)])
    names = ", ".join(samples.image_path[2:])
    with pytest.raises(ValueError, match=rf"2 of 3 abnormal images have no mask .*{re.escape(names)}\. Add the masks"):
        check_masks(samples)


def test_turned_masks_are_named_with_both_sizes(make_samples):
    samples = make_samples([(1, (30, 20)), (1, (20, 30))])
    message = rf"1 of 2 masks differ .*{re.escape(samples.mask_path[1])} \(20x30, image 30x20\)\. Resample"
    with pytest.raises(ValueError, match=message):
        check_masks(samples)


def test_five_files_are_named_and_the_others_counted(make_samples):
    samples = make_samples([(1, (5, 5))] * 8)
    with pytest.raises(ValueError, match=r"8 of 8 masks differ .* and 3 more\.") as refusal:
        check_masks(samples)
    assert str(refusal.value).count("_mask.png") == 5


def test_enumeration_counts_only_what_it_leaves_out():
    assert enumerate_some(["a", "b"], 2) == "a, b"
    assert enumerate_some(["a", "b", "c"], 2) == "a, b and 1 more"


def test_single_missing_value_among_masks_is_named(make_samples):
    samples = make_samples([(1, (30, 20)), (1, None)])
    samples.loc[1, "mask_path"] = None
    with pytest.raises(ValueError, match="1 of 2 abnormal images have no mask"):
        check_masks(samples)
