# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Leave one set out: what is trained on, what each image carries, and that the target stays unseen."""

import hashlib
import logging
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data.utils import ValSplitMode
from PIL import Image

from anomalib_mvfa.data import LeaveOneOut

MASKED = ("Brain_AD", "Liver_AD")
SIZE = (24, 20)


@pytest.fixture
def root(tmp_path) -> Path:
    """Brain and Liver with masks and Chest without, laid out like the archives of MVFA; all images differ."""
    rng = np.random.default_rng(0)
    for name in (*MASKED, "Chest_AD"):
        for split, count in (("valid", 10), ("test", 6)):
            for label in ("good", "Ungood"):
                folder = tmp_path / name / split / label
                for index in range(count + 20 * (name == "Liver_AD" and split == "valid")):
                    save(rng.integers(0, 255, SIZE[::-1], dtype=np.uint8), folder / "img" / f"{index}.png")
                    if label == "Ungood" and name in MASKED:
                        mask = np.zeros(SIZE[::-1], np.uint8)
                        mask[: index % 5 + 1] = 255
                        save(mask, folder / "anomaly_mask" / f"{index}.png")
    return tmp_path


def save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def leave_out(root: Path, target: str = "Brain", **options) -> LeaveOneOut:
    data = LeaveOneOut(target, root, num_workers=0, **options)
    data.setup("fit")
    return data


def paths(part) -> set[str]:
    return set(part.samples["image_path"])


def digests(image_paths) -> set[str]:
    return {hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in image_paths}


def folders(part) -> set[tuple[str, str]]:
    """Set and split of every image."""
    return {tuple(Path(path).parts[-5:-3]) for path in paths(part)}


@pytest.mark.parametrize(("train_split", "count"), [("valid", 80), ("test", 24)])
def test_training_takes_one_split_of_the_other_sets(root, train_split, count):
    data = leave_out(root, train_split=train_split)
    assert folders(data.train_data) == {("Liver_AD", train_split), ("Chest_AD", train_split)}
    assert paths(data.train_data).isdisjoint(paths(data.val_data))
    assert len(data.train_data) + len(data.val_data) == count
    assert folders(data.test_data) == {("Brain_AD", "test")}
    assert len(data.test_data) == 12


def test_thresholds_come_from_a_share_of_each_class_of_each_training_set_by_default(root):
    data = leave_out(root, val_split_ratio=0.2)
    held_out = Counter(zip(data.val_data.samples["set"], data.val_data.samples["label_index"], strict=True))
    assert held_out == {("Chest", 0): 2, ("Chest", 1): 2, ("Liver", 0): 6, ("Liver", 1): 6}
    assert paths(leave_out(root).val_data) == paths(data.val_data)
    assert paths(leave_out(root, seed=1).val_data) != paths(data.val_data)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [(ValSplitMode.FROM_DIR, {("Brain_AD", "valid")}), ("same_as_test", {("Brain_AD", "test")})],
)
def test_validation_on_the_target_only_when_asked(root, mode, expected):
    data = leave_out(root, val_split_mode=mode)
    assert folders(data.val_data) == expected
    assert len(data.train_data) == 80


def test_no_validation_part_when_asked(root):
    assert leave_out(root, val_split_mode="none").val_dataloader() == []


def test_copies_of_target_images_are_not_trained_on(root, caplog):
    for split in ("valid", "test"):
        good = root / "Chest_AD" / "valid" / "good" / "img"
        shutil.copy(root / "Brain_AD" / split / "good" / "img" / "0.png", good / f"copy_{split}.png")
    with caplog.at_level(logging.WARNING):
        data = leave_out(root)
    assert "2 images of the training part are copies of images of Brain" in caplog.text
    target = digests(root.glob("Brain_AD/*/*/img/*.png"))
    assert target.isdisjoint(digests(paths(data.train_data) | paths(data.val_data)))


def test_resaved_copies_of_target_images_are_not_trained_on(root, caplog):
    copied = root / "Brain_AD" / "test" / "good" / "img" / "0.png"
    with Image.open(copied) as image:
        image.convert("RGB").save(root / "Chest_AD" / "valid" / "good" / "img" / "other.tif", compression="tiff_lzw")
    data = leave_out(root)
    assert "1 images of the training part are copies of images of Brain" in caplog.text
    assert not any(path.endswith("other.tif") for path in paths(data.train_data) | paths(data.val_data))


def test_slices_of_one_patient_are_held_out_together(root):
    for label in ("good", "Ungood"):
        for folder in (root / "Liver_AD" / "valid" / label).iterdir():
            for path in sorted(folder.iterdir(), key=lambda path: int(path.stem)):
                path.rename(path.with_name(f"{int(path.stem) // 6:03}_{path.stem}.png"))
    for seed in range(4):
        data = leave_out(root, group_by={"Liver": r"(?P<patient>\d+)_\d+"}, seed=seed)
        patients = [
            {Path(path).stem[:3] for path in paths(part) if "Liver" in path}
            for part in (data.train_data, data.val_data)
        ]
        assert not patients[0] & patients[1]
        assert len(patients[1]) == 1  # a fifth of five
    with pytest.raises(ValueError, match=r"does not match the names of 32 of 32 images: .*Brain"):
        leave_out(root, group_by=r"(?P<patient>\d+)_\d+")


