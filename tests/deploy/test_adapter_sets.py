# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Named adapter sets on one live model: the same predictions as models of their own, and mixed lists."""

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from PIL import Image
from torch.testing import assert_close

from anomalib_mvfa import MVFA, AdapterSets
from anomalib_mvfa.data import FewShot
from anomalib_mvfa.model.memory import Support

BRIGHT = {"brain": 40, "liver": 200}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, small_backbone):
    """Two models of the same backbone, trained on other images with other prompts and thresholds."""
    root = tmp_path_factory.mktemp("sets")
    paths = {}
    for number, (name, grey) in enumerate(BRIGHT.items()):
        for kind in ("normal", "abnormal", "masks"):
            (root / name / kind).mkdir(parents=True)
        generator = torch.Generator().manual_seed(number)
        for index in range(6):
            pixels = (grey + 20 * torch.rand(56, 56, generator=generator)).byte()
            Image.fromarray(pixels.numpy()).save(root / name / "normal" / f"{index}.png")
            mask = torch.zeros(56, 56, dtype=torch.uint8)
            mask[10:24, 10 + index : 24 + index] = 255
            Image.fromarray(mask.numpy()).save(root / name / "masks" / f"{index}.png")
            abnormal = pixels.clone()
            abnormal[mask > 0] = 120
            Image.fromarray(abnormal.numpy()).save(root / name / "abnormal" / f"{index}.png")
        folder = Folder(
            name,
            normal_dir="normal",
            abnormal_dir="abnormal",
            mask_dir="masks",
            root=root / name,
            num_workers=0,
            seed=0,
            test_split_ratio=0.5,
        )
        torch.manual_seed(number)
        weight = 0.5 + 0.2 * number
        model = MVFA(small_backbone, "random", class_name=name, visualizer=False, language_weight=weight)
        engine = Engine(
            max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=root / "results"
        )
        engine.fit(model, datamodule=FewShot(folder, k_shot=1))
        paths[name] = engine.best_model_path
    return root, paths


@pytest.fixture
def live(small_backbone, checkpoints):
    torch.manual_seed(9)
    sets = AdapterSets(MVFA(small_backbone, "random", class_name="object", visualizer=False))
    for name, path in checkpoints[1].items():
        sets.add(name, path)
    return sets


@pytest.fixture
def mixed(checkpoints):
    root = checkpoints[0]
    return [root / name / kind / f"{i}.png" for i in (4, 5) for kind in ("normal", "abnormal") for name in BRIGHT]


@torch.no_grad()
def expected(path, checkpoint):
    model = MVFA.load_from_checkpoint(checkpoint).eval()
    return model(model.pre_processed(torch.from_numpy(read(path)))[None])


def read(path):
    return np.repeat((np.asarray(Image.open(path), np.float32) / 255)[None], 3, axis=0)


@pytest.mark.parametrize("route", ["column", "function"])
def test_mixed_list_is_predicted_as_by_each_model_of_its_own(live, mixed, checkpoints, route):
    def organ(path):
        return path.parts[-3]

    route = organ if route == "function" else [organ(path) for path in mixed]
    predictions = list(live.predict(mixed, route, batch_size=2))
    assert len(predictions) == len(mixed)
    for path, prediction in zip(mixed, predictions, strict=True):
        own = expected(path, checkpoints[1][organ(path)])
        for given, wanted in zip(prediction, own, strict=True):
            assert_close(given.float(), wanted.float(), atol=1e-5, rtol=1e-5)


def test_sets_differ_in_all_that_belongs_to_an_organ(live):
    seen = []
    for name in BRIGHT:
        live.use(name)
        model = live.mvfa.model
        assert model.class_name == name
        seen.append(
            [
                model.text_features,
                model.seg_adapters[0].fc1[0].weight,
                model.seg_memory[0],
                model.fusion.memory_map,
                live.mvfa.post_processor.image_threshold,
                torch.tensor(model.fusion.language_weight),
            ]
        )
    assert not any(torch.equal(first, second) for first, second in zip(*seen, strict=True))


