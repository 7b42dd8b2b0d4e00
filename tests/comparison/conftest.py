# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Comparisons with known scores."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from anomalib_mvfa.comparison.statistics import image_metrics
from anomalib_mvfa.demo.phantoms import draw_phantom

METHODS = {  # distance of the classes, and whether there is a map
    "MVFA": (1.6, True),
    "MVFA (normal only)": (1.2, True),
    "MVFA (zero-shot)": (1.0, True),
    "WinCLIP (zero-shot)": (0.5, True),
    "WinCLIP": (0.6, True),
    "PatchCore": (0.9, True),
    "AnomalyDINO": (1.0, True),
    "mean brightness": (0.7, False),
    "image variance": (0.1, False),
    "distance to mean normal": (0.3, True),
}
SHOWN = {
    "MVFA": (4, 4, 4, ""),
    "MVFA (zero-shot)": (0, 0, 0, "adapters from a file"),
    "PatchCore": (4, 0, 0, "random weights"),
}
ZERO = {"MVFA (zero-shot)", "WinCLIP (zero-shot)", "mean brightness", "image variance"}


def write_cell(
    out: Path,
    method: str,
    name: str,
    k_shot: int,
    seed: int,
    masks=None,
    images: int = 60,
    patients: int = 0,
    **changes,
) -> Path:
    """Write one cell with normally distributed scores; ``changes`` replace what cell.json says."""
    shift, has_map = METHODS[method]
    rng = np.random.default_rng([seed, *method.encode()])
    labels = np.arange(images) >= images // 2
    common = np.random.default_rng(99).normal(size=images)
    scores = 0.7 * common + 0.7 * rng.normal(size=images) + shift * labels
    folder = out / "cells" / f"{method.replace(' ', '_')}-{name}-{k_shot}-{seed}"
    folder.mkdir(parents=True)
    paths = [f"{'Ungood' if label else 'good'}/patient_{i:03}.png" for i, label in enumerate(labels)]
    table = pd.DataFrame({"path": paths, "label": labels.astype(int), "score": scores})
    if patients:
        table["group"] = np.arange(images) * patients // images
    table.to_csv(folder / "scores.csv", index=False)
    metrics = {metric: float(value[0]) for metric, value in image_metrics(labels, scores).items()}
    if has_map:
        maps = rng.integers(0, 60, size=(images, 56, 56), dtype=np.uint8)
        arrays = {"low": np.float64(0.1), "high": np.float64(0.9)}
        if masks is not None:
            maps += (masks * 120 * min(1, shift)).astype(np.uint8)
            arrays["masks"] = masks.astype(np.uint8)
            metrics |= {"pixel_AUROC": 0.8 + 0.01 * seed, "pixel_AP": 0.4, "pixel_AUPRO": 0.6, "pixel_Dice": 0.45}
        np.savez_compressed(folder / "maps.npz", maps=maps, **arrays)
    seen = SHOWN.get(method, (0, 0, 0, "") if method in ZERO else (4, 0, 0, ""))
    cell = {
        "method": method, "set": name, "k_shot": k_shot, "seed": seed, "backbone": "tiny", "status": "done",
        "error": None, "config": {"root": "secret/place"},
        "shown": dict(zip(("normal", "abnormal", "masks", "remark"), seen, strict=True)),
        "machine": "Processor, 1 threads",
        "metrics": metrics, "threshold": 0.6, "supports": [f"good/support_{seed}.png"], "anomalib_mvfa": "0.1.0",
        "cost": {"train_seconds": 12.5, "train_peak_mb": 812.0, "predict_ms": 4.2, "size_mb": 3.1},
    }  # fmt: skip
    (folder / "cell.json").write_text(json.dumps({**cell, **changes}), encoding="utf-8")
    return folder


@pytest.fixture
def comparison(tmp_path: Path) -> Callable[..., Path]:
    """Write phantoms and cells of all methods on them; return the folder of the comparison. Images are in ``data``."""

    def make(
        methods=tuple(METHODS),
        name: str = "BrainMRI",
        k_shot: int = 4,
        seeds: int = 2,
        images: int = 60,
        patients: int = 0,
    ) -> Path:
        from PIL import Image

        masks = np.zeros((images, 56, 56), dtype=bool)
        for index in range(images):
            abnormal = index >= images // 2
            rng = np.random.default_rng(index)
            phantom = draw_phantom("brain_mri", 56, "random" if abnormal else None, rng)
            masks[index] = phantom.mask
            path = tmp_path / "data" / ("Ungood" if abnormal else "good") / f"patient_{index:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(phantom.image).save(path)
        for method in methods:
            for seed in range(1 if method in ZERO else seeds):
                own_shot = 0 if method in ZERO else k_shot
                write_cell(tmp_path / "out", method, name, own_shot, seed, masks, images, patients)
        return tmp_path / "out"

    make.write_cell = write_cell
    return make
