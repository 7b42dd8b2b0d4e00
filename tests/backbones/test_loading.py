# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Where the frozen CLIP comes from: file formats, sizes, and what is refused."""

import json
import pickle
import warnings
import zipfile
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from anomalib_mvfa.backbones import loading
from anomalib_mvfa.backbones.loading import fingerprint, load_clip, read_state_dict, resolve_backbone
from anomalib_mvfa.backbones.towers import image_tower
from anomalib_mvfa.model.tower import FrozenTower

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}


class Archive(nn.Module):
    """Laid out as OpenAI's archives: half precision, with plain numbers beside the weights."""

    def __init__(self, clip):
        super().__init__()
        for name, child in clip.named_children():
            self.add_module(name, child)
        for name in ("positional_embedding", "text_projection", "logit_scale"):
            setattr(self, name, getattr(clip, name))
        self.input_resolution, self.context_length, self.vocab_size = 32, 77, 49408

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.visual.conv1(image)


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.json"
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    return str(path)


@pytest.fixture
def clip():
    torch.manual_seed(8)
    model = open_clip.CLIP(**CONFIG)
    # Values that half precision holds exactly.
    model.load_state_dict(
        {name: v.half().float() if v.is_floating_point() else v for name, v in model.state_dict().items()},
    )
    return model.eval()


def save(clip, folder, kind):
    state = clip.state_dict()
    if kind == "safetensors":
        save_file(state, folder / "weights.safetensors")
        return folder / "weights.safetensors"
    path = folder / "weights.pt"
    if kind == "torchscript":
        archive = Archive(clip).half().eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scripted = torch.jit.trace(archive, torch.zeros(1, 3, 32, 32).half(), check_trace=False)
            for name in ("input_resolution", "context_length", "vocab_size"):
                scripted._c._register_attribute(name, torch._C.IntType.get(), getattr(archive, name))
            torch.jit.save(scripted, path)
    else:
        wrapped = {
            "state_dict": {"state_dict": state},
            "module": {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}},
        }
        torch.save(wrapped.get(kind, state), path)
    return path


@pytest.mark.parametrize("kind", ["plain", "state_dict", "module", "safetensors", "torchscript"])
def test_every_file_format_gives_the_same_weights(tmp_path, config_file, clip, kind):
    expected = {name: value.clone() for name, value in clip.state_dict().items()}
    path = save(clip, tmp_path, kind)
    loaded, _ = load_clip(resolve_backbone(config_file, str(path)))
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def test_unknown_backbone_suggests_near_names():
    with pytest.raises(ValueError, match=r"Did you mean .*ViT-L-14-336"):
        resolve_backbone("ViT-L-14-366")
    with pytest.raises(ValueError, match="Did you mean tiny"):
        resolve_backbone("tinny")


def test_incomplete_or_absent_configuration_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.json"):
        resolve_backbone(str(tmp_path / "absent.json"))
    (tmp_path / "part.json").write_text('{"embed_dim": 4}', encoding="utf-8")
    with pytest.raises(ValueError, match="lacks text_cfg, vision_cfg"):
        resolve_backbone(str(tmp_path / "part.json"))


def test_sizes_of_the_published_and_of_other_backbones():
    assert resolve_backbone("ViT-L-14-336").image_size == (240, 240)
    assert resolve_backbone("ViT-B-16").image_size == (224, 224)
    assert resolve_backbone("tiny", image_size=(64, 128)).image_size == (64, 128)


@pytest.mark.parametrize(("size", "near"), [(225, "224 or 240"), ((224, 230), "224 or 240"), (8, "16")])
def test_image_size_that_is_no_multiple_suggests_near_ones(size, near):
    with pytest.raises(ValueError, match=f"patch size 16.*Use for instance {near}"):
        resolve_backbone("ViT-B-16", image_size=size)


def activations(config):
    clip, _ = load_clip(config)
    return {type(module).__name__ for module in clip.modules() if "GELU" in type(module).__name__}


