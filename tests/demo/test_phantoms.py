# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Generated images: reproducible, lesions only where the mask says, one scanner a set, no trivial shortcut."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from anomalib_mvfa.demo.phantoms import (
    LESIONS,
    MODALITIES,
    TYPICAL,
    Phantom,
    draw_phantom,
    write_phantoms,
)


def _pair(modality: str, lesion: str, seed: int, size: int = 112) -> tuple[Phantom, np.ndarray]:
    """The same patient with a lesion, and the change it makes in grey levels."""
    ill = draw_phantom(modality, size, lesion, np.random.default_rng(seed))
    well = draw_phantom(modality, size, None, np.random.default_rng(seed))
    return ill, np.abs(ill.image.astype(float) - well.image).mean(axis=2)


def _auroc(normal: np.ndarray, abnormal: np.ndarray) -> float:
    return float((abnormal[:, None] > normal).mean() + 0.5 * (abnormal[:, None] == normal).mean())


@pytest.mark.parametrize("modality", MODALITIES)
def test_equal_generator_states_give_equal_images(modality: str) -> None:
    first, second, other = (draw_phantom(modality, 112, "random", np.random.default_rng(s)) for s in (3, 3, 4))
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.mask, second.mask)
    assert first.lesion == second.lesion
    assert not np.array_equal(first.image, other.image)


def test_one_generator_gives_a_new_image_each_time() -> None:
    rng = np.random.default_rng(0)
    images = [draw_phantom("liver_ct", rng=rng).image for _ in range(3)]
    assert not np.array_equal(images[0], images[1])
    assert not np.array_equal(images[1], images[2])


@pytest.mark.parametrize("modality", MODALITIES)
def test_normal_images_have_no_lesion(modality: str) -> None:
    phantom = draw_phantom(modality, 64, rng=np.random.default_rng(1))
    assert phantom.image.shape == (64, 64, 3)
    assert phantom.image.dtype == np.uint8
    assert not phantom.mask.any()
    assert phantom.lesion is None
    assert phantom.modality == modality


@pytest.mark.parametrize("lesion", LESIONS)
@pytest.mark.parametrize("modality", MODALITIES)
def test_a_lesion_changes_its_mask_and_nothing_else(modality: str, lesion: str) -> None:
    inside, outside = [], []
    for seed in range(4):
        phantom, change = _pair(modality, lesion, seed)
        assert phantom.lesion == lesion
        assert 0.003 <= phantom.mask.mean() < 0.25
        # Blur carries a soft edge a little way out of the mask.
        far = cv2.dilate(phantom.mask.astype(np.uint8), np.ones((13, 13), np.uint8)) == 0
        inside.append(change[phantom.mask].mean())
        outside.append(change[far].mean())
    assert min(inside) > 3
    assert np.mean(inside) > 10
    assert max(outside) < 0.3


@pytest.mark.parametrize("modality", MODALITIES)
def test_most_of_the_change_lies_in_the_mask(modality: str) -> None:
    shares = []
    for seed in range(15):
        phantom, change = _pair(modality, LESIONS[seed % 5], 100 + seed)
        shares.append(change[phantom.mask].sum() / change.sum())
    assert np.mean(shares) > 0.8


@pytest.mark.parametrize("modality", ["brain_mri", "chest_xray", "liver_ct"])
def test_lesions_keep_away_from_the_edge_of_the_body(modality: str) -> None:
    for seed in range(16):
        phantom, change = _pair(modality, LESIONS[seed % 4], 200 + seed)
        rows, columns = np.nonzero(phantom.mask)
        assert min(rows.min(), columns.min()) > 2
        assert max(rows.max(), columns.max()) < 109
        # The air around the body stays as it was.
        assert change[:, :2].max() < 12
        assert change[:2].max() < 12


