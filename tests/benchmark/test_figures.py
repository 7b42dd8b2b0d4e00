# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The figures of a cell against those of anomalib, scikit-learn and counting by hand."""

import pytest
import torch
from anomalib.metrics.aupro import _AUPRO
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve, roc_auc_score, roc_curve

from anomalib_mvfa.benchmark.figures import PixelFigures, image_figures


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(2, (300,), generator=generator)
    return torch.randn(300, generator=generator) * 3 + labels * 2, labels


@pytest.fixture
def pixels():
    generator = torch.Generator().manual_seed(2)
    masks = torch.zeros(6, 48, 48, dtype=torch.bool)
    masks[0, 5:15, 5:9] = masks[0, 30:40, 30:45] = masks[1, 2:6, 2:6] = masks[3, 20:44, 10:13] = True
    masks[4, 10:12, 10:12] = masks[4, 12:14, 12:14] = True  # one region: the two touch at a corner
    return torch.rand(6, 48, 48, generator=generator) * 3 - 1 + 1.2 * masks, masks


def test_image_figures_are_those_of_scikit_learn(images):
    scores, labels = images
    figures = image_figures(scores, labels)
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert figures["image_AUROC"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    assert figures["image_AP"] == pytest.approx(average_precision_score(labels, scores), abs=1e-6)
    best = max(f1_score(labels, scores >= threshold) for threshold in scores)
    assert figures["image_F1Max"] == pytest.approx(best, abs=1e-6)
    assert figures["image_sensitivity_at_95_specificity"] == pytest.approx(true[false <= 0.05].max(), abs=1e-6)


def test_image_figures_depend_on_the_order_alone(images):
    scores, labels = images
    assert image_figures(scores.double().exp() * 1e6, labels) == image_figures(scores, labels)
    assert image_figures(torch.zeros(4), torch.tensor([0, 1, 0, 1]))["image_AUROC"] == 0.5


def test_scores_that_cannot_be_judged_are_refused():
    with pytest.raises(ValueError, match="1 of 2 image scores are not finite"):
        image_figures(torch.tensor([0.0, float("nan")]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="all normal or all abnormal"):
        image_figures(torch.tensor([0.0, 1.0]), torch.tensor([1, 1]))


def test_pixel_figures_are_those_of_scikit_learn_and_anomalib(pixels):
    maps, masks = pixels
    metric = PixelFigures()
    for part in (slice(0, 4), slice(4, 6)):
        metric.update(maps[part], masks[part])
    figures = metric.compute()
    flat, truth = maps.flatten(), masks.flatten()
    assert figures["pixel_AUROC"] == pytest.approx(roc_auc_score(truth, flat), abs=1e-5)
    assert figures["pixel_AP"] == pytest.approx(average_precision_score(truth, flat), abs=1e-4)
    precision, recall, _ = precision_recall_curve(truth, flat)
    assert figures["pixel_Dice"] == pytest.approx((2 * precision * recall / (precision + recall)).max(), abs=1e-4)
    aupro = _AUPRO()
    aupro.update(maps, masks)
    assert figures["pixel_AUPRO"] == pytest.approx(float(aupro.compute()), abs=1e-3)


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
