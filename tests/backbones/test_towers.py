# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Backbones of every kind: their tokens and texts are open_clip's, and MVFA trains, exports and restores on them."""

import copy
import json
import shutil
import sys

import openvino
import pytest
import timm
import torch
from anomalib.deploy import CompressionType
from anomalib.engine import Engine
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from anomalib_mvfa import MVFA, MVFAModel
from anomalib_mvfa.backbones.loading import fingerprint, load_clip, resolve_backbone
from anomalib_mvfa.backbones.text import make_tokenizer
from anomalib_mvfa.backbones.towers import TimmTower, image_tower
from anomalib_mvfa.baselines.win_clip import WinClipAnyModel
from anomalib_mvfa.data import FewShot
from anomalib_mvfa.deploy.quantisation import sensitive_nodes
from anomalib_mvfa.model.tower import FrozenTower
from anomalib_mvfa.pre_processing import EightBitResize

TEXTS = ["a photo of the damaged brain", "a flawless normal object with perfect brain", "tumor"]
F32 = {"INFERENCE_PRECISION_HINT": "f32"}


def local(folder):
    return f"local-dir:{folder}"


@torch.no_grad()
def test_tokens_after_the_last_block_are_those_of_open_clip(hub_folder):
    folder, model = hub_folder
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    visual = load_clip(resolve_backbone(local(folder)))[0].visual
    tower = FrozenTower(image_tower(copy.deepcopy(visual)), [1, 3, 4])
    tokens = tower.embed(images)
    for stage in range(3):
        tokens = tower.run_stage(tokens, stage)
    assert tokens.shape == (2, tower.prefix + 16, 32)
    assert_close(image_tower(visual).pool(tokens)[0], model.encode_image(images), atol=1e-5, rtol=0)


@torch.no_grad()
def test_win_clip_sees_the_window_alone(hub_folder):
    folder, model = hub_folder
    win_clip = WinClipAnyModel(resolve_backbone(local(folder)), scales=(4, 2))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    embedded, (whole, windows), patches = win_clip.encode_image(images)
    assert_close(embedded, model.encode_image(images), atol=1e-5, rtol=0)
    assert_close(whole[:, 0], embedded, atol=1e-5, rtol=0)  # a window that is the whole image
    assert patches.shape == (2, 16, 32)
    changed = images.clone()
    changed[:, :, 32:] = 0  # behind the first window of 2 x 2 patches
    others = win_clip.encode_image(changed)[1][1]
    assert_close(windows[:, 0], others[:, 0], atol=1e-6, rtol=0)
    assert (windows[:, -1] - others[:, -1]).abs().max() > 1e-3


@torch.no_grad()
def test_texts_are_encoded_as_by_open_clip(hub_folder, kind):
    folder, model = hub_folder
    clip, tokenizer = load_clip(resolve_backbone(local(folder)))
    if kind in {"biomedclip", "siglip"}:
        from transformers import AutoTokenizer

        length = {"biomedclip": 32, "siglip": 16}[kind]
        tokens = AutoTokenizer.from_pretrained(folder)(
            TEXTS, return_tensors="pt", max_length=length, padding="max_length", truncation=True
        ).input_ids
        assert len(tokens.unique()) > 8
        assert torch.equal(tokenizer([text.replace(" ", "  ") for text in TEXTS]), tokens)
    else:
        tokens = tokenizer(TEXTS)
    assert_close(clip.encode_text(tokens), model.encode_text(tokens), atol=1e-5, rtol=0)


def test_facts_are_those_of_the_folder(hub_folder):
    folder, _ = hub_folder
    config = resolve_backbone(local(folder))
    assert (config.mean, config.std) == ((0.4, 0.5, 0.6), (0.2, 0.25, 0.5))
    assert not config.quick_gelu
    model = MVFAModel(local(folder), class_name="Brain")
    assert model.tower.normalize_input
    assert model.tower.mean.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert not MVFAModel(local(folder), variant={"normalize_input": False}).tower.normalize_input
    assert model.levels == (1, 2, 3, 4)
    assert model.text_features.shape[0] == model.backbone.model["embed_dim"]


