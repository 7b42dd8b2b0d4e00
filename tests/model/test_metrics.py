# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The score by which the best epoch is chosen, held against scikit-learn."""

import pytest
import torch
from anomalib.data import ImageBatch
from sklearn.metrics import roc_auc_score

from anomalib_mvfa.model.metrics import PixelAUROC, SelectionScore, squash


@pytest.mark.parametrize("scale", [1e-3, 1.0, 40.0])
def test_pixel_area_is_exact_to_a_ten_thousandth_on_any_scale(scale):
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(6, 40, 40, generator=generator) < 0.05
    maps = scale * (torch.randn(6, 40, 40, generator=generator) + 1.2 * masks)
    metric = PixelAUROC()
    for image_map, mask in zip(maps, masks, strict=True):
        metric.update(image_map, mask)
    assert float(metric.compute()) == pytest.approx(roc_auc_score(masks.flatten(), maps.flatten()), abs=1e-4)


def test_tied_pixels_count_half():
    metric = PixelAUROC()
    metric.update(torch.tensor([0.5, 0.5, 0.2]), torch.tensor([1, 0, 0]))
    assert float(metric.compute()) == pytest.approx(0.75)


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
    assert float(metric.compute()) == pytest.approx(image + pixel, abs=1e-4)
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
