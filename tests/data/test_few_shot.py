# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Few-shot episodes: which images become supports, what is left to evaluate, and what the batches hold."""

import hashlib
import logging
import re
import shutil
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.data.utils import ValSplitMode
from PIL import Image
from torch import Tensor

from anomalib_mvfa.data import FewShot, MedicalBMAD
from anomalib_mvfa.data.augmentation import support_version
from anomalib_mvfa.data.few_shot import SupportDataset

SEEDS = range(4)


def few_shot(source, **options) -> FewShot:
    data = FewShot(source, **options)
    data.setup("fit")
    return data


def paths(part) -> set[str]:
    return set(part.samples.image_path)


def digests(part) -> set[str]:
    return {hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in part.samples.image_path}


def supports(data, label: int) -> list[str]:
    samples = data.train_data.samples
    return samples.image_path[samples.label_index == label].tolist()


def test_training_shows_eleven_versions_of_each_support_abnormal_block_first(make_folder):
    data = few_shot(make_folder(12, 12), k_shot=2, shuffle=False)
    batches = list(data.train_dataloader())
    assert [int(batch.gt_label) for batch in batches] == [1] * 22 + [0] * 22
    abnormal, normal = supports(data, 1), supports(data, 0)
    assert [batch.image_path[0] for batch in batches] == abnormal * 11 + normal * 11
    assert [batch.mask_path[0] for batch in batches[:2]] == [path.replace("abnormal", "masks") for path in abnormal]
    for index, batch in enumerate(batches):
        version, position = divmod(index % 22, 2)
        original = data.train_data.support(position + 2 * (index >= 22))
        expected = support_version(original.image.as_subclass(Tensor)[None], version)
        torch.testing.assert_close(batch.image.as_subclass(Tensor), expected, rtol=0, atol=0)
    assert all(bool(batch.gt_mask.any()) == bool(batch.gt_label) for batch in batches)


@pytest.mark.parametrize("names", [("00.png 01.png 02.png", "02.png"), ("00.png", "01.png 02.png 03.png")])
def test_classes_of_a_list_may_have_different_numbers_of_supports(make_folder, tmp_path, names):
    path = tmp_path / "list.txt"
    path.write_text(f"n-0: {names[0]}\na-0: {names[1]}\n")
    data = few_shot(make_folder(12, 12), support_list=path, shuffle=False).train_data
    normal, abnormal = (text.split() for text in names)
    items = [data[index] for index in range(len(data))]
    assert [Path(item.image_path).name for item in items] == abnormal * 11 + normal * 11
    assert [int(item.gt_label) for item in items] == [1] * 11 * len(abnormal) + [0] * 11 * len(normal)
    for index, item in enumerate(items[-11 * len(normal) :]):
        expected = support_version(data.support(index % len(normal) + len(abnormal)).image[None], index // len(normal))
        torch.testing.assert_close(item.image.as_subclass(Tensor), expected[0].as_subclass(Tensor), rtol=0, atol=0)


def test_order_without_shuffling_is_the_same_in_every_epoch(make_folder):
    data = few_shot(make_folder(12, 12), k_shot=2, shuffle=False)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(5)
    assert list(loader.sampler) == list(range(44))


def test_order_depends_on_seed_and_epoch_only(make_folder):
    source = make_folder(12, 12)

    def order(seed: int, epoch: int) -> list[int]:
        torch.rand(3)  # the global generator moves on
        sampler = few_shot(source, k_shot=2, seed=seed).train_dataloader().sampler
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 3) == order(0, 3)
    assert sorted(order(0, 3)) == list(range(44))
    assert order(0, 3) != order(0, 4)
    assert order(0, 3) != order(1, 3)


@pytest.mark.parametrize("mode", [ValSplitMode.FROM_TEST, ValSplitMode.SAME_AS_TEST, ValSplitMode.NONE])
def test_supports_are_in_neither_validation_nor_test(make_folder, mode):
    source = make_folder(12, 12)
    source.val_split_mode = mode
    for seed in SEEDS:
        data = few_shot(source, k_shot=4, seed=seed)
        evaluated = paths(data.test_data) | (paths(data.val_data) if mode != ValSplitMode.NONE else set())
        assert len(paths(data.train_data)) == 8
        assert not paths(data.train_data) & evaluated