@pytest.mark.parametrize("name", ["mvfa_small_vit", "mvfa_small_siglip", "mvfa_small_eva"])
@torch.no_grad()
def test_positions_are_interpolated_as_timm_does_for_another_size(name, make_hub_folder):
    kind = {"mvfa_small_vit": "biomedclip", "mvfa_small_siglip": "siglip", "mvfa_small_eva": "eva"}[name]
    if kind != "eva":
        pytest.importorskip("transformers")
    folder, model = make_hub_folder(kind)
    config = resolve_backbone(local(folder), image_size=(96, 80))
    loaded = load_clip(config)[0].visual
    assert fingerprint(loaded) == fingerprint(model.visual)
    tower = image_tower(loaded)
    assert (tower.grid_size, tower.image_size) == ((6, 5), (96, 80))
    dynamic = timm.create_model(name, dynamic_img_size=True).eval()
    dynamic.load_state_dict(
        {k: v for k, v in model.visual.trunk.state_dict().items() if not k.startswith(("head", "fc_norm"))},
        strict=False,
    )
    images = torch.rand(1, 3, 96, 80, generator=torch.Generator().manual_seed(1))
    tokens = tower.embed(images)
    for block in tower.blocks:
        tokens = tower.run_block(block, tokens)
    assert_close(loaded.trunk.norm(tokens), dynamic.forward_features(images), atol=1e-5, rtol=0)


