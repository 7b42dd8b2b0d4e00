# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""How sure a figure is, and whether two methods differ.

Two things vary, and they are told apart. Other *supports* would have given another model: that is the standard
deviation over seeds. Other *test images* would have given another figure for the same models: that is the bootstrap
over images, whose statistic is the mean over seeds, each image drawn for all seeds at once. Two methods are compared on
the same images: the bootstrap draws the same images for both, and DeLong's test, which knows one pair of models, is
done seed by seed.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata

__all__ = [
    "IMAGE_METRICS",
    "DeLong",
    "Difference",
    "ImageScores",
    "bootstrap",
    "delong",
    "holm",
    "image_metrics",
    "interval",
    "mean_and_spread",
    "mean_pr",
    "mean_roc",
    "paired_bootstrap",
    "placements",
]

Array = NDArray[np.floating[Any]]

IMAGE_METRICS = ("image_AUROC", "image_AP", "image_F1Max", "image_sensitivity_at_95_specificity")
DRAWS = 2000
_CHUNK = 2**19  # numbers in one array of the bootstrap: about what a core's cache holds


@dataclass(frozen=True, eq=False)
class ImageScores:
    """What one trained model says about the test images.

    Args:
        paths: Names of the ``N`` images.
        labels: ``(N,)``, true for abnormal.
        scores: ``(N,)``, larger for more abnormal.
    """

    paths: tuple[str, ...]
    labels: NDArray[np.bool_]
    scores: Array

    def only(self, paths: Collection[str]) -> "ImageScores":
        """Leave out the images that are not among the given ones."""
        kept = np.array([path in paths for path in self.paths], dtype=np.bool_)
        names = tuple(path for path, keep in zip(self.paths, kept, strict=True) if keep)
        return ImageScores(names, self.labels[kept], self.scores[kept])


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Give the mean and the standard deviation of a sample; NaN for the latter if there is one value only.

    Example:
        >>> mean_and_spread([1.0, 2.0, 3.0])
        (2.0, 1.0)
    """
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return float(np.mean(values)), spread


def image_metrics(
    labels: NDArray[np.bool_], scores: Array, weights: NDArray[np.integer[Any]] | None = None
) -> dict[str, Array]:
    """Compute the image-level figures, for many samples of the same images at once.

    Equal scores are told apart by no threshold: they count as half in the area under the ROC curve.

    Args:
        labels: ``(N,)``, true for abnormal.
        scores: ``(N,)``.
        weights: ``(B, N)``, how often each image is in each of ``B`` samples. Defaults to one sample with every image.

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


def bootstrap(runs: Sequence[ImageScores], draws: int = DRAWS, seed: int = 0) -> dict[str, Array]:
    """Draw the test images anew, with replacement, and compute the figures each time.

    Normal and abnormal images are drawn apart, as many of each as there are. All runs see the same drawn images. The
    draws depend on the names and labels of the images and on the seed alone, so that draws of two methods on the same
    images can be subtracted.

    Args:
        runs: One method with different supports, usually on the same images.
        draws: Number of draws ``B``.
        seed: Seed of the draws.

    Returns:
        For each of `IMAGE_METRICS` the ``(B,)`` means over the runs, kept for the next call with the same runs.
    """
    return _drawn(tuple(runs), draws, seed)


