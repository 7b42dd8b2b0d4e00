# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Writes the page of a comparison: one HTML file with tables, figures and images."""

import logging
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from anomalib_mvfa.data.readers import read_image
from anomalib_mvfa.files import replacing

from .cells import Cell, Maps
from .figures import Histogram, colour_bar, curves, forest, heatmap, histograms, outlined, picture, thumbnail
from .report import FinishedCells, Group, Table, environment, facts, failures, points, shot
from .statistics import mean_pr, mean_roc, placements

__all__ = ["write_page"]

logger = logging.getLogger(__name__)

GALLERY_ROWS = 40  # images on a page: with ten heatmaps each they stay under 2 MB


def _curves(comparison: FinishedCells, name: str, k_shot: int) -> tuple[str, str]:
    groups = comparison.select(name, k_shot)
    runs = {f"{g.label} ({g.text('image_AUROC')} %)": [c.scores for c in g.cells.values()] for g in groups}
    roc = {label: mean_roc(own) for label, own in runs.items()}
    precision = {label: mean_pr(own) for label, own in runs.items()}
    share = float(groups[0].first.scores.labels.mean())
    alt = f"ROC and precision-recall curves on {name}; image AUROC: {', '.join(runs)}."
    return curves(roc, precision, share), alt


def _forest(comparison: FinishedCells, name: str, k_shot: int) -> tuple[str, str] | None:
    known = [pair for pair in comparison.pairs.get((name, k_shot), ()) if not math.isnan(pair.area.low)]
    rows = [
        (f"{p.first.label} - {p.second.label}", 100 * p.area.mean, 100 * p.area.low, 100 * p.area.high) for p in known
    ]
    alt = "; ".join(f"{pair.first.label} minus {pair.second.label}: {points(pair.area)}" for pair in known)
    return (forest(rows), alt) if rows else None


def _histograms(comparison: FinishedCells, name: str, k_shot: int) -> tuple[str, str]:
    methods = []
    for group in comparison.select(name, k_shot):
        scores, threshold, title = group.first.scores, group.first.threshold, group.label
        normal, abnormal = scores.scores[~scores.labels], scores.scores[scores.labels]
        if threshold is not None:
            hits, passed = 100 * (abnormal >= threshold).mean(), 100 * (normal < threshold).mean()
            title += f"\nsensitivity {hits:.0f} %, specificity {passed:.0f} %"
        methods.append(Histogram(title, normal, abnormal, threshold))
    alt = f"Score histograms on {name}: " + "; ".join(method.title.replace("\n", ", ") for method in methods)
    return histograms(methods), alt


def _plots(
    comparison: FinishedCells, plot: Callable[[FinishedCells, str, int], tuple[str, str] | None]
) -> list[dict[str, str]]:
    """Draw one figure for each set and shot that has results."""
    made = [(f"{name}, {shot(k_shot)}", plot(comparison, name, k_shot)) for name, k_shot in comparison.places]
    return [{"title": title, "source": drawn[0], "alt": drawn[1]} for title, drawn in made if drawn]


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


def _gallery(comparison: FinishedCells, roots: Mapping[str, Path], show_paths: bool) -> list[dict[str, Any]]:
    """Return the images of each set with their heatmaps."""
    galleries = []
    for name in comparison.sets:
        shots = [k for k in comparison.shots if comparison.select(name, k)]
        k_shot = 4 if 4 in shots else max(shots)
        groups = comparison.select(name, k_shot, zero_too=True)
        maps = [_maps(group.first) for group in groups]
        chosen = _chosen(groups, max(4, GALLERY_ROWS // len(comparison.sets)))
        runs = [group.first.scores for group in groups]
        abnormal = pd.concat([pd.Series(run.labels, run.paths) for run in runs]).groupby(level=0).first()
        rows = [
            {
                "name": path if show_paths else f"Image {abnormal.index.get_loc(path) + 1}",
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
            image = thumbnail((255 * read_image(root / path).permute(1, 2, 0).numpy()).round().astype(np.uint8))
    except (OSError, ValueError, ImportError) as error:
        logger.warning("An image is not shown on the page: %s", error)
    panels: list[dict[str, Any]] = [{"name": "input", "shows": "Input"}]
    if image is not None:
        panels[0]["source"] = picture(image)
        known = ((own.masks, group.first.scores.paths) for group, own in zip(groups, maps, strict=True) if own)
        mask = next((masks[paths.index(path)] for masks, paths in known if masks is not None and path in paths), None)
        if mask is not None and mask.any():
            drawn = picture(outlined(image, mask))
            panels.append({"name": "mask outline", "shows": "Outline of the mask", "source": drawn})
    size = image.shape[:2] if image is not None else (112, 112)
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
            panel["source"] = picture(heatmap(own.levels[index], (size[0], size[1])))
    return panels


def _maps(cell: Cell) -> Maps | None:
    try:
        return cell.read_maps()
    except ValueError as error:
        logger.warning("No pictures of this cell: %s", error)
        return None


def _supports(comparison: FinishedCells, show_paths: bool) -> list[Table]:
    """List the supports of all methods by set, shot and seed, or count them."""
    used: dict[tuple[str, int, int], dict[str, None]] = {}
    for cell in comparison.cells:
        used.setdefault((cell.set, cell.k_shot, cell.seed), {}).update(dict.fromkeys(cell.supports))
    rows = [(*key, ", ".join(own) if show_paths else str(len(own))) for key, own in sorted(used.items()) if own]
    frame = pd.DataFrame(rows, columns=["set", "k", "seed", "images"])
    return [Table("Supports of all methods", frame)] if rows else []


def write_page(
    cells: Sequence[Cell],
    path: Path | str,
    data_root: Path | str | Mapping[str, Path | str] | None = None,
    *,
    show_paths: bool = False,
    command: str | None = None,
) -> None:
    """Write the page: one HTML file that needs no other file, no script and no network.

    Args:
        cells: The cells of a comparison.
        path: The file to write.
        data_root: Folder that the paths of the cells are relative to, or one such folder by the name of the set.
            Without it heatmaps are shown alone.
        show_paths: Show the paths of images and the errors of failed cells. File names may identify patients, so that
            images are numbered by default.
        command: How the comparison was run.

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
    document = environment().get_template("page.html.jinja")
    text = document.render(
        **facts(comparison),
        missing=failures(comparison, show_paths),
        forests=_plots(comparison, _forest),
        curves=_plots(comparison, _curves),
        histograms=_plots(comparison, _histograms),
        galleries=_gallery(comparison, roots, show_paths),
        colour_bar=colour_bar(),
        supports=_supports(comparison, show_paths),
        command=command,
        made=made,
    )
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
