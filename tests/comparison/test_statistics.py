# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Figures against torchmetrics, tests against slow computations and simulated truth."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_f1_score,
    binary_sensitivity_at_specificity,
)

from anomalib_mvfa.comparison.statistics import (
    IMAGE_METRICS,
    ImageScores,
    bootstrap,
    delong,
    holm,
    image_metrics,
    interval,
    mean_and_spread,
    mean_pr,
    mean_roc,
    paired_bootstrap,
    placements,
)


def draw(seed: int, normal: int = 40, abnormal: int = 60, shift: float = 1.0, steps: int | None = None):
    """Labels and normally distributed scores, rounded to so many steps a unit where ties are wanted."""
    rng = np.random.default_rng(seed)
    labels = np.arange(normal + abnormal) >= normal
    scores = rng.normal(size=len(labels)) + shift * labels
    if steps:
        scores = np.round(scores * steps) / steps
    order = rng.permutation(len(labels))
    return labels[order], scores[order]


def run(labels, scores) -> ImageScores:
    return ImageScores(tuple(f"{index:04}.png" for index in range(len(labels))), labels, scores)


def naive_delong(labels, first, second) -> tuple[float, float]:
    """Difference and p-value from the matrix of all pairs."""
    kernels = []
    for scores in (first, second):
        abnormal, normal = scores[labels][:, None], scores[~labels][None]
        kernels.append((abnormal > normal) + 0.5 * (abnormal == normal))
    by_abnormal = np.cov([kernel.mean(axis=1) for kernel in kernels])
    by_normal = np.cov([kernel.mean(axis=0) for kernel in kernels])
    covariance = by_abnormal / labels.sum() + by_normal / (~labels).sum()
    difference = kernels[0].mean() - kernels[1].mean()
    error = math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    return difference, 2 * norm.sf(abs(difference) / error)


@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_figures_are_those_of_torchmetrics(seed, steps):
    labels, scores = draw(seed, steps=steps)
    ours = {name: float(value[0]) for name, value in image_metrics(labels, scores).items()}
    ranks = torch.tensor(np.unique(scores, return_inverse=True)[1] / 1000 + 0.01)  # in [0, 1], taken as they are
    truth = torch.tensor(labels).int()
    assert ours["image_AUROC"] == pytest.approx(float(binary_auroc(ranks, truth)), abs=1e-6)
    assert ours["image_AP"] == pytest.approx(float(binary_average_precision(ranks, truth)), abs=1e-6)
    at_every_threshold = [float(binary_f1_score(ranks, truth, threshold=float(t) - 1e-6)) for t in ranks.unique()]
    assert ours["image_F1Max"] == pytest.approx(max(at_every_threshold), abs=1e-6)
    sensitivity = float(binary_sensitivity_at_specificity(ranks, truth, min_specificity=0.95)[0])
    assert ours["image_sensitivity_at_95_specificity"] == pytest.approx(sensitivity, abs=1e-6)


def test_weights_stand_for_repeated_images():
    labels, scores = draw(2, steps=4)
    weights = np.random.default_rng(0).integers(0, 4, size=(3, len(labels)))
    weighted = image_metrics(labels, scores, weights)
    for row, counts in enumerate(weights):
        repeated = image_metrics(labels.repeat(counts), scores.repeat(counts))
        for name in IMAGE_METRICS:
            assert weighted[name][row] == pytest.approx(repeated[name][0], abs=1e-12)


def test_figures_are_unknown_without_both_classes():
    values = image_metrics(np.ones(3, dtype=bool), np.arange(3.0))
    assert all(math.isnan(values[name][0]) for name in IMAGE_METRICS)


def test_bootstrap_spreads_as_far_as_delong_says():
    labels, scores = draw(3, normal=150, abnormal=170)
    drawn = bootstrap([run(labels, scores)], draws=1000)["image_AUROC"]
    placed = placements(labels, scores)
    error = math.sqrt(placed[labels].var(ddof=1) / labels.sum() + placed[~labels].var(ddof=1) / (~labels).sum())
    assert drawn.std() == pytest.approx(error, rel=0.1)
    assert drawn.mean() == pytest.approx(placed[labels].mean(), abs=0.002)