@pytest.mark.parametrize(("lesion", "sign"), [("bright", 1), ("dark", -1)])
@pytest.mark.parametrize("modality", MODALITIES)
def test_bright_and_dark_lesions_are_what_they_are_called(modality: str, lesion: str, sign: int) -> None:
    for seed in range(8):
        ill = draw_phantom(modality, 112, lesion, np.random.default_rng(seed))
        well = draw_phantom(modality, 112, None, np.random.default_rng(seed))
        change = (ill.image.astype(float) - well.image)[ill.mask].mean()
        assert sign * change > 2


@pytest.mark.parametrize("modality", MODALITIES)
def test_brightness_does_not_tell_normal_from_abnormal(modality: str) -> None:
    normal = [draw_phantom(modality, 112, None, np.random.default_rng((1, i))).image for i in range(60)]
    abnormal = [draw_phantom(modality, 112, "random", np.random.default_rng((2, i))).image for i in range(60)]
    for statistic in (np.mean, np.max, np.var):
        area = _auroc(np.array([statistic(i) for i in normal]), np.array([statistic(i) for i in abnormal]))
        assert 0.35 < area < 0.65, statistic.__name__
    means = np.array([image.mean() for image in normal])
    assert means.std() / means.mean() > 0.07


def test_random_lesions_are_of_every_kind() -> None:
    rng = np.random.default_rng(0)
    assert {draw_phantom("retinal_oct", 64, "random", rng).lesion for _ in range(60)} == set(LESIONS)


