# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The grid of a comparison: what it shares among methods, what it leaves behind, how it goes on, and how it fails."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from anomalib.cli import AnomalibCLI
from anomalib.pipelines import Benchmark
from jsonargparse import Namespace
from safetensors.torch import save_file

from anomalib_mvfa.comparison import runner
from anomalib_mvfa.comparison.runner import Comparison, run_comparison, write_report

TRIVIAL = {"mean brightness": None, "image variance": {}, "distance to mean normal": {"blur": 2.0}}


@pytest.fixture
def config(make_folder, small_backbone, tmp_path):
    """A comparison of disks with a small random tower."""
    make_folder(normal=20, abnormal=16)
    source = {"name": "disks", "normal_dir": "normal", "abnormal_dir": "abnormal", "mask_dir": "masks"}
    source |= {"root": str(tmp_path / "data"), "num_workers": 0, "eval_batch_size": 8}
    return {
        "output": str(tmp_path / "out"),
        "sets": {"disks": {"class_path": "Folder", "init_args": source}},
        "methods": dict(TRIVIAL),
        "backbone": small_backbone,
        "pretrained": "random",
        "k_shot": [1, 3],
        "seeds": [0],
        "epochs": 1,
        "accelerator": "cpu",
    }


def cells(config):
    paths = sorted((Path(config["output"]) / "cells").glob("*/cell.json"))
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def judged(config, cell):
    with (Path(config["output"]) / "cells" / cell / "scores.csv").open(encoding="utf-8") as file:
        return [(row["path"], row["label"]) for row in csv.DictReader(file)]


