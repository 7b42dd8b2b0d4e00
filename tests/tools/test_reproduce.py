# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The published protocols, on miniature sets in the layout of MVFA's archives."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from anomalib.engine import Engine
from lightning import seed_everything
from PIL import Image

from anomalib_mvfa import MVFA
from anomalib_mvfa.data import FewShot, MedicalBMAD
from anomalib_mvfa.data.few_shot import read_support_list
from tools import reproduce
from tools.reproduce import TEN_DRAWS


def save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Brain with masks and Chest without, and two lists of two supports each."""
    root = tmp_path_factory.mktemp("reproduce")
    rng = np.random.default_rng(0)
    for name in ("Brain", "Chest"):
        for split, count in (("valid", 4), ("test", 6)):
            for label in ("good", "Ungood"):
                for index in range(count):
                    pixels = rng.integers(60, 130, (56, 56), dtype=np.uint8)
                    mask = np.zeros_like(pixels)
                    if label == "Ungood":
                        mask[10:30, 5 + 3 * index : 25 + 3 * index] = 255
                        pixels[mask > 0] += 12
                        if name == "Brain":
                            save(mask, root / "DATA/Brain_AD" / split / label / "anomaly_mask" / f"{index}.png")
                    save(pixels, root / "DATA" / f"{name}_AD" / split / label / "img" / f"{index}.png")
        (root / "LISTS" / name).mkdir(parents=True)
        (root / "LISTS" / name / "4-shot.txt").write_text("n-0: 0.png 3.png\na-0: 1.png 2.png\n", encoding="utf-8")
        (root / "LISTS" / name / "shot4_sample1.txt").write_text("n-0: 1.png 2.png\na-0: 0.png 3.png\n")
    return root


def run(root: Path, small_backbone: str, output: Path, *more: str) -> str:
    reproduce.main(
        [
            *("--data", str(root / "DATA"), "--lists", str(root / "LISTS"), "--output", str(output)),
            *("--backbone", small_backbone, "--pretrained", "random", "--accelerator", "cpu", "--num_workers", "0"),
            *("--sets", "Brain", "Chest", "--draws", "2", "--k_shot", "2", "--epochs", "2", *more),
        ]
    )
    return (output / "reproduce.md").read_text(encoding="utf-8")


def records(output: Path, protocol: str) -> dict[str, dict]:
    paths = (output / protocol / "cells").glob("*/cell.json")
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def test_the_published_protocol_gives_what_the_command_of_the_host_gives(
    root, small_backbone, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(reproduce, "MVFA", lambda **given: time.sleep(3) or MVFA(**given))  # a start that counts
    text = run(root, small_backbone, tmp_path, "--only", "published few-shot")
    said = capsys.readouterr().out
    *clock, start, step = re.search(
        r"4 runs are left: about (\d+):(\d\d):(\d\d) \(h:mm:ss\) .*\(([\d.]+) s per start, (\d+) ms per training step",
        said,
    ).groups()
    seconds = sum(int(value) * unit for value, unit in zip(clock, (3600, 60, 1), strict=True))
    assert seconds >= 4 * (float(start) + 2 * 44 * float(step) / 1000) - 4  # four starts, two epochs; rounded
    found = records(tmp_path, "published-few-shot")
    assert len(found) == 4
    for seed, draw in enumerate(("4-shot", "shot4_sample1")):
        record = found[f"Brain-MVFA-k2-seed{seed}"]
        names = read_support_list(root / "LISTS/Brain" / f"{draw}.txt")
        assert sorted(Path(path).name for path in record["supports"]) == sorted([*names[0], *names[1]])
        assert record["config"]["arguments"]["selection"] == "best"
    source = MedicalBMAD(root / "DATA", "Brain", val_split_mode="same_as_test", num_workers=0, eval_batch_size=16)
    data = FewShot(source, k_shot=2, support_list=root / "LISTS/Brain/4-shot.txt", seed=0)
    seed_everything(0)
    model = MVFA(backbone=small_backbone, pretrained="random", selection="best", fusion_scale="test", visualizer=False)
    engine = Engine(
        max_epochs=2, check_val_every_n_epoch=1, accelerator="cpu", logger=False, default_root_dir=tmp_path / "host",
        enable_progress_bar=False,
    )  # fmt: skip
    engine.fit(model, datamodule=data)
    expected = engine.test(model, datamodule=data, verbose=False)[0]
    metrics = found["Brain-MVFA-k2-seed0"]["metrics"]
    assert metrics["image_AUROC"] == pytest.approx(expected["image_AUROC"], abs=1e-6)
    assert metrics["pixel_AUROC"] == pytest.approx(expected["pixel_AUROC"], abs=1e-6)
    ours = [100 * found[f"Brain-MVFA-k2-seed{seed}"]["metrics"]["image_AUROC"] for seed in (0, 1)]
    ten = TEN_DRAWS["image"]["Brain"]
    inside = "yes" if abs(np.mean(ours) - np.mean(ten)) <= 2 * np.std(ten, ddof=1) else "no"
    mean = f"{np.mean(ours):.2f} ± {np.std(ours, ddof=1):.2f} (2)"
    assert f"| Brain | image | {ours[0]:.2f} | 92.44 | {mean} | 91.39 ± 3.04 (10) | {inside} |" in text
    assert "| Chest | pixel |" not in text


def test_a_second_run_computes_nothing(root, small_backbone, tmp_path, capsys, monkeypatch):
    run(root, small_backbone, tmp_path, "--only", "default few-shot", "--draws", "1")
    capsys.readouterr()
    monkeypatch.setattr(reproduce.Engine, "fit", None)
    text = run(root, small_backbone, tmp_path, "--only", "default few-shot", "--draws", "1")
    assert "Everything has been computed." in capsys.readouterr().out
    assert "Default few-shot (nothing is taken from the test set)" in text


def test_protocols_differ_in_what_they_take_from_the_test_set(root, small_backbone, tmp_path, monkeypatch):
    made = {}
    monkeypatch.setattr(reproduce, "estimate", lambda protocols, options: made.update(protocols) or "")
    monkeypatch.setattr(reproduce, "run_comparison", lambda comparison: [])
    run(root, small_backbone, tmp_path, "--weights", "WEIGHTS")
    assert len(made) == 6
    few, zero = made["published few-shot"], made["published zero-shot"]
    assert few.methods["MVFA"]["fusion_scale"] == "test"
    assert few.sets["Brain"]["init_args"]["val_split_mode"] == "same_as_test"
    arguments = zero.methods["MVFA (zero-shot)"]
    assert (arguments["data"]["train_split"], arguments["trainer"]["val_check_interval"]) == ("test", 0.2)
    own = made["default few-shot"]
    assert own.methods["MVFA"] == {}
    assert "val_split_mode" not in own.sets["Brain"]["init_args"]
    assert made["default zero-shot"].methods["MVFA (zero-shot)"]["data"]["train_split"] == "valid"
    assert made["released few-shot adapters"].methods["MVFA"]["adapters"] == "WEIGHTS/few-shot/{set}.pth"
    assert all(comparison.pixel_metrics == "network" for comparison in made.values())


def test_released_adapters_are_evaluated_without_training(root, small_backbone, tmp_path):
    model = MVFA(backbone=small_backbone, pretrained="random", class_name="Brain")
    model.configure_model()
    (tmp_path / "few-shot").mkdir()
    for name in ("Brain", "Chest"):
        model.save_adapters(tmp_path / "few-shot" / f"{name}.pth")
    more = ("--weights", str(tmp_path), "--only", "released few-shot adapters", "--draws", "1")
    text = run(root, small_backbone, tmp_path / "out", *more)
    assert "Released few-shot adapters (ranges of the fusion from the test set)" in text
    found = records(tmp_path / "out", "released-few-shot-adapters")
    assert {record["status"] for record in found.values()} == {"done"}


def test_independent_draws_have_the_means_of_their_source():
    means = {"Retina_OCT2017": 98.27, "Histopathology": 75.94, "Chest": 77.66, "Brain": 91.39, "Liver": 84.57}
    for name, mean in {**means, "Retina_RESC": 94.96}.items():
        assert np.mean(TEN_DRAWS["image"][name]) == pytest.approx(mean, abs=0.006)
    for name, mean in {"Brain": 97.45, "Liver": 98.30, "Retina_RESC": 98.60}.items():
        assert np.mean(TEN_DRAWS["pixel"][name]) == pytest.approx(mean, abs=0.006)