def test_bootstrap_keeps_the_number_of_images_of_each_class():
    """With a perfect order and equal scores within a class every figure of every draw is the same."""
    labels = np.arange(10) >= 7
    drawn = bootstrap([run(labels, labels.astype(float))], draws=50)
    assert all((drawn[name] == 1).all() for name in IMAGE_METRICS)


def test_bootstrap_is_repeatable_and_blind_to_the_order_of_images():
    labels, scores = draw(4)
    one = run(labels, scores)
    order = np.random.default_rng(1).permutation(len(labels))
    other = ImageScores(tuple(one.paths[index] for index in order), labels[order], scores[order])
    first, second = bootstrap([one], draws=64), bootstrap([other], draws=64)
    assert all(np.allclose(first[name], second[name], atol=1e-12) for name in IMAGE_METRICS)
    assert not np.array_equal(first["image_AUROC"], bootstrap([one], draws=64, seed=1)["image_AUROC"])


def test_bootstrap_of_several_seeds_is_that_of_their_mean():
    labels, scores = draw(5)
    one, other = run(labels, scores), run(labels, -scores)
    drawn = bootstrap([one, other], draws=64)["image_AUROC"]
    assert np.allclose(drawn, 0.5)  # each draw of one seed is the mirror of the other seed's on the same images


def test_interval_covers_the_truth_as_often_as_it_says():
    truth = norm.cdf(1 / math.sqrt(2))  # area of two normal distributions one standard deviation apart
    covered = 0
    for seed in range(200):
        low, high = interval(bootstrap([run(*draw(seed))], draws=200)["image_AUROC"])
        covered += low <= truth <= high
    assert 0.89 <= covered / 200 <= 0.99


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("seed", range(3))
def test_delong_is_what_all_pairs_give(seed, steps):
    labels, first = draw(seed, steps=steps)
    second = first + np.random.default_rng(seed + 50).normal(size=len(first))
    result = delong(labels, first, second)
    assert (result.difference, result.p_value) == pytest.approx(naive_delong(labels, first, second), rel=1e-9)


def test_delong_p_values_are_uniform_where_nothing_differs():
    p_values = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        labels, common = draw(seed)
        noise = rng.normal(size=(2, len(common)))
        p_values.append(delong(labels, common + noise[0], common + noise[1]).p_value)
    assert kstest(p_values, "uniform").pvalue > 0.01


def test_delong_is_antisymmetric_and_blind_to_monotone_scales():
    labels, first = draw(6)
    second = draw(7)[1]
    forward, backward = delong(labels, first, second), delong(labels, np.exp(second), 5 * first - 2)
    assert forward.difference == pytest.approx(-backward.difference)
    assert forward.p_value == pytest.approx(backward.p_value)


def test_delong_of_the_same_scores_finds_no_difference():
    labels, scores = draw(8)
    assert delong(labels, scores, scores).p_value == 1.0


def test_delong_does_not_claim_what_it_cannot_know():
    labels = np.array([False, False, True, True])
    perfect, constant = np.array([0.0, 1.0, 2.0, 3.0]), np.zeros(4)
    assert math.isnan(delong(labels, perfect, constant).p_value)
    assert math.isnan(delong(labels[1:3], perfect[1:3], -perfect[1:3]).p_value)
    with pytest.raises(ValueError, match="normal and abnormal"):
        delong(np.ones(4, dtype=bool), perfect, constant)


def test_paired_bootstrap_agrees_with_delong():
    labels, common = draw(9, normal=100, abnormal=120)
    rng = np.random.default_rng(9)
    better, worse = common + 0.3 * rng.normal(size=220), common + 1.5 * rng.normal(size=220)
    difference = paired_bootstrap([run(labels, better)], [run(labels, worse)], draws=4000)["image_AUROC"]
    reference = delong(labels, better, worse)
    assert difference.mean == pytest.approx(reference.difference)
    half_width = (difference.high - difference.low) / 2
    assert half_width == pytest.approx(1.96 * reference.standard_error, rel=0.1)
    assert difference.p_value == pytest.approx(reference.p_value, abs=0.02)
    assert (difference.ahead, difference.seeds, difference.images) == (1, 1, 220)


