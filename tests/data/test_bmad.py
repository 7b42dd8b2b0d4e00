# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The BMAD sets in miniature: real set and folder names, a few tiny images in each split."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataModule, AnomalibDataset
from PIL import Image
from torchvision.transforms.v2 import Resize

from anomalib_mvfa.data.bmad import MedicalBMAD, available_sets, find_set, read_samples
from anomalib_mvfa.model.prompts import prompt_name

SUFFIX = {
    "Brain": ".png",
    "Liver": ".PNG",
    "Retina_RESC": ".bmp",
    "Retina_OCT2017": ".jpeg",
    "Chest": ".JPG",
    "Histopathology": ".tif",
}
SEGMENTATION = ("Brain", "Liver", "Retina_RESC")
# Images a split and label, all different so that no two can be mixed up.
COUNTS = {"train/good": 4, "valid/good": 2, "valid/Ungood": 3, "test/good": 5, "test/Ungood": 6}
PUBLISHED_NAMES = {
    "Brain": "Brain",
    "Liver": "Liver",
    "Retina_RESC": "retinal OCT",
    "Retina_OCT2017": "retinal OCT",
    "Chest": "Chest X-ray film",
    "Histopathology": "histopathological image",
}
SIZE = (12, 8)


def save_image(path: Path, grey: int, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, grey).save(path)


def make_set(
    folder: Path,
    mask_folder: str | None,
    suffix: str = ".png",
    train: bool = True,
    image_folder: str = "img",
) -> Path:
    """Write a set whose images and masks are created in a shuffled order.

    Image ``i`` of a folder has grey value ``10 * i``; the mask of abnormal image ``i`` has ``i + 1`` foreground pixels.
    """
    for part, count in COUNTS.items():
        split, label = part.split("/")
        if split == "train" and not train:
            continue
        below = folder / part / ("" if split == "train" else image_folder)
        order = random.Random(0).sample(range(count), count)
        for i in order:
            save_image(below / f"{split}_{label}_{i}{suffix}", 10 * i)
        for i in reversed(order):
            if mask_folder and split != "train":
                mask = np.zeros(SIZE[::-1], dtype=np.uint8)
                mask.flat[: i + 1] = 255 if label == "Ungood" else 0
                path = folder / part / mask_folder / f"{split}_{label}_{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(path)
    return folder


def make_root(root: Path, layout: str) -> Path:
    """Write all six sets in one layout."""
    for name, suffix in SUFFIX.items():
        mask_folder = {"anomalib": "label", "bmad": "anomaly_mask", "mvfa": "anomaly_mask"}[layout]
        make_set(
            root / (f"{name}_AD" if layout == "mvfa" else name),
            mask_folder if name in SEGMENTATION else None,
            suffix,
            train=layout != "mvfa",
            image_folder="" if layout == "bmad" and name not in SEGMENTATION else "img",
        )
    return root


def datamodule_for(root: Path, category: str = "Brain", **kwargs: object) -> MedicalBMAD:
    return MedicalBMAD(root=root, category=category, num_workers=0, eval_batch_size=4, train_batch_size=3, **kwargs)


def label_counts(dataset: AnomalibDataset) -> tuple[int, int]:
    labels = dataset.samples.label_index.tolist()
    return labels.count(0), labels.count(1)


