# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Pixel metrics and the score that selects the best epoch, compared with scikit-learn and anomalib."""

from types import SimpleNamespace

import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.metrics.aupro import _AUPRO
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from anomalib_mvfa import metrics
from anomalib_mvfa.metrics import MVFAEvaluator, PixelFigures, SelectionScore, squash


@pytest.fixture
def pixels():
    generator = torch.Generator().manual_seed(2)
    masks = torch.zeros(6, 48, 48, dtype=torch.bool)
    masks[0, 5:15, 5:9] = masks[0, 30:40, 30:45] = masks[1, 2:6, 2:6] = masks[3, 20:44, 10:13] = True
    masks[4, 10:12, 10:12] = masks[4, 12:14, 12:14] = True  # one region: the two touch at a corner
    return torch.rand(6, 48, 48, generator=generator) * 3 - 1 + 1.2 * masks, masks


@pytest.mark.parametrize("block", [500, metrics.BLOCK])
def test_pixel_figures_are_exact_whatever_the_blocks(pixels, block, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", block)
    maps, masks = pixels
    maps = (maps * 40).round() / 40  # with ties
    metric = PixelFigures()
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        metric.update(maps[part], masks[part])
    figures = metric.compute()
    flat, truth = maps.flatten(), masks.flatten()
    assert figures["pixel_AUROC"] == pytest.approx(roc_auc_score(truth, flat), abs=1e-9)
    assert figures["pixel_AP"] == pytest.approx(average_precision_score(truth, flat), abs=1e-9)
    precision, recall, _ = precision_recall_curve(truth, flat)
    assert figures["pixel_Dice"] == pytest.approx((2 * precision * recall / (precision + recall)).max(), abs=1e-9)
    aupro = _AUPRO()
    aupro.update(maps, masks)
    assert figures["pixel_AUPRO"] == pytest.approx(float(aupro.compute()), abs=1e-6)
    assert metric.compute() == figures
    metric.reset()
    assert metric.compute() == {}


@pytest.mark.parametrize("scores", [lambda x: torch.sigmoid(5 * x - 60), lambda x: 3.9 + 1e-6 * x, lambda x: -x.exp()])
def test_pixel_metrics_separate_the_closest_scores(pixels, scores):
    maps, masks = pixels
    maps = scores(4 * maps)
    metric = PixelFigures()
    metric.update(maps, masks)
    assert metric.compute()["pixel_AUROC"] == pytest.approx(roc_auc_score(masks.flatten(), maps.flatten()), abs=1e-9)


def test_pixels_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="1 of 4 pixel scores of a batch are not finite"):
        PixelFigures().update(torch.tensor([[[0.0, 1.0], [float("nan"), 0.0]]]), torch.zeros(1, 2, 2))


def test_evaluator_computes_pixel_metrics_where_there_are_masks(pixels):
    maps, masks = pixels
    logged = {}
    for given in (masks, None):
        evaluator = MVFAEvaluator()
        evaluator.log = logged.__setitem__
        labels = masks.flatten(1).any(dim=1)
        predicted = batch(maps.flatten(1).amax(dim=1), labels, maps, given)
        predicted.pred_label, predicted.pred_mask = labels, maps > 1
        evaluator.pixels.update(-maps, masks)  # of a test that was interrupted
        evaluator.on_test_epoch_start(None, None)
        for index in range(2):
            evaluator.on_test_batch_end(None, None, None, predicted, index)
        evaluator.on_test_epoch_end(SimpleNamespace(barebones=False), None)
        if given is None:
            assert not {"pixel_AUROC", "pixel_AUPR", "pixel_AUPRO"} & logged.keys()
        else:
            assert logged["pixel_AUROC"] == pytest.approx(roc_auc_score(masks.flatten(), maps.flatten()))
            assert logged["pixel_AUPR"] == pytest.approx(average_precision_score(masks.flatten(), maps.flatten()))
            assert 0 < logged["pixel_AUPRO"] < 1
        assert float(logged["image_AUROC"].compute()) <= 1
        logged.clear()


def test_aupro_counts_a_small_region_like_a_large_one():
    masks = torch.zeros(1, 40, 40, dtype=torch.bool)
    masks[0, :20, :20] = masks[0, 30:32, 30:32] = True
    maps = torch.zeros(1, 40, 40)
    maps[0, 30:32, 30:32] = 1  # the small one alone is found
    metric = PixelFigures()
    metric.update(maps, masks)
    # Half of the regions at no false alarm; then all pixels at once, a straight line from (0, 1/2) to (1, 1).
    assert metric.compute()["pixel_AUPRO"] == pytest.approx(0.5 + 0.5 * 0.3 / 2, abs=1e-6)


def test_without_abnormal_pixels_there_are_no_pixel_figures():
    metric = PixelFigures()
    metric.update(torch.rand(1, 8, 8), torch.zeros(1, 8, 8))
    assert metric.compute() == {}


def test_selection_score_adds_both_areas_over_batches_of_any_scale():
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    scores = torch.tensor([0.2, 0.9, 1.1, 3.0, 1.0, 0.95])
    masks = (torch.rand(6, 8, 8, generator=generator) < 0.3) & labels.bool().view(-1, 1, 1)
    maps = torch.rand(6, 8, 8, generator=generator) * 4
    metric = SelectionScore()
    for rows in (slice(0, 2), slice(2, 6)):  # the first batch lies within [0, 1], the second does not
        metric.update(batch(scores[rows], labels[rows], maps[rows], masks[rows]))
    image = roc_auc_score(labels, scores)
    pixel = roc_auc_score(masks.flatten(), maps.flatten())
    assert float(metric.compute()) == pytest.approx(image + pixel, abs=1e-6)
    metric.reset()
    metric.update(batch(scores, labels, maps, None))
    assert float(metric.compute()) == pytest.approx(image, abs=1e-6)


def test_one_sided_validation_is_refused():
    metric = SelectionScore()
    metric.update(batch(torch.rand(3), torch.zeros(3), torch.rand(3, 4, 4), None))
    with pytest.raises(ValueError, match="no normal or no abnormal images"):
        metric.compute()


def test_squash_keeps_order_and_stays_inside_the_unit_interval():
    values = torch.tensor([-1e6, -4.0, -0.1, 0.0, 1e-4, 0.9999, 1.0, 4.0, 1e6])
    squashed = squash(values)
    assert bool((squashed.diff() > 0).all())
    assert float(squashed.min()) >= 0
    assert float(squashed.max()) <= 1


def batch(scores, labels, maps, masks) -> ImageBatch:
    images = torch.zeros(len(scores), 3, *maps.shape[-2:])
    return ImageBatch(images, gt_label=labels.int(), gt_mask=masks, pred_score=scores, anomaly_map=maps)