def test_activation_is_what_the_weights_were_trained_with(tmp_path, config_file, clip):
    plain, archive = str(save(clip, tmp_path, "plain")), tmp_path / "archive"
    archive.mkdir()
    cases = {
        ("ViT-B-16", "openai"): True,
        ("ViT-B-16", None): True,
        ("ViT-B-16", "laion2b_s34b_b88k"): False,
        ("ViT-B-32-quickgelu", "laion400m_e32"): True,
        ("tiny", None): False,
        (config_file, plain): False,
        # The same weights by tag and as the file of OpenAI that the tag stands for.
        ("ViT-B-16", str(save(clip, archive, "torchscript"))): True,
    }
    for (backbone, weights), expected in cases.items():
        assert resolve_backbone(backbone, weights).quick_gelu is expected, (backbone, weights)
        assert resolve_backbone(backbone, weights, quick_gelu=not expected).quick_gelu is not expected
    own = tmp_path / "own.json"
    own.write_text(json.dumps({**CONFIG, "quick_gelu": True}), encoding="utf-8")
    assert activations(resolve_backbone(str(own), plain)) == {"QuickGELU"}
    assert activations(resolve_backbone(str(own), plain, quick_gelu=False)) == {"GELU"}
    assert activations(resolve_backbone(config_file, plain)) == {"GELU"}


def test_published_tower_is_known_by_name_and_weights(tmp_path, clip):
    file = str(save(clip, tmp_path, "plain"))
    for weights in (None, "openai", "random", file):
        assert resolve_backbone("ViT-L-14-336", weights).is_published
        assert not resolve_backbone("ViT-L-14", weights).is_published
    assert not resolve_backbone("ViT-L-14-336", "laion400m_e32").is_published
    assert not resolve_backbone("tiny").is_published


def test_mean_and_deviation_are_those_of_the_weights(tmp_path, config_file, clip):
    openai, half = open_clip.constants.OPENAI_DATASET_MEAN, (0.5, 0.5, 0.5)
    assert resolve_backbone("ViT-L-14", "openai").mean == openai
    assert resolve_backbone("ViT-L-14", "laion2b_s32b_b82k").mean == half
    file = str(save(clip, tmp_path, "plain"))
    assert resolve_backbone("ViT-L-14", file).mean == openai  # its tags differ
    assert resolve_backbone("ViT-L-14-CLIPA", file).mean == open_clip.constants.IMAGENET_MEAN  # its tags agree
    own = tmp_path / "own.json"
    own.write_text(
        json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 4]}}),
        encoding="utf-8",
    )
    config = resolve_backbone(str(own), file)
    assert (config.mean, config.std) == ((0.1, 0.2, 0.3), (1, 2, 4))
    assert config.normalized
    assert resolve_backbone("ViT-L-14", "openai").normalized
    assert not resolve_backbone("tiny").normalized
    assert not resolve_backbone(config_file, file).normalized
    tower = FrozenTower(image_tower(load_clip(config)[0].visual), (1, 2), True, config.mean, config.std)
    bare = FrozenTower(image_tower(load_clip(config)[0].visual), (1, 2))
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    normalised = (image - torch.tensor(config.mean).view(3, 1, 1)) / torch.tensor(config.std).view(3, 1, 1)
    assert torch.equal(tower.embed(image), bare.embed(normalised))
    assert not torch.equal(tower.embed(image), bare.embed(image))


def refuse_download(*_, **__):
    msg = "no network"
    raise OSError(msg)


@pytest.mark.parametrize("name", ["ViT-L-14-336", "ViT-B-16"])
def test_without_weights_and_network_the_remedy_is_named(monkeypatch, name):
    small = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "patch_size": 16}}
    resolved = resolve_backbone(name)
    config = loading.BackboneConfig(name, small, (32, 32), resolved.weights)
    monkeypatch.setattr(loading, "download_pretrained", refuse_download)
    with pytest.raises(FileNotFoundError, match=r"(?s)openai.*--model\.pretrained.*tiny"):
        load_clip(config)


def test_hub_weights_without_network_name_the_remedy(monkeypatch):
    monkeypatch.setattr(loading, "snapshot_download", refuse_download)
    with pytest.raises(FileNotFoundError, match=r"(?s)owner/name.*--model\.pretrained.*tiny"):
        resolve_backbone("hf-hub:owner/name")


