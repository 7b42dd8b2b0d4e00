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


def validated(post, *batches):
    for each in batches:
        post.on_validation_batch_end(None, None, each)
    post.on_validation_epoch_end(None, None)
    return post


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
        (2, 0.7, 1),
        (9, 0.95, 1),
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
    assert float(validated(MVFAPostProcessor("f1"), batch([1, 5], [0, 1])).image_threshold) == 5  # one of each suffices


def test_f1_threshold_of_pixels_is_anomalibs():
    generator = torch.Generator().manual_seed(2)
    maps = torch.randn(4, 2, 2, generator=generator)
    masks = (torch.randn(4, 2, 2, generator=generator) + maps > 1) & (torch.arange(4) > 1)[:, None, None]
    theirs = F1AdaptiveThreshold(fields=["anomaly_map", "gt_mask"])
    theirs.update(batch([1, 2, 8, 9], [0, 0, 1, 1], maps, masks))
    ours = validated(MVFAPostProcessor("f1"), batch([1, 2, 8, 9], [0, 0, 1, 1], maps, masks))
    assert float(ours.pixel_threshold) == pytest.approx(float(theirs.compute()))


def test_memory_is_bounded_and_the_sample_is_fair():
    metric = ScoreThreshold("fpr", 0.1, limit=1000)
    generator = torch.Generator().manual_seed(0)
    for step in range(40):  # the scores drift, so that the first or the last thousand would be wrong by far
        scores = torch.rand(500, generator=generator) + step
        metric.update(scores, torch.zeros(500))
        assert sum(map(len, metric.preds)) <= 2500
    assert float(metric.compute()) == pytest.approx(36, abs=1.5)
    assert len(metric.normal) == 1000


def test_the_sample_is_the_same_in_every_run():
    def threshold(seed):
        torch.manual_seed(seed)
        metric = ScoreThreshold("fpr", 0.1, limit=10)
        for start in range(0, 100, 20):
            metric.update(torch.arange(start, start + 20), torch.zeros(20))
        return float(metric.compute())

    assert threshold(0) == threshold(1)


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
        validated(MVFAPostProcessor("fpr", 0.25), batch([1, 2, 3], [0, 0, 0], torch.arange(12).reshape(3, 2, 2)))
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
        post = MVFAPostProcessor("f1")
        post.on_validation_start(None, None)
        validated(post, batch([1, 2], [1, 1]))
    assert bool(post.image_threshold.isnan())
    assert "no labels" in caplog.text


def support():
    scores = torch.tensor([1.0, 2.0, 3.0, 9.0])
    maps = 10 * scores[:, None, None].expand(4, 2, 2)
    return InferenceBatch(pred_score=scores, anomaly_map=maps), torch.arange(4) == 3


@pytest.mark.parametrize("rule", ["fpr", "f1"])
def test_supports_stand_in_for_normal_images_and_widen_the_range(rule, caplog):
    post = MVFAPostProcessor(rule, 0.5)
    post.set_support(*support())
    with caplog.at_level(logging.WARNING, logger="anomalib_mvfa"):
        validated(post)
    assert "3 normal supports" in caplog.text
    assert float(post.image_threshold) == 2  # the abnormal support is no part of it
    assert float(post.pixel_threshold) == 20
    assert [float(post.image_min), float(post.image_max)] == [1, 9]


@pytest.mark.parametrize(("kept", "threshold", "value"), [("pred_score", "image", 2), ("anomaly_map", "pixel", 20)])
def test_supports_may_have_maps_or_scores_alone(kept, threshold, value):
    post = MVFAPostProcessor("f1", 0.5)
    predictions, labels = support()
    post.set_support(InferenceBatch(**{kept: getattr(predictions, kept)}), labels)
    assert float(getattr(validated(post), f"{threshold}_threshold")) == value


def test_supports_count_in_one_process(monkeypatch):
    monkeypatch.setattr("anomalib_mvfa.post_processing.is_first", lambda: False)
    post = MVFAPostProcessor("f1", 0.5)
    post.set_support(*support())
    validated(post)
    assert bool(post.image_threshold.isnan())
    assert [float(post.image_min), float(post.image_max)] == [1, 9]


def test_normalisation_is_linear_around_the_threshold_and_bends_at_the_ends():
    post = validated(MVFAPostProcessor("fpr", 0.5), batch([2, 3, 6], [0, 0, 1]))
    assert [float(value) for value in (post.image_min, post.image_threshold, post.image_max)] == [2, 3, 6]
    scores = torch.tensor([3, 4, 2, 4.92, 5, 1, 103, -97])
    expected = [0.5, 0.75, 0.25, 0.98, 0.99, 0.01, 1 - 0.02 / (1 + 24.52 / 0.02), 0.02 / (1 + 24.52 / 0.02)]
    assert_close(post(InferenceBatch(pred_score=scores)).pred_score, torch.tensor(expected), rtol=0, atol=1e-6)


def test_without_a_threshold_the_middle_of_the_range_becomes_one_half():
    post = validated(MVFAPostProcessor("f1"), batch([2, 6], [1, 1]))
    assert post(InferenceBatch(pred_score=torch.tensor([3.0, 4.0, 5.0]))).pred_score.tolist() == [0.25, 0.5, 0.75]


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
