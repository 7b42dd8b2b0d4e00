# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The speed benchmarks run, and what they compare computes the same."""

import argparse
import json

import pytest
import torch

from benchmarks import bank, inference, training


@torch.inference_mode()
def test_the_naive_variant_computes_the_map_of_the_model():
    model = inference.build(argparse.Namespace(backbone="tiny", device="cpu", k_shot=1)).model
    image = torch.rand(1, 3, *model.image_size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        inference.naive(model, image), inference.predictor(model, image)().anomaly_map, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("variant", [{}, {"naive": True}, {"cached": True, "levels": "middle"}])
def test_training_steps_are_timed(variant):
    found = training.measure("tiny", 2, torch.device("cpu"), **variant)
    assert 0 < found["seconds"] < 60
    assert found["peak_mb"] > 100


def test_the_search_is_timed_for_each_size_of_the_bank(tmp_path, monkeypatch):
    monkeypatch.setattr(bank, "SHOTS", (1, 16))
    monkeypatch.setattr(bank, "SHARES", (1.0, 0.1))
    output = tmp_path / "bank.json"
    monkeypatch.setattr("sys.argv", ["bank", "--backbone", "tiny", "--repeats", "2", "--output", str(output)])
    bank.main()
    shares = json.loads(output.read_text(encoding="utf-8"))["share"]
    assert shares.keys() == {"1, 1.0", "1, 0.1", "16, 1.0", "16, 0.1"}
    assert min(shares.values()) > 0
