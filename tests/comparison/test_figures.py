# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The figures of a cell against those of anomalib, scikit-learn and counting by hand."""

import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score, roc_curve

from anomalib_mvfa.comparison.figures import image_figures


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(2, (300,), generator=generator)
    return torch.randn(300, generator=generator) * 3 + labels * 2, labels


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