def test_methods_share_supports_and_test_images(config):
    names = ("MVFA", "MVFA (normal only)", "WinCLIP", "WinCLIP (zero-shot)")
    config["methods"] |= dict.fromkeys(names)
    assert run_comparison(Comparison.from_config(config)) == []
    done = cells(config)
    assert len(done) == 2 * 4 + 3
    assert {len(judged(config, cell)) for cell in done} == {len(judged(config, "disks-MVFA-k3-seed0"))}
    assert len({tuple(judged(config, cell)) for cell in done}) == 1
    images = {path for path, _ in judged(config, "disks-MVFA-k1-seed0")}
    for cell, record in done.items():
        normal = [path for path in record["supports"] if path.startswith("normal")]
        assert not images & set(record["supports"])
        assert len(normal) == record["k_shot"]
        assert len(record["supports"]) - len(normal) == (record["k_shot"] if record["method"] == "MVFA" else 0)
        assert set(normal) <= set(done["disks-MVFA-k3-seed0"]["supports"]), cell
        assert 0 <= record["metrics"]["image_AUROC"] <= 1
        assert set(record["cost"]) == {"train_seconds", "train_peak_mb", "predict_ms", "size_mb"}
    assert done["disks-MVFA-k1-seed0"]["threshold"] is not None
    assert "pixel_AUROC" not in done["disks-mean-brightness-k0-seed0"]["metrics"]

    page = write_report(Comparison.from_config(config), command="anomalib benchmark").read_text(encoding="utf-8")
    assert all(f"{record['method']}</th>" in page for record in done.values())
    assert page.count("data:image/jpeg") > 20
    assert "image not found" not in page
    with (Path(config["output"]) / "results.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(done)


def test_a_cell_holds_raw_scores_and_maps_on_one_scale(config):
    config["methods"] = {"distance to mean normal": {}, "mean brightness": {}}
    config["k_shot"] = [2]
    run_comparison(Comparison.from_config(config))
    folder = Path(config["output"]) / "cells"
    with np.load(folder / "disks-distance-to-mean-normal-k2-seed0" / "maps.npz") as archive:
        count = len(judged(config, "disks-distance-to-mean-normal-k2-seed0"))
        assert archive["maps"].shape == archive["masks"].shape == (count, 56, 56)
        assert archive["maps"].dtype == archive["masks"].dtype == np.uint8
        assert archive["maps"].min() == 0
        assert archive["maps"].max() == 255
        assert 0 <= archive["low"] < archive["high"] < 1
        assert set(np.unique(archive["masks"])) == {0, 1}
    assert not (folder / "disks-mean-brightness-k0-seed0" / "maps.npz").exists()
    with (folder / "disks-mean-brightness-k0-seed0" / "scores.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label", "score"]
    assert {row["label"] for row in rows if row["path"].startswith("abnormal/")} == {"1"}
    assert all(0.1 < float(row["score"]) < 0.6 for row in rows)


def test_a_rerun_computes_only_what_is_missing_failed_or_changed(config, monkeypatch):
    run_comparison(Comparison.from_config(config))
    computed = []
    record = runner._Run.record
    monkeypatch.setattr(runner._Run, "record", lambda run: computed.append(run.spec.folder.name) or record(run))
    run_comparison(Comparison.from_config(config))
    assert computed == []
    folder = Path(config["output"]) / "cells"
    (folder / "disks-image-variance-k0-seed0" / "cell.json").unlink()
    failed = folder / "disks-mean-brightness-k0-seed0" / "cell.json"
    failed.write_text(json.dumps(json.loads(failed.read_text()) | {"status": "failed"}))
    config["methods"] = {**TRIVIAL, "distance to mean normal": {"blur": 3.0}}
    run_comparison(Comparison.from_config(config))
    assert sorted(computed) == [
        "disks-distance-to-mean-normal-k1-seed0",
        "disks-distance-to-mean-normal-k3-seed0",
        "disks-image-variance-k0-seed0",
        "disks-mean-brightness-k0-seed0",
    ]


def test_the_command_reports_a_failed_cell_and_finishes_the_rest(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config["methods"] = {"PatchCore": {}, "MVFA (zero-shot)": {}, "mean brightness": {}}
    config["k_shot"] = [2]
    (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump({"comparison": config}), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"(?s)2 cells failed.*disks-PatchCore-k2-seed0") as error:
        AnomalibCLI(args=["benchmark", "--config", "benchmark.yaml"])
    assert error.value.code != 0
    done = cells(config)
    assert {record["method"]: record["status"] for record in done.values()} == {
        "PatchCore": "failed",
        "MVFA (zero-shot)": "failed",
        "mean brightness": "done",
    }
    assert "needs weights, a .safetensors file" in done["disks-PatchCore-k2-seed0"]["error"]
    assert "needs either adapters" in done["disks-MVFA-zero-shot-k0-seed0"]["error"]


def test_a_stock_configuration_goes_to_anomalib(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = {"class_path": "MVFA", "init_args": {"backbone": config["backbone"], "pretrained": "random"}}
    stock = {"accelerator": "cpu", "benchmark": {"seed": 1, "model": model, "data": config["sets"]["disks"]}}
    (tmp_path / "stock.yaml").write_text(yaml.safe_dump(stock), encoding="utf-8")
    ran = []
    monkeypatch.setattr(Benchmark, "_setup_runners", staticmethod(lambda args: ran.append(args) or []))
    Benchmark().run(Namespace(config="stock.yaml"))
    assert ran == [stock]
    assert not Path(config["output"]).exists()


def test_zero_shot_adapters_are_found_by_the_name_of_the_set(config, tmp_path):
    config["methods"] = {"MVFA": {}}
    config["k_shot"] = [1]
    model = runner.MVFA(config["backbone"], "random", memory=False)
    model.configure_model()
    model.save_adapters(tmp_path / "disks.safetensors")
    config["methods"] = {"MVFA (zero-shot)": {"adapters": str(tmp_path / "{set}.safetensors")}}
    assert run_comparison(Comparison.from_config(config)) == []
    assert cells(config)["disks-MVFA-zero-shot-k0-seed0"]["supports"] == []


def test_patchcore_learns_from_the_normal_supports_with_weights_from_a_file(config, tmp_path):
    torch.manual_seed(0)
    backbone = timm.create_model("resnet18", pretrained=False)
    save_file(backbone.state_dict(), tmp_path / "resnet18.safetensors")
    arguments = {"backbone": "resnet18", "weights": str(tmp_path / "resnet18.safetensors"), "num_neighbors": 1}
    config |= {"methods": {"PatchCore": arguments}, "k_shot": [2]}
    assert run_comparison(Comparison.from_config(config)) == []
    record = cells(config)["disks-PatchCore-k2-seed0"]
    assert len(record["supports"]) == 2
    assert 0 <= record["metrics"]["pixel_AUPRO"] <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": {"MVFB": {}}}, "unknown MVFB. Known are MVFA"),
        ({"seeds": []}, "comparison.seeds is empty"),
        ({"k_shot": [0]}, "at least 1, got 0"),
        ({"epoch": 3}, r"unknown entries \['epoch'\]"),
    ],
)
def test_wrong_configurations_are_refused(change, message, config):
    with pytest.raises(ValueError, match=message):
        Comparison.from_config(config | change)
