# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Exported models predict as the Lightning model, compressed ones nearly so, and bad input is refused."""

import csv
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import openvino
import pytest
import torch
from anomalib.deploy import CompressionType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.metrics import AUROC
from PIL import Image
from torch.testing import assert_close

from anomalib_mvfa import MVFA, deploy
from anomalib_mvfa.data import FewShot
from anomalib_mvfa.deploy import quantisation
from anomalib_mvfa.deploy.quantisation import _calibration_data, compress, sensitive_nodes
from anomalib_mvfa.pre_processing import EightBitResize

F32 = {"INFERENCE_PRECISION_HINT": "f32"}  # processors with bfloat16 would otherwise compute with it
OUTPUTS = ("pred_score", "anomaly_map")
EXACT = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def datamodule(make_folder_in, tmp_path_factory):
    source = make_folder_in(tmp_path_factory.mktemp("data"), 12, 8)
    source.test_split_ratio = 0.5
    return FewShot(source, k_shot=1)


def train(datamodule, backbone, root, **options):
    torch.manual_seed(0)
    model = MVFA(backbone, "random", class_name="Brain", visualizer=False, **options)
    engine = Engine(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=root)
    engine.fit(model, datamodule=datamodule)
    return model.eval()


@pytest.fixture(scope="module")
def trained(datamodule, small_backbone, tmp_path_factory):
    return train(datamodule, small_backbone, tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def full(trained, tmp_path_factory):
    """The model as an uncompressed OpenVINO graph."""
    return trained.to_openvino(tmp_path_factory.mktemp("full"))


@pytest.fixture
def images():
    """At the model's size, of every kind of grey."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(3, 3, 56, 56, generator=generator) * torch.tensor([0.3, 0.6, 1.0]).view(3, 1, 1, 1)


def run(path, images):
    outputs = openvino.Core().compile_model(path, "CPU", F32)(images.numpy())
    return {next(iter(port.get_names())): torch.from_numpy(value.copy()) for port, value in outputs.items()}


@torch.no_grad()
def assert_agrees(outputs, model, images, **tolerance):
    expected = model(images)
    for name in OUTPUTS:
        wanted = getattr(expected, name)
        assert_close(torch.as_tensor(outputs[name]).reshape(wanted.shape), wanted, **tolerance)


def test_openvino_graph_agrees_at_every_batch_size(trained, full, images):
    for count in (1, 2, 3):
        outputs = run(full, images[:count])
        assert_agrees(outputs, trained, images[:count], **EXACT)
    expected = trained(images)
    assert outputs["pred_label"].flatten().bool().tolist() == expected.pred_label.flatten().tolist()
    assert float((outputs["pred_mask"].reshape(3, 56, 56).bool() == expected.pred_mask).float().mean()) > 0.999


def test_fp16_is_half_as_large_and_within_a_hundredth(trained, full, images, tmp_path):
    half = trained.to_openvino(tmp_path, compression_type=CompressionType.FP16)
    sizes = [path.with_suffix(".bin").stat().st_size for path in (full, half)]
    assert sizes[1] < 0.52 * sizes[0]
    assert_agrees(run(half, images), trained, images, rtol=1e-2, atol=1e-2)


def test_onnxruntime_agrees(trained, images, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(trained.to_onnx(tmp_path))
    names = [output.name for output in session.get_outputs()]
    for count in (1, 3):
        outputs = dict(zip(names, session.run(None, {"input": images[:count].numpy()}), strict=True))
        assert_agrees(outputs, trained, images[:count], **EXACT)


SIZES = [(140, 96), (57, 211), (20, 30), (56, 56), (1003, 777)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Images of many sizes, as files."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for height, width in SIZES:
        coarse = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize((width, height))
        noise = rng.integers(-20, 20, (height, width, 3))
        pixels = np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{height}_{width}.png")
    return sorted(folder.iterdir())


def resized(path):
    """What the model reads of a file in training: Pillow's resize."""
    with Image.open(path) as image:
        pixels = image.resize((56, 56), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("kind", [None, CompressionType.FP16, CompressionType.INT8, CompressionType.INT8_PTQ])
def test_inferencer_of_anomalib_predicts_files_of_any_size(trained, datamodule, files, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # anomalib's inferencer keeps a cache in the working directory
    graph = trained.to_openvino(tmp_path, compression_type=kind, datamodule=datamodule)
    inferencer = OpenVINOInferencer(graph, "CPU", F32)
    exact = deploy.OpenVINOInferencer(graph, "CPU", F32)
    for path in files:
        prediction, reference = inferencer.predict(path), exact.predict(path)
        for name in OUTPUTS:  # whatever compression costs, a grey level of 255 makes little difference beside it
            assert np.abs(getattr(prediction, name) - getattr(reference, name)).max() < 0.03
        if kind is None:
            outputs = {name: getattr(prediction, name) for name in OUTPUTS}
            assert_agrees(outputs, trained, resized(path), rtol=0, atol=0.02)


def test_graph_of_any_size_is_bit_for_bit_that_of_the_models_own_size(trained, full, images, tmp_path):
    fixed = trained.to_openvino(tmp_path, input_size=(56, 56))
    assert list(openvino.Core().read_model(fixed).input(0).get_partial_shape())[2:] == [56, 56]
    expected, outputs = run(fixed, images), run(full, images)
    assert all(torch.equal(outputs[name], value) for name, value in expected.items())


def test_torch_export_and_onnx_predict_files_of_any_size(trained, files, tmp_path, monkeypatch):
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    inferencer = TorchInferencer(trained.to_torch(tmp_path), device="cpu")
    session = pytest.importorskip("onnxruntime").InferenceSession(trained.to_onnx(tmp_path))
    names = [output.name for output in session.get_outputs()]
    for path in files:
        prediction = inferencer.predict(path)
        assert_agrees({name: getattr(prediction, name) for name in OUTPUTS}, trained, resized(path), atol=0.02, rtol=0)
        with Image.open(path) as image:
            pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255
        outputs = dict(zip(names, session.run(None, {"input": pixels}), strict=True))
        assert_agrees(outputs, trained, resized(path), atol=0.02, rtol=0)


def test_given_input_size_is_the_only_one_that_the_graph_reads(trained, tmp_path):
    generator = torch.Generator().manual_seed(2)
    image = torch.randint(0, 256, (1, 3, 140, 96), generator=generator) / 255
    graph = trained.to_openvino(tmp_path, input_size=(140, 96))
    assert_agrees(run(graph, image), trained, EightBitResize((56, 56))(image), atol=0.02, rtol=0)
    with pytest.raises(RuntimeError, match=r"model input \(shape=\[\?,3,140,96\]\)"):
        run(graph, torch.rand(1, 3, 56, 56))


def test_own_inferencer_resizes_files_as_training_does_and_changes_no_array(
    trained, full, files, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    inferencer = deploy.OpenVINOInferencer(full, "CPU", F32)
    for path in files:
        image = resized(path)[0]
        for given in (path, Image.open(path), image, image.permute(1, 2, 0).numpy()):
            prediction = inferencer.predict(given)
            outputs = {name: getattr(prediction, name) for name in OUTPUTS}
            assert_agrees(outputs, trained, image[None], **EXACT)
    pixels = np.asarray(Image.open(files[0]), np.float32)
    before = pixels.copy()
    by_graph = inferencer.predict(pixels)
    assert_agrees({name: getattr(by_graph, name) for name in OUTPUTS}, trained, resized(files[0]), atol=0.02, rtol=0)
    assert (pixels == before).all()


def test_dark_image_is_read_as_dark(trained, full, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = Image.fromarray(np.ones((70, 70, 3), np.uint8))  # grey level 1 of 255
    prediction = deploy.OpenVINOInferencer(full, "CPU", F32).predict(image)
    outputs = {name: getattr(prediction, name) for name in OUTPUTS}
    assert_agrees(outputs, trained, torch.full((1, 3, 56, 56), 1 / 255), **EXACT)


def quantised(path):
    """Names of the nodes that read quantised values."""
    graph = openvino.Core().read_model(path)
    fake = [node for node in graph.get_ordered_ops() if node.get_type_name() == "FakeQuantize"]
    readers = {reader.get_node() for node in fake for reader in node.output(0).get_target_inputs()}
    return graph, {node.get_friendly_name() for node in readers}


def test_quantisation_spares_all_that_follows_the_adapters(trained, datamodule, images, tmp_path):
    path = trained.to_openvino(tmp_path, compression_type=CompressionType.INT8_PTQ, datamodule=datamodule)
    graph, readers = quantised(path)
    types = {node.get_friendly_name(): node.get_type_name() for node in graph.get_ordered_ops()}
    layers = 4 * 4 + 4 * 4 - 2  # four products a block and a level, less the last outputs, which nothing reads
    assert sum(types[name] == "MatMul" for name in readers) >= layers - 4  # attention's own may be one node
    sensitive = set(sensitive_nodes(graph))
    assert not readers & sensitive
    assert not [name for name in readers if types[name] in {"MVN", "Softmax", "Divide", "ReduceMax", "Interpolate"}]
    products = [name for name in sensitive if types[name] == "MatMul"]
    assert len(products) == 2 + 2 * 4  # rows and columns of the resize; text and bank at each level
    assert sum(types[name] == "Convolution" for name in readers) == 1
    expected = trained(images)
    outputs = run(path, images)
    assert_close(outputs["pred_score"].flatten(), expected.pred_score.flatten(), atol=0.1, rtol=0)
    assert not torch.equal(outputs["anomaly_map"].reshape(3, 56, 56), expected.anomaly_map)


def test_head_is_found_where_the_tower_has_lengths_of_its_own(small_backbone, datamodule, tmp_path):
    model = train(datamodule, small_backbone, tmp_path, variant={"residual_norm": True})
    graph = openvino.Core().read_model(model.to_openvino(tmp_path))
    types = {node.get_friendly_name(): node.get_type_name() for node in graph.get_ordered_ops()}
    sensitive = set(sensitive_nodes(graph))
    assert not [name for name in sensitive if types[name] == "MVN"]
    products = sum(types[name] == "MatMul" for name in sensitive) - 2  # the resize
    assert 2 * 4 <= products <= 2 * 4 + 1  # the last level's hidden vectors may be among them


def test_int8_weights_are_smaller_and_leave_the_bank_alone(trained, images, tmp_path):
    path = trained.to_openvino(tmp_path, compression_type=CompressionType.INT8)
    graph = openvino.Core().read_model(path)
    bank = trained.model.memory[0].numel()
    types = {node.get_element_type().get_type_name() for node in constants(graph) if np.prod(node.get_shape()) == bank}
    assert types == {"f32"}
    small = [node for node in constants(graph) if node.get_element_type().get_type_name() in {"u8", "i8"}]
    assert len(small) > 20
    expected = trained(images)
    assert_close(run(path, images)["pred_score"].flatten(), expected.pred_score.flatten(), atol=0.1, rtol=0)


def constants(graph):
    return [node for node in graph.get_ordered_ops() if node.get_type_name() == "Constant"]


def test_accuracy_control_judges_on_validation_images_only(trained, datamodule, tmp_path, monkeypatch):
    judged = []
    measure = quantisation._judged
    monkeypatch.setattr(quantisation, "_judged", lambda *a: judged.append(a[2].image_path) or measure(*a))
    path = trained.to_openvino(
        tmp_path,
        compression_type=CompressionType.INT8_ACQ,
        datamodule=datamodule,
        metric=AUROC(fields=["pred_score", "gt_label"]),
        max_drop=0.5,
    )
    assert path.is_file()
    assert set(judged) == set(datamodule.val_data.samples.image_path)
    assert not set(judged) & set(datamodule.test_data.samples.image_path)
    assert run(path, torch.rand(1, 3, 90, 70))["anomaly_map"].shape[-2:] == (56, 56)


@pytest.mark.parametrize("kind", [CompressionType.INT8_PTQ, CompressionType.INT8_ACQ])
def test_quantisation_without_images_says_what_to_give(trained, tmp_path, kind):
    with pytest.raises(ValueError, match=rf"{kind.name}.*--data FewShot"):
        trained.to_openvino(tmp_path, compression_type=kind)


def test_quantisation_of_data_without_any_image_or_of_another_kind_is_refused():
    empty = SimpleNamespace(prepare_data=lambda: None, setup=lambda stage: None)
    for data in (empty, SimpleNamespace(**vars(empty), train_data=[], val_data=[])):
        with pytest.raises(ValueError, match="no image to calibrate with"):
            _calibration_data(data, CompressionType.INT8_PTQ)
    with pytest.raises(ValueError, match=r"Unknown compression .*FP16.*INT8_ACQ"):
        compress(openvino.Model([], [], "empty"), CompressionType.FP16, None)


def test_export_of_untrained_adapters_is_refused(small_backbone, tmp_path):
    for run_export in ("to_torch", "to_onnx", "to_openvino"):
        with pytest.raises(ValueError, match=r"untrained.*--ckpt_path"):
            getattr(MVFA(small_backbone, "random", visualizer=False), run_export)(tmp_path)
    assert not list(tmp_path.rglob("*.*"))


def test_export_without_a_bank_is_refused_unless_it_is_zero_shot(trained, small_backbone, images, tmp_path):
    adapters = trained.save_adapters(tmp_path / "a.safetensors")
    few_shot = MVFA(small_backbone, "random", adapters=adapters, visualizer=False)
    with pytest.raises(ValueError, match=r"bank is empty.*validate.*--model\.memory false"):
        few_shot.to_onnx(tmp_path)
    zero_shot = MVFA(small_backbone, "random", adapters=adapters, memory=False, visualizer=False)
    path = zero_shot.to_openvino(tmp_path)
    assert_agrees(run(path, images), zero_shot, images, **EXACT)


def serve(*arguments):
    script = Path(__file__).parents[2] / "examples" / "serve_openvino.py"
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300
    )


@torch.no_grad()
def test_served_folder_has_the_scores_of_the_model_in_the_order_of_the_files(trained, full, tmp_path):
    rng = np.random.default_rng(2)
    pictures = {f"{index:02}.png": rng.integers(0, 40 + 20 * index, (70, 90, 3), dtype=np.uint8) for index in range(9)}
    (tmp_path / "in").mkdir()
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(tmp_path / "in" / name)
    (tmp_path / "in" / "04b.png").write_bytes(b"nothing")
    done = serve(full, tmp_path / "in", "--output", tmp_path / "scores.csv")
    assert done.returncode == 1
    assert "10 images" in done.stderr
    assert "1 could not be read" in done.stderr
    with (tmp_path / "scores.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    assert list(rows) == sorted([*pictures, "04b.png"])
    assert rows.pop("04b.png")["error"] == "could not be read"
    for name, row in rows.items():
        image = trained.pre_processed(torch.from_numpy(pictures[name]).permute(2, 0, 1) / 255)
        expected = trained(image[None])
        assert float(row["score"]) == pytest.approx(float(expected.pred_score), abs=1e-4)
        assert row["label"] == str(int(expected.pred_label))


def test_served_video_has_a_row_for_each_frame(full, tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "video.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    for grey in (20, 120, 220):
        writer.write(np.full((48, 64, 3), grey, np.uint8))
    writer.release()
    done = serve(full, tmp_path / "video.avi")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert [row["image"] for row in rows] == ["frame 0", "frame 1", "frame 2"]
    assert len({row["score"] for row in rows}) == 3


def test_serving_nothing_says_so(full, tmp_path):
    for source, message in ((tmp_path, "holds no image"), (tmp_path / "no.avi", "no folder")):
        done = serve(full, source)
        assert done.returncode == 1
        assert message in done.stderr
    assert "anomalib export" in serve(tmp_path / "no.xml", tmp_path).stderr


def test_calibration_is_spread_over_all_images():
    assert quantisation._spread(5) == [0, 1, 2, 3, 4]
    chosen = quantisation._spread(1000)
    assert len(chosen) == 300
    assert chosen[0] == 0
    assert chosen[-1] > 990
    assert {second - first for first, second in pairwise(chosen)} == {3, 4}