def test_mvfa_trains_restores_and_exports(kind, hub_folder, make_folder_in, tmp_path):
    if kind in {"open_clip", "registers"}:
        pytest.skip("as the others, which take long")
    folder, _ = hub_folder
    source = make_folder_in(tmp_path / "data", 12, 8)
    source.test_split_ratio = 0.5
    data = FewShot(source, k_shot=1)
    torch.manual_seed(0)
    model = MVFA(local(folder), class_name="Brain", visualizer=False)
    engine = Engine(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    engine.fit(model, datamodule=data)
    model.eval()
    before = [parameter.clone() for parameter in model.model.seg_adapters.parameters()]
    assert any(bool((value != 0).any()) for value in before)
    images = torch.stack([EightBitResize((64, 64))(data.test_data[index].image) for index in range(4)])
    images = images.as_subclass(torch.Tensor)
    with torch.no_grad():
        expected = model(images)
        restored = MVFA.load_from_checkpoint(engine.best_model_path).eval()(images)
    assert_close(restored.anomaly_map, expected.anomaly_map, atol=0.01, rtol=0)  # the bank is stored in half precision
    for compression, tolerance in ((None, 1e-4), (CompressionType.INT8_PTQ, 0.15)):
        path = model.to_openvino(tmp_path / str(compression), compression_type=compression, datamodule=data)
        outputs = openvino.Core().compile_model(path, "CPU", F32)(images.numpy())
        found = torch.from_numpy(outputs["anomaly_map"].copy()).reshape(expected.anomaly_map.shape)
        assert float((found - expected.anomaly_map).abs().mean()) < tolerance
    graph = openvino.Core().read_model(path)
    fake = [node for node in graph.get_ordered_ops() if node.get_type_name() == "FakeQuantize"]
    readers = {reader.get_node() for node in fake for reader in node.output(0).get_target_inputs()}
    assert sum(node.get_type_name() == "MatMul" for node in readers) >= 4 * 4 + 3 * 4
    assert any(node.get_type_name() == "Convolution" for node in readers)
    assert not {node.get_friendly_name() for node in readers} & set(sensitive_nodes(graph))


@pytest.mark.parametrize("kind", ["registers"], indirect=True)
def test_prefix_tokens_are_not_compared(hub_folder):
    folder, _ = hub_folder
    model = MVFAModel(local(folder), class_name="Brain")
    assert model.tower.prefix == 3
    hidden = torch.rand(1, 19, 24, generator=torch.Generator().manual_seed(3))
    changed = hidden.clone()
    changed[:, :3] += 1
    assert torch.equal(model.level_map(hidden), model.level_map(changed))
    changed[:, 3] += 1
    assert not torch.equal(model.level_map(hidden), model.level_map(changed))


def test_weights_of_pickle_are_read_where_there_is_no_safetensors_file(make_hub_folder):
    folder, model = make_hub_folder("eva", weights="bin")
    assert fingerprint(load_clip(resolve_backbone(local(folder)))[0].visual) == fingerprint(model.visual)


def test_hub_repository_is_read_as_a_local_folder(make_hub_folder, monkeypatch):
    from anomalib_mvfa.backbones import loading

    folder, model = make_hub_folder("eva", weights="bin")

    asked = []

    def download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        return str(folder)

    monkeypatch.setattr(loading, "snapshot_download", download)
    config = resolve_backbone("hf-hub:owner/eva")
    assert config.mean == (0.4, 0.5, 0.6)
    assert fingerprint(load_clip(config)[0].visual) == fingerprint(model.visual)
    assert asked == [
        ("owner/eva", ["*.json", "*.txt", "*.model"]),
        ("owner/eva", ["open_clip_model.safetensors"]),
        ("owner/eva", ["open_clip_pytorch_model.bin"]),
    ]


def test_weights_of_a_hub_that_only_its_configuration_was_fetched_from_say_what_to_fetch(make_hub_folder, monkeypatch):
    from anomalib_mvfa.backbones import loading

    # Without a network the hub's library returns what it has kept.
    folder = shutil.copytree(make_hub_folder("eva")[0], make_hub_folder("eva")[0].with_name("kept"))
    (folder / "open_clip_model.safetensors").unlink()
    monkeypatch.setattr(loading, "snapshot_download", lambda *_, **__: str(folder))
    with pytest.raises(FileNotFoundError, match=r"(?s)hub repository owner/eva, copy .*--model\.pretrained"):
        load_clip(resolve_backbone("hf-hub:owner/eva"))


@pytest.fixture
def eva(make_hub_folder, tmp_path):
    return shutil.copytree(make_hub_folder("eva")[0], tmp_path / "eva")


@pytest.fixture
def biomedclip(make_hub_folder, tmp_path):
    pytest.importorskip("transformers")
    return shutil.copytree(make_hub_folder("biomedclip")[0], tmp_path / "biomedclip")


def test_missing_files_are_named(eva, biomedclip, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.open_clip_config\.json is missing"):
        resolve_backbone(local(tmp_path / "none"))
    (eva / "open_clip_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"eva lacks open_clip_model\.safetensors or"):
        load_clip(resolve_backbone(local(eva)))
    (biomedclip / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"biomedclip lacks the tokenizer 'owner/bert'.*tokenizer\.json"):
        load_clip(resolve_backbone(local(biomedclip)))
    (biomedclip / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing: expected .* text tower 'owner/bert'"):
        load_clip(resolve_backbone(local(biomedclip)))


def test_damaged_tokenizer_is_named(biomedclip):
    (biomedclip / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"The tokenizer of .*biomedclip could not be loaded.*local-dir:PATH"):
        load_clip(resolve_backbone(local(biomedclip)))


def test_tokenizer_of_the_hub_without_a_network_names_the_remedy(monkeypatch, biomedclip):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = {"hf_tokenizer_name": "owner/absent", "context_length": 8}
    with pytest.raises(FileNotFoundError, match=r"The tokenizer of owner/absent could not be loaded"):
        make_tokenizer(text, "ViT-B-16-SigLIP", None)


def test_without_transformers_the_extra_is_named(monkeypatch, biomedclip):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"anomalib-mvfa\[hf\]"):
        load_clip(resolve_backbone(local(biomedclip)))


def test_weights_of_another_width_are_refused(eva):
    path = eva / "open_clip_model.safetensors"
    state = load_file(path)
    state["visual.trunk.norm.weight"] = torch.ones(48)
    save_file(state, path)
    with pytest.raises(ValueError, match=r"open_clip_model\.safetensors does not hold weights.*norm\.weight"):
        load_clip(resolve_backbone(local(eva)))


def test_tokenizer_of_another_vocabulary_is_refused(biomedclip):
    from .conftest import write_tokenizer

    write_tokenizer(biomedclip, "biomedclip", [f"word{index}" for index in range(100)])
    with pytest.raises(ValueError, match=r"biomedclip has 105 tokens, but the text tower .* only 64"):
        load_clip(resolve_backbone(local(biomedclip)))


def test_tower_without_a_text_is_refused(eva):
    path = eva / "open_clip_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["model_cfg"]["text_cfg"]
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"eva' lacks text_cfg"):
        resolve_backbone(local(eva))


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("RN50", "lacks an image tower of transformer blocks"),
        ("coca_ViT-B-32", "lacks a text tower"),
        ("convnext_base", "'convnext_base' cannot hold adapters.* lacks transformer blocks"),
        ("swin_base_patch4_window7_224", "lacks transformer blocks"),
        ("vit_relpos_medium_patch16_cls_224", "lacks position embeddings"),
    ],
)
def test_what_cannot_hold_adapters_is_refused_by_what_it_lacks(name, lacking):
    with pytest.raises(ValueError, match=lacking):
        resolve_backbone(name)


def test_activation_of_a_tower_of_timm_cannot_be_chosen(eva):
    with pytest.raises(ValueError, match="timm's towers have an activation of their own"):
        resolve_backbone(local(eva), quick_gelu=True)


def test_unknown_trunk_is_named(eva):
    path = eva / "open_clip_config.json"
    path.write_text(path.read_text(encoding="utf-8").replace("mvfa_small_eva", "eva99"), encoding="utf-8")
    with pytest.raises(ValueError, match="has no model 'eva99'"):
        resolve_backbone(local(eva))


def test_backbone_of_timm_is_behind_the_same_interface(hub_folder, kind):
    visual = load_clip(resolve_backbone(local(hub_folder[0])))[0].visual
    assert isinstance(image_tower(visual), TimmTower) == (kind != "open_clip")