def test_pairing_sees_what_separate_intervals_miss():
    labels, common = draw(10, normal=100, abnormal=100, shift=0.7)
    slightly_better = common + 0.15 * labels
    one, other = run(labels, slightly_better), run(labels, common)
    difference = paired_bootstrap([one], [other], draws=500)["image_AUROC"]
    separate = [interval(bootstrap([each], draws=500)["image_AUROC"]) for each in (one, other)]
    assert separate[0][0] < separate[1][1]
    assert difference.low > 0


def test_paired_bootstrap_of_a_method_with_itself_finds_nothing():
    labels, scores = draw(11)
    for difference in paired_bootstrap([run(labels, scores)], [run(labels, scores)], draws=100).values():
        assert (difference.mean, difference.low, difference.high, difference.p_value) == (0, 0, 0, 1)
        assert difference.ahead == 0


def test_paired_bootstrap_rarely_sees_a_difference_where_there_is_none():
    found = 0
    for seed in range(100):
        labels, common = draw(seed)
        noise = np.random.default_rng(seed + 500).normal(size=(2, len(common)))
        pair = ([run(labels, common + noise[0])], [run(labels, common + noise[1])])
        found += paired_bootstrap(*pair, draws=200)["image_AUROC"].p_value < 0.05
    assert found <= 12


def test_pairs_are_compared_on_the_images_that_both_have():
    labels, scores = draw(12)
    whole = run(labels, scores)
    part = ImageScores(whole.paths[10:][::-1], labels[10:][::-1], -scores[10:][::-1])
    difference = paired_bootstrap([whole], [part], draws=50)["image_AUROC"]
    area = image_metrics(labels[10:], scores[10:])["image_AUROC"][0]
    assert difference.images == 90
    assert difference.mean == pytest.approx(area - (1 - area))


def test_pairs_without_common_truth_are_refused():
    labels, scores = draw(13)
    one = run(labels, scores)
    with pytest.raises(ValueError, match="label the same images differently"):
        paired_bootstrap([one], [run(~labels, scores)])
    with pytest.raises(ValueError, match="no image in common"):
        paired_bootstrap([one], [ImageScores(tuple("x" + path for path in one.paths), labels, scores)])


@pytest.mark.parametrize("steps", [None, 3])
def test_placements_average_to_the_area_in_both_classes(steps):
    labels, scores = draw(14, steps=steps)
    placed = placements(labels, scores)
    area = image_metrics(labels, scores)["image_AUROC"][0]
    assert placed[labels].mean() == pytest.approx(area)
    assert placed[~labels].mean() == pytest.approx(area)


def test_holm_never_lowers_a_p_value_nor_its_order():
    p_values = list(np.random.default_rng(0).uniform(size=9) ** 3)
    adjusted = holm(p_values)
    assert all(a >= p for a, p in zip(adjusted, p_values, strict=True))
    assert min(adjusted) == pytest.approx(9 * min(p_values))
    for (p, a), (q, b) in itertools.combinations(zip(p_values, adjusted, strict=True), 2):
        assert (p - q) * (a - b) >= 0
    assert holm([]) == []


def test_spread_of_one_value_is_unknown():
    mean, spread = mean_and_spread([0.5])
    assert mean == 0.5
    assert math.isnan(spread)


def test_mean_roc_of_one_run_encloses_its_area():
    labels, scores = draw(15, normal=200, abnormal=200)
    x, y = mean_roc([run(labels, scores)])
    area = float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())
    assert area == pytest.approx(image_metrics(labels, scores)["image_AUROC"][0], abs=0.005)
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert (np.diff(y) >= -1e-12).all()


def test_mean_roc_is_the_mean_at_equal_false_positive_rates():
    labels = np.array([False, True, False, True])
    right, wrong = np.array([0.0, 1.0, 0.0, 1.0]), np.array([1.0, 0.0, 1.0, 0.0])
    x, y = mean_roc([run(labels, right), run(labels, wrong)], points=5)
    assert y[x < 1].tolist() == [0, 0.5, 0.5, 0.5, 0.5]


def test_mean_pr_averages_to_the_average_precision():
    labels, scores = draw(16, normal=100, abnormal=100)
    recalls, precisions = mean_pr([run(labels, scores)], points=200)
    assert precisions.mean() == pytest.approx(image_metrics(labels, scores)["image_AP"][0], abs=1e-9)
    assert recalls[-1] == 1
    assert precisions[-1] >= 0.5