def test_unknown_tag_lists_the_known_ones():
    config = loading.BackboneConfig("ViT-B-16", CONFIG, (32, 32), "opneai")
    with pytest.raises(FileNotFoundError, match=r"No weights 'opneai'.*openai"):
        load_clip(config)


def test_weights_of_another_model_are_refused(tmp_path, config_file, clip):
    other = {**CONFIG, "embed_dim": 24}
    path = save(open_clip.CLIP(**other), tmp_path, "plain")
    with pytest.raises(ValueError, match=r"weights\.pt does not hold weights of backbone.*size mismatch"):
        load_clip(resolve_backbone(config_file, str(path)))
    torch.save({"conv.weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"weights\.pt does not hold weights"):
        load_clip(resolve_backbone(config_file, str(path)))
    save_file({"visual.conv1.weight": clip.visual.conv1.weight.detach()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors does not hold weights"):
        load_clip(resolve_backbone(config_file, str(tmp_path / "a.safetensors")))


class Intruder:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_code_in_a_weights_file_is_not_executed(tmp_path):
    torch.save({"state_dict": Intruder(tmp_path / "executed")}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="could not be read as weights"):
        read_state_dict(tmp_path / "a.pt")
    assert not (tmp_path / "executed").exists()


class Writer(nn.Module):
    """Scripted, its ``__setstate__`` runs while ``torch.jit.load`` reads it."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.weight = torch.ones(2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image * self.weight

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path, self.training = state
        self.weight = torch.zeros(2)
        torch.save(self.weight, self.path)


def test_code_in_a_scripted_archive_is_not_executed(tmp_path):
    executed, path = tmp_path / "executed", tmp_path / "a.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Writer(str(executed))), path)
        torch.jit.load(path)
    assert executed.exists()  # the archive does what it was made for
    executed.unlink()
    with pytest.raises(ValueError, match="could not be read as weights"):
        read_state_dict(path)
    assert not executed.exists()


def test_global_of_python_in_a_scripted_archive_is_refused(tmp_path, clip):
    path, changed = save(clip, tmp_path, "torchscript"), tmp_path / "changed.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(changed, "w") as target:
        for name in source.namelist():
            tree = pickle.dumps(Intruder(tmp_path / "executed"), protocol=2)
            target.writestr(name, tree if name.endswith("/data.pkl") else source.read(name))
    with pytest.raises(ValueError, match="could not be read as weights"):
        read_state_dict(changed)
    assert not (tmp_path / "executed").exists()


def test_text_truncated_and_empty_files_are_refused(tmp_path, clip):
    (tmp_path / "a.pt").write_text("hello", encoding="utf-8")
    for kind in ("plain", "safetensors"):
        path = save(clip, tmp_path, kind)
        path.write_bytes(path.read_bytes()[:2000])
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("a.pt", "weights.pt", "weights.safetensors", "list.pt"):
        with pytest.raises(ValueError, match="could not be read as weights"):
            read_state_dict(tmp_path / name)
    torch.save({}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match="no state dict"):
        read_state_dict(tmp_path / "empty.pt")


def test_fingerprint_distinguishes_weights_and_ignores_the_image_size(tmp_path, config_file, clip):
    path = str(save(clip, tmp_path, "plain"))

    def digest(weights, size=32):
        return fingerprint(load_clip(resolve_backbone(config_file, weights, size))[0].visual)

    assert digest(path) == digest(path, 48) == digest(path, (32, 64))
    assert digest(path) != digest("random")
    assert len(digest(path)) == 16


def test_random_and_tiny_weights_do_not_depend_on_the_global_seed(config_file):
    def values(name, weights):
        return load_clip(resolve_backbone(name, weights))[0].visual.proj

    for name, weights in ((config_file, "random"), ("tiny", None)):
        torch.manual_seed(1)
        first = values(name, weights)
        torch.manual_seed(2)
        before = torch.get_rng_state()
        assert torch.equal(values(name, weights), first)
        assert torch.equal(torch.get_rng_state(), before)
