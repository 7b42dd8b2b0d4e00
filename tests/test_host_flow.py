# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""What anomalib does with each of its models, done with MVFA: API, command line, and the ways to run inference."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.cli import AnomalibCLI
from anomalib.data import MVTecAD, PredictDataset
from anomalib.deploy import ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.models import get_model
from PIL import Image
from torch.utils.data import DataLoader

from anomalib_mvfa import MVFA

CATEGORY = "plate"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A set laid out like MVTec AD: normal images to train on, normal and scratched ones with masks to test on."""
    root = tmp_path_factory.mktemp("host")
    rng = np.random.default_rng(0)
    for folder, count, scratched in (("train/good", 4, False), ("test/good", 3, False), ("test/scratch", 3, True)):
        for index in range(count):
            pixels = rng.integers(90, 130, (64, 64, 3)).astype(np.uint8)
            mask = np.zeros((64, 64), np.uint8)
            if scratched:
                mask[20:30, 8 * index : 8 * index + 30] = 255
                pixels[mask > 0] = 235
                save(mask, root / "set" / CATEGORY / "ground_truth" / "scratch" / f"{index:03}_mask.png")
            save(pixels, root / "set" / CATEGORY / folder / f"{index:03}.png")
    return root


def save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def data(root):
    return MVTecAD(root / "set", CATEGORY, train_batch_size=2, eval_batch_size=2, num_workers=0)


@pytest.fixture(scope="module")
def engine(root):
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_progress_bar": False}
    return lambda: Engine(default_root_dir=root / "api", **options)


@pytest.fixture(scope="module")
def checkpoint(engine, data) -> Path:
    torch.manual_seed(0)
    running = engine()
    running.fit(get_model("mvfa", backbone="tiny"), datamodule=data)
    return Path(running.best_model_path)


@pytest.fixture
def model():
    return get_model("mvfa", backbone="tiny")


def assert_figures(figures):
    assert {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"} <= figures.keys()
    assert all(math.isfinite(value) for value in figures.values())


def test_fit_leaves_a_checkpoint(checkpoint):
    assert checkpoint.name == "model.ckpt"
    assert (checkpoint.parent / "run.json").is_file()


def test_test_from_a_checkpoint(model, engine, data, checkpoint):
    (figures,) = engine().test(model, datamodule=data, ckpt_path=checkpoint)
    assert_figures(figures)


def test_train_from_a_checkpoint(model, engine, data, checkpoint):
    assert_figures(engine().train(model, datamodule=data, ckpt_path=checkpoint)[0])


def test_validate_from_a_checkpoint(model, engine, data, checkpoint):
    engine().validate(model, datamodule=data, ckpt_path=checkpoint)
    assert math.isfinite(float(model.post_processor.image_threshold))


@pytest.mark.parametrize("source", ["datamodule", "loader", "folder"])
def test_predict_from_a_checkpoint(model, engine, data, root, checkpoint, source):
    folder = root / "set" / CATEGORY / "test" / "scratch"
    dataset = PredictDataset(path=folder)
    given = {
        "datamodule": {"datamodule": data},
        "loader": {"dataloaders": DataLoader(dataset, collate_fn=dataset.collate_fn)},
        "folder": {"data_path": folder},
    }[source]
    batches = engine().predict(model, ckpt_path=checkpoint, **given)
    scores = torch.cat([batch.pred_score for batch in batches])
    assert len(scores) == (len(data.test_data) if source == "datamodule" else 3)
    assert bool(((scores > 0) & (scores < 1)).all())


@pytest.mark.parametrize("kind", [ExportType.TORCH, ExportType.OPENVINO])  # the way to the latter leads over ONNX
def test_exports_from_a_checkpoint_run(engine, root, checkpoint, kind, monkeypatch):
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")  # anomalib asks for it, as its torch files are pickles
    path = engine().export(MVFA(backbone="tiny"), kind, export_root=root / "exported", ckpt_path=checkpoint)
    assert Path(path).is_file()
    image = root / "set" / CATEGORY / "test" / "scratch" / "000.png"
    mvfa = MVFA.load_from_checkpoint(checkpoint).eval()
    with torch.no_grad():
        pixels = torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1)[None] / 255
        expected = float(mvfa(pixels).pred_score)
    if kind == ExportType.TORCH:
        found = TorchInferencer(path=path, device="cpu").predict(image)
    else:
        found = OpenVINOInferencer(path=path, device="CPU").predict(image)
    # A graph resizes in floating point, and a processor may compute it in bfloat16.
    assert found.pred_score.item() == pytest.approx(expected, abs=0.05)


def command(root: Path, subcommand: str, *arguments: object) -> AnomalibCLI:
    data = ["--data", "MVTecAD", "--data.root", root / "set", "--data.category", CATEGORY, "--data.num_workers", 0]
    trainer = [
        "--trainer.accelerator",
        "cpu",
        "--trainer.enable_progress_bar",
        "false",
        "--default_root_dir",
        root / "cli",
    ]
    if subcommand == "export":
        data = trainer = []
    backbone = ["--model", "MVFA", "--model.backbone", "tiny"]
    return AnomalibCLI(args=[subcommand, *map(str, [*backbone, *data, *trainer, *arguments])])


@pytest.mark.parametrize("subcommand", ["fit", "test", "train", "validate", "predict", "export"])
def test_the_command_line_does_the_same(root, checkpoint, subcommand):
    arguments: list[object] = ["--ckpt_path", checkpoint]
    if subcommand == "fit":
        arguments = ["--trainer.max_epochs", 1]
    elif subcommand == "train":
        arguments += ["--trainer.max_epochs", 2]
    elif subcommand == "export":
        arguments += ["--export_type", "torch", "--export_root", root / "cli"]
    cli = command(root, subcommand, *arguments)
    if subcommand in {"test", "train"}:
        assert_figures({name: float(value) for name, value in cli.engine.trainer.callback_metrics.items()})
    elif subcommand == "fit":
        assert Path(cli.engine.best_model_path).is_file()
    elif subcommand == "export":
        assert (root / "cli" / "weights" / "torch" / "model.pt").is_file()
    elif subcommand == "predict":
        assert (Path(cli.engine.trainer.default_root_dir) / "images" / "predictions.csv").is_file()
    else:
        assert math.isfinite(float(cli.model.post_processor.image_threshold))
