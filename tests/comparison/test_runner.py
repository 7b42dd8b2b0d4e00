# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The grid of a comparison: what methods share, what a run writes, how it resumes, and how it fails."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import yaml
from anomalib import LearningType
from anomalib.cli import AnomalibCLI
from anomalib.data import Folder
from anomalib.models import Patchcore
from anomalib.pipelines import Benchmark
from anomalib.pre_processing import PreProcessor
from jsonargparse import Namespace
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import save_file
from sklearn.metrics import precision_recall_curve, roc_auc_score
from torchvision.transforms.v2 import CenterCrop, Compose, Resize, functional

from anomalib_mvfa import MVFA
from anomalib_mvfa.baselines import DistanceToMean
from anomalib_mvfa.comparison import methods, runner
from anomalib_mvfa.comparison.runner import Comparison, run_comparison, write_report
from anomalib_mvfa.data.readers import read_image
from anomalib_mvfa.pre_processing import EightBitResize

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
    assert len({tuple(judged(config, cell)) for cell in done if "k0" not in cell}) == 1
    images = {path for path, _ in judged(config, "disks-MVFA-k1-seed0")}
    for cell, record in done.items():
        normal = [path for path in record["supports"] if path.startswith("normal")]
        assert not images & set(record["supports"])
        assert images <= {path for path, _ in judged(config, cell)}
        assert len(normal) == record["k_shot"]
        assert len(record["supports"]) - len(normal) == (record["k_shot"] if record["method"] == "MVFA" else 0)
        assert set(normal) <= set(done["disks-MVFA-k3-seed0"]["supports"]), cell
        assert 0 <= record["metrics"]["image_AUROC"] <= 1
        assert set(record["cost"]) == {"train_seconds", "train_peak_mb", "predict_ms", "size_mb"}
    assert done["disks-MVFA-k1-seed0"]["threshold"] is not None
    assert "pixel_AUROC" not in done["disks-mean-brightness-k0-seed0"]["metrics"]

    page = write_report(Comparison.from_config(config)).read_text(encoding="utf-8")
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
    run = runner._run
    monkeypatch.setattr(runner, "_run", lambda spec, made: computed.append(spec.folder.name) or run(spec, made))
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


def scores(config, cell):
    table = pd.read_csv(Path(config["output"]) / "cells" / cell / "scores.csv")
    return table.set_index("path").score


def test_every_seed_draws_other_supports_for_all_methods(config):
    config |= {"methods": {"MVFA": {}, "distance to mean normal": {}}, "seeds": [0, 1], "k_shot": [2]}
    assert run_comparison(Comparison.from_config(config)) == []
    done = cells(config)
    supports = [done[f"disks-MVFA-k2-seed{seed}"]["supports"] for seed in (0, 1)]
    assert set(supports[0]) != set(supports[1])
    for seed in (0, 1):
        normal = [path for path in supports[seed] if path.startswith("normal")]
        assert done[f"disks-distance-to-mean-normal-k2-seed{seed}"]["supports"] == normal


def test_methods_without_supports_are_run_once_on_the_whole_test_part(config):
    config |= {"methods": {"mean brightness": {}, "distance to mean normal": {}}, "seeds": [4, 5], "k_shot": [2]}
    assert run_comparison(Comparison.from_config(config)) == []
    assert sorted(cells(config)) == [
        "disks-distance-to-mean-normal-k2-seed4",
        "disks-distance-to-mean-normal-k2-seed5",
        "disks-mean-brightness-k0-seed4",
    ]
    whole = set(scores(config, "disks-mean-brightness-k0-seed4").index)
    for seed in (4, 5):
        assert set(scores(config, f"disks-distance-to-mean-normal-k2-seed{seed}").index) <= whole