@lru_cache(maxsize=64)
def _drawn(runs: tuple[ImageScores, ...], draws: int, seed: int) -> dict[str, Array]:
    labels = {path: bool(label) for run in runs for path, label in zip(run.paths, run.labels, strict=True)}
    position = {path: index for index, path in enumerate(sorted(labels))}
    abnormal = np.array([labels[path] for path in position])
    columns = [np.array([position[path] for path in run.paths]) for run in runs]
    rng = np.random.default_rng(seed)
    parts = []
    size = max(1, _CHUNK // len(position))
    for start in range(0, draws, size):
        count = min(size, draws - start)
        weights = np.zeros((count, len(position)), dtype=np.int32)
        for stratum in (np.flatnonzero(~abnormal), np.flatnonzero(abnormal)):
            if len(stratum):
                drawn = rng.integers(len(stratum), size=(count, len(stratum)))
                drawn += len(stratum) * np.arange(count)[:, None]
                counts = np.bincount(drawn.ravel(), minlength=count * len(stratum))
                weights[:, stratum] = counts.reshape(count, -1)
        each = [image_metrics(run.labels, run.scores, weights[:, own]) for run, own in zip(runs, columns, strict=True)]
        parts.append({name: np.mean([values[name] for values in each], axis=0) for name in IMAGE_METRICS})
    return {name: np.concatenate([part[name] for part in parts]) for name in IMAGE_METRICS}


def interval(draws: Array, level: float = 0.95) -> tuple[float, float]:
    """Give the percentile interval of bootstrap draws ``(B,)``.

    Example:
        >>> interval(np.arange(101.0), level=0.5)
        (25.0, 75.0)
    """
    known = draws[~np.isnan(draws)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """A difference of two methods in one figure, first minus second, mean over the seeds.

    Attributes:
        mean: The difference on the images themselves.
        low: Lower end of the 95 % interval over images.
        high: Upper end.
        p_value: Two-sided, at least ``2 / (draws + 1)``.
        ahead: Number of seeds with which the first method is strictly better.
        seeds: Number of seeds.
        images: Number of different test images.
    """

    mean: float
    low: float
    high: float
    p_value: float
    ahead: int
    seeds: int
    images: int


def paired_bootstrap(
    first: Sequence[ImageScores],
    second: Sequence[ImageScores],
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Difference]:
    """Compare two methods on the same images, drawn anew.

    Args:
        first: The runs of one method, one a seed.
        second: Those of the other, in the same order of seeds. Images that one of a pair lacks are left out of both.
        draws: Number of draws.
        seed: Seed of the draws.

    Returns:
        For each of `IMAGE_METRICS` the difference of the means over the seeds. The p-value is twice the share of draws
        on the other side of zero, zero itself counted on both.

    Raises:
        ValueError: If a pair has no image in common, or labels an image differently.
    """
    pairs = [_on_common_images(a, b) for a, b in zip(first, second, strict=True)]
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    ours, theirs = bootstrap(first, draws, seed), bootstrap(second, draws, seed)
    each = [(image_metrics(a.labels, a.scores), image_metrics(b.labels, b.scores)) for a, b in pairs]
    images = len({path for run in first for path in run.paths})
    result = {}
    for name in IMAGE_METRICS:
        by_seed = np.array([float(a[name][0] - b[name][0]) for a, b in each])
        drawn = ours[name] - theirs[name]
        below, above = (int((drawn <= 0).sum()), int((drawn >= 0).sum()))
        p_value = min(1.0, 2 * (1 + min(below, above)) / (draws + 1))
        low, high = interval(drawn)
        result[name] = Difference(
            float(by_seed.mean()), low, high, p_value, int((by_seed > 0).sum()), len(by_seed), images
        )
    return result


def _on_common_images(first: ImageScores, second: ImageScores) -> tuple[ImageScores, ImageScores]:
    """Leave the images that both have, in the order of the first."""
    if first.paths == second.paths:
        same = bool((first.labels == second.labels).all())
    else:
        first = first.only(set(second.paths))
        position = {path: index for index, path in enumerate(second.paths)}
        order = np.array([position[path] for path in first.paths], dtype=np.intp)
        second = ImageScores(first.paths, second.labels[order], second.scores[order])
        same = bool((first.labels == second.labels).all())
    if not first.paths or not same:
        what = "have no image in common" if not first.paths else "label the same images differently"
        msg = f"Two methods {what}: run both on the same test part, with paths relative to the same root."
        raise ValueError(msg)
    return first, second


def placements(labels: NDArray[np.bool_], scores: Array) -> Array:
    """Tell for each image which share of the other class it is in the right order with, equal scores by half.

    The mean over the images of either class is the area under the ROC curve.

    Args:
        labels: ``(N,)``, true for abnormal.
        scores: ``(N,)``.

    Returns:
        ``(N,)`` in [0, 1]: for an abnormal image the share of normal images that score lower, for a normal image the
        share of abnormal images that score higher. NaN where the other class is missing.

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


@dataclass(frozen=True)
class DeLong:
    """Result of DeLong's test.

    Attributes:
        difference: Area under the ROC curve of the first method minus that of the second.
        standard_error: Of the difference.
        p_value: Two-sided. NaN where the standard error is not known (one image in a class) or zero for methods that
            differ (each orders the classes all right, all wrong or not at all): the test then has nothing to say.
    """

    difference: float
    standard_error: float
    p_value: float


def delong(labels: NDArray[np.bool_], first: Array, second: Array) -> DeLong:
    """Test whether two areas under the ROC curve on the same images differ.

    DeLong, DeLong, Clarke-Pearson 1988, with mid-ranks (Sun, Xu 2014), so that time grows as ``N log N``.

    Args:
        labels: ``(N,)``, true for abnormal; both classes occur.
        first: ``(N,)`` scores of one method.
        second: ``(N,)`` scores of the other.

    Returns:
        The difference and how sure it is.

    Raises:
        ValueError: If a class is missing.
    """
    if labels.all() or not labels.any():
        msg = "DeLong's test needs normal and abnormal images: give a test part with both."
        raise ValueError(msg)
    shift = placements(labels, first) - placements(labels, second)
    difference = float(shift[labels].mean())
    counts = [int((labels == label).sum()) for label in (False, True)]
    if min(counts) < 2:
        return DeLong(difference, math.nan, math.nan)
    variance = sum(
        shift[labels == label].var(ddof=1) / count for label, count in zip((False, True), counts, strict=True)
    )
    error = math.sqrt(variance)
    if error < 1e-12:
        return DeLong(difference, 0.0, 1.0 if abs(difference) < 1e-12 else math.nan)
    return DeLong(difference, error, float(2 * norm.sf(abs(difference) / error)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number, by Holm's step-down rule.

    Returns:
        Values of which those below a level are significant while the chance of one false one stays below that level.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def mean_roc(runs: Sequence[ImageScores], points: int = 201) -> tuple[Array, Array]:
    """Average ROC curves at equal false-positive rates.

    Args:
        runs: Runs with both classes.
        points: Number of points of the mean curve.

    Returns:
        False-positive rates and mean sensitivities, both ``(points + 1,)``, from (0, 0) to (1, 1).
    """
    grid = np.linspace(0, 1, points)
    curves = []
    for run in runs:
        hits, alarms = _counts(run)
        curves.append(np.interp(grid, alarms / alarms[-1], hits / hits[-1]))
    return np.append(0.0, grid), np.append(0.0, np.mean(curves, axis=0))


def mean_pr(runs: Sequence[ImageScores], points: int = 201) -> tuple[Array, Array]:
    """Average precision-recall curves at equal recalls, without interpolating between thresholds.

    Args:
        runs: Runs with both classes.
        points: Number of points of the mean curve.

    Returns:
        Recalls in (0, 1] and mean precisions, both ``(points,)``: the precision at the highest threshold with at least
        that recall.
    """
    grid = np.linspace(0, 1, points + 1)[1:]
    curves = []
    for run in runs:
        hits, alarms = _counts(run)
        hits, alarms = hits[1:], alarms[1:]
        reached = np.searchsorted(hits / hits[-1], grid - 1e-12)
        curves.append((hits / (hits + alarms))[reached])
    return grid, np.mean(curves, axis=0)


def _counts(run: ImageScores) -> tuple[Array, Array]:
    """Count hits and false alarms at each threshold, from none called abnormal to all."""
    order = np.argsort(-run.scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(run.scores[order]) != 0, True))
    hits = np.append(0, run.labels[order].cumsum()[ends]).astype(np.float64)
    called = np.append(0, ends + 1).astype(np.float64)
    return hits, called - hits