@pytest.mark.parametrize("size", [32, 224])
def test_every_modality_can_be_drawn_at_other_sizes(size: int) -> None:
    for modality in MODALITIES:
        phantom, change = _pair(modality, "bright", 5, size)
        assert phantom.image.shape == (size, size, 3)
        assert change[phantom.mask].mean() > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("knee_mri", 112, None), "knee_mri.*brain_mri"),
        (("brain_mri", 112, "shiny"), "shiny.*displaced"),
        (("brain_mri", 16, None), "16 pixels.*32"),
    ],
)
def test_wrong_arguments_are_named_with_the_remedy(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_phantom(*arguments)


def test_data_sets_are_written_in_the_layout_of_bmad(tmp_path: Path) -> None:
    counts = {"train": 3, "valid": 1, "test": 2}
    assert write_phantoms(tmp_path, ["brain_mri", "liver_ct"], counts, size=48) == tmp_path
    expected = {
        "train/good": 3,
        "valid/good/img": 1,
        "valid/Ungood/img": 1,
        "valid/Ungood/label": 1,
        "test/good/img": 2,
        "test/Ungood/img": 2,
        "test/Ungood/label": 2,
    }
    assert {folder.name for folder in tmp_path.iterdir()} == {"BrainMRI", "LiverCT"}
    for name in ("BrainMRI", "LiverCT"):
        written = [p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*.png")]
        assert {folder: sum(p.parent.as_posix() == folder for p in written) for folder in expected} == expected
        assert len(written) == sum(expected.values())
    for label in tmp_path.glob("*/*/Ungood/label/*.png"):
        mask = np.asarray(Image.open(label))
        assert set(np.unique(mask)) == {0, 255}
        assert mask.shape == (48, 48)
        assert (label.parents[1] / "img" / label.name).is_file()


def test_an_image_does_not_depend_on_how_many_are_written(tmp_path: Path) -> None:
    few = write_phantoms(tmp_path / "few", ["retinal_oct"], {"train": 1, "valid": 0, "test": 1}, size=48)
    many = write_phantoms(tmp_path / "many", ["liver_ct", "retinal_oct"], {"train": 2, "valid": 1, "test": 2}, size=48)
    other = write_phantoms(tmp_path / "other", ["retinal_oct"], {"train": 1, "valid": 0, "test": 1}, size=48, seed=1)
    files = sorted(p.relative_to(few) for p in few.rglob("*.png"))
    assert len(files) == 4
    for file in files:
        assert (few / file).read_bytes() == (many / file).read_bytes()
        assert (few / file).read_bytes() != (other / file).read_bytes()


def test_no_image_is_written_twice(tmp_path: Path) -> None:
    root = write_phantoms(tmp_path, ["breast_ultrasound"], {"train": 3, "valid": 3, "test": 3}, size=48)
    images = [p.read_bytes() for p in root.rglob("*.png") if p.parent.name != "label"]
    assert len(set(images)) == len(images) == 15


def test_unknown_sets_and_splits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="knee"):
        write_phantoms(tmp_path, ["knee"])
    with pytest.raises(ValueError, match="holdout"):
        write_phantoms(tmp_path, ["brain_mri"], {"holdout": 3})
    assert not list(tmp_path.iterdir())


def test_the_command_writes_what_it_is_asked_for(tmp_path: Path) -> None:
    options = ["--root", tmp_path, "--modalities", "[histology]", "--counts", "{train: 1, valid: 0, test: 1}"]
    command = [sys.executable, "-m", "anomalib_mvfa.demo.phantoms", *map(str, options), "--size", "48"]
    subprocess.run(command, check=True)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert files == [
        f"Histology/{path}/0000.png" for path in ("test/Ungood/img", "test/Ungood/label", "test/good/img", "train/good")
    ]


def _contrasts(modality: str, scanner: int | None) -> np.ndarray:
    """Ratio of bright to dark tissue in 24 normal images, which gain does not change."""
    images = [draw_phantom(modality, 64, None, np.random.default_rng((4, i)), scanner).image for i in range(24)]
    return np.array([np.divide(*np.percentile(image[image > 20], (85, 35))) for image in images])


@pytest.mark.parametrize("modality", ["brain_mri", "liver_ct", "retinal_oct", "breast_ultrasound"])
def test_images_of_one_scanner_have_one_contrast(modality: str) -> None:
    one, many = _contrasts(modality, 7), _contrasts(modality, None)
    assert one.std() / one.mean() < 0.8 * many.std() / many.mean()


def test_scanners_differ_and_keep_one_protocol() -> None:
    rngs = [np.random.default_rng((9, i)) for i in range(12)]
    assert {draw_phantom("brain_mri", 64, None, rng, scanner=3).variant for rng in rngs} == {"FLAIR"}
    contrasts = [_contrasts("liver_ct", scanner).mean() for scanner in range(5)]
    assert max(contrasts) / min(contrasts) > 1.05


@pytest.mark.parametrize("modality", MODALITIES)
def test_no_trivial_score_solves_a_set_from_one_scanner(modality: str) -> None:
    areas = []
    for scanner in range(3):
        kinds = ((None, 4), (None, 50), (TYPICAL[modality], 50))
        few, normal, abnormal = (
            np.stack(
                [
                    draw_phantom(modality, 64, kind, np.random.default_rng((scanner, part, i)), scanner).image
                    for i in range(n)
                ]
            )
            for part, (kind, n) in enumerate(kinds)
        )
        centre = few.mean(0)
        far = [np.square(images - centre).mean((1, 2, 3)) for images in (normal, abnormal)]
        areas.append((_auroc(normal.mean((1, 2, 3)), abnormal.mean((1, 2, 3))), _auroc(*far)))
    brightness, distance = np.mean(areas, axis=0)
    assert 0.33 < brightness < 0.67
    assert distance < 0.72


def test_sets_have_one_scanner_and_typical_lesions_unless_mixed(tmp_path: Path) -> None:
    counts = {"train": 2, "valid": 0, "test": 1}
    write_phantoms(tmp_path / "one", ["liver_ct"], counts, size=48, seed=5)
    write_phantoms(tmp_path / "mixed", ["liver_ct"], counts, size=48, seed=5, mixed=True)
    key = np.random.default_rng((5, 2, 2, 1, 0))
    expected = draw_phantom("liver_ct", 48, "dark", key, scanner=5).image
    written = [
        np.asarray(Image.open(tmp_path / name / "LiverCT/test/Ungood/img/0000.png")) for name in ("one", "mixed")
    ]
    assert np.array_equal(written[0], expected)
    assert not np.array_equal(written[1], expected)
