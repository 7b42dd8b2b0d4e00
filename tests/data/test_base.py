# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The check of images before a run, the order of the training images, and how messages list files."""

import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from anomalib.data import AnomalibDataset
from pandas import DataFrame
from PIL import Image

from anomalib_mvfa.data import FewShot, base
from anomalib_mvfa.data.base import SplitDataModule, check_choice, check_images, enumerate_some
from anomalib_mvfa.data.readers import UnreadableImageError


def write_samples(folder: Path, count: int, **options) -> DataFrame:
    """Write normal images, and masks for them."""
    rows = []
    for index in range(count):
        image, mask = folder / f"{index}.png", folder / f"{index}_mask.png"
        Image.new("RGB", (30, 20)).save(image)
        Image.new("L", (30, 20)).save(mask)
        rows.append({"image_path": str(image), "mask_path": str(mask), "label_index": 0, "split": "test", **options})
    return DataFrame(rows)


class OfTheHost(AnomalibDataset):
    """A set that reads images in anomalib's own way, or raises a given error."""

    def __init__(self, samples: DataFrame, error: Exception | None = None, **attributes) -> None:
        super().__init__()
        self.samples = samples
        self.samples.attrs["task"] = "segmentation"
        self.error = error
        self.read: list[int] = []
        vars(self).update(attributes)

    def __getitem__(self, index):
        self.read.append(index)
        if self.error:
            raise self.error
        return super().__getitem__(index)


class OneTestPart(SplitDataModule):
    """A datamodule that has a given test part and nothing else."""

    def __init__(self, part: AnomalibDataset) -> None:
        super().__init__(train_batch_size=1, eval_batch_size=1, num_workers=0)
        self.part = part

    def _setup(self, stage: str | None = None) -> None:
        self.test_data = self.part
        self.stage = stage


@pytest.mark.parametrize("content", [b"", b"words", None])
def test_what_cannot_be_read_is_listed_and_nothing_else(tmp_path, content):
    dataset = OfTheHost(write_samples(tmp_path, 3))
    check_images(dataset)
    path = Path(dataset.samples.image_path[1])
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^1 file cannot be used\. [^\n]*:\n  {re.escape(str(path))}: \w+$"):
        check_images(dataset)
    assert dataset.read == [0, 1, 2, 1]


@pytest.mark.parametrize(
    ("error", "reason"),
    [(KeyError("secret"), "{}: KeyError"), (UnreadableImageError("a.png", "the file is empty"), "a.png: the file is")],
)
def test_our_reasons_are_quoted_and_of_other_errors_only_the_kind(tmp_path, error, reason):
    dataset = OfTheHost(write_samples(tmp_path, 2), error)
    with pytest.raises(ValueError, match="cannot be used") as refusal:
        check_images(dataset)
    assert reason.format(dataset.samples.image_path[0]) in str(refusal.value)
    assert "secret" not in str(refusal.value)


def test_files_are_read_once_unless_they_or_the_way_of_reading_change(tmp_path):
    samples = write_samples(tmp_path, 2)
    first = OfTheHost(samples)
    check_images(first, first)
    assert first.read == [0, 1, 0, 1]
    Image.new("RGB", (31, 20)).save(samples.image_path[1])
    check_images(first)
    assert first.read[4:] == [1]
    for changed in ({"rule": "brain"}, {"like": "x"}):
        other = OfTheHost(samples, **changed)
        check_images(other)
        check_images(other)
        assert other.read == [0, 1]
    other = OfTheHost(samples)
    other.samples.attrs["task"] = "classification"
    check_images(other)
    assert other.read == [0, 1]


def test_a_volume_is_read_once_for_all_its_slices(tmp_path):
    (tmp_path / "a.nii").write_bytes(b"words")
    row = {"image_path": str(tmp_path / "a.nii"), "label_index": 0, "mask_path": "", "split": "test"}
    dataset = OfTheHost(DataFrame([row] * 3), KeyError())
    with pytest.raises(ValueError, match=r"1 file cannot be used"):
        check_images(dataset)
    assert dataset.read == [0]


def test_jpeg_masks_are_warned_of_with_their_number(tmp_path, caplog):
    samples = write_samples(tmp_path, 3)
    for row in (0, 2):
        jpeg = Path(samples.mask_path[row]).with_suffix(".JPG")
        Image.open(samples.mask_path[row]).save(jpeg)
        samples.loc[row, "mask_path"] = str(jpeg)
    check_images(OfTheHost(samples))
    assert "2 masks are JPEG files" in caplog.text


@pytest.mark.parametrize(
    ("stage", "blackout", "warned"),
    [("test", None, True), ("predict", (), True), ("fit", (), False), ("test", ((0, 0, 9, 9),), False)],
)
def test_text_in_images_to_be_shown_is_warned_of_unless_it_is_blacked_out(
    stage, blackout, warned, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(base, "dicom_header", lambda ref: SimpleNamespace(burned_in=ref.path.name != "1.png"))
    part = OfTheHost(write_samples(tmp_path, 3), **({} if blackout is None else {"blackout": blackout}))
    data = OneTestPart(part)
    data.setup(stage)
    assert data.stage == stage
    assert ("2 DICOM files may have text" in caplog.text) == warned
    assert part.read == ([] if stage == "predict" else [0, 1, 2])


def test_reading_beforehand_leaves_the_random_numbers_alone(tmp_path):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    check_images(OfTheHost(write_samples(tmp_path, 2)))
    assert torch.equal(torch.rand(3), expected)


def test_many_files_are_read_under_a_bar_that_vanishes(tmp_path, monkeypatch):
    bars = []

    def track(loader, description, total, **options):
        bars.append((description, total, options))
        return loader

    monkeypatch.setattr(base, "track", track)
    monkeypatch.setattr(base, "PROGRESS_FROM", 2)
    samples = write_samples(tmp_path, 6)
    for start, stop in ((0, 1), (1, 3), (3, 6)):
        check_images(OfTheHost(samples[start:stop]), num_workers=4)
    shown = [(total, options["disable"], options["transient"]) for _, total, options in bars]
    assert shown == [(1, True, True), (2, False, True), (3, False, True)]
    assert {description for description, _, _ in bars} == {"Reading the images"}


def test_validation_images_are_those_of_the_part_if_there_are_any(tmp_path):
    data = OneTestPart(OfTheHost(write_samples(tmp_path, 3)))
    data.setup("predict")
    assert data.val_dataloader() == []
    data.val_data = data.part.subsample([])
    assert data.val_dataloader() == []
    data.val_data = data.part
    assert len(data.val_dataloader().dataset) == 3


def test_without_text_nothing_is_warned_of(tmp_path, caplog):
    OneTestPart(OfTheHost(write_samples(tmp_path, 1))).setup("test")
    assert not caplog.text


def test_the_processes_share_the_training_images(make_folder):
    data = FewShot(make_folder(12, 12), k_shot=2, train_batch_size=3)
    data.setup("fit")
    loader = data._train_loader(2)
    assert (loader.batch_size, loader.num_workers) == (3, 2)
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


def test_enumeration_counts_only_what_it_leaves_out():
    assert enumerate_some(["a", "b"], 2) == "a, b"
    assert enumerate_some(["a", "b", "c"], 2) == "a, b and 1 more"
    assert enumerate_some("abcdefg") == "a, b, c, d, e and 2 more"
