# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Writes the page of a comparison: one HTML file with tables, figures and images."""

import logging
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from anomalib_mvfa.data.readers import read_image
from anomalib_mvfa.files import replacing

from .cells import Cell, Maps
from .figures import Histogram, colour_bar, curves, forest, heatmap, histograms, outlined, picture, thumbnail
from .report import FinishedCells, Group, Table, environment, facts, failures, points, shot
from .statistics import mean_pr, mean_roc, placements

__all__ = ["write_page"]

logger = logging.getLogger(__name__)

GALLERY_ROWS = 40  # images on a page: with ten heatmaps each they stay under 2 MB


def _curves(comparison: FinishedCells) -> list[dict[str, str]]:
    figures = []
    for name, k_shot in comparison.places:
        groups = comparison.select(name, k_shot)
        runs = {f"{g.label} ({g.value('image_AUROC')} %)": [c.scores for c in g.cells.values()] for g in groups}
        roc = {label: mean_roc(own) for label, own in runs.items()}
        precision = {label: mean_pr(own) for label, own in runs.items()}
        plotted = curves(roc, precision, float(groups[0].first.scores.labels.mean()))
        alt = f"ROC and precision-recall curves on {name}; image AUROC: {', '.join(runs)}."
        figures.append({"title": f"{name}, {shot(k_shot)}", "source": plotted, "alt": alt})
    return figures


def _forests(comparison: FinishedCells) -> list[dict[str, str]]:
    figures = []
    for (name, k_shot), pairs in comparison.pairs.items():
        known = [pair for pair in pairs if not math.isnan(pair.area.low)]
        rows = [
            (f"{p.first.label} - {p.second.label}", 100 * p.area.mean, 100 * p.area.low, 100 * p.area.high)
            for p in known
        ]
        if rows:
            alt = "; ".join(f"{pair.first.label} minus {pair.second.label}: {points(pair.area)}" for pair in known)
            figures.append({"title": f"{name}, {shot(k_shot)}", "source": forest(rows), "alt": alt})
    return figures


def _histograms(comparison: FinishedCells) -> list[dict[str, str]]:
    figures = []
    for name, k_shot in comparison.places:
        methods = []
        for group in comparison.select(name, k_shot):
            scores, threshold = group.first.scores, group.first.threshold
            title = group.label
            if threshold is not None:
                hits = float((scores.scores[scores.labels] >= threshold).mean())
                passed = float((scores.scores[~scores.labels] < threshold).mean())
                title += f"\nsensitivity {100 * hits:.0f} %, specificity {100 * passed:.0f} %"
            methods.append(Histogram(title, scores.scores[~scores.labels], scores.scores[scores.labels], threshold))
        alt = f"Score histograms on {name}: " + "; ".join(method.title.replace("\n", ", ") for method in methods)
        figures.append({"title": f"{name}, {shot(k_shot)}", "source": histograms(methods), "alt": alt})
    return figures


