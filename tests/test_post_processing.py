# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Thresholds: values for known scores, and their use in the post-processor."""

import logging

import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.metrics import F1AdaptiveThreshold
from torch.testing import assert_close

from anomalib_mvfa.post_processing import MVFAPostProcessor, ScoreThreshold, false_positive_threshold

NAN = float("nan")


def batch(scores, labels, maps=None, masks=None):
    return ImageBatch(
        image=torch.zeros(len(scores), 3, 2, 2),
        pred_score=torch.tensor(scores, dtype=torch.float),
        gt_label=torch.tensor(labels),
        anomaly_map=None if maps is None else maps.float(),
        gt_mask=None if masks is None else masks.bool(),
    )


def validated(post_processor, *batches):
    for each in batches:
        post_processor.on_validation_batch_end(None, None, each)
    post_processor.on_validation_epoch_end(None, None)
    return post_processor


@pytest.mark.parametrize(
    ("count", "target", "expected"),
    [
        (9, 0.1, 9),  # of ten scores one is the largest
        (19, 0.1, 18),
        (19, 0.5, 10),
        (99, 0.01, 99),
        (99, 0.05, 95),
        (29, 0.1, 27),  # 0.1 * 30 is less than 3 in binary
        (5, 0.01, 5),  # less than five scores can show
        (1, 0.01, 1),
        (1, 0.99, 1),
    ],
)
def test_fpr_threshold_is_the_known_rank(count, target, expected):
    scores = torch.arange(1.0, count + 1)[torch.randperm(count, generator=torch.Generator().manual_seed(count))]
    assert float(false_positive_threshold(scores, target)) == expected


@pytest.mark.parametrize("target", [0.02, 0.1, 0.3])
def test_new_normal_scores_exceed_the_threshold_at_the_promised_rate(target):
    generator = torch.Generator().manual_seed(0)
    rates = []
    for _ in range(2000):
        scores = torch.randn(60, generator=generator)
        rates.append(float((scores[49:] > false_positive_threshold(scores[:49], target)).float().mean()))
    assert sum(rates) / len(rates) == pytest.approx(target, rel=0.1)


def test_f1_threshold_is_anomalibs():
    generator = torch.Generator().manual_seed(1)
    scores, labels = torch.randn(50, generator=generator), torch.arange(50) % 3 == 0
    theirs = F1AdaptiveThreshold(fields=["pred_score", "gt_label"])
    theirs.update(batch(scores.tolist(), labels.tolist()))
    ours = validated(MVFAPostProcessor("f1"), batch(scores.tolist(), labels.tolist()))
    assert float(ours.image_threshold) == pytest.approx(float(theirs.compute()))


def test_memory_is_bounded_and_the_sample_is_fair():
    metric = ScoreThreshold("fpr", 0.1, limit=1000)
    generator = torch.Generator().manual_seed(0)
    for step in range(40):  # the scores drift, so that the first or the last thousand would be wrong by far
        scores = torch.rand(500, generator=generator) + step
        metric.update(scores, torch.zeros(500))
        assert sum(map(len, metric.preds)) <= 2500
    assert float(metric.compute()) == pytest.approx(36, abs=1.5)
    assert len(metric.normal) == 1000


def test_all_scores_count_up_to_the_limit():
    metric = ScoreThreshold("fpr", 0.5, limit=9)
    for score in range(1, 10):
        metric.update(torch.tensor([float(score)]), torch.tensor([0]))
    assert float(metric.compute()) == 5


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_scores_that_are_no_numbers_are_refused(value):
    with pytest.raises(ValueError, match="training has diverged"):
        ScoreThreshold("fpr", 0.1).update(torch.tensor([1.0, value]), torch.tensor([0, 0]))


@pytest.mark.parametrize("arguments", [{"threshold": "best"}, {"target_fpr": 0.0}, {"target_fpr": 1}])
def test_wrong_options_are_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        MVFAPostProcessor(**arguments)


def test_fpr_thresholds_come_from_normal_images_alone():
    maps = torch.arange(12).reshape(3, 2, 2)
    masks = torch.zeros(3, 2, 2)
    post = validated(MVFAPostProcessor("fpr", 0.5), batch([1, 2, 9], [0, 0, 1], maps, masks))
    # Two normal scores: 1 of 3 ranks is above the second, 2 of 3 above the first. Eight normal pixels: 0 to 7.
    assert float(post.image_threshold) == 2
    assert float(post.pixel_threshold) == 4
    assert [float(post.image_min), float(post.image_max)] == [1, 9]
    without_masks = validated(MVFAPostProcessor("fpr", 0.5), batch([1, 2, 9], [0, 0, 1], maps))
    assert float(without_masks.pixel_threshold) == 4


def test_without_abnormal_images_fpr_takes_over_and_says_so(caplog):
    with caplog.at_level(logging.WARNING, logger="anomalib_mvfa"):
        post = validated(MVFAPostProcessor("f1", 0.2), batch(list(range(1, 20)), [0] * 19))
    assert float(post.image_threshold) == 16
    assert "No abnormal validation images" in caplog.text
    assert "0.2" in caplog.text
    validated(post, batch(list(range(1, 20)), [0] * 19))
    assert caplog.text.count("No abnormal validation images") == 1


