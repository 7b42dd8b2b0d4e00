# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Adapters in and out of files: both formats, and what is refused."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from anomalib_mvfa.model.adapters import ResidualAdapter
from anomalib_mvfa.model.weights import load_adapters, read_adapters, write_adapters


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