def _chosen(groups: Sequence[Group], limit: int) -> dict[str, list[str]]:
    """Choose images by rank error: path to reasons, at most so many paths, the methods taking turns."""
    wanted: list[list[tuple[str, str]]] = []
    for group in groups:
        scores = group.first.scores
        order = {}
        for label in (True, False):
            own = np.flatnonzero(scores.labels == label)
            error = 1 - placements(scores.labels, scores.scores)[own]
            surer = scores.scores[own] if label else -scores.scores[own]  # among equals the surer one is better
            order[label] = own[np.lexsort((-surer, error))]
        ill = order[True]
        picks = (
            (ill[-1], "worst"),
            (ill[0], "best"),
            (ill[len(ill) // 2], "median"),
            (order[False][-1], "worst normal"),
        )
        wanted.append([(scores.paths[index], f"{reason} of {group.label}") for index, reason in picks])
    chosen: dict[str, list[str]] = {}
    for turn in zip(*wanted, strict=True):
        for path, reason in turn:
            if path in chosen or len(chosen) < limit:
                chosen.setdefault(path, []).append(reason)
    return chosen


def _gallery(comparison: FinishedCells, roots: Mapping[str, Path], show_paths: bool) -> list[dict[str, Any]]:
    """Return the images of each set with their heatmaps."""
    galleries = []
    limit = max(4, GALLERY_ROWS // max(1, len(comparison.sets)))
    for name in comparison.sets:
        shots = [k for k in comparison.shots if comparison.select(name, k)]
        k_shot = 4 if 4 in shots else max(shots)
        groups = comparison.select(name, k_shot, zero_too=True)
        chosen = _chosen(groups, limit)
        maps = [_maps(group.first) for group in groups]
        labels: dict[str, bool] = {}
        for group in groups:
            labels.update(zip(group.first.scores.paths, group.first.scores.labels.tolist(), strict=True))
        numbers = {path: number for number, path in enumerate(sorted(labels), start=1)}
        rows = []
        for path in sorted(chosen, key=lambda path: (not labels[path], numbers[path])):
            title = path if show_paths else f"Image {numbers[path]}"
            about = f"{title}, {'abnormal' if labels[path] else 'normal'}"
            rows.append(
                {
                    "about": about,
                    "remark": "; ".join(chosen[path]),
                    "panels": _panels(groups, maps, roots.get(name), path, about),
                }
            )
        galleries.append({"title": f"{name}, {shot(k_shot)}", "rows": rows})
    return galleries


def _panels(
    groups: Sequence[Group], maps: Sequence[Maps | None], root: Path | None, path: str, about: str
) -> list[dict[str, str]]:
    """Return the image, the outline of its mask, and the heatmap and score of each method."""
    panels = []
    image = None
    try:
        pixels = read_image(root / path).permute(1, 2, 0).numpy() if root else None
        image = None if pixels is None else thumbnail((255 * pixels).round().astype(np.uint8))
    except (OSError, ValueError, ImportError) as error:
        logger.warning("An image is not shown on the page: %s", error)
    if image is None:
        panels.append({"none": "image not found", "name": "input", "score": ""})
    else:
        panels.append({"source": picture(image), "alt": f"Input: {about}", "name": "input", "score": ""})
    size = (image.shape[0], image.shape[1]) if image is not None else (112, 112)
    for group, own in zip(groups, maps, strict=True):
        paths = group.first.scores.paths
        if image is not None and own is not None and own.masks is not None and path in paths:
            mask = own.masks[paths.index(path)]
            if mask.any():
                drawn = picture(outlined(image, mask))
                panels.append(
                    {"source": drawn, "alt": f"Outline of the mask: {about}", "name": "mask outline", "score": ""}
                )
            break
    for group, own in zip(groups, maps, strict=True):
        scores, threshold = group.first.scores, group.first.threshold
        if path not in scores.paths:
            panels.append({"none": "no map", "name": group.label, "score": "not tested on this image"})
            continue
        index = scores.paths.index(path)
        score = float(scores.scores[index])
        said = f"{score:.3g}"
        if threshold is not None:
            right = (score >= threshold) == bool(scores.labels[index])
            said += f" {'✓' if right else '✗'} called {'abnormal' if score >= threshold else 'normal'}"
        said += f", above {100 * float((scores.scores[~scores.labels] < score).mean()):.0f} % of normal"
        panel = {"name": group.label, "score": said}
        if own is None:
            panel["none"] = "no map"
        else:
            panel["source"] = picture(heatmap(own.levels[index], size))
            panel["alt"] = f"Heatmap of {group.label}: {about}, {said}"
        panels.append(panel)
    return panels


def _maps(cell: Cell) -> Maps | None:
    try:
        return cell.read_maps()
    except ValueError as error:
        logger.warning("No pictures of this cell: %s", error)
        return None


def _supports(comparison: FinishedCells, show_paths: bool) -> Table:
    rows = []

    def key(cell: Cell) -> tuple[str, int, int]:
        return cell.set, cell.k_shot, cell.seed

    for (name, k_shot, seed), members in groupby(sorted(comparison.cells, key=key), key=key):
        supports = dict.fromkeys(path for cell in members for path in cell.supports)
        if supports:
            rows.append([name, str(k_shot), str(seed), ", ".join(supports) if show_paths else str(len(supports))])
    return Table("Supports of all methods", ["set", "k", "seed", "images"], rows)


def write_page(
    cells: Sequence[Cell],
    path: Path | str,
    data_root: Path | str | Mapping[str, Path | str] | None = None,
    *,
    show_paths: bool = False,
    command: str | None = None,
    title: str = "Anomaly detection methods side by side",
) -> None:
    """Write the page: one HTML file that needs no other file, no script and no network.

    Args:
        cells: The cells of a comparison.
        path: The file to write.
        data_root: Folder that the paths of the cells are relative to, or one such folder by the name of the set. Input
            images are read there; without it heatmaps are shown alone.
        show_paths: Show the paths of images, relative to the data root, and the errors of failed cells. File names may
            identify patients, so that images are numbered by default.
        command: How the comparison was run.
        title: Title of the page.

    Raises:
        ValueError: If two cells are of the same method, set, shot and seed.
    """
    comparison = FinishedCells(cells)
    if isinstance(data_root, Mapping):
        roots = {name: Path(root) for name, root in data_root.items()}
    else:
        roots = dict.fromkeys(comparison.sets, Path(data_root)) if data_root is not None else {}
    made = {
        "anomalib-mvfa": ", ".join(sorted({cell.version for cell in comparison.cells})),
        "backbone": ", ".join(comparison.backbones),
        "machine": "; ".join(sorted({cell.machine for cell in comparison.cells})),
        "seeds": ", ".join(map(str, sorted({cell.seed for cell in comparison.cells}))),
        "page written with": f"anomalib {version('anomalib')}, Python {platform.python_version()}",
    }
    document = (
        environment()
        .get_template("page.html.jinja")
        .render(
            **facts(comparison),
            title=title,
            missing=failures(comparison, show_paths),
            forests=_forests(comparison),
            curves=_curves(comparison),
            histograms=_histograms(comparison),
            galleries=_gallery(comparison, roots, show_paths),
            colour_bar=colour_bar(),
            supports=_supports(comparison, show_paths),
            command=command,
            made=made,
        )
    )
    with replacing(path) as partial:
        partial.write_text(document, encoding="utf-8")
