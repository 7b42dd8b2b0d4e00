# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Names and sentences of prompts; text features are encoded once, and found again by what they depend on."""

import pytest
import torch
from torch import nn

from anomalib_mvfa.backbones.loading import load_clip, resolve_backbone
from anomalib_mvfa.model.prompts import (
    cache_dir,
    class_prompts,
    encode_states,
    prompt_ensemble,
    prompt_name,
    published_class_names,
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ANOMALIB_MVFA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "text_features"


@pytest.fixture(scope="module")
def text():
    """A small CLIP, and its tokenizer."""
    return load_clip(resolve_backbone("tiny"))


@pytest.fixture
def encodings(text, monkeypatch):
    """How often the text tower was asked."""
    calls = []
    encode = text[0].encode_text
    monkeypatch.setattr(text[0], "encode_text", lambda *args, **kwargs: (calls.append(1), encode(*args, **kwargs))[1])
    return calls


def test_features_are_encoded_once_and_read_bit_by_bit(text, cache, encodings):
    first = encode_states(*text, "Brain")
    assert encodings
    encodings.clear()
    assert torch.equal(encode_states(*text, "Brain"), first)
    assert not encodings
    (file,) = cache.iterdir()
    assert "Brain" not in file.name
    assert b"Brain" not in file.read_bytes()
    text[0].visual, tower = nn.Identity(), text[0].visual  # the image tower has no part in it
    encode_states(*text, "Brain")
    text[0].visual = tower
    assert not encodings


def test_other_classes_weights_and_activations_are_encoded_anew(text, cache, encodings):
    first = encode_states(*text, "Brain")
    assert not torch.equal(encode_states(*text, "Liver"), first)
    with torch.no_grad():
        text[0].text_projection[0, 0] += 1
    assert not torch.equal(encode_states(*text, "Brain"), first)
    with torch.no_grad():
        text[0].text_projection[0, 0] -= 1
    block = text[0].transformer.resblocks[0].mlp
    block.gelu, gelu = nn.ReLU(), block.gelu
    assert not torch.equal(encode_states(*text, "Brain"), first)
    block.gelu = gelu
    assert len(list(cache.iterdir())) == 4
    assert torch.equal(encode_states(*text, "Brain"), first)


def test_damaged_files_and_folders_that_cannot_be_written_do_no_harm(text, cache, encodings, monkeypatch):
    first = encode_states(*text, "Brain")
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:40])
    encodings.clear()
    assert torch.equal(encode_states(*text, "Brain"), first)
    assert encodings
    encodings.clear()
    assert torch.equal(encode_states(*text, "Brain"), first)
    assert not encodings
    monkeypatch.setenv("ANOMALIB_MVFA_CACHE", str(file))  # a file where a folder is wanted
    assert torch.equal(encode_states(*text, "Brain"), first)


def test_folder_follows_the_variable_or_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ANOMALIB_MVFA_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("ANOMALIB_MVFA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own" / "anomalib_mvfa"


@pytest.mark.parametrize(
    ("category", "name"),
    [
        ("Retina_OCT2017", "retinal OCT"),
        ("retina_oct2017_ad", "retinal OCT"),
        ("Chest_AD", "Chest X-ray film"),
        ("BRAIN", "Brain"),
        ("BrainMRI", "brain MRI"),
        ("metal_nut", "metal nut"),
        ("T2-FLAIR scan", "T2 FLAIR scan"),
        ("scan_AD_2", "scan AD 2"),
        ("CTAngio", "CT angio"),
    ],
)
def test_names_of_sets_become_words(category, name):
    assert prompt_name(category) == name


def test_the_six_published_sets_have_names():
    known = published_class_names()
    assert len(known) == 6
    assert known["liver"] == "Liver"
    assert all(key == key.lower() for key in known)


def test_sentences_hold_every_state_in_every_template():
    ensemble = {"normal_states": ["{}"], "abnormal_states": ["bad {}", "{} with a hole"], "templates": ["a {}.", "{}!"]}
    normal, abnormal = class_prompts("br{}ain", ensemble)
    assert normal == ["a br{}ain.", "br{}ain!"]
    assert abnormal == ["a bad br{}ain.", "bad br{}ain!", "a br{}ain with a hole.", "br{}ain with a hole!"]
    parts = prompt_ensemble()
    assert [len(parts[name]) for name in ("normal_states", "abnormal_states", "templates")] == [7, 5, 35]
