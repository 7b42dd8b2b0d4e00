# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The checks of images and masks: what passes, and what the refusal says."""

import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from anomalib.data import AnomalibDataset
from pandas import DataFrame
from PIL import Image

from anomalib_mvfa.data import FewShot, checks
from anomalib_mvfa.data.checks import check_choice, check_images, check_masks, enumerate_some


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


class OfTheHost(AnomalibDataset):
    """A set that reads images in anomalib's own way, or not at all."""

    def __init__(self, samples: DataFrame, error: Exception | None = None) -> None:
        super().__init__()
        self.samples = samples.assign(split="train")
        self.samples.attrs["task"] = "segmentation"
        self.error = error
        self.read: list[int] = []

    def __getitem__(self, index):
        self.read.append(index)
        if self.error:
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("part", "content", "reason"),
    [
        ("image_path", b"", "the file is empty"),
        ("image_path", b"words", "not an image of a supported format"),
        ("image_path", None, "no such file"),
        ("mask_path", b"words", "not an image of a supported format"),
        ("mask_path", None, "no such file"),
        ("mask_path", "", "abnormal, but without a mask of the same stem, while the set has masks"),
    ],
)
def test_what_the_host_cannot_read_is_listed_with_our_reason(make_samples, part, content, reason):
    dataset = OfTheHost(make_samples([(1, (30, 20)), (0, None), (1, (30, 20))]))
    check_images(dataset)
    path = Path(dataset.samples[part][2])
    if content == "":
        dataset.samples.loc[2, "mask_path"], path = "", Path(dataset.samples.image_path[2])
    elif content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"1 file cannot be used[^\n]*\n  {re.escape(str(path))}: {reason}[^\n]*$"):
        check_images(dataset)


def test_an_error_of_the_sets_own_reader_is_named_by_its_kind(make_samples):
    dataset = OfTheHost(make_samples([(0, None), (0, None)]), KeyError("secret"))
    with pytest.raises(ValueError, match=r"2 files cannot be used") as refusal:
        check_images(dataset)
    assert f"{dataset.samples.image_path[0]}: KeyError" in str(refusal.value)
    assert "secret" not in str(refusal.value)


def test_masks_of_normal_images_may_have_any_size_and_those_of_abnormal_ones_may_not(make_samples):
    check_images(OfTheHost(make_samples([(1, (30, 20)), (0, (7, 7))])))
    with pytest.raises(
        ValueError, match=r"_mask\.png: this mask is 20x30 \(width x height\), its image 30x20; resample"
    ):
        check_images(OfTheHost(make_samples([(1, (30, 20)), (1, (20, 30))])))


def test_files_are_read_once_unless_they_change(make_samples):
    dataset = OfTheHost(make_samples([(0, None), (0, None)]))
    check_images(dataset)
    assert dataset.read == [0, 1]
    Image.new("RGB", (31, 20)).save(dataset.samples.image_path[1])
    check_images(dataset, dataset)
    assert set(dataset.read[2:]) == {1}


def test_a_volume_is_read_once_for_all_its_slices(tmp_path):
    (tmp_path / "a.nii").write_bytes(b"words")
    row = {"image_path": str(tmp_path / "a.nii"), "label_index": 0, "mask_path": ""}
    dataset = OfTheHost(DataFrame([row] * 3), KeyError())
    with pytest.raises(ValueError, match=r"1 file cannot be used"):
        check_images(dataset)
    assert dataset.read == [0]


@pytest.mark.parametrize(("blackout", "warned"), [((), True), (((0, 0, 9, 9),), False)])
def test_text_in_images_is_warned_of_unless_it_is_blacked_out(blackout, warned, monkeypatch, caplog):
    monkeypatch.setattr(checks, "has_burned_in_text", lambda path: path != "c.dcm")
    samples = DataFrame({"image_path": ["a.dcm", "a.dcm", "b.dcm", "c.dcm"]})
    checks.warn_of_text(SimpleNamespace(samples=samples, blackout=blackout))
    assert ("2 DICOM files may have text" in caplog.text) == warned
    caplog.clear()
    checks.warn_of_text(SimpleNamespace(samples=samples[3:]))
    assert not caplog.text


def test_jpeg_masks_are_warned_of_with_their_number(make_samples, caplog):
    samples = make_samples([(1, (30, 20)), (1, (30, 20)), (1, (30, 20))])
    for row in (0, 2):
        jpeg = Path(samples.mask_path[row]).with_suffix(".JPG")
        Image.open(samples.mask_path[row]).save(jpeg)
        samples.loc[row, "mask_path"] = str(jpeg)
    check_images(OfTheHost(samples))
    assert "2 masks are JPEG files" in caplog.text


def test_the_processes_share_the_training_images(make_folder):
    data = FewShot(make_folder(12, 12), k_shot=2)
    data.setup("fit")
    whole = list(data.train_dataloader().sampler)
    parts = []
    for rank in range(2):
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)
        parts.append(list(data.train_dataloader().sampler))
    assert parts == [whole[::2], whole[1::2]]


@pytest.mark.parametrize(("value", "accepted"), [("a", True), ("c", False)])
def test_a_choice_is_one_of_the_given(value, accepted):
    with nullcontext() if accepted else pytest.raises(ValueError, match=r"kind must be one of a, b, got 'c'\."):
        check_choice("kind", value, ("a", "b"))