def test_switching_copies_nothing_and_keeps_the_backbone(live):
    tower = live.mvfa.model.tower
    live.use("brain")
    bank = live.mvfa.model.seg_memory[0].data_ptr()
    live.use("liver")
    assert live.mvfa.model.seg_memory[0].data_ptr() != bank
    live.use("brain")
    assert live.mvfa.model.seg_memory[0].data_ptr() == bank
    assert live.mvfa.model.tower is tower
    assert live.active == "brain"


def test_neighbours_of_a_set_share_a_batch(live, mixed, monkeypatch):
    sizes = []
    forward = live.mvfa.model.forward
    monkeypatch.setattr(live.mvfa.model, "forward", lambda images: sizes.append(len(images)) or forward(images))
    ordered = sorted(mixed, key=lambda path: path.parts[-3])
    list(live.predict(ordered, lambda path: path.parts[-3], batch_size=3))
    assert sizes == [3, 1, 3, 1]


def test_stream_is_predicted_item_by_item(live):
    def camera():
        for index in range(10**9):
            yield "brain" if index % 2 else "liver", torch.full((3, 40, 40), 0.5)

    stream = live.predict(camera(), lambda item: item[0], read=lambda item: item[1])
    first, second = next(stream), next(stream)
    assert not torch.equal(first.pred_score, second.pred_score)


def test_switched_model_is_the_set_for_saving_for_export_and_for_forward(live, checkpoints, tmp_path):
    live.use("liver")
    features = live.mvfa.model.text_features.clone()
    live.mvfa.to_torch(tmp_path)
    assert torch.equal(live.mvfa.model.text_features, features)
    again = MVFA.load_from_checkpoint(checkpoints[1]["liver"])
    assert live.mvfa.facts()["class_name"] == again.facts()["class_name"] == "liver"
    image = torch.rand(1, 3, 56, 56)
    with torch.no_grad():
        assert_close(live.mvfa(image).anomaly_map, again.eval()(image).anomaly_map)


def test_adapters_file_is_zero_shot_until_it_is_given_supports(live, checkpoints, tmp_path, mixed):
    source = MVFA.load_from_checkpoint(checkpoints[1]["brain"])
    path = source.save_adapters(tmp_path / "brain.safetensors")
    live.use("liver")
    live.add("zero", path)
    normal = torch.rand(2, 2, 3, 56, 56)
    live.add("few", path, support=Support(normal, normal[0, :0]))
    assert live.active == "liver"
    assert live.mvfa.model.class_name == "liver"
    live.use("zero")
    assert live.mvfa.model.memory.is_empty
    live.mvfa.to_torch(tmp_path)  # not refused for want of a bank
    assert_close(live.mvfa.model.text_features, source.model.text_features)
    live.use("few")
    assert live.mvfa.model.memory[0].shape[0] == 4 * 17
    live.use("zero")
    assert live.mvfa.model.memory.is_empty


def test_unknown_names_and_unequal_columns_are_refused(live, mixed):
    with pytest.raises(KeyError, match=r"'heart'.*brain, liver"):
        live.use("heart")
    with pytest.raises(ValueError, match="1 sets for 8 items"):
        next(live.predict(mixed, ["brain"]))  # before anything is predicted


def test_sets_of_another_network_are_refused(live, checkpoints, small_backbone, tmp_path, official_adapters):
    path = checkpoints[1]["brain"]
    for choices, match in (
        ({"levels": [1, 2, 4]}, r"levels \[1, 2, 3, 4\]"),
        ({"variant": {"quick_gelu": True}}, "quick_gelu"),
    ):
        sets = AdapterSets(MVFA(small_backbone, "random", class_name="Brain", visualizer=False, **choices))
        with pytest.raises(ValueError, match=match) as caught:
            sets.add("brain", path)
        assert str(path) in str(caught.value)
    live.mvfa.model.image_size = (112, 112)
    with pytest.raises(ValueError, match=r"image_size=\[56, 56\]"):
        live.add("brain", path)
    live.mvfa.model.image_size = (56, 56)
    torch.save({"state_dict": {}, "hyper_parameters": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="not made by MVFA"):
        live.add("foreign", tmp_path / "foreign.ckpt")
    with pytest.raises(FileNotFoundError, match=r"nothing\.ckpt"):
        live.add("nothing", tmp_path / "nothing.ckpt")
    with pytest.raises(ValueError, match="class_name"):
        live.add("released", official_adapters)
    live.add("released", official_adapters, class_name="Brain")
