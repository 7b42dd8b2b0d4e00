# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Uncertainty of image-level metrics, and tests of the difference between two methods.

Two sources of variation are kept apart. Other *supports* would have given another model: the standard deviation over
seeds. Other *patients* would have given other values for the same models: the intervals and tests here, whose statistic
is the mean over seeds. The unit of resampling is the group of an image (its patient or volume) where groups are known,
otherwise the image itself.

- AUROC: DeLong's variance, summed within groups (Obuchowski, "Nonparametric analysis of clustered ROC curve data",
  Biometrics 1997). Intervals of one area are built on the logit scale, which keeps them inside (0, 1); differences are
  tested with Student's t.
- The other metrics: bootstrap of whole groups, paired over methods, with BCa intervals (Efron 1987).

``benchmarks/coverage.py`` measures how often these intervals cover the true value.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import norm, rankdata, t
from sklearn.metrics import precision_recall_curve, roc_curve
from statsmodels.stats.multitest import multipletests

__all__ = ["Area", "ImageScores", "area", "area_difference", "bca_interval", "bootstrap", "differences", "holm"]

Array = NDArray[np.floating[Any]]

IMAGE_METRICS = ("image_AUROC", "image_AP", "image_F1Max", "image_sensitivity_at_95_specificity")
DRAWS = 2000
LEVEL = 0.95
BLOCKS = 200
"""The acceleration of BCa leaves out this many blocks of groups in turn, or single groups where there are fewer."""
_CHUNK = 2**19  # elements of one array of the bootstrap, about the size of a core's cache


@dataclass(frozen=True, eq=False)
class ImageScores:
    """Scores of one trained model on the ``N`` test images."""

    paths: tuple[str, ...]
    labels: NDArray[np.bool_]  # (N,), true for abnormal
    scores: Array  # (N,), larger for more abnormal
    groups: tuple[str, ...] = ()  # of each image, such as its patient; empty where no groups are known

    @cached_property
    def units(self) -> tuple[str, ...]:
        """The unit of resampling of each image: its group, or the image itself."""
        return self.groups or self.paths

    def select(self, paths: Sequence[str]) -> "ImageScores":
        """Return the given images, in the given order."""
        kept = pd.Index(self.paths).get_indexer(pd.Index(paths))
        groups = tuple(self.groups[index] for index in kept) if self.groups else ()
        return ImageScores(tuple(paths), self.labels[kept], self.scores[kept], groups)


def image_metrics(
    labels: NDArray[np.bool_], scores: Array, weights: NDArray[np.integer[Any]] | None = None
) -> dict[str, Array]:
    """Compute the image-level metrics, for many samples of the same images at once.

    No threshold separates equal scores: they count as half in the area under the ROC curve.

    Args:
        labels: ``(N,)``, true for abnormal.
        scores: ``(N,)``.
        weights: ``(B, N)``, how often each image is in each sample. Defaults to one sample with every image.

    Returns:
        For each of `IMAGE_METRICS` the ``(B,)`` values in [0, 1]; NaN where a sample lacks a class. The sensitivity is
        the largest among the thresholds with a specificity of at least 0.95.

    Example:
        >>> labels = np.array([False, False, True, True])
        >>> image_metrics(labels, np.array([0.1, 0.4, 0.35, 0.8]))["image_AUROC"]
        array([0.75])
    """
    if weights is None:
        weights = np.ones((1, len(labels)), dtype=np.int64)
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # the last image of each score
    weights = weights[:, order]
    called = weights.cumsum(axis=1)[:, ends].astype(np.float64)  # called abnormal at each threshold
    hits = (weights * labels[order]).cumsum(axis=1)[:, ends].astype(np.float64)
    alarms = called - hits
    positive, negative = hits[:, -1:], alarms[:, -1:]
    with np.errstate(invalid="ignore", divide="ignore"):
        sensitivity, false_rate = hits / positive, alarms / negative
        gained = np.diff(sensitivity, axis=1, prepend=0)
        strips = np.diff(false_rate, axis=1, prepend=0) * (sensitivity - gained / 2)
        precision = hits / np.maximum(called, 1)
        values = {
            "image_AUROC": strips.sum(axis=1),
            "image_AP": (gained * precision).sum(axis=1),
            "image_F1Max": (2 * hits / (called + positive)).max(axis=1),
            "image_sensitivity_at_95_specificity": np.where(false_rate <= 0.05 + 1e-12, sensitivity, 0).max(axis=1),
        }
    both = (positive[:, 0] > 0) & (negative[:, 0] > 0)
    return {name: np.where(both, value, np.nan) for name, value in values.items()}