def test_what_methods_are_shown_is_recorded_and_true(config, monkeypatch):
    """The record is compared with the data that each training got."""
    config |= {
        "k_shot": [2],
        "methods": dict.fromkeys(("MVFA", "MVFA (normal only)", "WinCLIP", "WinCLIP (zero-shot)")),
    }
    trained = {}
    fit = methods._fit

    def spy(spec, model, options, **data):
        supports = data["datamodule"].train_data
        trained[type(model).__name__, supports.num_abnormal, getattr(model, "k_shot", None)] = {
            item.image_path for item in (supports[index] for index in range(len(supports)))
        }
        return fit(spec, model, options, **data)

    monkeypatch.setattr(methods, "_fit", spy)
    assert run_comparison(Comparison.from_config(config)) == []
    done = cells(config)
    shown = {record["method"]: record["shown"] for record in done.values()}
    for method, counts in {"MVFA": (2, 2, 2), "MVFA (normal only)": (2, 0, 0), "WinCLIP": (2, 0, 0)}.items():
        assert (shown[method]["normal"], shown[method]["abnormal"], shown[method]["masks"]) == counts
    assert shown["WinCLIP (zero-shot)"]["normal"] == 0
    assert {(name, k_shot) for name, _, k_shot in trained if name == "WinClipAny"} == {
        ("WinClipAny", 2),
        ("WinClipAny", 0),
    }
    assert all("abnormal" not in path for path in trained["MVFA", 0, None])
    assert any("abnormal" in path for path in trained["MVFA", 2, None])
    few, zero = (scores(config, f"disks-WinCLIP{name}-seed0") for name in ("-k2", "-zero-shot-k0"))
    assert (few - zero.reindex(few.index)).abs().max() > 1e-4