def test_copies_of_supports_are_in_neither_validation_nor_test(make_folder, caplog):
    source = make_folder(12, 12)
    root = Path(source.root)
    shutil.copytree(root / "normal", root / "normal_test")
    for folder in ("abnormal", "masks"):
        for path in list((root / folder).iterdir()):
            shutil.copy(path, path.with_stem(f"{path.stem}_copy"))
    source.normal_test_dir = "normal_test"
    with caplog.at_level(logging.WARNING):
        data = few_shot(source, k_shot=3)
    assert not digests(data.train_data) & (digests(data.val_data) | digests(data.test_data))
    left = [path for part in (data.val_data, data.test_data) for path in paths(part) if "normal_test" in path]
    assert len(left) == 12 - 3
    assert "copies of supports" in caplog.text


def test_resaved_copies_of_supports_are_in_neither_validation_nor_test(make_folder):
    source = make_folder(12, 12)
    root = Path(source.root)
    for folder in ("abnormal", "masks"):
        for path in list((root / folder).iterdir()):
            Image.open(path).convert("RGB").save(path.with_name(f"{path.stem}_again.bmp"))
    data = few_shot(source, k_shot=3)
    stems = {Path(path).stem.removesuffix("_again") for path in supports(data, 1)}
    evaluated = {
        Path(path).stem.removesuffix("_again")
        for path in paths(data.val_data) | paths(data.test_data)
        if "abnormal" in path
    }
    assert len(evaluated) == 12 - 3
    assert not stems & evaluated


def test_supports_come_from_different_patients_by_a_pattern_of_names(make_folder, caplog):
    source = make_folder(24, 24)
    root = Path(source.root)
    for folder in ("normal", "abnormal", "masks"):  # 24 slices of 6 patients
        for index, path in enumerate(sorted((root / folder).iterdir())):
            path.rename(path.with_name(f"{folder[0].replace('m', 'a')}{index // 4}_{index % 4}.png"))
    for seed in SEEDS:
        data = few_shot(source, k_shot=2, seed=seed, group_by=r"(?P<patient>\w\d+)_\d+")
        patients = [Path(path).stem[:2] for path in paths(data.train_data)]
        assert len(set(patients)) == 4
        assert not set(patients) & {Path(path).stem[:2] for path in paths(data.val_data) | paths(data.test_data)}
    assert "supports come from" not in caplog.text
    few_shot(source, k_shot=7, group_by=r"(\w\d+)_\d+", abnormal_source="synthetic")
    assert re.search(r"The 7 normal supports come from [1-6] groups", caplog.text)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("[", "is no regular expression"),
        (r"\d+", "needs one group in parentheses"),
        (r"(x)_\d", r"does not match the names of \d+ of \d+ images: .*\.png. Correct the pattern"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(make_folder, pattern, message):
    with pytest.raises(ValueError, match=message):
        few_shot(make_folder(), k_shot=1, group_by=pattern)


def test_sixteen_bit_images_and_jpeg_masks_of_folder_are_read_as_medical_folder_does(make_folder, caplog):
    source = make_folder(8, 8)
    root = Path(source.root)
    ramp = np.linspace(0, 4095, 72 * 64).reshape(72, 64)
    for index, path in enumerate(sorted((root / "normal").iterdir())):
        Image.fromarray(np.roll(ramp, index, 0).astype(np.uint16)).save(path)
    expected = {}
    for path in list((root / "masks").iterdir()):
        mask = Image.open(path)
        expected[path.stem] = np.asarray(mask).astype(bool).sum()
        mask.save(path.with_suffix(".jpg"), quality=60)
        path.unlink()
    data = few_shot(source, k_shot=2)
    low, high = np.percentile(ramp.astype(np.uint16), (0.5, 99.5))
    image = data.train_data.support(2).image[0].numpy()
    assert np.sort(image.ravel()) == pytest.approx(
        np.clip((np.sort(ramp.astype(np.uint16).ravel()) - low) / (high - low), 0, 1), abs=1e-6
    )
    for item in data.test_data:
        if item.gt_label:
            assert int(item.gt_mask.sum()) == expected[Path(item.image_path).stem]
    assert re.search(r"masks are JPEG files, whose edges are blurred: values above half count as lesion", caplog.text)


@pytest.mark.parametrize(
    ("stage", "part", "refused"), [("test", "val", False), ("test", "test", True), ("fit", "test", True)]
)
def test_only_what_a_stage_reads_is_checked_before_it(make_folder, stage, part, refused):
    source = make_folder(8, 8)
    data = few_shot(source, k_shot=2)
    again = FewShot(source, k_shot=2)
    path = Path(getattr(data, f"{part}_data").samples.image_path[0])
    path.write_bytes(b"words")
    with pytest.raises(ValueError, match="1 file cannot be used") if refused else nullcontext():
        again.setup(stage)


def test_supports_of_fewer_shots_are_among_those_of_more(make_folder):
    source = make_folder(12, 12)
    for seed in SEEDS:
        few, more = (few_shot(source, k_shot=k, seed=seed) for k in (2, 4))
        for label in (0, 1):
            assert supports(more, label)[:2] == supports(few, label)


def test_each_seed_draws_its_own_supports_and_keeps_the_test_part(make_folder):
    source = make_folder(12, 12)
    source.seed = None
    episodes = [few_shot(source, k_shot=3, seed=seed) for seed in SEEDS]
    for label in (0, 1):
        assert len({tuple(supports(data, label)) for data in episodes}) == len(episodes)
    assert len({frozenset(paths(data.test_data)) for data in episodes}) == 1
    again = few_shot(source, k_shot=3, seed=0)
    assert paths(again.train_data) == paths(episodes[0].train_data)


def test_abnormal_supports_come_from_validation(make_folder):
    source = make_folder(12, 12)
    data = few_shot(source, k_shot=2)
    assert set(supports(data, 1)) <= paths(source.val_data)
    assert set(supports(data, 0)) <= paths(source.train_data)
    assert paths(data.test_data) == paths(source.test_data)
    assert len(data.val_data) == len(source.val_data) - 2


def test_abnormal_supports_come_from_test_without_a_validation_part_and_the_log_says_so(make_folder, caplog):
    source = make_folder(12, 12)
    source.val_split_mode = ValSplitMode.NONE
    with caplog.at_level(logging.WARNING):
        episodes = [few_shot(source, k_shot=2, seed=seed) for seed in SEEDS]
    assert "2 abnormal supports were taken from the test part" in caplog.text
    for data in episodes:
        assert paths(data.test_data) | set(supports(data, 1)) == paths(source.test_data)
        assert len(data.test_data) == len(source.test_data) - 2
        assert data.val_dataloader() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_shot": 9}, r"9 normal supports .* training part .* disks .* has 5 normal images\. Lower k_shot"),
        ({"k_shot": 4}, r"4 abnormal supports .* validation part .* has 3 abnormal images.*'test' or 'synthetic'"),
    ],
)
def test_more_shots_than_images_are_refused_with_part_count_and_remedy(make_folder, options, message):
    with pytest.raises(ValueError, match=message):
        few_shot(make_folder(6, 6), **options)


