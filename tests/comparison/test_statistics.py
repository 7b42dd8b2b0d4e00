# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Metrics against torchmetrics, intervals and tests against slow computations, SciPy and simulated truth."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.stats import kstest, norm, t
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_f1_score,
    binary_sensitivity_at_specificity,
)

from anomalib_mvfa.comparison import statistics
from anomalib_mvfa.comparison.statistics import (
    IMAGE_METRICS,
    Area,
    ImageScores,
    area,
    area_difference,
    bca_interval,
    bootstrap,
    differences,
    holm,
    image_metrics,
    intervals,
    mean_pr,
    mean_roc,
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


def run(labels, scores, groups=()) -> ImageScores:
    return ImageScores(tuple(f"{index:04}.png" for index in range(len(labels))), labels, scores, tuple(groups))


def draw_patients(seed: int, patients: int = 20, slices: int = 10, correlation: float = 0.5, methods: int = 2):
    """Runs of methods of equal quality on slices of patients, each patient of one class."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(2 * patients), slices)
    labels = groups >= patients
    runs = []
    for _ in range(methods):
        noise = correlation**0.5 * rng.normal(size=2 * patients)[groups]
        scores = noise + (1 - correlation) ** 0.5 * rng.normal(size=len(groups)) + labels
        runs.append(run(labels, scores, (f"patient {group}" for group in groups)))
    return runs


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
def test_metrics_are_those_of_torchmetrics(seed, steps):
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


def test_metrics_are_unknown_without_both_classes():
    values = image_metrics(np.ones(3, dtype=bool), np.arange(3.0))
    assert all(math.isnan(values[name][0]) for name in IMAGE_METRICS)


def test_bootstrap_has_the_spread_of_delongs_variance():
    labels, scores = draw(3, normal=150, abnormal=170)
    drawn = bootstrap((run(labels, scores),), draws=1000)["image_AUROC"]
    assert drawn.draws.std() == pytest.approx(area([run(labels, scores)]).standard_error, rel=0.1)
    assert drawn.draws.mean() == pytest.approx(drawn.value, abs=0.002)
    assert drawn.value == image_metrics(labels, scores)["image_AUROC"][0]


def test_bootstrap_keeps_the_number_of_images_of_each_class():
    """With a perfect order and equal scores within a class every metric of every draw is the same."""
    labels = np.arange(10) >= 7
    drawn = bootstrap((run(labels, labels.astype(float)),), draws=50)
    assert all((drawn[name].draws == 1).all() for name in IMAGE_METRICS)


def test_bootstrap_draws_whole_patients():
    """Two patients of each class, of which one is scored wrong: a draw holds it zero, one or two times."""
    labels = np.repeat([False, False, True, True], 3)
    scores = np.repeat([0.0, 0.0, -1.0, 1.0], 3)
    drawn = bootstrap((run(labels, scores, np.repeat(["a", "b", "c", "d"], 3)),), draws=200)["image_AUROC"].draws
    assert set(drawn.tolist()) == {0.0, 0.5, 1.0}
    assert len(set(bootstrap((run(labels, scores),), draws=200)["image_AUROC"].draws.tolist())) > 3


def test_patients_with_both_classes_are_drawn_with_all_their_images():
    labels = np.tile([False, True], 4)
    scores = np.array([0.0, 1.0, 10.0, 11.0, 20.0, 19.0, 30.0, 31.0])
    drawn = bootstrap((run(labels, scores, np.repeat(["a", "b", "c", "d"], 2)),), draws=300)["image_AUROC"].draws
    # Of one patient drawn four times the area is that of its own two images.
    assert {0.0, 1.0} <= set(drawn.tolist())
    assert not np.isnan(drawn).any()


def test_bootstrap_is_repeatable_and_independent_of_the_order_of_images():
    labels, scores = draw(4)
    one = run(labels, scores)
    order = np.random.default_rng(1).permutation(len(labels))
    other = ImageScores(tuple(one.paths[index] for index in order), labels[order], scores[order])
    first, second = bootstrap((one,), draws=64), bootstrap((other,), draws=64)
    assert all(np.allclose(first[name].draws, second[name].draws, atol=1e-12) for name in IMAGE_METRICS)
    assert not np.array_equal(first["image_AUROC"].draws, bootstrap((one,), draws=64, seed=1)["image_AUROC"].draws)


def test_bca_interval_is_that_of_scipy():
    labels, scores = draw(5, normal=40, abnormal=30, shift=2.0)
    normal, abnormal = np.sort(scores[~labels]), np.sort(scores[labels])

    def statistic(x, y, axis=-1):
        return (y[..., None, :] > x[..., :, None]).mean(axis=(-1, -2))

    reference = scipy.stats.bootstrap(
        (normal, abnormal), statistic, method="BCa", n_resamples=20_000, vectorized=True, batch=500, rng=1
    ).confidence_interval
    found = bca_interval(bootstrap((run(labels, scores),), draws=20_000)["image_AUROC"])
    assert found == pytest.approx(tuple(reference), abs=0.004)
    percentile = np.quantile(bootstrap((run(labels, scores),), draws=20_000)["image_AUROC"].draws, [0.025, 0.975])
    assert found[0] < percentile[0] - 0.008


def test_draws_equal_to_the_estimate_count_by_half():
    draws = np.concatenate([np.full(400, 0.5), np.linspace(0, 1, 1601)])
    below, at_or_below = (draws < 0.5).mean(), (draws <= 0.5).mean()
    bias = norm.ppf((below + at_or_below) / 2)
    low, high = bca_interval(statistics.Resampled(0.5, draws, ()))
    expected = np.quantile(draws, norm.cdf(2 * bias + norm.ppf([0.025, 0.975])))
    assert (low, high) == pytest.approx(tuple(expected))
    assert bca_interval(statistics.Resampled(0.3, np.full(50, 0.3), ())) == (0.3, 0.3)


def test_the_acceleration_is_the_skewness_of_the_influence_over_all_strata():
    draws = np.linspace(-1, 1, 4001) ** 3
    left_out = (np.array([0.0, 0.0, 3.0, math.nan]), np.array([1.0, 2.0, 2.0, 9.0]), np.array([5.0, 6.0]), np.ones(1))
    first, second = (2 * (1 - np.array([0, 0, 3.0])) / 3, 3 * (3.5 - np.array([1, 2, 2, 9.0])) / 4)
    influence = np.concatenate([first, second, [0.25, -0.25]])
    acceleration = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    bias = norm.ppf(0.6)
    value = float(np.quantile(draws, 0.6))
    shifted = bias + norm.ppf([0.05, 0.95])
    expected = np.quantile(draws, norm.cdf(bias + shifted / (1 - acceleration * shifted)))
    found = bca_interval(statistics.Resampled(value, draws, left_out), level=0.9)
    assert found == pytest.approx(tuple(expected), rel=1e-3)


@pytest.mark.parametrize(("value", "near"), [(2.0, 1.0), (-2.0, 0.0)])
def test_an_estimate_beyond_all_draws_has_an_interval_at_their_end(value, near):
    low, high = bca_interval(statistics.Resampled(value, np.linspace(0, 1, 1001), ()))
    assert 0 <= low <= high <= 1
    assert abs(low - near) < 0.01 or abs(high - near) < 0.01
    assert all(math.isnan(end) for end in bca_interval(statistics.Resampled(math.nan, np.zeros(5), ())))
    assert all(math.isnan(end) for end in bca_interval(statistics.Resampled(0.0, np.full(5, math.nan), ())))


def test_leaving_out_blocks_gives_the_acceleration_of_leaving_out_images(monkeypatch):
    labels, scores = draw(6, normal=120, abnormal=120, shift=2.0)
    whole = bca_interval(bootstrap((run(labels, scores),))["image_AP"])
    monkeypatch.setattr(statistics, "BLOCKS", 30)
    assert bca_interval(bootstrap((run(labels, scores),))["image_AP"]) == pytest.approx(whole, abs=0.002)


def test_area_and_variance_are_those_of_obuchowski():
    """Against the sums of her paper, over patients that have images of both classes, of one, and different numbers."""
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 12, size=90)
    labels = rng.random(90) < 0.2 + 0.6 * (groups % 3 == 0)
    scores = labels + rng.normal(size=90) + rng.normal(size=12)[groups]
    kernel = (scores[labels][:, None] > scores[~labels][None]) * 1.0
    value, m, n = kernel.mean(), int(labels.sum()), int((~labels).sum())
    abnormal, normal = kernel.mean(axis=1) - value, kernel.mean(axis=0) - value
    by_group = [
        (abnormal[groups[labels] == g].sum(), normal[groups[~labels] == g].sum(), (labels[groups == g]).any(),
         (~labels[groups == g]).any()) for g in range(12)
    ]  # fmt: skip
    with_abnormal, with_normal = sum(g[2] for g in by_group), sum(g[3] for g in by_group)
    s10 = with_abnormal / ((with_abnormal - 1) * m) * sum(g[0] ** 2 for g in by_group)
    s01 = with_normal / ((with_normal - 1) * n) * sum(g[1] ** 2 for g in by_group)
    s11 = 12 / 11 * sum(g[0] * g[1] for g in by_group)
    expected = math.sqrt(s10 / m + s01 / n + 2 * s11 / (m * n))
    found = area([run(labels, scores, (f"patient {g}" for g in groups))])
    assert found.value == pytest.approx(value)
    assert found.standard_error == pytest.approx(expected)
    assert found.groups == min(with_abnormal, with_normal)


@pytest.mark.parametrize(("abnormal", "known"), [(1, False), (2, True)])
def test_two_images_of_each_class_have_a_standard_error(abnormal, known):
    labels, scores = np.array([False, False, True, True]), np.array([0.1, 0.4, 0.35, 0.8])
    found = area([run(labels[: 2 + abnormal], scores[: 2 + abnormal])])
    assert math.isfinite(found.standard_error) == known
    assert found.groups == abnormal


def test_methods_with_different_numbers_of_seeds_are_refused():
    one = run(*draw(0))
    with pytest.raises(ValueError, match="shorter"):
        differences([one, one], [one])


def test_areas_are_averaged_over_the_seeds():
    labels, first = draw(7)
    second = draw(8)[1]
    one, two, both = (area(runs) for runs in ([run(labels, first)], [run(labels, second)],
                                              [run(labels, first), run(labels, second)]))  # fmt: skip
    assert both.value == pytest.approx((one.value + two.value) / 2)
    assert both.standard_error < max(one.standard_error, two.standard_error)


def test_delongs_difference_and_error_are_those_of_all_pairs():
    for seed in (1, 2):
        labels, first = draw(seed, normal=100, abnormal=120)
        second = first + np.random.default_rng(seed).normal(size=220)
        found = area_difference([run(labels, first)], [run(labels, second)])
        difference, p_value = naive_delong(labels, first, second)
        assert found.value == pytest.approx(difference)
        error = abs(difference) / norm.isf(p_value / 2)
        assert found.standard_error == pytest.approx(error)
        assert found.p_value() == pytest.approx(2 * t.sf(abs(difference) / error, 99))
        low, high = found.difference_interval()
        assert (low + high) / 2 == pytest.approx(difference)
        assert (high - low) / 2 == pytest.approx(t.ppf(0.975, 99) * error)


def test_p_values_are_uniform_where_there_is_no_difference():
    p_values = []
    for seed in range(300):
        labels, common = draw(seed)
        noise = np.random.default_rng(seed + 500).normal(size=(2, len(common)))
        p_values.append(area_difference([run(labels, common + noise[0])], [run(labels, common + noise[1])]).p_value())
    assert kstest(p_values, "uniform").pvalue > 0.01


def test_slices_of_patients_are_no_independent_images():
    """At equal quality the test rejects in about 5 %; taken as independent it would in about 40 %."""
    rejected = np.zeros(2)
    covered = np.zeros(2)
    true = norm.cdf(1 / math.sqrt(2))
    for seed in range(150):
        first, second = draw_patients(seed)
        as_images = [run(each.labels, each.scores) for each in (first, second)]
        for index, (a, b) in enumerate(((first, second), as_images)):
            rejected[index] += area_difference([a], [b]).p_value() < 0.05
            low, high = area([a]).interval()
            covered[index] += low <= true <= high
    assert rejected[0] <= 15
    assert rejected[1] > 30
    assert covered[0] >= 135
    assert covered[1] < 110


def test_the_interval_of_an_area_stays_below_one():
    labels, scores = draw(9, normal=20, abnormal=20, shift=2.6)
    found = area([run(labels, scores)])
    assert 0.9 < found.value < 1
    low, high = found.interval()
    assert low < found.value < high < 1
    assert found.value - low > high - found.value
    reach = t.ppf(0.975, 19) * found.standard_error / (found.value * (1 - found.value))
    assert math.log(high / (1 - high)) - math.log(found.value / (1 - found.value)) == pytest.approx(reach)


def test_a_perfect_order_does_not_claim_a_perfect_method():
    assert Area(1.0, 0.0, 20).interval() == (pytest.approx(0.025 ** (1 / 20)), 1.0)
    assert Area(0.0, 0.0, 20).interval() == (0.0, pytest.approx(1 - 0.025 ** (1 / 20)))
    assert all(math.isnan(end) for end in Area(math.nan, math.nan, 0).interval())


def test_delong_is_antisymmetric_and_invariant_to_monotone_scales():
    labels, first = draw(6)
    second = draw(7)[1]
    forward = area_difference([run(labels, first)], [run(labels, second)])
    backward = area_difference([run(labels, np.exp(second))], [run(labels, 5 * first - 2)])
    assert forward.value == pytest.approx(-backward.value)
    assert forward.p_value() == pytest.approx(backward.p_value())


def test_no_p_value_where_the_variance_is_unknown():
    labels, scores = draw(8)
    assert area_difference([run(labels, scores)], [run(labels, scores)]).p_value() == 1.0
    labels = np.array([False, False, True, True])
    perfect, constant = run(labels, np.array([0.0, 1.0, 2.0, 3.0])), run(labels, np.zeros(4))
    assert math.isnan(area_difference([perfect], [constant]).p_value())
    single = run(labels[1:3], np.array([1.0, 2.0]))
    assert math.isnan(area_difference([single], [run(labels[1:3], -single.scores)]).p_value())


def test_no_p_value_without_a_difference():
    labels, scores = draw(9)
    one = run(labels, scores)
    normal = one.select([path for path, ill in zip(one.paths, labels, strict=True) if not ill])
    found = differences([one], [normal])
    assert all(math.isnan(each.mean) and math.isnan(each.p_value) for each in found.values())
    assert all(math.isnan(each.low) and math.isnan(each.high) for each in found.values())


def test_differences_of_all_metrics_are_paired():
    labels, common = draw(10, normal=100, abnormal=100, shift=0.7)
    one, other = run(labels, common + 0.15 * labels), run(labels, common)
    found = differences([one], [other])
    separate = [intervals([each])["image_AP"] for each in (one, other)]
    assert separate[0][0] < separate[1][1]
    for name in IMAGE_METRICS[:2]:
        assert found[name].low > 0
        ours, theirs = (image_metrics(labels, each.scores)[name][0] for each in (one, other))
        assert found[name].mean == pytest.approx(ours - theirs)
    area_found = area_difference([one], [other])
    assert found["image_AUROC"].p_value == area_found.p_value()
    assert (found["image_AUROC"].low, found["image_AUROC"].high) == area_found.difference_interval()
    assert math.isnan(found["image_AP"].p_value)
    assert (found["image_AUROC"].ahead, found["image_AUROC"].seeds) == (1, 1)


def test_the_interval_of_a_difference_is_bca_of_the_differences():
    labels, first = draw(17, shift=2.0)
    second = first + np.random.default_rng(17).normal(size=100)
    ours, theirs = (bootstrap((run(labels, scores),))["image_AP"] for scores in (first, second))
    by_hand = statistics.Resampled(
        ours.value - theirs.value,
        ours.draws - theirs.draws,
        tuple(a - b for a, b in zip(ours.left_out, theirs.left_out, strict=True)),
    )
    found = differences([run(labels, first)], [run(labels, second)])["image_AP"]
    assert (found.low, found.high) == pytest.approx(bca_interval(by_hand), abs=1e-12)
    for name in IMAGE_METRICS:
        alone = intervals([run(labels, first)])[name]
        expected = bca_interval(bootstrap((run(labels, first),))[name])
        assert alone == (area([run(labels, first)]).interval() if name == "image_AUROC" else expected)
    assert list(intervals([run(labels, first)])) == list(IMAGE_METRICS)


def test_a_method_does_not_differ_from_itself():
    labels, scores = draw(11)
    for name, difference in differences([run(labels, scores)], [run(labels, scores)]).items():
        assert (difference.mean, difference.low, difference.high, difference.ahead) == (0, 0, 0, 0)
        assert difference.p_value == 1 or name != "image_AUROC"


def test_pairs_are_compared_on_the_images_that_both_have():
    labels, scores = draw(12)
    whole = run(labels, scores, (f"patient {index // 2}" for index in range(100)))
    part = ImageScores(whole.paths[10:][::-1], labels[10:][::-1], -scores[10:][::-1], whole.groups[10:][::-1])
    found = differences([whole], [part])["image_AUROC"]
    value = image_metrics(labels[10:], scores[10:])["image_AUROC"][0]
    assert found.mean == pytest.approx(value - (1 - value))
    aligned = run(labels[10:], scores[10:], whole.groups[10:]), run(labels[10:], -scores[10:], whole.groups[10:])
    expected = area_difference([aligned[0]], [aligned[1]])
    assert found.p_value == pytest.approx(expected.p_value())
    assert (found.low, found.high) == pytest.approx(expected.difference_interval())


def test_one_run_is_compared_with_every_seed_of_another_method():
    labels, scores = draw(13)
    others = [run(labels, draw(seed)[1]) for seed in (14, 15)]
    once = run(labels, scores)
    found = differences(others, [once, once])["image_AUROC"]
    each = [image_metrics(labels, other.scores)["image_AUROC"][0] for other in others]
    assert found.mean == pytest.approx(np.mean(each) - image_metrics(labels, scores)["image_AUROC"][0])
    assert found.seeds == 2


def test_pairs_without_common_truth_are_refused():
    labels, scores = draw(13)
    one = run(labels, scores)
    with pytest.raises(ValueError, match=r"^Two methods label the same images differently: run"):
        differences([one], [run(~labels, scores)])
    with pytest.raises(ValueError, match=r"^Two methods have no image in common: run"):
        differences([one], [ImageScores(tuple("x" + path for path in one.paths), labels, scores)])


@pytest.mark.parametrize("steps", [None, 3])
def test_placements_average_to_the_area_in_both_classes(steps):
    labels, scores = draw(14, steps=steps)
    placed = placements(labels, scores)
    area = image_metrics(labels, scores)["image_AUROC"][0]
    assert placed[labels].mean() == pytest.approx(area)
    assert placed[~labels].mean() == pytest.approx(area)


def test_holm_multiplies_by_the_comparisons_that_are_left():
    found = holm([0.01, 0.04, 0.03, math.nan, 0.9])
    assert found == pytest.approx([0.04, 0.09, 0.09, math.nan, 0.9], nan_ok=True)
    assert holm([]).tolist() == []
    assert np.isnan(holm([math.nan])).tolist() == [True]


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


def test_mean_curves_are_the_means_of_their_runs():
    runs = [run(*draw(seed, normal=30, abnormal=30)) for seed in (18, 19)]
    for curve in (mean_roc, mean_pr):
        x, y = curve(runs)
        singles = [curve([each]) for each in runs]
        assert y == pytest.approx((singles[0][1] + singles[1][1]) / 2)
        assert x.tolist() == singles[0][0].tolist()
        assert len(x) == len(y) == (202 if curve is mean_roc else 201)