def test_images_pass_the_pre_processor_of_their_method_once(config, monkeypatch):
    config |= {"k_shot": [2], "methods": {"WinCLIP (zero-shot)": {}, "distance to mean normal": {"blur": 2.0}}}
    ready = {}
    train = runner.train
    monkeypatch.setattr(runner, "train", lambda spec, *a: ready.setdefault(spec.method, train(spec, *a)))
    assert run_comparison(Comparison.from_config(config)) == []
    root = Path(config["sets"]["disks"]["init_args"]["root"])
    for method, cell in (
        ("WinCLIP (zero-shot)", "WinCLIP-zero-shot-k0"),
        ("distance to mean normal", "distance-to-mean-normal-k2"),
    ):
        found = scores(config, f"disks-{cell}-seed0")
        model = ready[method].model
        for path in found.index[:3]:
            image = EightBitResize((56, 56))(read_image(root / path))
            if method.startswith("WinCLIP"):
                assert image.min() >= 0
                image = functional.normalize(image, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
            with torch.inference_mode():
                expected = ready[method].network(image[None]).pred_score
            assert found[path] == pytest.approx(float(expected), abs=1e-6)
        assert not model.training


def test_pixel_metrics_are_computed_at_the_size_of_the_masks(config, tmp_path):
    config |= {"k_shot": [2], "methods": {"distance to mean normal": {"blur": 2.0}}}
    assert run_comparison(Comparison.from_config(config)) == []
    record = cells(config)["disks-distance-to-mean-normal-k2-seed0"]
    root = tmp_path / "data"
    resize = EightBitResize((56, 56))
    model = DistanceToMean(torch.stack([resize(read_image(root / path)) for path in record["supports"]]), blur=2.0)
    maps, masks = [], []
    for path, _ in judged(config, "disks-distance-to-mean-normal-k2-seed0"):
        image = read_image(root / path)
        assert image.shape == (3, 64, 72)
        own = model(resize(image)[None]).anomaly_map[None]
        maps.append(torch.nn.functional.interpolate(own, (64, 72), mode="bilinear")[0, 0])
        mask = root / "masks" / Path(path).name
        masks.append(read_image(mask)[0] > 0 if path.startswith("abnormal") else torch.zeros(64, 72, dtype=torch.bool))
    values, truth = torch.stack(maps).flatten().numpy(), torch.stack(masks).flatten().numpy()
    assert record["metrics"]["pixel_AUROC"] == pytest.approx(roc_auc_score(truth, values), abs=1e-6)
    precision, recall, thresholds = precision_recall_curve(truth, values)
    dice = 2 * precision * recall / (precision + recall + 1e-12)
    assert record["metrics"]["pixel_Dice"] == pytest.approx(dice.max(), abs=1e-6)
    best = thresholds[dice[:-1].argmax()]
    each = [
        float(2 * ((own >= best) & mask).sum() / ((own >= best).sum() + mask.sum()))
        for own, mask in zip(maps, masks, strict=True) if mask.any()
    ]  # fmt: skip
    assert record["metrics"]["pixel_Dice_mean"] == pytest.approx(np.mean(each), abs=1e-6)
    assert record["metrics"]["pixel_Dice_sd"] == pytest.approx(np.std(each), abs=1e-6)
    config |= {"pixel_metrics": "network", "output": str(tmp_path / "network")}
    assert run_comparison(Comparison.from_config(config)) == []
    other = cells(config)["disks-distance-to-mean-normal-k2-seed0"]["metrics"]
    assert other["image_AUROC"] == record["metrics"]["image_AUROC"]
    assert other["pixel_AUROC"] != record["metrics"]["pixel_AUROC"]


def test_groups_of_the_samples_reach_the_scores_as_numbers(config, monkeypatch):
    class Grouped(Folder):
        def _setup(self, stage=None):
            super()._setup(stage)
            for part in (self.train_data, self.test_data):
                part.samples["group"] = [
                    f"Jane Doe {label}-{int(Path(path).stem) % 3}"
                    for path, label in zip(part.samples.image_path, part.samples.label_index, strict=True)
                ]

    monkeypatch.setattr(runner, "get_datamodule", lambda source: Grouped(**source["init_args"]))
    config |= {"k_shot": [1], "methods": {"mean brightness": {}}}
    assert run_comparison(Comparison.from_config(config)) == []
    cell = Path(config["output"]) / "cells" / "disks-mean-brightness-k0-seed0"
    table = pd.read_csv(cell / "scores.csv")
    ill = table[table.label == 1]
    third = ill.path.str[-6:-4].astype(int) % 3
    assert table.group.isin(range(6)).all()
    assert len(ill.group.unique()) == 3
    assert set(ill.group).isdisjoint(table.group[table.label == 0])
    assert all(len(group.group.unique()) == 1 for _, group in ill.groupby(third))
    assert "Jane" not in (cell / "scores.csv").read_text() + (cell / "cell.json").read_text()


def test_groups_may_be_read_from_file_names(config):
    """The last digit of a name stands for the patient."""
    config |= {"k_shot": [1], "methods": {"distance to mean normal": {}, "mean brightness": {}}}
    config["group_by"] = r"\d(\d)"
    assert run_comparison(Comparison.from_config(config)) == []
    groups = {}
    for cell, record in cells(config).items():
        table = pd.read_csv(Path(config["output"]) / "cells" / cell / "scores.csv")
        assert record["config"]["group_by"] == config["group_by"]
        groups[cell] = dict(zip(table.path, table.group, strict=True))
    whole = groups["disks-mean-brightness-k0-seed0"]
    some = groups["disks-distance-to-mean-normal-k1-seed0"]
    assert all(whole[path] == group for path, group in some.items())
    assert len(set(whole.values())) < len(whole)


def test_the_command_reports_a_failed_cell_and_finishes_the_rest(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    peer = {"class_path": "Patchcore", "weights": "nowhere.safetensors"}
    config["methods"] = {"PatchCore": peer, "MVFA (zero-shot)": {}, "mean brightness": {}}
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
    assert "No weights at nowhere.safetensors" in done["disks-PatchCore-k2-seed0"]["error"]
    assert "needs either adapters" in done["disks-MVFA-zero-shot-k0-seed0"]["error"]
    text = (Path(config["output"]) / "results.md").read_text(encoding="utf-8")
    assert "| PatchCore | failed, see Missing |" in text
    assert "No weights at nowhere.safetensors" in text


def test_weights_that_cannot_be_downloaded_are_named(config, monkeypatch):
    create = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    config |= {
        "k_shot": [2],
        "methods": {"PatchCore": {"class_path": "Patchcore", "init_args": {"backbone": "resnet18"}}},
    }
    assert len(run_comparison(Comparison.from_config(config))) == 1
    error = cells(config)["disks-PatchCore-k2-seed0"]["error"]
    assert "download model.safetensors of timm/resnet18" in error
    assert "entry weights" in error
    assert error in write_report(Comparison.from_config(config)).read_text(encoding="utf-8").replace("&#39;", "'")


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


def test_zero_shot_adapters_are_found_by_the_name_of_the_set_and_have_no_memory(config, tmp_path, monkeypatch):
    model = methods.MVFA(backbone=config["backbone"], pretrained="random", memory=False)
    model.configure_model()
    model.save_adapters(tmp_path / "disks.safetensors")
    built = []
    monkeypatch.setattr(methods, "MVFA", lambda **arguments: built.append(MVFA(**arguments)) or built[-1])
    config["methods"] = {"MVFA (zero-shot)": {"adapters": str(tmp_path / "{set}.safetensors")}}
    assert run_comparison(Comparison.from_config(config)) == []
    record = cells(config)["disks-MVFA-zero-shot-k0-seed0"]
    assert record["supports"] == []
    assert record["shown"] == {"normal": 0, "abnormal": 0, "masks": 0, "remark": "adapters from a file"}
    assert built[0].hparams["memory"] is False
    assert built[0].learning_type == LearningType.ZERO_SHOT


@pytest.mark.parametrize("trained_on", ["supports", "train"])
def test_a_model_of_anomalib_learns_from_normal_images_with_weights_from_a_file(
    config, tmp_path, trained_on, monkeypatch
):
    torch.manual_seed(0)
    backbone = timm.create_model("resnet18", pretrained=False)
    save_file(backbone.state_dict(), tmp_path / "resnet18.safetensors")
    peer = {"class_path": "Patchcore", "init_args": {"backbone": "resnet18", "num_neighbors": 1}, "image_size": 64}
    peer |= {"weights": str(tmp_path / "resnet18.safetensors"), "trained_on": trained_on}
    config |= {"methods": {"near": peer}, "k_shot": [2]}
    ready = []
    train = runner.train
    monkeypatch.setattr(runner, "train", lambda *a: ready.append(train(*a)) or ready[-1])
    assert run_comparison(Comparison.from_config(config)) == []
    (record,) = cells(config).values()
    weight = ready[0].network.feature_extractor.feature_extractor.conv1.weight
    torch.testing.assert_close(weight.cpu(), backbone.conv1.weight)
    assert record["k_shot"] == (2 if trained_on == "supports" else 0)
    assert len(record["supports"]) == record["k_shot"]
    assert all(path.startswith("normal") for path in record["supports"])
    assert record["shown"]["normal"] == (2 if trained_on == "supports" else 16)
    assert (record["shown"]["remark"] == "whole training part") == (trained_on == "train")
    assert 0 <= record["metrics"]["pixel_AUPRO"] <= 1


def test_random_weights_are_said_and_crops_are_taken_out(config, monkeypatch):
    peer = {"class_path": "Patchcore", "init_args": {"backbone": "resnet18"}, "weights": "random"}
    config |= {"methods": {"near": peer}, "k_shot": [2]}
    ready = []
    train = runner.train
    monkeypatch.setattr(runner, "train", lambda *a: ready.append(train(*a)) or ready[-1])
    pre_processor = PreProcessor(transform=Compose([Resize((80, 80)), CenterCrop(64)]))
    monkeypatch.setattr(Patchcore, "configure_pre_processor", lambda *a, **k: pre_processor)
    assert run_comparison(Comparison.from_config(config)) == []
    assert cells(config)["disks-near-k2-seed0"]["shown"]["remark"] == "random weights"
    image = torch.rand(3, 90, 70)
    torch.testing.assert_close(ready[0].transform(image), Resize((64, 64))(image))
    write_report(Comparison.from_config(config))
    assert "| near, random weights | 2 | 0 | 0 |" in (Path(config["output"]) / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": {"MVFB": {}}}, "unknown MVFB. Known are MVFA.*needs the class_path"),
        ({"methods": {"a": {"class_path": "Padim", "backbone": "x"}}}, r"methods.a: unknown entries \['backbone'\]"),
        ({"methods": {"a": {"class_path": "Padim", "trained_on": "test"}}}, "trained_on must be supports or train"),
        ({"pixel_metrics": "image"}, "pixel_metrics must be mask or network, got 'image'"),
        ({"support_list": "x.txt"}, "support_list and comparison.draws belong together"),
        ({"draws": ["x"]}, "support_list and comparison.draws belong together"),
        ({"seeds": []}, "comparison.seeds is empty"),
        ({"k_shot": [0]}, "at least 1, got 0"),
        ({"epoch": 3}, r"unknown entries \['epoch'\]"),
    ],
)
def test_wrong_configurations_are_refused(change, message, config):
    with pytest.raises(ValueError, match=message):
        Comparison.from_config(config | change)


def test_test_images_that_differ_between_numbers_of_supports_are_refused(monkeypatch):
    parts = {4: ["a", "b"], 2: ["a", "b", "c"], 1: ["a", "c"]}

    def part(paths):
        return SimpleNamespace(
            samples=pd.DataFrame({"image_path": paths}),
            subsample=lambda rows: part([paths[row] for row in rows]),
        )

    monkeypatch.setattr(runner, "_make_episode", lambda _, k_shot, __: SimpleNamespace(test_data=part(parts[k_shot])))
    comparison = SimpleNamespace(k_shot=(1, 2, 4))
    made = {}
    common = runner._episode(SimpleNamespace(comparison=comparison, set="s", seed=0, method="MVFA", k_shot=2), made)
    assert common.test_data.samples.image_path.tolist() == ["a", "b"]
    with pytest.raises(RuntimeError, match="test images of s differ"):
        runner._episode(SimpleNamespace(comparison=comparison, set="s", seed=0, method="MVFA", k_shot=1), made)


@pytest.fixture
def recorded(monkeypatch):
    """What MVFA is built, trained and tested with, without doing so."""
    calls = SimpleNamespace(built=[], fitted=[], tested=[], sources=[])
    monkeypatch.setattr(methods, "MVFA", lambda **given: calls.built.append(given) or "model")
    monkeypatch.setattr(methods, "LeaveOneOut", lambda **given: calls.sources.append(given) or "other sets")
    monkeypatch.setattr(
        methods, "_fit", lambda spec, model, options, datamodule: calls.fitted.append(datamodule) or 0.5
    )

    def engine(spec, options):
        return SimpleNamespace(test=lambda model, **given: calls.tested.append((model, options, given)))

    monkeypatch.setattr(methods, "_engine", engine)
    return calls


def episode():
    support = SimpleNamespace(num_normal=2, num_abnormal=0, images=SimpleNamespace(samples=pd.DataFrame()))
    samples = pd.DataFrame({"image_path": ["a.png", "b.png"], "label_index": [0, 0]})
    support.samples = samples
    return SimpleNamespace(
        train_data=support, category="Brain", class_name="Brain", seed=7, train_batch_size=None, trainer="trainer"
    )


def spec_of(method, **arguments):
    grid = SimpleNamespace(tower={"backbone": "tiny"}, epochs=3, accelerator="cpu")
    return SimpleNamespace(method=method, arguments=arguments, comparison=grid, set="Brain", k_shot=2, seed=7)


@pytest.mark.parametrize("given", [{}, {"train_batch_size": 4}])
def test_mvfa_trains_in_batches_of_one_unless_told_otherwise(recorded, given):
    data = episode()
    methods._mvfa(spec_of("MVFA"), dict(given), data)
    assert data.train_batch_size == given.get("train_batch_size", 1)
    assert "train_batch_size" not in recorded.built[0]
    assert recorded.fitted == [data]


@pytest.mark.parametrize("rate", [None, 0.01])
def test_zero_shot_learns_from_the_other_sets_at_the_published_rate(recorded, rate):
    own = {"data": {"root": "DATA"}, **({"learning_rate": rate} if rate else {})}
    methods._mvfa(spec_of("MVFA (zero-shot)"), own, episode())
    assert recorded.sources == [{"target": "Brain", "seed": 7, "root": "DATA"}]
    assert recorded.fitted == ["other sets"]
    assert recorded.built[0]["learning_rate"] == (rate or 1e-4)
    assert recorded.built[0]["memory"] is False


@pytest.mark.parametrize(
    ("given", "tests"),
    [({}, 0), ({"fusion_scale": "test"}, 1), ({"fusion_scale": "test", "memory": False}, 0)],
)
def test_ranges_of_the_test_set_need_one_batch_of_a_test(recorded, given, tests):
    data = episode()
    methods._mvfa(spec_of("MVFA"), dict(given), data)
    expected = ("model", {"limit_test_batches": 1}, {"datamodule": data, "verbose": False})
    assert recorded.tested == [expected] * tests
    assert data.trainer == (None if tests else "trainer")


def test_draws_take_the_place_of_the_seeds(config):
    lists = {"support_list": "LISTS/{set}/{draw}.txt", "draws": ["first", "second", "third"], "k_shot": [2]}
    grid = Comparison.from_config({**config, **lists})
    assert grid.seeds == (0, 1, 2)


def test_the_threshold_of_the_greatest_dice_is_found_among_all():
    rng = np.random.default_rng(5)
    masks = rng.random((3, 9, 9)) < 0.2
    maps = np.round(rng.random((3, 9, 9)) + 0.5 * masks, 2).astype(np.float32)
    pixels = runner._Pixels()
    pixels.update(torch.from_numpy(maps), torch.from_numpy(masks))
    found = {float(t): 2 * (masks & (maps >= t)).sum() / (masks.sum() + (maps >= t).sum()) for t in np.unique(maps)}
    assert found[pixels.best_threshold()] == max(found.values())


def test_times_are_milliseconds_an_image_without_the_first_batch(config, monkeypatch):
    clock = iter(np.cumsum([0, 9, *[0, 0.5] * 50]))
    monkeypatch.setattr(runner.time, "perf_counter", lambda: float(next(clock)))
    config["methods"] = {"mean brightness": {}}
    config["sets"]["disks"]["init_args"]["eval_batch_size"] = 2
    run_comparison(Comparison.from_config(config))
    cost = cells(config)["disks-mean-brightness-k0-seed0"]["cost"]
    assert cost["predict_ms"] == pytest.approx(500 / 2)


def test_the_processor_is_named(monkeypatch):
    monkeypatch.setattr(runner.Path, "read_text", lambda *_, **__: "processor : 0\nmodel name : Fast One\n")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert runner._machine() == "Fast One, 3 threads"
