# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Adapters in and out of files and of the hub: both formats, what is refused, and the model card."""

import json
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from anomalib_mvfa import MVFA
from anomalib_mvfa.backbones.loading import load_clip, resolve_backbone
from anomalib_mvfa.model.adapters import ResidualAdapter
from anomalib_mvfa.model.prompts import class_prompts
from anomalib_mvfa.training.state import choose_class_name
from anomalib_mvfa.weights import adapter_files
from anomalib_mvfa.weights.adapter_files import load_adapters, read_adapters, write_adapters


def make_adapters(width=32, hidden=24, levels=4):
    return tuple(nn.ModuleList(ResidualAdapter(width, hidden) for _ in range(levels)) for _ in range(2))


def same(first, second):
    return all(
        torch.equal(value, other.state_dict()[name])
        for module, other in zip(first, second, strict=True)
        for name, value in module.state_dict().items()
    )


def snapshot(adapters):
    return [{name: value.clone() for name, value in module.state_dict().items()} for module in adapters]


def assert_refused(path, match, adapters=None):
    adapters = adapters or make_adapters()
    before = snapshot(adapters)
    with pytest.raises(ValueError, match=match) as caught:
        load_adapters(path, *adapters)
    assert str(path) in str(caught.value)
    for module, state in zip(adapters, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_released_file_is_read(official_adapters):
    adapters = make_adapters()
    facts = load_adapters(official_adapters, *adapters)
    raw = torch.load(official_adapters, weights_only=True)
    assert facts == {}
    for module, kind in zip(adapters, ("seg_adapters", "det_adapters"), strict=True):
        assert module.state_dict().keys() == raw[kind].keys()
        assert all(torch.equal(value, raw[kind][name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_round_trip_is_exact(tmp_path, suffix):
    written, read = make_adapters(), make_adapters()
    path = write_adapters(
        tmp_path / "new" / f"a{suffix}", *written, metadata={"class_name": "Brain", "levels": [6, 12]}
    )
    facts = load_adapters(path, *read)
    assert same(written, read)
    assert facts == ({"class_name": "Brain", "levels": [6, 12]} if suffix == ".safetensors" else {})
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_pth_has_the_layout_of_the_released_file(tmp_path, official_adapters):
    path = write_adapters(tmp_path / "a.pth", *make_adapters())
    ours, released = (torch.load(file, weights_only=True) for file in (path, official_adapters))
    assert ours.keys() == released.keys()
    assert all(ours[kind].keys() == released[kind].keys() for kind in ours)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_half_precision_halves_the_file_and_is_read_as_float32(tmp_path, suffix):
    written, read = make_adapters(256, 128), make_adapters(256, 128)
    full = write_adapters(tmp_path / f"full{suffix}", *written)
    half = write_adapters(tmp_path / f"half{suffix}", *written, dtype=torch.float16)
    assert half.stat().st_size < 0.52 * full.stat().st_size
    load_adapters(half, *read)
    for module, other in zip(written, read, strict=True):
        for name, value in other.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, module.state_dict()[name].half().float())


def test_other_suffix_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"\.safetensors"):
        write_adapters(tmp_path / "a.bin", *make_adapters())
    assert not list(tmp_path.iterdir())


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        read_adapters(tmp_path / "nothing.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("shape", [(48, 24, 4), (32, 16, 4), (32, 24, 3), (32, 24, 5)])
def test_other_width_or_levels_are_refused(tmp_path, suffix, shape):
    path = write_adapters(tmp_path / f"a{suffix}", *make_adapters(*shape))
    assert_refused(path, "does not fit this model")


def test_first_kind_is_unchanged_when_the_second_does_not_fit(tmp_path):
    path = write_adapters(tmp_path / "a.safetensors", make_adapters()[0], make_adapters(48)[1])
    assert_refused(path, r"det_adapters\.0\.fc1")


def test_missing_weight_is_named(tmp_path, official_adapters):
    state = torch.load(official_adapters, weights_only=True)
    del state["det_adapters"]["2.fc2.0.weight"]
    torch.save(state, tmp_path / "a.pth")
    assert_refused(tmp_path / "a.pth", r"det_adapters\.2\.fc2\.0\.weight is missing")


@pytest.mark.parametrize(
    "contents",
    [
        {},
        [1, 2],
        {"seg_adapters": {"0.fc1.0.weight": torch.ones(2)}},
        {"seg_adapters": {"a": 1}, "det_adapters": {"a": 1}},
    ],
)
def test_foreign_pth_is_refused(tmp_path, contents):
    torch.save(contents, tmp_path / "a.pth")
    assert_refused(tmp_path / "a.pth", "no adapters file")


def test_foreign_safetensors_is_refused(tmp_path):
    save_file({"conv.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    assert_refused(tmp_path / "a.safetensors", "no adapters file")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_text_and_truncated_files_are_refused(tmp_path, suffix):
    text = tmp_path / f"text{suffix}"
    text.write_text("patient list", encoding="utf-8")
    assert_refused(text, "could not be read")
    path = write_adapters(tmp_path / f"a{suffix}", *make_adapters())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert_refused(path, "could not be read")


class Intruder:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_code_in_a_pickle_is_not_executed(tmp_path, save):
    trace, path = tmp_path / "executed", tmp_path / "a.pth"
    save({"seg_adapters": Intruder(trace), "det_adapters": {}}, path)
    assert_refused(path, "could not be read")
    assert not trace.exists()


@pytest.fixture
def mvfa(small_backbone):
    torch.manual_seed(2)
    model = MVFA(small_backbone, "random", class_name="Brain", visualizer=False)
    model.configure_model()
    return model


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub in a folder: whatever is uploaded can be downloaded."""

    def download(repository, filename, revision=None):
        path = tmp_path / "hub" / repository / filename
        if not path.is_file() or revision not in {None, "main"}:
            message = "not there"
            raise LocalEntryNotFoundError(message)
        return str(path)

    def create(self, repo_id, private, exist_ok):
        (tmp_path / "hub" / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        (tmp_path / "private").write_text(str(private))
        return f"https://hub/{repo_id}"

    def upload(self, repo_id, folder_path, commit_message):
        for path in Path(folder_path).iterdir():
            path.rename(tmp_path / "hub" / repo_id / path.name)

    monkeypatch.setattr(adapter_files, "hf_hub_download", download)
    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return tmp_path / "hub"


def test_what_is_pushed_to_the_hub_is_loaded_from_there(hub, mvfa, small_backbone):
    assert mvfa.push_to_hub("me/brain", licence="cc-by-nc-sa-4.0") == "https://hub/me/brain"
    assert {path.name for path in (hub / "me/brain").iterdir()} == {"README.md", "adapters.safetensors"}
    assert (hub.parent / "private").read_text() == "True"
    loaded = MVFA(small_backbone, "random", adapters="hf-hub:me/brain@main", visualizer=False)
    loaded.configure_model()
    for name, value in mvfa.model.seg_adapters.state_dict().items():
        assert torch.equal(loaded.model.seg_adapters.state_dict()[name], value.half().float())
    choose_class_name(loaded)
    assert loaded.model.class_name == "Brain"


def test_file_in_the_local_cache_of_the_hub_is_found_without_a_network(monkeypatch, tmp_path, mvfa):
    written = mvfa.save_adapters(tmp_path / "adapters.safetensors")
    repository = tmp_path / "cache" / "models--me--brain"
    snapshot_folder = repository / "snapshots" / ("0" * 40)
    snapshot_folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    written.rename(snapshot_folder / written.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    download = adapter_files.hf_hub_download
    monkeypatch.setattr(
        adapter_files,
        "hf_hub_download",
        lambda *names, **options: download(*names, **options, cache_dir=tmp_path / "cache"),
    )
    assert read_adapters("hf-hub:me/brain").metadata["class_name"] == "Brain"
    with pytest.raises(FileNotFoundError, match=r"hf-hub:me/liver.*adapters\.safetensors"):
        read_adapters("hf-hub:me/liver")


@pytest.mark.parametrize("name", ["brain", "hf-hub:me/brain", "a/b/c"])
def test_repository_is_named_by_owner_and_name(hub, mvfa, name):
    with pytest.raises(ValueError, match="owner/name"):
        mvfa.push_to_hub(name, licence="mit")


def test_model_card_states_use_data_results_and_limits(hub, mvfa):
    mvfa.history["training"] = {
        "data": "mri",
        "classes": ["Brain"],
        "k_shot": 4,
        "synthetic_lesions": False,
        "epochs": 50,
        "learning_rate": 0.001,
    }
    mvfa.history["figures"] = {
        "data": "mri",
        "images": 144,
        "fusion_scale": "support",
        "metrics": {"image_AUROC": 0.71234},
    }
    mvfa.push_to_hub("me/brain", licence="cc-by-nc-sa-4.0")
    header, _, text = (hub / "me/brain/README.md").read_text(encoding="utf-8").removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(header)["license"] == "cc-by-nc-sa-4.0"
    for section in ("Intended use", "How to use", "Facts", "Results", "Limits"):
        assert f"\n\n## {section}\n\n" in text
    for line in (
        "    anomalib test --model MVFA --model.adapters hf-hub:me/brain --data FewShot ...",
        "| Training set | mri |",
        "| Supports | 4 normal, as many abnormal unless lesions were synthetic |",
        "| Synthetic lesions | no |",
        "| Epochs, learning rate | 50, 0.001 |",
        "Test part of mri, 144 images; nothing of the test set was used before.",
        "| image_AUROC | 0.7123 |",
    ):
        assert line in text.splitlines(), text
    assert f"(fingerprint {mvfa.model.fingerprint})" in text
    assert "`residual=[0.8, 0.1, 0.1]`, " in text
    assert "**Not for clinical use.**" in text


def test_model_card_without_training_facts_says_unknown(hub, mvfa):
    mvfa.push_to_hub("me/brain", licence="mit")
    text = (hub / "me/brain/README.md").read_text(encoding="utf-8")
    for name in ("Training set", "Supports", "Synthetic lesions", "Epochs, learning rate"):
        assert f"| {name} | unknown |" in text
    assert "None were measured" in text


def test_metadata_says_what_the_adapters_fit_and_holds_no_path(tmp_path, mvfa):
    path = mvfa.save_adapters(tmp_path / "a.safetensors", torch.float16)
    with safe_open(path, framework="pt") as file:
        stored = json.loads(file.metadata()["anomalib_mvfa"])
    assert stored == read_adapters(path).metadata == json.loads(json.dumps(mvfa.facts()))
    assert stored["levels"] == [1, 2, 3, 4]
    assert stored["backbone"] == "small.json"
    assert stored["variant"]["residual"] == [0.8, 0.1, 0.1]
    assert "/" not in json.dumps(stored)
    prompts = stored["prompts"]
    first = prompts["templates"][0].replace("{}", prompts["abnormal_states"][0].replace("{}", "Brain"))
    assert first == class_prompts("Brain")[1][0]


@pytest.mark.parametrize(
    ("choices", "match"),
    [
        ({"pretrained": "other"}, r"other backbone weights.*'small\.json'"),
        ({"levels": [1, 2, 3]}, "does not fit this model"),
        ({"variant": {"normalize_input": True}}, r"--model\.variant\.normalize_input"),
        ({"variant": {"residual": [0.9, 0.05, 0.05]}}, r"residual=\[0\.8, 0\.1, 0\.1\]"),
    ],
)
def test_adapters_of_another_network_are_refused(tmp_path, mvfa, small_backbone, choices, match):
    path = mvfa.save_adapters(tmp_path / "a.safetensors")
    if "pretrained" in choices:
        state = weights_of_another_tower(small_backbone)
        save_file(state, tmp_path / "other.safetensors")
        choices = {"pretrained": str(tmp_path / "other.safetensors")}
    choices = {"pretrained": "random", **choices}
    model = MVFA(small_backbone, adapters=path, visualizer=False, **choices)
    with pytest.raises(ValueError, match=match) as caught:
        model.configure_model()
    assert str(path) in str(caught.value)


def weights_of_another_tower(config):
    clip, _ = load_clip(resolve_backbone(config, "random"))
    return {name: (value * 1.01).contiguous() for name, value in clip.state_dict().items()}


def test_same_number_of_other_levels_is_refused(tmp_path, golden_files):
    config, weights_file = golden_files
    model = MVFA(config, weights_file, class_name="Brain", visualizer=False, levels=[6, 12])
    model.configure_model()
    path = model.save_adapters(tmp_path / "a.safetensors")
    other = MVFA(config, weights_file, adapters=path, visualizer=False, levels=[12, 24])
    with pytest.raises(ValueError, match=r"levels \[6, 12\].*--model\.levels"):
        other.configure_model()


def test_choices_that_leave_the_tokens_alone_may_differ(tmp_path, mvfa, small_backbone):
    path = mvfa.save_adapters(tmp_path / "a.safetensors")
    model = MVFA(small_backbone, "random", adapters=path, variant={"pooling": "max", "map_blur": 2.0}, visualizer=False)
    model.configure_model()
    assert model.model.variant.pooling == "max"