@pytest.fixture(scope="module", params=["anomalib", "bmad", "mvfa"])
def bmad_root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, make_root(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("category", SUFFIX)
def test_every_set_is_read_in_every_layout(bmad_root: tuple[str, Path], category: str) -> None:
    layout_name, root = bmad_root
    datamodule = datamodule_for(root, category)
    datamodule.prepare_data()
    datamodule.setup()

    segmentation = category in SEGMENTATION
    assert datamodule.task == (TaskType.SEGMENTATION if segmentation else TaskType.CLASSIFICATION)
    assert datamodule.class_name == PUBLISHED_NAMES[category]
    expected_masks = "label" if layout_name == "anomalib" else "anomaly_mask"

    assert label_counts(datamodule.train_data) == ((2, 0) if layout_name == "mvfa" else (4, 0))
    assert label_counts(datamodule.val_data) == (2, 3)
    assert label_counts(datamodule.test_data) == (5, 6)
    for data in (datamodule.train_data, datamodule.val_data, datamodule.test_data):
        assert data.task == datamodule.task
        assert set(data.samples.columns) == {"image_path", "split", "label", "label_index", "mask_path"}
        for row in data.samples.itertuples():
            assert row.label == ("Ungood" if row.label_index else "good")
            has_mask = segmentation and row.label_index == 1
            assert (Path(row.mask_path).stem == Path(row.image_path).stem) if has_mask else row.mask_path == ""
            assert Path(row.mask_path).parent.name == (expected_masks if has_mask else "")


def test_batches_pair_each_image_with_its_own_mask(bmad_root: tuple[str, Path]) -> None:
    _, root = bmad_root
    datamodule = datamodule_for(root, "Brain")
    datamodule.setup()
    seen = 0
    for loader in (datamodule.val_dataloader(), datamodule.test_dataloader()):
        for batch in loader:
            assert batch.image.shape[1:] == (3, 8, 12)
            for item in batch:
                number = int(Path(item.image_path).stem.rsplit("_", 1)[1])
                torch.testing.assert_close(item.image, torch.full_like(item.image, 10 * number / 255))
                assert item.gt_mask.sum() == (number + 1 if item.gt_label else 0)
                seen += int(item.gt_label)
    assert seen == 9
    train = next(iter(datamodule.train_dataloader()))
    assert not train.gt_label.any()
    assert not train.gt_mask.any()


def test_sixteen_bit_images_and_jpeg_masks_are_read_by_the_readers_of_this_package(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "Brain", "label")
    pixels = np.linspace(0, 4095, SIZE[0] * SIZE[1]).astype(np.uint16).reshape(SIZE[::-1])
    Image.fromarray(pixels).save(folder / "test/good/img/test_good_0.png")
    mask = np.zeros(SIZE[::-1], np.uint8)
    mask[3:7, 2:8] = 255
    (folder / "test/Ungood/label/test_Ungood_0.png").unlink()
    Image.fromarray(mask).save(folder / "test/Ungood/label/test_Ungood_0.jpg", quality=50)
    datamodule = datamodule_for(tmp_path)
    datamodule.setup("test")
    items = {Path(item.image_path).name: item for item in datamodule.test_data}
    low, high = np.percentile(pixels, (0.5, 99.5))
    expected = np.clip((pixels - low) / (high - low), 0, 1)
    np.testing.assert_allclose(items["test_good_0.png"].image[0], expected, atol=1e-6)
    assert int(items["test_Ungood_0.png"].gt_mask.sum()) == 24


def test_a_test_reads_nothing_of_the_train_split_beforehand(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "Brain", "label")
    (folder / "train/good/train_good_0.png").write_bytes(b"words")
    datamodule_for(tmp_path).setup("test")
    with pytest.raises(ValueError, match=r"1 file cannot be used.*\n.*train_good_0\.png"):
        datamodule_for(tmp_path).setup("fit")


def test_copies_of_training_images_in_the_published_parts_are_reported_before_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_set(tmp_path / "Brain", "label")
    pixels = np.random.default_rng(0).integers(0, 256, SIZE[::-1]).astype(np.uint8)
    for path in ("train/good/copy.png", "valid/good/img/saved_again.bmp", "test/good/img/saved_again.tif"):
        Image.fromarray(pixels).save(folder / path)
    datamodule = datamodule_for(tmp_path)
    datamodule.setup("fit")
    assert "1 images of the test part are copies of training or validation images" in caplog.text
    assert "1 images of the validation part are copies of training images" in caplog.text
    assert len(datamodule.test_data) == COUNTS["test/good"] + COUNTS["test/Ungood"] + 1  # as published


def test_sets_without_masks_yield_batches_without_masks(bmad_root: tuple[str, Path]) -> None:
    _, root = bmad_root
    datamodule = datamodule_for(root, "Retina_OCT2017", augmentations=Resize((6, 6)))
    datamodule.setup()
    batch = next(iter(datamodule.test_dataloader()))
    assert batch.gt_mask is None
    assert batch.image.shape == (4, 3, 6, 6)


def test_available_sets_names_all_six_in_every_layout(bmad_root: tuple[str, Path]) -> None:
    _, root = bmad_root
    assert available_sets(root) == sorted(SUFFIX)


def test_available_sets_ignores_other_folders_and_accepts_the_set_itself(tmp_path: Path) -> None:
    make_set(tmp_path / "Liver_AD", "anomaly_mask", train=False)
    (tmp_path / "bottle" / "test" / "good").mkdir(parents=True)
    (tmp_path / "notes.txt").touch()
    assert available_sets(tmp_path) == ["Liver"]
    assert available_sets(tmp_path / "Liver_AD") == ["Liver"]
    assert available_sets(tmp_path / "absent") == []


@pytest.mark.parametrize(
    ("category", "name"),
    [
        *PUBLISHED_NAMES.items(),
        ("brain", "Brain"),
        ("Chest_AD", "Chest X-ray film"),
        ("BrainMRI", "brain MRI"),
        ("MRIBrain", "MRI brain"),
        ("ChestXray", "chest xray"),
        ("Skin_Lesion", "skin lesion"),
        ("head-CT", "head CT"),
        ("OCT2017", "OCT2017"),
    ],
)
def test_prompt_name_has_published_names_and_splits_others_into_words(category: str, name: str) -> None:
    assert prompt_name(category) == name


def test_folder_names_match_in_any_letter_case(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "brain", "LABEL", image_folder="IMG")
    for split in ("train", "valid", "test"):
        (folder / split / "good").rename(folder / split / "Good")
        if split != "train":
            (folder / split / "Ungood").rename(folder / split / "ungood")
    (folder / "test").rename(folder / "Test")
    datamodule = datamodule_for(tmp_path, "BRAIN")
    datamodule.setup()
    assert label_counts(datamodule.train_data) == (4, 0)
    assert label_counts(datamodule.val_data) == (2, 3)
    assert label_counts(datamodule.test_data) == (5, 6)
    assert datamodule.task == TaskType.SEGMENTATION


def test_a_set_of_any_name_is_read(tmp_path: Path) -> None:
    make_set(tmp_path / "BrainMRI", "label")
    datamodule = datamodule_for(tmp_path, "BrainMRI")
    datamodule.setup()
    assert datamodule.class_name == "brain MRI"
    assert len(datamodule.test_data) == 11


def test_root_may_be_the_folder_of_the_set_and_sets_may_be_links(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "Liver_AD", "anomaly_mask", train=False)
    assert find_set(folder, "Liver") == folder
    (tmp_path / "liver_ct").symlink_to(folder)
    assert find_set(tmp_path, "liver_ct") == tmp_path / "liver_ct"
    own = make_set(tmp_path / "my_copy", "label")
    assert find_set(own, "Brain") == own


def test_root_of_another_set_than_the_category_is_refused(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "Liver_AD", "anomaly_mask", train=False)
    with pytest.raises(ValueError, match="is the set Liver, but category is 'Brain': pass category='Liver'"):
        find_set(folder, "Brain")


def test_folder_with_train_split_is_preferred_over_the_archive(tmp_path: Path) -> None:
    make_set(tmp_path / "Brain_AD", "anomaly_mask", train=False)
    make_set(tmp_path / "Brain", "label")
    assert find_set(tmp_path, "Brain").name == "Brain"
    assert find_set(tmp_path, "Brain_AD").name == "Brain_AD"
    shutil.rmtree(tmp_path / "Brain" / "test")
    assert find_set(tmp_path, "Brain").name == "Brain_AD"


def test_lesion_masks_are_preferred_over_organ_labels(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "Liver", "label")
    make_set(folder, "anomaly_mask")
    samples = read_samples(find_set(tmp_path, "Liver"))
    assert {Path(path).parent.name for path in samples.mask_path if path} == {"anomaly_mask"}


def test_masks_pair_by_stem_where_orphans_and_suffixes_differ(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "Brain", "label", suffix=".jpg")
    masks = folder / "test" / "Ungood" / "label"
    save_image(masks / "a_mask_without_image.png", 255)
    (masks / "test_Ungood_1.png").rename(masks / "test_Ungood_1.BMP")
    samples = read_samples(find_set(tmp_path, "Brain"))
    paired = {Path(row.image_path).name: Path(row.mask_path).name for row in samples.itertuples() if row.mask_path}
    assert len(paired) == 9
    assert paired["test_Ungood_0.jpg"] == "test_Ungood_0.png"
    assert paired["test_Ungood_1.jpg"] == "test_Ungood_1.BMP"
    assert paired["test_Ungood_5.jpg"] == "test_Ungood_5.png"


def test_empty_mask_folder_and_hidden_files_do_not_count(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "Chest", None)
    (folder / "test" / "Ungood" / "label").mkdir()
    (folder / "test" / "Ungood" / "img" / "._test_Ungood_0.png").touch()
    samples = read_samples(find_set(tmp_path, "Chest"))
    assert samples.attrs["task"] == "classification"
    assert len(samples) == sum(COUNTS.values())


def test_train_split_without_images_falls_back_to_normal_images_of_valid(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "Brain", "label", train=False)
    (folder / "train" / "good").mkdir(parents=True)
    datamodule = datamodule_for(tmp_path)
    datamodule.setup()
    assert label_counts(datamodule.train_data) == (2, 0)
    assert set(datamodule.train_data.samples.image_path) < set(datamodule.val_data.samples.image_path)
    assert len(next(iter(datamodule.train_dataloader())).image) == 2


@pytest.mark.parametrize(
    ("mode", "train", "val", "test"),
    [
        ("from_dir", (4, 0), (2, 3), (5, 6)),
        ("same_as_test", (4, 0), (5, 6), (5, 6)),
        ("from_test", (4, 0), (2, 3), (3, 3)),
        ("from_train", (2, 0), (2, 0), (5, 6)),
        ("none", (4, 0), None, (5, 6)),
    ],
)
def test_validation_split_modes(
    tmp_path: Path,
    mode: str,
    train: tuple[int, int],
    val: tuple[int, int] | None,
    test: tuple[int, int],
) -> None:
    make_set(tmp_path / "Brain", "label")
    datamodule = datamodule_for(tmp_path, val_split_mode=mode, seed=0)
    datamodule.setup()
    assert label_counts(datamodule.train_data) == train
    assert label_counts(datamodule.test_data) == test
    assert datamodule.test_data.task == TaskType.SEGMENTATION
    assert hasattr(datamodule, "val_data") == (val is not None)
    if val:
        assert label_counts(datamodule.val_data) == val


def test_missing_valid_split_is_an_error_only_where_it_is_used(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "Brain", "label")
    shutil.rmtree(folder / "valid")
    with pytest.raises(FileNotFoundError, match=r"valid/Ungood .* holds test, train\. Add the split, or pass"):
        datamodule_for(tmp_path).setup()
    datamodule = datamodule_for(tmp_path, val_split_mode="same_as_test")
    datamodule.setup()
    assert label_counts(datamodule.val_data) == (5, 6)


def test_set_without_normal_images_to_train_on_is_refused(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "Brain_AD", "anomaly_mask", train=False)
    shutil.rmtree(folder / "valid")
    with pytest.raises(FileNotFoundError, match=r"No normal image to train on .* looked for train/good and valid/good"):
        datamodule_for(tmp_path, val_split_mode="same_as_test").setup()


def test_missing_masks_are_listed_before_training(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "Brain", "label")
    (folder / "test" / "Ungood" / "label" / "test_Ungood_3.png").unlink()
    (folder / "valid" / "Ungood" / "label" / "valid_Ungood_1.png").unlink()
    with pytest.raises(ValueError, match="2 files cannot be used") as error:
        datamodule_for(tmp_path).setup("fit")
    for name in ("test_Ungood_3.png", "valid_Ungood_1.png"):
        assert f"{name}: abnormal, but without a mask of the same stem" in str(error.value)


def test_masks_of_another_size_are_listed_with_both_sizes(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "Brain", "label")
    save_image(folder / "test" / "Ungood" / "label" / "test_Ungood_2.png", 255, size=(24, 16))
    save_image(folder / "test" / "good" / "label" / "test_good_0.png", 0, size=(24, 16))  # never read
    with pytest.raises(ValueError, match="1 file cannot be used") as error:
        datamodule_for(tmp_path).setup("fit")
    assert "test_Ungood_2.png: this mask is 24x16 (width x height), its image 12x8" in str(error.value)


def test_wrong_tree_names_what_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    make_set(tmp_path / "Liver", "label")
    (tmp_path / "Brain" / "images").mkdir(parents=True)
    for i in range(30):
        (tmp_path / f"note_{i:02}.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"No set 'Brain'") as error:
        datamodule_for(tmp_path).prepare_data()
    message = str(error.value)
    assert "looked for Brain/ and Brain_AD/" in message
    assert "holds Brain, Liver, note_00.txt" in message
    assert "note_17.txt and 12 more." in message
    assert f"{tmp_path / 'Brain'} holds images." in message
    assert "Sets found: Liver." in message


def test_test_split_without_images_names_what_the_folder_holds(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "Brain", None)
    shutil.rmtree(folder / "test" / "good")
    save_image(folder / "test" / "good" / "pictures" / "0.png", 0)
    with pytest.raises(FileNotFoundError, match=r"No image in .*good.* holds pictures"):
        datamodule_for(tmp_path).setup()


def test_only_an_absent_root_of_a_published_set_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads: list[Path] = []

    def download(root: Path, _info: object) -> None:
        downloads.append(root)
        make_set(root / "Brain", "label")

    monkeypatch.setattr("anomalib.data.datamodules.image.bmad.download_and_extract", download)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        datamodule_for(tmp_path / "absent", "BrainMRI").prepare_data()
    with pytest.raises(FileNotFoundError, match="holds nothing"):
        datamodule_for(tmp_path).prepare_data()
    assert downloads == []
    for _ in range(2):
        datamodule_for(tmp_path / "BMAD").prepare_data()
    assert downloads == [tmp_path / "BMAD"]


def test_command_line_finds_the_datamodule_by_its_short_name(tmp_path: Path) -> None:
    make_set(tmp_path / "Brain", "label")
    config = tmp_path / "data.yaml"
    config.write_text(f"class_path: MedicalBMAD\ninit_args:\n  root: {tmp_path}\n  category: Brain\n", encoding="utf-8")
    datamodule = AnomalibDataModule.from_config(config)
    datamodule.setup()
    assert isinstance(datamodule, MedicalBMAD)
    assert len(datamodule.test_data) == 11