def test_sixteen_bit_images_and_jpeg_masks_are_read(root, caplog):
    wide = root / "Liver_AD" / "valid" / "good" / "img" / "0.png"
    pixels = np.linspace(0, 4095, SIZE[0] * SIZE[1]).astype(np.uint16).reshape(SIZE[::-1])
    Image.fromarray(pixels).save(wide)
    folder = root / "Liver_AD" / "valid" / "Ungood" / "anomaly_mask"
    Image.open(folder / "1.png").save(folder / "1.jpg", quality=50)
    (folder / "1.png").unlink()
    data = leave_out(root)
    for item in (*data.train_data, *data.val_data):
        if item.image_path == str(wide):
            low, high = np.percentile(pixels, (0.5, 99.5))
            np.testing.assert_allclose(item.image[0], np.clip((pixels - low) / (high - low), 0, 1), atol=1e-6)
        if (item.mask_path or "").endswith(".jpg"):
            assert int(item.gt_mask.sum()) == 2 * SIZE[0]
    assert "1 masks are JPEG files" in caplog.text


def test_too_few_images_to_hold_any_out_are_refused(root):
    for path in sorted((root / "Chest_AD" / "valid" / "Ungood" / "img").iterdir())[1:]:
        path.unlink()
    with pytest.raises(
        ValueError, match=r"1 abnormal group\(s\) .* cannot be split into val, train.*Add some to Chest"
    ):
        leave_out(root)


def test_batches_mix_sets_and_each_image_carries_its_class_and_whether_it_has_a_mask(root):
    data = leave_out(root, train_batch_size=40)
    (first, second) = data.train_dataloader()
    for batch in (first, second):
        assert set(batch.class_name) <= {"Liver", "Chest X-ray film"}
        for index, path in enumerate(batch.image_path):
            liver = "Liver_AD" in path
            assert batch.class_name[index] == ("Liver" if liver else "Chest X-ray film")
            assert bool(batch.has_mask[index]) == liver
            abnormal = "Ungood" in path
            assert int(batch.gt_label[index]) == abnormal
            rows = int(Path(path).stem) % 5 + 1 if liver and abnormal else 0
            assert int(batch.gt_mask[index].sum()) == rows * SIZE[0]
    assert set(first.class_name) == {"Liver", "Chest X-ray film"}
    assert data.class_names == ("Chest X-ray film", "Liver")
    assert data.class_name == "Brain"


def test_a_target_without_masks_is_tested_without_masks(root):
    data = leave_out(root, target="Chest")
    assert data.test_data.samples.attrs["task"] == "classification"
    assert next(iter(data.test_dataloader())).gt_mask is None
    assert next(iter(data.train_dataloader())).gt_mask is not None


def test_sets_without_masks_alone_give_batches_without_masks(root):
    data = leave_out(root, sets=["Chest"])
    assert next(iter(data.train_dataloader())).gt_mask is None


def test_order_depends_on_seed_and_epoch_only(root):
    def order(seed: int, epoch: int) -> list[int]:
        torch.rand(3)
        sampler = leave_out(root, seed=seed).train_dataloader().sampler
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert sorted(order(0, 1)) == list(range(64))
    assert order(0, 1) != order(0, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_split": "train"}, r"valid, test, got 'train'"),
        ({"val_split_mode": "synthetic"}, r"from_train, from_dir, same_as_test, none, got 'synthetic'"),
        ({"val_split_ratio": 1.0}, r"between 0 and 1, got 1\.0"),
        ({"sets": ["Brain", "Liver"]}, r"target 'Brain' is among the sets"),
    ],
)
def test_arguments_are_checked(root, options, message):
    with pytest.raises(ValueError, match=message):
        leave_out(root, **options)


def test_all_images_that_cannot_be_used_are_listed_at_once(root):
    empty = root / "Liver_AD" / "valid" / "good" / "img" / "2.png"
    empty.write_bytes(b"")
    cut = root / "Chest_AD" / "valid" / "Ungood" / "img" / "1.png"
    cut.write_bytes(cut.read_bytes()[:80])
    with pytest.raises(ValueError, match="2 files cannot be used") as error:
        leave_out(root)
    assert str(empty) in str(error.value)
    assert str(cut) in str(error.value)


def test_missing_target_missing_others_and_one_sided_sets_are_refused_by_name(root):
    with pytest.raises(FileNotFoundError, match="No set 'Kidney'"):
        leave_out(root, target="Kidney")
    for path in (root / "Liver_AD" / "valid" / "Ungood" / "img").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"valid split of .*Liver_AD has no normal or no abnormal"):
        leave_out(root)
    shutil.rmtree(root / "Liver_AD")
    shutil.rmtree(root / "Chest_AD")
    with pytest.raises(ValueError, match=r"No set but the target 'Brain' .* found Brain"):
        leave_out(root)