def test_rate_that_the_images_cannot_show_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, logger="anomalib_mvfa"):
        validated(MVFAPostProcessor("fpr", 0.25), batch([1, 2, 3], [0, 0, 0]))
        assert caplog.text == ""
        post = validated(MVFAPostProcessor("fpr", 0.24), batch([1, 2, 3], [0, 0, 0]))
    assert "1 / 4 = 0.25" in caplog.text
    assert float(post.image_threshold) == 3


@pytest.mark.parametrize("scores", [[0.5], [0.5, 0.5, 0.5]])
def test_one_or_constant_normal_scores_give_a_finite_threshold_and_normal_labels(scores):
    post = validated(MVFAPostProcessor("fpr"), batch(scores, [0] * len(scores), torch.full((len(scores), 2, 2), 0.5)))
    prediction = post(InferenceBatch(pred_score=torch.tensor([0.5, 0.6]), anomaly_map=torch.full((2, 2, 2), 0.5)))
    assert prediction.pred_label.tolist() == [False, True]
    assert not prediction.pred_mask.any()
    assert bool(prediction.pred_score.isfinite().all())


def test_fpr_without_a_normal_image_is_refused():
    with pytest.raises(ValueError, match=r"threshold='fpr'.*there are none.*Add normal validation images"):
        validated(MVFAPostProcessor("fpr"), batch([1, 2], [1, 1]))


def test_validation_that_shows_nothing_leaves_threshold_and_reference():
    post = validated(validated(MVFAPostProcessor("fpr", 0.5), batch([1, 2, 3], [0, 0, 0])))
    assert float(post.image_threshold) == 2


def test_without_any_normal_image_there_is_no_threshold_and_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="anomalib_mvfa"):
        post = validated(MVFAPostProcessor("f1"), batch([1, 2], [1, 1]))
    assert bool(post.image_threshold.isnan())
    assert "no labels" in caplog.text


def support():
    maps = torch.tensor([1.0, 2.0, 3.0, 9.0])[:, None, None].expand(4, 2, 2)
    return InferenceBatch(pred_score=torch.tensor([1.0, 2.0, 3.0, 9.0]), anomaly_map=maps), torch.arange(4) == 3


def test_supports_stand_in_for_normal_images_and_widen_the_range(caplog):
    post = MVFAPostProcessor("fpr", 0.5)
    post.set_support(*support())
    with caplog.at_level(logging.WARNING, logger="anomalib_mvfa"):
        validated(post)
    assert "3 normal supports" in caplog.text
    assert float(post.image_threshold) == 2
    assert float(post.pixel_threshold) == 2
    assert [float(post.image_min), float(post.image_max)] == [1, 9]


def test_supports_meet_abnormal_validation_images():
    post = MVFAPostProcessor("f1")
    post.set_support(*support())
    validated(post, batch([5, 6], [1, 1]))
    assert 3 < float(post.image_threshold) <= 5


def test_normal_validation_images_go_before_supports():
    post = MVFAPostProcessor("fpr", 0.5)
    post.set_support(*support())
    validated(post, batch([11, 12, 13], [0, 0, 0]))
    assert float(post.image_threshold) == 12


def test_state_and_options_are_restored():
    post = validated(MVFAPostProcessor("fpr", 0.3), batch([1, 2, 5], [0, 0, 1]))
    other = MVFAPostProcessor()
    other.load_checkpoint_config(post.checkpoint_config())
    other.load_state_dict(post.state_dict())
    assert (other.threshold, other.target_fpr) == ("fpr", 0.3)
    assert float(other.image_threshold) == 2
    assert float(validated(other, batch([1, 3, 6], [0, 0, 1])).image_threshold) == 3


def test_an_interrupted_validation_leaves_nothing_behind():
    post, interrupted = MVFAPostProcessor("fpr", 0.5), MVFAPostProcessor("fpr", 0.5)
    interrupted.on_validation_batch_end(None, None, batch([90, 91, 92], [0, 0, 0]))
    interrupted.set_support(*support())
    for each in (post, interrupted):
        each.on_validation_start(None, None)
        validated(each, batch([1, 2, 3], [0, 0, 0]))
    for name, value in post.state_dict().items():
        assert_close(interrupted.state_dict()[name], value, equal_nan=True, msg=name)


def test_reset_drops_thresholds_and_ranges():
    post = validated(MVFAPostProcessor("fpr", 0.5), batch([1, 2, 3], [0, 0, 0]))
    post.reset()
    assert all(bool(value.isnan()) for value in post.buffers())


def test_thresholds_keep_their_precision_in_half_precision_modules():
    post = validated(MVFAPostProcessor("fpr", 0.5), batch([1.0009765625, 2, 3], [0, 0, 0]))
    post.to(torch.bfloat16)
    assert float(post.image_min) == 1.0009765625
