# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Two processes have the results of one: adapters, metrics, thresholds, tables, pictures, volumes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

nibabel = pytest.importorskip("nibabel")
SCRIPT = Path(__file__).with_name("two_processes.py")


def save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, small_backbone) -> dict[int, Path]:
    """Folders of a run with one and of a run with two processes; odd numbers of images everywhere."""
    root = tmp_path_factory.mktemp("processes")
    rng = np.random.default_rng(5)
    for kind, count in (("normal", 14), ("abnormal", 9)):
        for index in range(count):
            pixels = rng.integers(90, 130, (64, 64)).astype(np.uint8)
            mask = np.zeros_like(pixels)
            if kind == "abnormal":
                mask[20:36, 5 + 2 * index : 21 + 2 * index] = 255
                pixels[mask > 0] = 230
                save(mask, root / "masks" / f"{index:02}.png")
            save(pixels, root / kind / f"{index:02}.png")
    for name, depth in (("first", 2), ("second", 5)):
        voxels = rng.integers(1, 200, (40, 40, depth)).astype(np.float32)
        (root / "scans").mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([1.0, 2, 3, 1])), root / "scans" / f"{name}.nii.gz")
    for name in ("same.jpg", "same.png"):
        save(rng.integers(0, 255, (50, 60)).astype(np.uint8), root / "scans" / name)
    (root / "scans" / "empty.png").write_bytes(b"")
    folders = {devices: root / f"out{devices}" for devices in (1, 2)}
    # Lightning would take the seed of another test, and use it where there are several processes alone.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PL_")}
    for devices, out in folders.items():
        done = subprocess.run(
            [sys.executable, SCRIPT, root, out, small_backbone, str(devices)],
            env=environment | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return folders


def facts(outputs: dict[int, Path], devices: int) -> list[dict]:
    return [json.loads((outputs[devices] / f"rank{rank}.json").read_text("utf-8")) for rank in range(devices)]


def tables(outputs: dict[int, Path], name: str) -> list[list[dict[str, str]]]:
    found = []
    for out in outputs.values():
        (path,) = out.rglob(name)
        with path.open(newline="", encoding="utf-8") as file:
            found.append(list(csv.DictReader(file)))
    return found


def test_adapters_metrics_and_threshold_are_those_of_one_process(outputs):
    adapters = [load_file(out / "adapters.safetensors") for out in outputs.values()]
    assert_close(adapters[1], adapters[0], atol=1e-5, rtol=0)
    (one,), two = facts(outputs, 1), facts(outputs, 2)
    assert {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"} <= one["metrics"].keys()
    for fact in two:
        assert fact["metrics"] == pytest.approx(one["metrics"], abs=1e-5)
        assert fact["threshold"] == pytest.approx(one["threshold"], abs=1e-5)


def test_every_process_has_one_complete_bank(outputs):
    (one,), two = facts(outputs, 1), facts(outputs, 2)
    assert one["entries"] == 4 * 2 * 11 * 17  # levels, supports, versions, tokens
    assert [fact["entries"] for fact in two] == [one["entries"]] * 2
    assert two[0]["digest"] == two[1]["digest"]


@pytest.mark.parametrize("name", ["tested.csv", "predictions.csv"])
def test_there_is_one_table_with_the_rows_of_one_process(outputs, name):
    one, two = tables(outputs, name)
    assert len(one) == {"tested.csv": 9, "predictions.csv": 10}[name]
    assert [row["path"] for row in two] == [row["path"] for row in one]
    for row, expected in zip(two, one, strict=True):
        for column in ("score", "abnormal_area"):
            value, reference = (float(values[column] or "nan") for values in (row, expected))
            assert value == pytest.approx(reference, abs=1e-4, nan_ok=True)
        assert [row[key] for key in ("label", "true_label", "error") if key in row] == [
            expected[key] for key in ("label", "true_label", "error") if key in row
        ]


def test_each_image_is_predicted_once(outputs):
    (one,), two = facts(outputs, 1), facts(outputs, 2)
    predicted = [path for fact in two for path in fact["predicted"]]
    assert all(fact["predicted"] for fact in two)
    assert sorted(predicted) == sorted(one["predicted"])
    assert len(set(predicted)) == len(predicted) == 10


def test_pictures_and_volumes_are_those_of_one_process(outputs):
    images = [next(out.rglob("images")) for out in outputs.values()]
    names = [sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()) for folder in images]
    assert names[1] == names[0]
    assert {"same.png", "same_2.png", "second_slice004.png"} <= {path.name for path in names[0]}
    for name in ("first", "second"):
        one, two = (nibabel.load(folder / f"{name}_anomaly.nii.gz") for folder in images)
        assert float(np.ptp(one.get_fdata())) > 0
        np.testing.assert_allclose(two.get_fdata(), one.get_fdata(), atol=1e-4)


def test_nothing_is_left_of_the_second_process(outputs):
    assert [path.name for path in sorted((outputs[2] / "MVFA" / "disks").iterdir())] == ["latest", "v0"]
    assert (outputs[2] / "MVFA" / "disks" / "latest").resolve().name == "v0"
    assert not list(outputs[2].rglob("partial-*"))