def test_a_source_without_abnormal_images_is_pointed_to_synthetic_lesions(make_folder):
    source = make_folder(8, 0)
    with pytest.raises(ValueError, match=r"0 abnormal images.*'synthetic'"):
        few_shot(source, k_shot=2)
    data = few_shot(source, k_shot=2, abnormal_source="synthetic")
    assert len(data.train_data) == 44


def test_synthetic_lesions_change_the_support_where_the_mask_says(make_folder):
    data = few_shot(make_folder(8, 8, masks=False), k_shot=2, abnormal_source="synthetic", shuffle=False)
    assert supports(data, 1) == []
    items = [data.train_data[index] for index in range(len(data.train_data))]
    assert [int(item.gt_label) for item in items] == [1] * 22 + [0] * 22
    for index, item in enumerate(items):
        assert bool(item.gt_mask.any()) == (index < 22)
    for index in range(2):  # version 0: only the lesion differs from the support
        changed = (items[index].image - data.train_data.support(index).image).abs().amax(0) > 0
        assert not bool((changed & ~items[index].gt_mask.bool()).any())
        assert bool(changed.any())


def test_synthetic_lesions_depend_on_seed_and_epoch_only(make_folder):
    samples = few_shot(make_folder(8, 8), k_shot=2, abnormal_source="synthetic").train_data.samples

    def lesions(seed: int, epoch: int) -> Tensor:
        torch.rand(3)
        dataset = SupportDataset(samples, samples.iloc[:0], "segmentation", seed=seed)
        dataset.epoch = epoch
        return torch.stack([dataset[index].image.as_subclass(Tensor) for index in range(6)])

    assert torch.equal(lesions(0, 1), lesions(0, 1))
    for other in (lesions(0, 2), lesions(1, 1)):
        assert all(not torch.equal(one, two) for one, two in zip(lesions(0, 1), other, strict=True))


