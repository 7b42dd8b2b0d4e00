# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Figures and pictures of the page, as data URIs."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

__all__ = ["Histogram", "colour_bar", "curves", "forest", "heatmap", "histograms", "outlined", "picture", "thumbnail"]

Array = NDArray[np.floating[Any]]
Pixels = NDArray[np.uint8]

THUMBNAIL = 160  # pixels of the longer side
STYLE = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "comparison", "font.size": 9.0}
DASHES = ("-", "--", ":", "-.")
NORMAL, ABNORMAL = "#2a78b5", "#c6560a"
_OUTLINE = (0, 255, 255)  # cyan, which no tissue has


def curves(roc: Mapping[str, tuple[Array, Array]], precision: Mapping[str, tuple[Array, Array]], share: float) -> str:
    """Plot ROC and precision-recall curves by method, side by side; ``share`` is that of abnormal images."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.6 + 0.12 * len(roc)), layout="constrained")
        left, right = figure.subplots(1, 2)
        colours = mpl.colormaps["tab10"]
        for axes, lines in ((left, roc), (right, precision)):
            for index, (name, (x, y)) in enumerate(lines.items()):
                style = {"color": colours(index % 10), "linestyle": DASHES[index % len(DASHES)]}
                axes.plot(x, y, label=name, linewidth=2.2 if index == 0 else 1.4, zorder=3 - index / 100, **style)
            axes.set(xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
            axes.grid(alpha=0.3)
        left.plot([0, 1], [0, 1], ":", color="grey", linewidth=1)
        right.axhline(share, linestyle=":", color="grey", linewidth=1)
        left.set(xlabel="1 - specificity", ylabel="sensitivity")
        right.set(xlabel="recall", ylabel="precision")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        return _svg(figure)


def forest(rows: Sequence[tuple[str, float, float, float]]) -> str:
    """Plot differences with their intervals, one per line: name, difference and both ends, in points."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 0.7 + 0.28 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, (_, mean, low, high) in enumerate(rows):
            axes.plot([low, high], [place, place], color=NORMAL, linewidth=1.6)
            axes.plot(mean, place, "o", color=NORMAL, markersize=5)
        axes.axvline(0, color="grey", linewidth=1)
        axes.set(xlabel="difference of image AUROC, points", ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.grid(axis="x", alpha=0.3)
        return _svg(figure)


class Histogram(NamedTuple):
    """Scores of one method, and that from which on an image is called abnormal."""

    title: str
    normal: Array
    abnormal: Array
    threshold: float | None


def histograms(methods: Sequence[Histogram], columns: int = 3) -> str:
    """Plot score histograms, normal images upwards, abnormal ones downwards, as shares of each class."""
    with mpl.rc_context(STYLE):
        lines = -(-len(methods) // columns)
        figure = Figure(figsize=(8.4, 1.7 * lines + 0.2), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes in grid[len(methods) :]:
            axes.set_axis_off()
        for axes, method in zip(grid, methods, strict=False):
            low, high = np.quantile(np.concatenate([method.normal, method.abnormal]), [0.005, 0.995])
            low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
            edges = np.linspace(low, high, 33)
            for scores, colour, sign in ((method.normal, NORMAL, 1), (method.abnormal, ABNORMAL, -1)):
                shares = np.histogram(np.clip(scores, low, high), edges)[0] / len(scores)
                axes.stairs(sign * shares, edges, fill=True, color=colour)
            if method.threshold is not None:
                axes.axvline(min(max(method.threshold, low), high), color="black", linestyle="--", linewidth=1.2)
            axes.axhline(0, color="grey", linewidth=0.8)
            axes.set_title(method.title, fontsize=8)
            axes.set_yticks([])
        return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture(pixels: Pixels) -> str:
    """Encode a picture ``(H, W, 3)``."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=82, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def heatmap(levels: Pixels, size: tuple[int, int]) -> Pixels:
    """Colour a map ``(h, w)`` of 8 bits, all maps alike, and resize it to height and width."""
    coloured = (255 * mpl.colormaps["inferno"](levels)[..., :3]).round().astype(np.uint8)
    return np.asarray(cv2.resize(coloured, size[::-1], interpolation=cv2.INTER_LINEAR), dtype=np.uint8)


def colour_bar() -> str:
    """Return the colours of the heatmaps from low to high."""
    return picture(heatmap(np.arange(256, dtype=np.uint8)[None].repeat(12, axis=0), (12, 256)))


def thumbnail(image: Pixels) -> Pixels:
    """Shrink an image ``(H, W, 3)`` to at most 160 pixels a side."""
    scale = min(1.0, THUMBNAIL / max(image.shape[:2]))
    size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def outlined(image: Pixels, mask: NDArray[np.bool_]) -> Pixels:
    """Outline a mask ``(h, w)`` of any size on an image ``(H, W, 3)``."""
    size: Any = image.shape[1::-1]
    inside = cv2.resize(mask.astype(np.uint8) * 255, size, interpolation=cv2.INTER_LINEAR) > 127
    if not inside.any():  # a lesion smaller than a pixel
        inside = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
    grown = cv2.dilate(inside.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    drawn = image.copy()
    drawn[grown & ~inside] = _OUTLINE
    return drawn