def placements(labels: NDArray[np.bool_], scores: Array) -> Array:
    """Compute for each image the share of the other class that it is ordered correctly with, equal scores by half.

    Returns:
        ``(N,)`` in [0, 1], whose mean over the images of either class is the area under the ROC curve; NaN where the
        other class is missing.

    Example:
        >>> placements(np.array([False, False, True, True]), np.array([0.1, 0.4, 0.35, 0.8]))
        array([1. , 0.5, 0.5, 1. ])
    """
    midranks = rankdata(scores)
    result = np.full(len(scores), np.nan)
    for label in (False, True):
        own = labels == label
        others = len(labels) - int(own.sum())
        if others and own.any():
            below = (midranks[own] - rankdata(scores[own])) / others
            result[own] = below if label else 1 - below
    return result


# The area under the ROC curve


@dataclass(frozen=True)
class Area:
    """An area under the ROC curve, or a difference of two, as the mean over the seeds; NaN if a class is missing."""

    value: float
    standard_error: float  # over patients or images; NaN if a class has fewer than two groups
    groups: int  # of the class that has fewer of them

    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of an area, computed on the logit scale.

        Without an error in the sample the logit is infinite. If all of ``n`` disjoint pairs of a normal and an abnormal
        group are ordered correctly, the lower end is the area where that has probability 2.5 %: ``0.025 ** (1 / n)``.

        Example:
            >>> [round(end, 3) for end in Area(0.96, 0.03, 20).interval()]
            [0.824, 0.992]
            >>> [round(end, 3) for end in Area(1.0, 0.0, 20).interval()]
            [0.832, 1.0]
        """
        if math.isnan(self.value):
            return math.nan, math.nan
        if self.value in {0.0, 1.0}:
            bound = ((1 - LEVEL) / 2) ** (1 / self.groups)
            return (bound, 1.0) if self.value else (0.0, 1 - bound)
        reach = self._quantile() * self.standard_error / (self.value * (1 - self.value))
        centre = logit(self.value)
        return float(expit(centre - reach)), float(expit(centre + reach))

    def difference_interval(self) -> tuple[float, float]:
        """Return the 95 % interval of a difference of two areas."""
        reach = self._quantile() * self.standard_error
        return self.value - reach, self.value + reach

    def p_value(self) -> float:
        """Return the two-sided p-value of a difference of two areas.

        NaN if the standard error is unknown, or zero for methods that differ: each then orders the classes all right,
        all wrong or not at all, and the variance cannot be estimated.
        """
        if self.standard_error < 1e-12:
            return 1.0 if abs(self.value) < 1e-12 else math.nan
        return float(2 * t.sf(abs(self.value) / self.standard_error, max(self.groups - 1, 1)))

    def _quantile(self) -> float:
        return float(t.ppf((1 + LEVEL) / 2, max(self.groups - 1, 1)))


def _influence(runs: Sequence[ImageScores]) -> tuple[float, pd.DataFrame]:
    """Return the mean area over the seeds, and the influence of each group on it: groups x (normal, abnormal)."""
    values, shares = [], []
    for run in runs:
        placed = placements(run.labels, run.scores)
        values.append(float(placed[run.labels].mean()) if run.labels.any() else math.nan)
        per_class = np.bincount(run.labels, minlength=2)[run.labels.astype(int)]
        share = (placed - values[-1]) / per_class / len(runs)
        shares.append(pd.DataFrame({"group": run.units, "label": run.labels, "share": share}))
    table = pd.concat(shares).pivot_table("share", "group", "label", "sum").reindex(columns=[False, True])
    return float(np.mean(values)), table


def _area(value: float, influence: pd.DataFrame) -> Area:
    counts = influence.notna().sum()
    if math.isnan(value) or counts.min() < 2:
        return Area(value, math.nan, int(counts.min()))
    variance = (counts / (counts - 1) * influence.pow(2).sum()).sum()
    variance += 2 * len(influence) / (len(influence) - 1) * influence.prod(axis=1, skipna=False).sum()
    return Area(value, math.sqrt(max(float(variance), 0.0)), int(counts.min()))


def area(runs: Sequence[ImageScores]) -> Area:
    """Estimate the mean area under the ROC curve of one method over its runs, with its standard error."""
    return _area(*_influence(runs))


def area_difference(first: Sequence[ImageScores], second: Sequence[ImageScores]) -> Area:
    """Estimate the difference of two mean areas under the ROC curve, with its standard error.

    With one pair of runs and images that are groups of their own, this is the test of DeLong, DeLong and Clarke-Pearson
    (1988) with mid-ranks (Sun and Xu 2014).

    Args:
        first: The runs of one method.
        second: Those of the other, each on the same images as its partner.
    """
    ours, theirs = _influence(first), _influence(second)
    return _area(ours[0] - theirs[0], ours[1] - theirs[1])


# The other metrics


@dataclass(frozen=True, eq=False)
class Resampled:
    """One metric, or a difference of it, as the mean over the seeds, on resampled groups."""

    value: float  # on the images themselves
    draws: Array  # (B,), on groups that were drawn with replacement
    left_out: tuple[Array, ...]  # by stratum (J,), without each block of groups

    def __sub__(self, other: "Resampled") -> "Resampled":
        pairs = zip(self.left_out, other.left_out, strict=True)
        return Resampled(self.value - other.value, self.draws - other.draws, tuple(a - b for a, b in pairs))


@lru_cache(maxsize=64)
def bootstrap(runs: tuple[ImageScores, ...], draws: int = DRAWS, seed: int = 0) -> dict[str, Resampled]:
    """Resample whole groups and compute the mean of each metric over the runs.

    Groups of normal images, groups of abnormal images and groups with both are resampled apart, as many of each as
    there are. The draws depend on the names, labels and groups of the images and on the seed alone, so that two methods
    on the same images can be subtracted. Results are cached for the next call with the same runs.

    Returns:
        One entry for each of `IMAGE_METRICS`.
    """
    ill = pd.concat([pd.Series(run.labels, run.units) for run in runs]).groupby(level=0).mean()  # by group, sorted
    strata = [np.flatnonzero(own) for own in (ill == 0, ill == 1, ill.between(0, 1, inclusive="neither")) if own.any()]
    columns = [ill.index.get_indexer(pd.Index(run.units)) for run in runs]

    def evaluate(weights: NDArray[np.int32]) -> dict[str, Array]:
        each = [image_metrics(run.labels, run.scores, weights[:, own]) for run, own in zip(runs, columns, strict=True)]
        return {name: np.mean([values[name] for values in each], axis=0) for name in IMAGE_METRICS}

    rng = np.random.default_rng(seed)
    size = max(1, _CHUNK // max(len(run.paths) for run in runs))
    drawn = []
    for start in range(0, draws, size):
        weights = np.zeros((min(size, draws - start), len(ill)), dtype=np.int32)
        for stratum in strata:
            chosen = rng.integers(len(stratum), size=(len(weights), len(stratum)))
            chosen += len(stratum) * np.arange(len(weights))[:, None]
            counts = np.bincount(chosen.ravel(), minlength=len(weights) * len(stratum))
            weights[:, stratum] = counts.reshape(len(weights), -1)
        drawn.append(evaluate(weights))
    left_out = []
    for stratum in strata:
        blocks = np.array_split(stratum, min(BLOCKS, len(stratum)))
        weights = np.ones((len(blocks), len(ill)), dtype=np.int32)
        for row, block in enumerate(blocks):
            weights[row, block] = 0
        left_out.append(evaluate(weights))
    whole = evaluate(np.ones((1, len(ill)), dtype=np.int32))
    return {
        name: Resampled(
            float(whole[name][0]), np.concatenate([p[name] for p in drawn]), tuple(p[name] for p in left_out)
        )
        for name in IMAGE_METRICS
    }


def bca_interval(sample: Resampled, level: float = LEVEL) -> tuple[float, float]:
    """Compute the bias-corrected and accelerated interval of a bootstrap.

    Efron, "Better bootstrap confidence intervals" (1987), with the acceleration for several samples that
    `scipy.stats.bootstrap` uses.

    Returns:
        Both ends; NaN if no draw is finite. If all draws are equal, both ends are their value.
    """
    known = sample.draws[np.isfinite(sample.draws)]
    if not len(known) or math.isnan(sample.value):
        return math.nan, math.nan
    share = ((known < sample.value).mean() + (known <= sample.value).mean()) / 2
    share = min(max(share, 0.5 / len(known)), 1 - 0.5 / len(known))  # keeps the bias finite
    cubes = squares = 0.0
    for values in sample.left_out:
        finite = values[np.isfinite(values)]
        if len(finite) > 1:
            influence = (len(finite) - 1) * (finite.mean() - finite) / len(finite)
            cubes += float((influence**3).sum())
            squares += float((influence**2).sum())
    acceleration = cubes / (6 * squares**1.5) if squares else 0.0
    bias = norm.ppf(share)
    shifted = bias + norm.ppf([(1 - level) / 2, (1 + level) / 2])
    low, high = np.quantile(known, norm.cdf(bias + shifted / (1 - acceleration * shifted)))
    return float(low), float(high)


def intervals(runs: Sequence[ImageScores]) -> dict[str, tuple[float, float]]:
    """Compute the 95 % intervals of all metrics of one method, over patients or images."""
    samples = bootstrap(tuple(runs))
    return {name: bca_interval(samples[name]) for name in IMAGE_METRICS} | {"image_AUROC": area(runs).interval()}


@dataclass(frozen=True)
class Difference:
    """A difference of two methods in one metric, first minus second, as the mean over the seeds."""

    mean: float
    low: float  # ends of the 95 % interval
    high: float
    p_value: float  # two-sided, of the AUROC; NaN for the other metrics, or where it cannot be computed
    ahead: int  # seeds with which the first method is strictly better
    seeds: int


def differences(first: Sequence[ImageScores], second: Sequence[ImageScores]) -> dict[str, Difference]:
    """Compare two methods on the same images.

    Args:
        first: The runs of one method, one per seed.
        second: Those of the other, in the same order of seeds. Images that one of a pair lacks are left out of both.

    Returns:
        One entry for each of `IMAGE_METRICS`.

    Raises:
        ValueError: If a pair has no image in common, or labels an image differently.
    """
    pairs = [_on_common_images(a, b) for a, b in zip(first, second, strict=True)]
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    each = [(image_metrics(a.labels, a.scores), image_metrics(b.labels, b.scores)) for a, b in pairs]
    ours, theirs = bootstrap(tuple(first)), bootstrap(tuple(second))
    areas = area_difference(first, second)
    result = {}
    for name in IMAGE_METRICS:
        by_seed = np.array([float(a[name][0] - b[name][0]) for a, b in each])
        (low, high), p_value = bca_interval(ours[name] - theirs[name]), math.nan
        if name == "image_AUROC":
            (low, high), p_value = areas.difference_interval(), areas.p_value()
        ahead = int((by_seed > 0).sum())
        result[name] = Difference(float(by_seed.mean()), low, high, p_value, ahead, len(by_seed))
    return result


def _on_common_images(first: ImageScores, second: ImageScores) -> tuple[ImageScores, ImageScores]:
    """Restrict both to the images that they share, in the order of the first."""
    if first.paths != second.paths:
        shared = set(second.paths)
        paths = [path for path in first.paths if path in shared]
        first, second = first.select(paths), second.select(paths)
    if not first.paths or not bool((first.labels == second.labels).all()):
        what = "label the same images differently" if first.paths else "have no image in common"
        msg = f"Two methods {what}: run both on the same test part, with paths relative to the same root."
        raise ValueError(msg)
    return first, second


def holm(p_values: Sequence[float]) -> Array:
    """Adjust the p-values of one family by Holm's step-down rule; NaN stays NaN and does not count.

    Example:
        >>> holm([0.01, 0.04, 0.03, math.nan])
        array([0.03, 0.06, 0.06,  nan])
    """
    adjusted = np.array(p_values, dtype=np.float64)
    known = ~np.isnan(adjusted)
    if known.any():
        adjusted[known] = multipletests(adjusted[known], method="holm")[1]
    return adjusted


def mean_roc(runs: Sequence[ImageScores], points: int = 201) -> tuple[Array, Array]:
    """Average the ROC curves of runs with both classes at equal false-positive rates.

    Returns:
        False-positive rates and mean sensitivities, both ``(points + 1,)``, from (0, 0) to (1, 1).
    """
    grid = np.linspace(0, 1, points)
    curves = [np.interp(grid, *roc_curve(run.labels, run.scores)[:2]) for run in runs]
    return np.append(0.0, grid), np.append(0.0, np.mean(curves, axis=0))


def mean_pr(runs: Sequence[ImageScores], points: int = 201) -> tuple[Array, Array]:
    """Average the precision-recall curves of runs with both classes, without interpolating between thresholds.

    Returns:
        Recalls in (0, 1] and mean precisions, both ``(points,)``: the precision at the highest threshold with at least
        that recall.
    """
    grid = np.linspace(0, 1, points + 1)[1:]
    curves = []
    for run in runs:
        precision, recall, _ = precision_recall_curve(run.labels, run.scores)
        precision, recall = precision[-2::-1], recall[-2::-1]  # recall now rises; the point (0, 1) is no threshold
        curves.append(precision[np.searchsorted(recall, grid - 1e-12)])
    return grid, np.mean(curves, axis=0)