def test_synthetic_lesions_of_a_support_take_their_texture_from_the_next(make_folder):
    samples = few_shot(make_folder(12, 12), k_shot=4, abnormal_source="synthetic").train_data.samples

    def lesions(rows: list[int]) -> list[Tensor]:
        dataset = SupportDataset(samples.iloc[rows], samples.iloc[:0], "segmentation", seed=0)
        return [torch.stack([dataset[3 * version + index].image for version in range(11)]) for index in range(3)]

    for index, (one, two) in enumerate(zip(lesions([0, 1, 2]), lesions([0, 1, 3]), strict=True)):
        assert torch.equal(one, two) == (index == 0)


def test_loader_tells_the_epoch_to_the_lesions(make_folder):
    data = few_shot(make_folder(8, 8), k_shot=1, abnormal_source="synthetic")
    data.train_dataloader().sampler.set_epoch(7)
    assert data.train_data.epoch == 7


def test_support_list_names_the_supports_in_its_order(make_folder, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("n-0: 00.png 01.png\na-0: 02.png 03.png\nn-1: 05.png 02.png\na-1: 07.png 04.png\n")
    source = make_folder(12, 12)
    data = few_shot(source, support_list=path, draw=1, k_shot=1)
    assert [Path(name).name for name in supports(data, 0)] == ["05.png", "02.png"]
    assert [Path(name).name for name in supports(data, 1)] == ["07.png", "04.png"]
    assert not paths(data.train_data) & (paths(data.val_data) | paths(data.test_data))
    everything = paths(source.val_data) | paths(source.test_data)
    assert paths(data.val_data) | paths(data.test_data) == everything - paths(data.train_data)


def bmad(root: Path, **options) -> MedicalBMAD:
    """A set whose splits have images of the same names, laid out like the archives of MVFA."""
    for grey, (part, label) in enumerate(product(("valid", "test"), ("good", "Ungood"))):
        for index in range(4):
            image = root / "Brain_AD" / part / label / "img" / f"{index}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (16, 16), 50 * grey + index).save(image)
    return MedicalBMAD(root=root, category="Brain", num_workers=0, **options)


@pytest.mark.parametrize("mode", ["from_dir", "same_as_test"])
def test_listed_supports_of_bmad_are_those_of_its_valid_split(tmp_path, mode):
    path = tmp_path / "2-shot.txt"
    path.write_text("n-0: 3.png 1.png\na-0: 0.png 2.png\n")
    data = few_shot(bmad(tmp_path, val_split_mode=mode), support_list=path)
    valid = tmp_path / "Brain_AD" / "valid"
    assert supports(data, 0) == [str(valid / "good" / "img" / name) for name in ("3.png", "1.png")]
    assert supports(data, 1) == [str(valid / "Ungood" / "img" / name) for name in ("0.png", "2.png")]
    assert len(data.test_data) == 8


def test_abnormal_supports_of_bmad_come_from_valid_even_when_validation_is_the_test_part(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        data = few_shot(bmad(tmp_path, val_split_mode="same_as_test"), k_shot=3)
    assert {Path(path).parts[-4] for path in supports(data, 1)} == {"valid"}
    assert len(data.test_data) == 8
    assert "test part" not in caplog.text


def test_abnormal_supports_from_a_validation_part_that_is_the_test_part_are_said_to_be(make_folder, caplog):
    source = make_folder(12, 12)
    source.val_split_mode = ValSplitMode.SAME_AS_TEST
    with caplog.at_level(logging.WARNING):
        data = few_shot(source, k_shot=2)
    assert "2 abnormal supports were taken from the test part" in caplog.text
    assert not set(supports(data, 1)) & paths(data.test_data)


def test_supports_for_the_bank_are_versions_of_normal_and_unchanged_abnormal(make_folder):
    data = few_shot(make_folder(12, 12), k_shot=2)
    support = data.support
    assert support.normal.shape == (11, 2, 3, 64, 72)
    assert torch.equal(support.normal[0, 1], data.train_data.support(3).image.as_subclass(Tensor))
    assert torch.equal(support.abnormal[1], data.train_data.support(1).image.as_subclass(Tensor))


def test_source_may_be_a_mapping_as_the_benchmark_hands_it(make_folder):
    folder = make_folder(12, 12)
    options = {"name": "disks", "root": str(folder.root), "normal_dir": "normal", "abnormal_dir": "abnormal"}
    mapping = {"class_path": "Folder", "init_args": {**options, "mask_dir": "masks", "num_workers": 0}}
    data = few_shot(mapping, k_shot=2)
    assert isinstance(data.source, Folder)
    assert data.name == "disks"
    assert paths(data.train_data) == paths(few_shot(folder, k_shot=2).train_data)


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        (None, {}, TypeError, "NoneType"),
        ("folder", {"k_shot": 0}, ValueError, "at least 1, got 0"),
        ("folder", {"abnormal_source": "train"}, ValueError, "auto, validation, test, synthetic, got 'train'"),
    ],
)
def test_arguments_are_checked_at_once(make_folder, source, options, error, message):
    with pytest.raises(error, match=message):
        FewShot(source and make_folder(), **options)


