# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Drawings for the page, as inline SVG whose colours are the page's own and so follow light and dark."""

from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Line", "curves", "histogram", "interval_bar", "swatch"]

Array = NDArray[np.floating[Any]]

_SIDE, _LEFT, _TOP, _BOTTOM = 300, 46, 8, 42  # of a square plot, in units of the drawing


class Line(NamedTuple):
    """One curve.

    Attributes:
        style: Name of its style on the page.
        x: ``(N,)`` in [0, 1].
        y: ``(N,)`` in [0, 1].
    """

    style: str
    x: Array
    y: Array


def _points(x: Array, y: Array) -> str:
    """Write points in tenths of a unit, without those on a straight line between their neighbours."""
    points = np.stack([_LEFT + _SIDE * x, _TOP + _SIDE * (1 - y)], axis=1).round(1)
    kept = [0]
    for index in range(1, len(points) - 1):
        before, here, after = points[kept[-1]], points[index], points[index + 1]
        cross = (here[0] - before[0]) * (after[1] - before[1]) - (here[1] - before[1]) * (after[0] - before[0])
        if abs(cross) > 0.05:
            kept.append(index)
    return " ".join(f"{a:g},{b:g}" for a, b in points[[*kept, len(points) - 1]])


def curves(lines: Sequence[Line], x_label: str, y_label: str, description: str, chance: float | None = None) -> str:
    """Draw curves in the unit square.

    Args:
        lines: The curves; the first is drawn on top.
        x_label: Below the horizontal axis.
        y_label: Beside the vertical axis.
        description: What a person who cannot see it is told.
        chance: Height of a level line for guessing; ``None`` draws the diagonal.

    Returns:
        An ``svg`` element.
    """
    right, base = _LEFT + _SIDE, _TOP + _SIDE
    box = f"0 0 {right + 10} {base + _BOTTOM}"
    parts = [f'<svg class="plot" viewBox="{box}" role="img" aria-label="{escape(description)}">']
    for step in range(6):
        share = step / 5
        x, y = _LEFT + _SIDE * share, base - _SIDE * share
        parts.append(f'<path class="grid" d="M{x:g} {_TOP}V{base}M{_LEFT} {y:g}H{right}"/>')
        parts.append(f'<text x="{x:g}" y="{base + 16}" text-anchor="middle">{share:g}</text>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:g}" text-anchor="end">{share:g}</text>')
    guess = f"M{_LEFT} {base}L{right} {_TOP}" if chance is None else f"M{_LEFT} {base - _SIDE * chance:g}H{right}"
    parts.append(f'<path class="chance" d="{guess}"/><path class="axis" d="M{_LEFT} {_TOP}V{base}H{right}"/>')
    for line in reversed(lines):
        parts.append(f'<polyline class="line {line.style}" points="{_points(line.x, line.y)}"/>')
    middle = _TOP + _SIDE / 2
    parts.append(f'<text x="{_LEFT + _SIDE / 2:g}" y="{base + 36}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text transform="translate(12 {middle:g}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    return "".join([*parts, "</svg>"])


def swatch(style: str) -> str:
    """Draw a short piece of a curve for a legend."""
    return f'<svg class="swatch" viewBox="0 0 34 10" aria-hidden="true"><path class="line {style}" d="M1 5H33"/></svg>'


def histogram(normal: Array, abnormal: Array, threshold: float | None, description: str, bins: int = 32) -> str:
    """Draw the scores of normal images upwards, those of abnormal images downwards, and the threshold.

    Heights are shares of each class. Scores beyond the outer half percent are counted in the outermost bins.

    Args:
        normal: Scores.
        abnormal: Scores.
        threshold: From which score on an image is called abnormal.
        description: What a person who cannot see it is told.
        bins: Number of bins.

    Returns:
        An ``svg`` element.
    """
    low, high = np.quantile(np.concatenate([normal, abnormal]), [0.005, 0.995])
    if not high > low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, bins + 1)
    shares = [np.histogram(np.clip(part, low, high), edges)[0] / len(part) for part in (normal, abnormal)]
    tallest = max(float(share.max()) for share in shares)
    width, half = 300, 70
    parts = [f'<svg class="plot" viewBox="0 0 {width} {2 * half + 34}" role="img" aria-label="{escape(description)}">']
    bar = width / bins
    for share, style, sign in zip(shares, ("normal", "abnormal"), (-1, 1), strict=True):
        d = [f"M0 {half + 8}"]
        for index, height in enumerate(share):
            d.append(f"V{half + 8 + sign * half * height / tallest:.1f}H{(index + 1) * bar:.1f}")
        parts.append(f'<path class="bars {style}" d="{"".join(d)}V{half + 8}Z"/>')
    parts.append(f'<path class="axis" d="M0 {half + 8}H{width}"/>')
    floor = 2 * half + 30
    if threshold is not None:
        share = (threshold - low) / (high - low)
        x = width * min(max(share, 0), 1)
        parts.append(f'<path class="threshold" d="M{x:.1f} 2V{2 * half + 14}"/>')
    parts.append(f'<text x="0" y="{floor}">{low:.3g}</text>')
    parts.append(f'<text x="{width}" y="{floor}" text-anchor="end">{high:.3g}</text>')
    return "".join([*parts, "</svg>"])


def interval_bar(mean: float, low: float, high: float, reach: float, style: str) -> str:
    """Draw a difference and its interval on a line from ``-reach`` to ``reach``, zero in the middle."""

    def place(value: float) -> float:
        return 50 + 50 * min(max(value / reach, -1), 1)

    return (
        '<svg class="interval" viewBox="0 0 100 16" preserveAspectRatio="none" aria-hidden="true">'
        '<path class="axis" d="M50 0V16"/>'
        f'<path class="line {style} solid" d="M{place(low):.1f} 8H{place(high):.1f}"/>'
        f'<path class="line {style} point" d="M{place(mean):.1f} 8h.01"/></svg>'
    )
