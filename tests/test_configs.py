# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Every configuration, run through anomalib's command on miniature sets with a small random tower."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from anomalib.cli import AnomalibCLI
from PIL import Image

from anomalib_mvfa import MVFA

CONFIGS = Path(__file__).parents[1] / "configs"
COUNTS = {"valid": 4, "test": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_backbone) -> Path:
    """Brain, Liver and Chest as released with MVFA, a support list, and the configuration of a small tower."""
    root = tmp_path_factory.mktemp("configs")
    shutil.copy(small_backbone, root / "small.json")
    rng = np.random.default_rng(0)
    for name in ("Brain_AD", "Liver_AD", "Chest_AD"):
        for split, count in COUNTS.items():
            for label in ("good", "Ungood"):
                for index in range(count):
                    pixels = rng.integers(60, 130, (56, 56), dtype=np.uint8)
                    mask = np.zeros_like(pixels)
                    if label == "Ungood":
                        mask[10:30, 5 + 3 * index : 25 + 3 * index] = 255
                        pixels[mask > 0] += 90
                        if name != "Chest_AD":
                            save(mask, root / "DATA" / name / split / label / "anomaly_mask" / f"{index}.png")
                    save(pixels, root / "DATA" / name / split / label / "img" / f"{index}.png")
    (root / "2-shot.txt").write_text("n-0: 1.png 3.png\na-0: 0.png 2.png\n", encoding="utf-8")
    return root


def save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def anomalib(folder: Path, subcommand: str, config: str, *arguments: str) -> dict[str, float]:
    """Run a subcommand and return its metrics."""
    small = ["--model.backbone", str(folder / "small.json"), "--model.pretrained", "random"]
    cli = AnomalibCLI(
        args=[
            *(subcommand, "--config", str(CONFIGS / config), *small, *arguments),
            *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
            *("--default_root_dir", str(folder / "results")),
        ],
    )
    metrics = cli.engine.trainer.callback_metrics
    return {name: float(metrics[name]) for name in ("image_AUROC", "pixel_AUROC") if name in metrics}


def few_shot_data(folder: Path) -> list[str]:
    data = {"source.root": folder / "DATA", "source.category": "Brain", "source.num_workers": 0}
    return [f"--data.{name}={value}" for name, value in data.items()]


def leave_one_out_data(folder: Path) -> list[str]:
    return [f"--data.root={folder / 'DATA'}", "--data.target=Brain", "--data.num_workers=0"]


def newest_checkpoint(folder: Path) -> MVFA:
    paths = (folder / "results").rglob("*.ckpt")
    return MVFA.load_from_checkpoint(max(paths, key=lambda path: path.stat().st_mtime))


def test_few_shot(folder):
    data = [*few_shot_data(folder), "--data.k_shot", "2"]
    figures = anomalib(folder, "train", "few_shot.yaml", *data, "--trainer.max_epochs", "1")
    assert set(figures) == {"image_AUROC", "pixel_AUROC"}


def test_zero_shot_trains_without_the_target(folder, caplog):
    with caplog.at_level(logging.INFO):
        figures = anomalib(folder, "train", "zero_shot.yaml", *leave_one_out_data(folder), "--trainer.max_epochs", "1")
    assert "Training on the valid splits of Chest (6), Liver (6); 4 validation images; testing on 10" in caplog.text
    assert "shares" not in caplog.text
    assert set(figures) == {"image_AUROC", "pixel_AUROC"}
    mvfa = newest_checkpoint(folder)
    assert mvfa.model.class_name == "Brain"
    assert mvfa.model.memory.is_empty


def test_published_few_shot_protocol_and_evaluation_of_its_adapters_agree(folder, caplog):
    data = [*few_shot_data(folder), "--data.support_list", str(folder / "2-shot.txt")]
    with caplog.at_level(logging.INFO):
        trained = anomalib(folder, "train", "paper/few_shot.yaml", *data, "--trainer.max_epochs", "3")
    assert "validation part that shares 10 images with the test part" in caplog.text
    assert "the ranges of both branches are taken from the whole test set" in caplog.text
    newest_checkpoint(folder).save_adapters(folder / "Brain.pth")
    adapters = ["--model.adapters", str(folder / "Brain.pth")]
    evaluated = anomalib(folder, "test", "paper/evaluate.yaml", *adapters, *data)
    assert evaluated == pytest.approx(trained, abs=1e-3)


def test_published_zero_shot_protocol_keeps_the_best_of_five_looks_an_epoch(folder, caplog):
    with caplog.at_level(logging.INFO):
        data = leave_one_out_data(folder)
        anomalib(folder, "train", "paper/zero_shot.yaml", *data, "--trainer.max_epochs", "1")
    assert "Training on the test splits of Chest (10), Liver (10); 10 validation images" in caplog.text
    assert "validation part that shares 10 images with the test part" in caplog.text
    assert "Kept epoch 1 of 1, selection score" in caplog.text


def compare(folder: Path, config: str, sets: list[str], k_shot: list[int]) -> dict[str, set[str]]:
    """Run a comparison on miniature sets with a small tower, one seed and one epoch; return the metrics by cell."""
    comparison = yaml.safe_load((CONFIGS / config).read_text(encoding="utf-8"))["comparison"]
    small = {"backbone": str(folder / "small.json"), "pretrained": "random", "accelerator": "cpu"}
    comparison |= small | {"epochs": 1, "seeds": [0], "output": str(folder / config), "k_shot": k_shot}
    source = next(iter(comparison["sets"].values()))
    names = {"root": str(folder / "DATA"), "num_workers": 0}
    comparison["sets"] = {
        name: source | {"init_args": source["init_args"] | names | {"category": name}} for name in sets
    }
    for arguments in comparison["methods"].values():
        if "data" in arguments:
            arguments["data"] |= names
    path = folder / "comparison.yaml"
    path.write_text(yaml.safe_dump({"comparison": comparison}), encoding="utf-8")
    AnomalibCLI(args=["benchmark", "--config", str(path)])
    records = [json.loads(path.read_text()) for path in (folder / config / "cells").glob("*/cell.json")]
    assert {record["status"] for record in records} == {"done"}
    return {f"{record['method']} {record['set']} {record['k_shot']}": set(record["metrics"]) for record in records}


def test_offline_comparison(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # anomalib writes a log there
    figures = compare(folder, "benchmark.yaml", ["Brain"], [1, 2])
    assert len(figures) == 6 * 2 + 4
    assert "pixel_AUPRO" in figures["AnomalyDINO Brain 2"]
    assert "pixel_AUPRO" in figures["MVFA (zero-shot) Brain 0"]
    assert "pixel_AUPRO" in figures["WinCLIP Brain 2"]


def test_comparison_of_the_first_table(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    figures = compare(folder, "paper/table1.yaml", ["Brain", "Chest"], [2])
    assert len(figures) == 2 * 6
    assert "pixel_Dice" in figures["MVFA Brain 2"]
    assert figures["MVFA Chest 2"] == {name for name in figures["MVFA Brain 2"] if name.startswith("image_")}


def test_comparison_of_the_second_table(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    figures = compare(folder, "paper/table2.yaml", ["Liver", "Chest"], [2])
    methods = ("MVFA (zero-shot)", "WinCLIP (zero-shot)", "mean brightness", "image variance")
    assert set(figures) == {f"{method} {name} 0" for method in methods for name in ("Liver", "Chest")}


@pytest.mark.parametrize("config", sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml")))
def test_the_comment_of_a_configuration_names_its_command(config):
    text = (CONFIGS / config).read_text(encoding="utf-8")
    assert f"--config configs/{config}" in text