def test_folder_without_masks_gives_batches_without_masks(make_folder):
    data = few_shot(make_folder(8, 8, masks=False), k_shot=2)
    batches = [*data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()]
    assert all(batch.gt_mask is None for batch in batches)
    assert sorted(int(label) for batch in batches[:44] for label in batch.gt_label) == [0] * 22 + [1] * 22


def test_missing_and_empty_folders_are_refused_by_name(make_folder):
    source = make_folder()
    for path in (Path(source.root) / "normal").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=f"Folder at {source.root} could not be read"):
        few_shot(source, k_shot=1)
    shutil.rmtree(source.root)
    with pytest.raises(ValueError, match=f"Folder at {source.root} could not be read"):
        few_shot(source, k_shot=1)


def test_mask_of_another_size_is_refused_before_training(make_folder):
    source = make_folder()
    mask = Path(source.root) / "masks" / "03.png"
    Image.new("L", (10, 12)).save(mask)
    with pytest.raises(ValueError, match=rf"1 file cannot be used.*\n  {mask}: this mask is 10x12 .*its image 72x64"):
        few_shot(source, k_shot=1)


def test_missing_mask_is_refused_before_training(make_folder):
    source = make_folder()
    (Path(source.root) / "masks" / "03.png").unlink()
    with pytest.raises(ValueError, match=f"Folder at {source.root} could not be read"):
        few_shot(source, k_shot=1)


def test_every_damaged_support_and_evaluation_image_is_listed_at_once(make_folder):
    source = make_folder(normal=4, abnormal=4)
    root = Path(source.root)
    few_shot(source, k_shot=1)  # what was in order once is looked at again
    reasons = {
        root / "abnormal" / "00.png": "the file is empty",
        root / "abnormal" / "01.png": "truncated, damaged or of an unsupported pixel format",
        root / "abnormal" / "02.png": "not an image of a supported format",
        root / "masks" / "03.png": "the file is empty",
    }
    for path, reason in reasons.items():
        whole = path.read_bytes()
        path.write_bytes({"the": b"", "tru": whole[: len(whole) // 2], "not": b"words"}[reason[:3]])
    for path in (root / "normal").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"\d files cannot be used") as refusal:
        few_shot(source, k_shot=2)
    for path, reason in reasons.items():
        assert f"{path}: {reason}" in str(refusal.value)
    assert str(refusal.value).count(f"{root / 'normal'}") >= 2  # the supports at least; training uses no other


def test_unchanged_files_are_read_once_a_process(make_folder, monkeypatch):
    source = make_folder(8, 8)
    few_shot(source, k_shot=2)
    reading = []
    monkeypatch.setattr("anomalib_mvfa.data.base._problems", lambda unit: reading.extend(unit[1]) or [])
    few_shot(source, k_shot=2)
    assert not reading
    image = Path(source.root) / "abnormal" / "03.png"
    image.write_bytes(image.read_bytes() + b" ")
    few_shot(source, k_shot=2)
    assert len(reading) == 1


def test_reading_beforehand_leaves_the_random_numbers_alone(make_folder):
    source = make_folder(8, 8)
    drawn = []
    for _ in range(2):  # the first time the files are read, the second time they are known
        torch.manual_seed(0)
        few_shot(source, k_shot=2)
        drawn.append(torch.rand(3))
    assert torch.equal(drawn[0], drawn[1])
