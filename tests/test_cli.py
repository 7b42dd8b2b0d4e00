# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The stock ``anomalib`` command with MVFA: train, predict, test, export, and what it refuses."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from anomalib.data.utils import read_image
from PIL import Image

from anomalib_mvfa import MVFA

SIZE = 64


def picture(index: int, *, abnormal: bool) -> tuple[Image.Image, Image.Image]:
    """A grey noise image, with a bright rectangle if abnormal, and the mask of the rectangle."""
    pixels = np.random.default_rng(index).integers(90, 130, (SIZE, SIZE), dtype=np.uint8)
    mask = np.zeros_like(pixels)
    if abnormal:
        mask[20:36, 10 + index : 26 + index] = 255
        pixels[mask > 0] = 240
    return Image.fromarray(pixels), Image.fromarray(mask)


def command(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("anomalib"), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def succeed(*arguments: str | Path, cwd: Path) -> None:
    done = command(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """8 normal and 8 abnormal images with masks."""
    root = tmp_path_factory.mktemp("cli")
    for kind in ("normal", "abnormal", "masks"):
        (root / "data" / kind).mkdir(parents=True)
    for index in range(8):
        normal, _ = picture(100 + index, abnormal=False)
        abnormal, mask = picture(index, abnormal=True)
        for kind, image in (("normal", normal), ("abnormal", abnormal), ("masks", mask)):
            image.save(root / "data" / kind / f"{index:02}.png")
    return root


@pytest.fixture(scope="module")
def few_shot(folder) -> list[str]:
    data = {"name": "squares", "root": folder / "data", "normal_dir": "normal", "abnormal_dir": "abnormal"}
    data |= {"mask_dir": "masks", "test_split_ratio": 0.5, "num_workers": 0}  # normal images to validate, too
    options = [f"--data.source.{name}={value}" for name, value in data.items()]
    return ["--data", "FewShot", "--data.source", "Folder", *options, "--trainer.accelerator", "cpu"]


@pytest.fixture(scope="module")
def checkpoint(folder, few_shot) -> Path:
    model = ["--model", "MVFA", "--model.backbone", "tiny", "--trainer.max_epochs", "1"]
    model += ["--model.threshold", "fpr", "--model.target_fpr", "0.1"]
    seeded = ["--data.k_shot", "2", "--seed_everything", "0"]
    succeed("train", *model, *few_shot, *seeded, "--default_root_dir", "trained", cwd=folder)
    return folder / "trained/MVFA/squares/v0/weights/lightning/model.ckpt"


def test_the_seed_of_the_command_is_honoured(checkpoint):
    record = json.loads((checkpoint.parent / "run.json").read_text(encoding="utf-8"))
    assert record["seeds"] == {"global": "0", "torch": 0}


def test_training_leaves_a_checkpoint_and_a_table_that_separates_the_classes(checkpoint):
    assert checkpoint.is_file()
    rows = table(checkpoint.parents[2] / "images" / "predictions.csv")
    scores = {label: [float(row["score"]) for row in rows if row["true_label"] == label] for label in ("0", "1")}
    assert scores["0"]
    assert min(scores["1"]) > max(scores["0"])


def test_prediction_needs_only_checkpoint_and_folder(checkpoint, folder):
    new = folder / "new"
    new.mkdir()
    picture(200, abnormal=False)[0].save(new / "a.png")
    picture(3, abnormal=True)[0].convert("RGB").save(new / "b.jpg", quality=95)
    picture(4, abnormal=True)[0].resize((80, 48)).save(new / "c.tiff")
    known = {f"{index}.png" for index in range(100, 108)}  # normal images of the validation part among them
    for name in known:
        picture(int(name[:3]), abnormal=False)[0].save(new / name)
    succeed("predict", "--model", "MVFA", "--ckpt_path", checkpoint, "--data", new, cwd=folder)
    (predictions,) = (folder / "results").rglob("predictions.csv")
    rows = {Path(row["path"]).name: row for row in table(predictions)}
    assert set(rows) == {"a.png", "b.jpg", "c.tiff"} | known
    assert float(rows["a.png"]["score"]) < min(float(rows[name]["score"]) for name in ("b.jpg", "c.tiff"))
    mvfa = MVFA.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    threshold = mvfa.post_processor.image_threshold
    for name, row in rows.items():
        with torch.no_grad():
            raw = mvfa.model(mvfa.pre_processed(read_image(new / name, as_tensor=True))[None]).pred_score
        assert row["label"] == str(int(raw > threshold))
    assert {row["label"] for row in rows.values()} == {"0", "1"}
    heatmaps = {path.name: Image.open(path).height for path in predictions.parent.rglob("*.png")}
    assert set(heatmaps) == {"a.png", "b.png", "c.png"} | known


def test_medical_folder_reports_what_it_cannot_read_and_the_status_says_so(checkpoint, folder):
    nibabel = pytest.importorskip("nibabel")
    scans = folder / "scans"
    scans.mkdir()
    slices = [np.asarray(picture(index, abnormal=True)[0], np.float32) for index in range(3)]
    nibabel.save(nibabel.Nifti1Image(np.stack(slices, axis=-1), np.diag([1.0, 2, 3, 1])), scans / "volume.nii.gz")
    (scans / "zero.png").write_bytes(b"")
    predict = ["predict", "--model", "MVFA", "--ckpt_path", checkpoint]
    done = command(*predict, "--data", "MedicalFolder", "--data.path", scans, cwd=folder)
    assert done.returncode == 1
    assert "1 of 4 images could not be read" in done.stderr.splitlines()[-1]
    (predictions,) = (folder / "results").rglob("Prediction/**/predictions.csv")
    rows = table(predictions)
    assert [row["error"] for row in rows] == ["", "", "", "the file is empty"]
    assert all(row["score"] for row in rows[:3])
    volume = nibabel.load(predictions.parent / "volume_anomaly.nii.gz")
    assert volume.shape == (SIZE, SIZE, 3)
    assert volume.affine.diagonal().tolist() == [1, 2, 3, 1]


def test_checkpoint_is_tested_on_the_same_images_with_the_same_scores(checkpoint, folder, few_shot):
    arguments = ["--model", "MVFA", "--ckpt_path", checkpoint, *few_shot, "--data.k_shot", "2"]
    succeed("test", *arguments, "--default_root_dir", "tested", cwd=folder)
    (tested,) = (folder / "tested").rglob("predictions.csv")
    trained = {row["path"]: row for row in table(checkpoint.parents[2] / "images" / "predictions.csv")}
    again = {row["path"]: row for row in table(tested)}
    assert again.keys() == trained.keys()
    for path, row in again.items():
        assert row["true_label"] == trained[path]["true_label"]
        # The bank is stored in half precision; a narrow validation range magnifies that.
        assert float(row["score"]) == pytest.approx(float(trained[path]["score"]), abs=0.02)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """4 normal and 4 abnormal images at the model's size, (8, 3, 112, 112)."""
    pictures = [picture(100 + i, abnormal=False)[0] for i in range(4)] + [
        picture(i, abnormal=True)[0] for i in range(4)
    ]
    pixels = np.stack([np.asarray(image.resize((112, 112)), np.float32) / 255 for image in pictures])
    return np.repeat(pixels[:, None], 3, axis=1)


def assert_labels_follow_the_threshold(mvfa: MVFA, images: torch.Tensor, labels: torch.Tensor, masks: torch.Tensor):
    post = mvfa.post_processor
    with torch.no_grad():
        raw = mvfa.model(images)
    assert labels.flatten().bool().tolist() == (raw.pred_score > post.image_threshold).tolist()
    assert set(labels.flatten().bool().tolist()) == {True, False}
    expected = raw.anomaly_map > post.pixel_threshold
    assert float((masks.bool().reshape(expected.shape) == expected).float().mean()) > 0.999
    assert 0 < float(expected.float().mean()) < 1


def test_exported_openvino_model_predicts_as_the_checkpoint(checkpoint, folder, images):
    arguments = ["--export_type", "openvino", "--input_size", "[112,112]", "--export_root", "exported"]
    succeed("export", "--model", "MVFA", "--ckpt_path", checkpoint, *arguments, cwd=folder)
    mvfa = MVFA.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    with torch.no_grad():
        expected = mvfa(torch.from_numpy(images))
    model = folder / "exported/weights/openvino/model.xml"
    # Processors with bfloat16 would otherwise compute with it.
    exported = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images)
    np.testing.assert_allclose(exported["pred_score"].ravel(), expected.pred_score.ravel().numpy(), atol=1e-3)
    np.testing.assert_allclose(exported["anomaly_map"], expected.anomaly_map.numpy(), atol=1e-3)
    labels, masks = (torch.from_numpy(exported[name].astype(bool)) for name in ("pred_label", "pred_mask"))
    assert_labels_follow_the_threshold(mvfa, torch.from_numpy(images), labels, masks)


def test_exported_torch_model_predicts_as_the_checkpoint(checkpoint, folder, images):
    arguments = ["--export_type", "torch", "--export_root", "exported"]
    succeed("export", "--model", "MVFA", "--ckpt_path", checkpoint, *arguments, cwd=folder)
    exported = torch.load(folder / "exported/weights/torch/model.pt", weights_only=False)["model"].eval()
    mvfa = MVFA.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    pixels = torch.from_numpy(images)
    with torch.no_grad():
        given, expected = exported(pixels), mvfa(pixels)
    torch.testing.assert_close(given.pred_score, expected.pred_score, atol=1e-4, rtol=0)
    assert_labels_follow_the_threshold(mvfa, pixels, given.pred_label, given.pred_mask)


def test_unknown_backbone_is_refused_by_name(folder, few_shot):
    done = command("train", "--model", "MVFA", "--model.backbone", "nosuch", *few_shot, cwd=folder)
    assert done.returncode != 0
    assert "Unknown backbone 'nosuch'" in done.stdout + done.stderr


def test_more_shots_than_images_are_refused(folder, few_shot):
    model = ["--model", "MVFA", "--model.backbone", "tiny"]
    done = command("train", *model, *few_shot, "--data.k_shot", "20", "--default_root_dir", "refused", cwd=folder)
    assert done.returncode != 0
    assert "20 normal supports were asked for" in done.stdout + done.stderr
