# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Pictures: names of files, heatmaps and outlines."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from anomalib.data import ImageItem
from PIL import Image

from anomalib_mvfa.visualization import MVFAVisualizer, claim_name, heatmap, outlines


def test_names_are_unique_and_the_same_for_the_same_source():
    taken: dict[Path, str] = {}
    names = [claim_name(Path("x/a.b.png"), source, taken) for source in ("one", "two", "three", "two")]
    assert names == [Path("x/a.b.png"), Path("x/a.b_2.png"), Path("x/a.b_3.png"), Path("x/a.b_2.png")]
    volumes = [claim_name(Path("v.1_anomaly.nii.gz"), source, taken) for source in ("one", "two")]
    assert volumes == [Path("v.1_anomaly.nii.gz"), Path("v.1_anomaly_2.nii.gz")]


def _grey(level=100, size=32):
    return Image.new("RGB", (size, size), (level, level, level))


def test_heatmap_leaves_tissue_below_half_of_the_threshold_as_it_is():
    scores = torch.full((32, 32), 0.24)
    scores[:, 16:] = 0.9
    shown = np.asarray(heatmap(_grey(), scores))
    assert (shown[:, :14] == 100).all()
    assert (shown[:, 18:, 0] > 150).all()  # warm
    assert (shown[:, 18:, 2] < 80).all()


def test_heatmap_is_more_opaque_where_the_score_is_higher():
    change = [
        np.abs(np.asarray(heatmap(_grey(), torch.full((8, 8), s))).astype(int) - 100).max() for s in (0.3, 0.5, 1)
    ]
    assert change[0] < 25
    assert change[0] < change[1] < change[2]


def test_mask_and_prediction_are_outlined_in_one_picture():
    mask, prediction = torch.zeros(32, 32, dtype=torch.bool), torch.zeros(32, 32, dtype=torch.bool)
    mask[4:12, 4:12], prediction[20:28, 20:28] = True, True
    shown = np.asarray(outlines(_grey(), mask, prediction)).astype(int)
    cyan, red = shown[..., 2] - shown[..., 0] > 100, shown[..., 0] - shown[..., 2] > 100
    assert cyan[4, 4:12].all()
    assert red[20, 20:28].all()
    assert not cyan[16:].any()
    assert not red[:16].any()
    assert not cyan[7, 7]  # the inside stays as it is


def test_pictures_show_image_heatmap_and_outlines_at_the_size_of_the_image(tmp_path):
    Image.new("RGB", (60, 40), (90, 90, 90)).save(tmp_path / "a.png")
    scores = torch.zeros(16, 16)
    scores[4:8, 4:8] = 1
    item = ImageItem(
        image=torch.zeros(3, 16, 16),
        image_path=str(tmp_path / "a.png"),
        anomaly_map=scores,
        pred_mask=scores > 0.5,
        gt_mask=scores > 0.5,
    )
    plain = MVFAVisualizer(text_config={"enable": False})
    plain._draw(item, None, tmp_path / "out.png")
    picture = np.asarray(Image.open(tmp_path / "out.png").convert("RGB")).astype(int)
    panels = np.array_split(picture, 3, axis=1)
    colourful = [(panel.max(2) - panel.min(2) > 60).mean() for panel in panels]
    assert colourful[0] == 0
    assert 0.03 < colourful[1] < 0.2
    assert 0 < colourful[2] < colourful[1]


def test_fields_of_anomalib_can_be_asked_for(tmp_path):
    Image.new("RGB", (60, 40), (90, 90, 90)).save(tmp_path / "a.png")
    item = ImageItem(image=torch.zeros(3, 16, 16), image_path=str(tmp_path / "a.png"), gt_mask=torch.ones(16, 16) > 0)
    MVFAVisualizer(fields=["gt_mask"], overlay_fields=[], text_config={"enable": False})._draw(
        item, None, tmp_path / "o.png"
    )
    assert (np.asarray(Image.open(tmp_path / "o.png").convert("L"))[2:-2, 2:58] == 255).all()


def test_names_of_a_run_are_free_in_the_next(tmp_path):
    visualizer = MVFAVisualizer()
    trainer = SimpleNamespace(world_size=1, predicting=False, test_dataloaders=None)
    first = visualizer._target("a/x.png", tmp_path, trainer)
    assert visualizer._target("b/a/x.png", tmp_path, trainer) != first
    visualizer.on_test_end(trainer, None)
    assert visualizer._target("b/a/x.png", tmp_path, trainer) == first
