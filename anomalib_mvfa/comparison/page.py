# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Writes the page of a comparison: one HTML file with tables, figures and images."""

import base64
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from anomalib_mvfa.data.readers import read_image
from anomalib_mvfa.files import replacing
from anomalib_mvfa.visualization import outlines

from .cells import Cell, Maps
from .report import FinishedCells, Group, environment, facts, failures, shot
from .statistics import mean_pr, mean_roc, placements

__all__ = ["heatmap", "picture", "write_page"]

logger = logging.getLogger(__name__)

GALLERY_ROWS = 40  # images on a page: with ten heatmaps each they stay under 2 MB
THUMBNAIL = 160  # pixels of the longer side
STYLE = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "comparison", "font.size": 9.0}
DASHES = ("-", "--", ":", "-.")
NORMAL, ABNORMAL = "#2a78b5", "#c6560a"
COLUMNS = 3  # of histograms

# Plots: each returns a figure and what it shows, in words


def _curves(groups: Sequence[Group]) -> tuple[Figure, str]:
    """ROC and precision-recall curves by method, side by side."""
    figure = Figure(figsize=(8.4, 3.6 + 0.12 * len(groups)), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [f"{group.label} ({group.text('image_AUROC')} %)" for group in groups]
    for index, (name, group) in enumerate(zip(names, groups, strict=True)):
        runs = [cell.scores for cell in group.cells.values()]
        style: dict[str, Any] = {"color": mpl.colormaps["tab10"](index % 10), "zorder": 3 - index / 100}
        style |= {"linestyle": DASHES[index % len(DASHES)], "linewidth": 1.4 if index else 2.2}
        left.plot(*mean_roc(runs), label=name, **style)
        right.plot(*mean_pr(runs), **style)
    left.plot([0, 1], [0, 1], ":", color="grey", linewidth=1)
    right.axhline(groups[0].first.scores.labels.mean(), linestyle=":", color="grey", linewidth=1)
    left.set(xlabel="1 - specificity", ylabel="sensitivity")
    right.set(xlabel="recall", ylabel="precision")
    for axes in (left, right):
        axes.set(xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure, f"ROC and precision-recall curves; image AUROC: {', '.join(names)}."


def _histograms(groups: Sequence[Group]) -> tuple[Figure, str]:
    """Scores of the first seed, normal images upwards, abnormal ones downwards, as shares of each class."""
    lines = -(-len(groups) // COLUMNS)
    figure = Figure(figsize=(8.4, 1.7 * lines + 0.2), layout="constrained")
    grid = figure.subplots(lines, COLUMNS, squeeze=False).ravel()
    for axes in grid[len(groups) :]:
        axes.set_axis_off()
    titles = []
    for axes, group in zip(grid, groups, strict=False):
        scores, threshold, title = group.first.scores, group.first.threshold, group.label
        normal, abnormal = scores.scores[~scores.labels], scores.scores[scores.labels]
        low, high = np.quantile(scores.scores, [0.005, 0.995])
        low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
        edges = np.linspace(low, high, 33)
        for own, colour, sign in ((normal, NORMAL, 1), (abnormal, ABNORMAL, -1)):
            axes.stairs(
                sign * np.histogram(np.clip(own, low, high), edges)[0] / len(own), edges, fill=True, color=colour
            )
        if threshold is not None:
            axes.axvline(min(max(threshold, low), high), color="black", linestyle="--", linewidth=1.2)
            hits, passed = 100 * (abnormal >= threshold).mean(), 100 * (normal < threshold).mean()
            title += f"\nsensitivity {hits:.0f} %, specificity {passed:.0f} %"
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_title(title, fontsize=8)
        axes.set_yticks([])
        titles.append(title.replace("\n", ", "))
    return figure, f"Score histograms: {'; '.join(titles)}"


def _plots(plot: Callable[[Sequence[Group]], tuple[Figure, str]], comparison: FinishedCells) -> list[dict[str, str]]:
    """Plot the methods of each set and shot."""
    made = []
    for name, k_shot in comparison.places:
        buffer = io.BytesIO()
        with mpl.rc_context(STYLE):
            figure, alt = plot(comparison.select(name, k_shot))
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        made.append({"title": f"{name}, {shot(k_shot)}", "source": _uri("svg+xml", buffer), "alt": alt})
    return made


# Pictures


def _uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture(image: Image.Image) -> str:
    """Encode a picture as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82, optimize=True)
    return _uri("jpeg", buffer)


def heatmap(levels: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    """Colour a map ``(h, w)`` of 8 bits, all maps alike, and resize it to width and height."""
    coloured = (255 * mpl.colormaps["inferno"](levels)[..., :3]).round().astype(np.uint8)
    return Image.fromarray(coloured).resize(size, Image.Resampling.BILINEAR)


def _chosen(groups: Sequence[Group], limit: int) -> dict[str, list[str]]:
    """Choose images by rank error: path to reasons, at most so many paths, the methods taking turns."""
    wanted = []
    for group in groups:
        scores = group.first.scores
        surer = np.where(scores.labels, scores.scores, -scores.scores)  # among equals the surer one is better
        order = np.lexsort((-surer, 1 - placements(scores.labels, scores.scores)))
        ill, well = order[scores.labels[order]], order[~scores.labels[order]]
        picks = {"worst": ill[-1], "best": ill[0], "median": ill[len(ill) // 2], "worst normal": well[-1]}
        wanted.append([(scores.paths[index], f"{reason} of {group.label}") for reason, index in picks.items()])
    chosen: dict[str, list[str]] = {}
    for turn in zip(*wanted, strict=True):
        for path, reason in turn:
            if path in chosen or len(chosen) < limit:
                chosen.setdefault(path, []).append(reason)
    return chosen


def _gallery(comparison: FinishedCells, roots: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Return the images of each set with their heatmaps."""
    galleries = []
    for name in comparison.sets:
        shots = [k for k in comparison.shots if comparison.select(name, k)]
        k_shot = 4 if 4 in shots else max(shots)
        groups = comparison.select(name, k_shot, zero_too=True)
        maps = [group.first.read_maps() for group in groups]
        chosen = _chosen(groups, max(4, GALLERY_ROWS // len(comparison.sets)))
        runs = [group.first.scores for group in groups]
        abnormal = pd.concat([pd.Series(run.labels, run.paths) for run in runs]).groupby(level=0).first()
        rows = [
            {
                "name": f"Image {abnormal.index.get_loc(path) + 1}",  # file names may identify patients
                "abnormal": abnormal[path],
                "remark": "; ".join(chosen[path]),
                "panels": _panels(groups, maps, roots.get(name), path),
            }
            for path in sorted(chosen, key=lambda path: (not abnormal[path], path))
        ]
        galleries.append({"title": f"{name}, {shot(k_shot)}", "rows": rows})
    return galleries


def _panels(groups: Sequence[Group], maps: Sequence[Maps | None], root: Path | None, path: str) -> list[dict[str, Any]]:
    """Return the image, the outline of its mask, and the heatmap and score of each method."""
    image = None
    try:
        if root is not None:
            image = to_pil_image(read_image(root / path))
            image.thumbnail((THUMBNAIL, THUMBNAIL))
    except (OSError, ValueError, ImportError) as error:
        logger.warning("An image is not shown on the page: %s", error)
    panels: list[dict[str, Any]] = [{"name": "input", "shows": "Input"}]
    if image is not None:
        panels[0]["source"] = picture(image)
        known = ((own.masks, group.first.scores.paths) for group, own in zip(groups, maps, strict=True) if own)
        mask = next((masks[paths.index(path)] for masks, paths in known if masks is not None and path in paths), None)
        if mask is not None and mask.any():
            drawn = picture(outlines(image, torch.from_numpy(mask), None))
            panels.append({"name": "mask outline", "shows": "Outline of the mask", "source": drawn})
    size = image.size if image is not None else (112, 112)
    for group, own in zip(groups, maps, strict=True):
        scores, threshold = group.first.scores, group.first.threshold
        panel: dict[str, Any] = {"name": group.label, "shows": f"Heatmap of {group.label}"}
        panels.append(panel)
        if path not in scores.paths:
            panel["untested"] = True
            continue
        index = scores.paths.index(path)
        panel["score"] = score = float(scores.scores[index])
        panel["above"] = 100 * float((scores.scores[~scores.labels] < score).mean())
        if threshold is not None:
            panel |= {"called": score >= threshold, "right": (score >= threshold) == scores.labels[index]}
        if own is not None:
            panel["source"] = picture(heatmap(own.levels[index], size))
    return panels


def write_page(cells: Sequence[Cell], path: Path | str, data_root: Mapping[str, Path] | None = None) -> None:
    """Write the page: one HTML file that needs no other file, no script and no network.

    Args:
        cells: The cells of a comparison.
        path: The file to write.
        data_root: The folder by the name of the set that the paths of its cells are relative to. Without it heatmaps
            are shown alone.

    Raises:
        ValueError: If two cells are of the same method, set, shot and seed.
    """
    comparison = FinishedCells(cells)
    made = {
        "anomalib-mvfa": ", ".join(sorted({cell.version for cell in comparison.cells})),
        "backbone": ", ".join(comparison.backbones),
        "machine": "; ".join(sorted({cell.machine for cell in comparison.cells})),
        "seeds": ", ".join(map(str, sorted({cell.seed for cell in comparison.cells}))),
    }
    content = {
        "missing": failures(comparison),
        "curves": _plots(_curves, comparison),
        "histograms": _plots(_histograms, comparison),
        "galleries": _gallery(comparison, data_root or {}),
        "colour_bar": picture(heatmap(np.arange(256, dtype=np.uint8)[None], (256, 12))),
    }
    text = environment().get_template("page.html.jinja").render(**facts(comparison), **content, made=made)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
