# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Tables and a page from the cells of a comparison.

A comparison that was run, or is still running, is reported anew with::

    python -m anomalib_mvfa.comparison.report FOLDER --data_root DATA
"""

import argparse
import csv
import logging
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anomalib_mvfa.data.readers import read_image
from anomalib_mvfa.files import replacing

from .cells import Cell, Maps, load_cells
from .charts import Line, curves, histogram, interval_bar, swatch
from .page import GalleryRow, Panel, Section, Table, colour_bar, gallery, page, thumbnail
from .published import PAPER_SETS, PUBLISHED, SOURCE, Figure, paper_set
from .statistics import (
    IMAGE_METRICS,
    Difference,
    bootstrap,
    delong,
    holm,
    interval,
    mean_and_spread,
    mean_pr,
    mean_roc,
    paired_bootstrap,
    placements,
)

__all__ = ["METHODS", "load_cells", "write_page", "write_tables"]

logger = logging.getLogger(__name__)

METHODS: Mapping[str, str] = {
    "MVFA": "mvfa",
    "MVFA (normal only)": "mvfa-normal",
    "MVFA (zero-shot)": "mvfa-zero",
    "WinCLIP": "winclip",
    "WinCLIP (zero-shot)": "winclip-zero",
    "PatchCore": "patchcore",
    "AnomalyDINO": "dino",
    "mean brightness": "brightness",
    "image variance": "variance",
    "distance to mean normal": "distance",
}
"""The methods in the order in which they are shown, each with its style on the page."""
TRIVIAL = ("mean brightness", "image variance", "distance to mean normal")

TITLES = {
    "image_AUROC": "AUROC",
    "image_AP": "AP",
    "image_F1Max": "F1-max",
    "image_sensitivity_at_95_specificity": "sensitivity at 95 % spec.",
    "pixel_AUROC": "pixel AUROC",
    "pixel_AP": "pixel AP",
    "pixel_AUPRO": "AUPRO",
    "pixel_Dice": "best Dice",
}
COSTS = {
    "train_seconds": "training\nseconds",
    "train_peak_mb": "training peak\nMB",
    "predict_ms": "prediction\nms an image",
    "size_mb": "shipped\nMB",
}
LEVEL = 0.05
GALLERY_ROWS = 40  # images on a page: with ten heatmaps each they stay under 2 MB
NOT_CLINICAL = "For research. Not a medical device, and not for clinical use."
DEMONSTRATION = (
    "The backbone is 'tiny', the small demonstration network inside the package: these figures show that the software "
    "works, not how good the methods are with the backbones that they were published with."
)
MEASURED = (
    "All figures in percent, mean ± standard deviation over the seeds, each of which draws other supports. Square "
    "brackets: 95 % bootstrap interval over test images (2000 draws, normal and abnormal images drawn apart, all "
    "seeds on the same drawn images); it holds for the supports that were drawn. Pixel figures have no interval, since "
    "full maps are not kept."
)
TESTED = (
    "Differences in points, first method minus second, mean over the seeds that both have, on the same images. The "
    "interval and p come from a paired bootstrap over images, p no smaller than 0.001; Holm's p is corrected for the "
    "number of methods compared in one set and shot. DeLong's test knows one pair of models: its p is given seed by "
    "seed, where both have the same images. 'Ahead' counts the seeds in which the first method is better: the tests "
    "are about other images, that count is about other supports."
)


class Group(NamedTuple):
    """One method on one set with one number of supports; its cells by seed."""

    set: str
    k_shot: int
    method: str
    cells: dict[int, Cell]


@dataclass(frozen=True)
class Pair:
    """Two methods on one set, by seeds that both have."""

    first: Group
    second: Group
    seeds: tuple[int, ...]
    differences: Mapping[str, Difference]
    delong: tuple[float, ...]
    adjusted: float


class FinishedCells:
    """The finished cells, grouped and ordered for display.

    Args:
        cells: All cells.

    Raises:
        ValueError: If two cells are of the same method, set, shot and seed.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = [cell for cell in cells if cell.status == "done"]
        self.others = [cell for cell in cells if cell.status != "done"]
        named = list(METHODS)
        named += [name for name in dict.fromkeys(cell.method for cell in self.cells) if name not in METHODS]
        sets = dict.fromkeys(cell.set for cell in self.cells)
        self.sets = sorted(sets, key=lambda name: PAPER_SETS.index(paper_set(name) or "") if paper_set(name) else 99)
        self.cells.sort(
            key=lambda c: (self.sets.index(c.set), c.k_shot == 0, c.k_shot, named.index(c.method), c.seed),
        )
        self.groups: list[Group] = []
        for key, members in groupby(self.cells, key=lambda cell: (cell.set, cell.k_shot, cell.method)):
            found: dict[int, Cell] = {}
            for cell in members:
                if cell.seed in found:
                    msg = (
                        f"{found[cell.seed].folder} and {cell.folder} are of the same method, set, shot and seed: "
                        "write one report a backbone, each with cells of its own."
                    )
                    raise ValueError(msg)
                found[cell.seed] = cell
            self.groups.append(Group(*key, found))
        self.shots = sorted({group.k_shot for group in self.groups}, key=lambda k: (k == 0, k))
        self.pairs = [pair for name in self.sets for k in self.shots for pair in self._compare(name, k)]

    def select(self, name: str, k_shot: int, zero_too: bool = False) -> list[Group]:
        """Give the groups of one set and shot, and on request those that see no support."""
        shots = {k_shot, 0} if zero_too else {k_shot}
        return [group for group in self.groups if group.set == name and group.k_shot in shots]

    def _compare(self, name: str, k_shot: int) -> list[Pair]:
        own = [group for group in self.select(name, k_shot) if group.method.startswith("MVFA")]
        if not own:
            return []
        first, pairs = own[0], []
        for second in self.select(name, k_shot, zero_too=True):
            seeds = tuple(seed for seed in first.cells if seed in second.cells)
            if second is first or not seeds:
                continue
            ours = [first.cells[seed].scores for seed in seeds]
            theirs = [second.cells[seed].scores for seed in seeds]
            try:
                differences = paired_bootstrap(ours, theirs)
            except ValueError as error:
                logger.warning("%s and %s are not compared on %s: %s", first.method, second.method, name, error)
                continue
            areas = []
            for a, b in zip(ours, theirs, strict=True):
                common = b if a.paths == b.paths else None
                areas.append(delong(a.labels, a.scores, common.scores).p_value if common else math.nan)
            pairs.append(Pair(first, second, seeds, differences, tuple(areas), math.nan))
        adjusted = holm([pair.differences["image_AUROC"].p_value for pair in pairs])
        return [
            Pair(p.first, p.second, p.seeds, p.differences, p.delong, a) for p, a in zip(pairs, adjusted, strict=True)
        ]

    @property
    def backbones(self) -> list[str]:
        """Names of the backbones."""
        return sorted({cell.backbone for cell in self.cells if cell.backbone})

    @property
    def demonstration(self) -> bool:
        """Whether a backbone is the one inside the package."""
        return "tiny" in self.backbones


# Words and numbers


def _shot(k_shot: int) -> str:
    return f"k = {k_shot}" if k_shot else "no supports"


def _percent(values: Iterable[float]) -> str:
    known = [100 * value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    mean, spread = mean_and_spread(known)
    return f"{mean:.1f}" if math.isnan(spread) else f"{mean:.1f} ± {spread:.1f}"


def _figure(group: Group, name: str) -> str:
    return _percent(cell.metrics.get(name, math.nan) for cell in group.cells.values())


def _p_value(value: float) -> str:
    return "-" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _points(difference: Difference) -> str:
    return f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def _summary(comparison: FinishedCells) -> list[str]:
    """Say for each set and shot what was found, no more than that."""
    sentences = []
    for name in comparison.sets:
        for k_shot in comparison.shots:
            pairs = [p for p in comparison.pairs if (p.first.set, p.first.k_shot) == (name, k_shot)]
            if not pairs:
                continue
            first = pairs[0].first
            count = len(first.cells)
            seeds = f"mean of {count} seeds" if count > 1 else "one seed"
            said = f"{name}, {_shot(k_shot)}, {seeds}: {first.method} has an image AUROC of "
            said += f"{_figure(first, 'image_AUROC')} %."
            rivals = [p for p in pairs if p.second.method.startswith("WinCLIP")][:1]
            trivial = [p for p in pairs if p.second.method in TRIVIAL]
            rivals += sorted(trivial, key=lambda pair: pair.differences["image_AUROC"].mean)[:1]
            for pair in rivals or pairs[:1]:
                said += " " + _verdict(pair, len(pairs))
            sentences.append(said)
    return sentences or ["No two methods could be compared on the same images."]


def _verdict(pair: Pair, family: int) -> str:
    difference = pair.differences["image_AUROC"]
    other = f"{pair.second.method} ({_percent(c.metrics['image_AUROC'] for c in pair.second.cells.values())} %)"
    direction = "better" if difference.mean > 0 else "worse"
    numbers = (
        f"{100 * difference.mean:+.1f} points, 95 % interval {100 * difference.low:+.1f} to "
        f"{100 * difference.high:+.1f}, "
        f"p = {_p_value(pair.adjusted)} corrected for {family} comparison{'s' * (family > 1)}"
    ).replace("p = <", "p <")
    if not pair.adjusted < LEVEL:
        verdict = "these images do not tell which is better"
        return f"Compared with {other} the difference is not significant ({numbers}): {verdict}."
    agreeing = difference.ahead if difference.mean > 0 else difference.seeds - difference.ahead
    said = f"It is significantly {direction} than {other} on these images ({numbers})"
    if agreeing < difference.seeds:
        said += f", but only with {agreeing} of {difference.seeds} seeds, so that another seed may turn it round"
    return said + "."


# Tables


def _paper_tables(comparison: FinishedCells) -> list[Table]:
    """Areas under the ROC curve, a method a row, image and pixel of each set beside each other, the mean at the end."""
    tables = []
    for k_shot in comparison.shots:
        groups = {(g.method, g.set): g for g in comparison.groups if g.k_shot == k_shot}
        sets = [name for name in comparison.sets if any(key[1] == name for key in groups)]
        masked = {
            name for (_, name), group in groups.items() if any("pixel_AUROC" in c.metrics for c in group.cells.values())
        }
        columns = [(name, level) for name in sets for level in ("image", "pixel") if level == "image" or name in masked]
        header = ["method", *(f"{name}\n{level} AUROC" for name, level in columns)]
        if len(sets) > 1:
            header += ["mean\nimage AUROC", *(["mean\npixel AUROC"] if masked else [])]
        published = {method: row for (method, k), row in PUBLISHED.items() if k == k_shot}
        published = published if any(paper_set(name) for name in sets) else {}
        rows, grey = [], set()
        for method in dict.fromkeys([*(method for method, _ in groups), *published]):
            if any(key[0] == method for key in groups):
                rows.append([method, *_own_row(groups, method, columns, bool(len(sets) > 1), masked)])
            if method in published:
                grey.add(len(rows))
                rows.append(
                    [f"{method}, published", *_published_row(published[method], columns, len(sets) > 1, masked)]
                )
        kind = f"Few-shot, k = {k_shot}" if k_shot else "Without supports (zero-shot)"
        note = "; in grey italics: published, not measured here" if grey else ""
        tables.append(Table(f"{kind}: AUROC in %{note}", header, rows, frozenset(grey)))
    return tables


def _own_row(
    groups: Mapping[tuple[str, str], Group],
    method: str,
    columns: Sequence[tuple[str, str]],
    with_mean: bool,
    masked: set[str],
) -> list[str]:
    row = []
    for name, level in columns:
        group = groups.get((method, name))
        row.append(_figure(group, f"{level}_AUROC") if group else "-")
    for level in ("image", "pixel") if with_mean and masked else ("image",) if with_mean else ():
        wanted = [name for name, kind in columns if kind == level]
        means = []
        for name in wanted:
            group = groups.get((method, name))
            values = [c.metrics.get(f"{level}_AUROC", math.nan) for c in group.cells.values()] if group else [math.nan]
            means.append(float(np.mean(values)))
        row.append("-" if any(map(math.isnan, means)) else f"{100 * float(np.mean(means)):.1f}")
    return row


def _published_row(
    figures: Mapping[str, Figure], columns: Sequence[tuple[str, str]], with_mean: bool, masked: set[str]
) -> list[str]:
    values: dict[str, list[float | None]] = {"image": [], "pixel": []}
    row = []
    for name, level in columns:
        known = figures.get(paper_set(name) or "")
        value: float | None = getattr(known, level) if known else None
        values[level].append(value)
        row.append("-" if value is None else f"{value:.2f}")
    for level in ("image", "pixel") if with_mean and masked else ("image",) if with_mean else ():
        known_values = [value for value in values[level] if value is not None]
        complete = len(known_values) == len(values[level])
        row.append(f"{float(np.mean(known_values)):.2f}" if complete else "-")
    return row


def _metric_tables(comparison: FinishedCells) -> list[Table]:
    """All figures with their intervals, a table a set and shot."""
    tables = []
    for name in comparison.sets:
        for k_shot in comparison.shots:
            groups = comparison.select(name, k_shot)
            if not groups:
                continue
            shown = [m for m in TITLES if any(m in cell.metrics for g in groups for cell in g.cells.values())]
            rows = []
            for group in groups:
                drawn = bootstrap([cell.scores for cell in group.cells.values()])
                row = [group.method]
                for metric in shown:
                    text = _figure(group, metric)
                    if metric in IMAGE_METRICS:
                        low, high = interval(drawn[metric])
                        text += f" [{100 * low:.1f}, {100 * high:.1f}]"
                    row.append(text)
                rows.append([*row, str(len(group.cells))])
            labels = groups[0].cells[min(groups[0].cells)].scores.labels
            counts = f"{int((~labels).sum())} normal and {int(labels.sum())} abnormal test images"
            header = ["method", *(TITLES[metric] for metric in shown), "seeds"]
            tables.append(Table(f"{name}, {_shot(k_shot)}: {counts}", header, rows))
    return tables


def _pair_tables(comparison: FinishedCells) -> list[Table]:
    tables = []
    for (name, k_shot, method), pairs in groupby(
        comparison.pairs, key=lambda p: (p.first.set, p.first.k_shot, p.first.method)
    ):
        rows = []
        for pair in pairs:
            area = pair.differences["image_AUROC"]
            rows.append(
                [
                    pair.second.method,
                    _points(area),
                    _p_value(area.p_value),
                    _p_value(pair.adjusted),
                    f"{area.ahead} of {area.seeds}",
                    ", ".join(map(_p_value, pair.delong)),
                    *(_points(pair.differences[metric]) for metric in IMAGE_METRICS[1:]),
                ],
            )
        header = ["against", "AUROC", "p", "Holm's p", "ahead\nseeds", "DeLong's p\nby seed"]
        header += [TITLES[metric] for metric in IMAGE_METRICS[1:]]
        tables.append(Table(f"{name}, {_shot(k_shot)}: {method} minus each other method", header, rows))
    return tables


def _cost_tables(comparison: FinishedCells) -> list[Table]:
    tables = []
    for name in comparison.sets:
        rows = []
        for group in (group for group in comparison.groups if group.set == name):
            row = [group.method, str(group.k_shot)]
            for cost in COSTS:
                values = [
                    cell.cost[cost] for cell in group.cells.values() if not math.isnan(cell.cost.get(cost, math.nan))
                ]
                row.append(f"{np.mean(values):,.3g}" if values and np.mean(values) < 100 else _whole(values))
            rows.append(row)
        tables.append(Table(f"{name}: cost, mean over the seeds", ["method", "k", *COSTS.values()], rows))
    return tables


def _whole(values: Sequence[float]) -> str:
    return f"{np.mean(values):,.0f}" if values else "-"


def _failure_table(comparison: FinishedCells, show_paths: bool) -> Table | None:
    rows = []
    for cell in comparison.others:
        hidden = f"see {Path('cells', cell.folder.name, 'cell.json').as_posix()}"
        reason = cell.error or "" if show_paths or cell.status == "unreadable" else hidden
        rows.append([cell.folder.name, cell.status, reason])
    return Table("Cells that are missing in all figures", ["cell", "status", "reason"], rows) if rows else None


def write_tables(cells: Sequence[Cell], folder: Path | str) -> None:
    """Write ``results.csv``, one row a cell with everything that was measured, and ``results.md``, the tables.

    The reasons of failed cells, which may name files, stand in ``results.csv`` alone.

    Args:
        cells: The cells of a comparison.
        folder: Folder that receives both.

    Raises:
        ValueError: If two cells are of the same method, set, shot and seed.
    """
    comparison = FinishedCells(cells)
    metrics = dict.fromkeys([*TITLES, *(name for cell in cells for name in cell.metrics)])
    costs = dict.fromkeys([*COSTS, *(name for cell in cells for name in cell.cost)])
    facts = ("method", "set", "k_shot", "seed", "backbone", "status", "threshold", "version", "error")
    with replacing(Path(folder) / "results.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["cell", *facts[:6], *metrics, *costs, *facts[6:]])
        for cell in cells:
            known = [getattr(cell, fact) for fact in facts]
            figures = [cell.metrics.get(name) for name in metrics] + [cell.cost.get(name) for name in costs]
            writer.writerow([cell.folder.name, *known[:6], *figures, *known[6:]])

    parts = ["# Comparison", *(f"- {sentence}" for sentence in _summary(comparison)), NOT_CLINICAL]
    parts += [f"**{DEMONSTRATION}**"] if comparison.demonstration else []
    parts += ["## Results", *(table.to_markdown() for table in _paper_tables(comparison))]
    if any(paper_set(name) for name in comparison.sets):
        parts.append(f"Published figures: {SOURCE}.")
    parts += ["## All figures", MEASURED, *(table.to_markdown() for table in _metric_tables(comparison))]
    parts += ["## Paired tests", TESTED, *(table.to_markdown() for table in _pair_tables(comparison))]
    parts += ["## Cost", *(table.to_markdown() for table in _cost_tables(comparison))]
    missing = _failure_table(comparison, show_paths=False)
    parts += ["## Missing", missing.to_markdown()] if missing else []
    with replacing(Path(folder) / "results.md") as partial:
        partial.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


# The page


def _style(method: str) -> str:
    return METHODS.get(method, "other")


def _curve_figures(comparison: FinishedCells) -> str:
    parts = []
    for name in comparison.sets:
        for k_shot in comparison.shots:
            groups = comparison.select(name, k_shot)
            if not groups:
                continue
            runs = {group.method: [cell.scores for cell in group.cells.values()] for group in groups}
            roc = [Line(_style(method), *mean_roc(own)) for method, own in runs.items()]
            precision = [Line(_style(method), *mean_pr(own)) for method, own in runs.items()]
            labels = next(iter(runs.values()))[0].labels
            areas = {group.method: _figure(group, "image_AUROC") for group in groups}
            said = "; ".join(f"{method} {area} %" for method, area in areas.items())
            legend = "".join(f"<li>{swatch(_style(m))}{escape(m)} <small>{areas[m]}</small></li>" for m in runs)
            parts.append(
                f"<h3>{escape(name)}, {_shot(k_shot)}</h3>"
                f'<ul class="legend" aria-label="Methods with their image AUROC in percent">{legend}</ul>'
                '<div class="plots">'
                + curves(roc, "1 - specificity", "sensitivity", f"ROC curves on {name}. Areas: {said}.")
                + curves(precision, "recall", "precision", f"Precision-recall curves on {name}.", float(labels.mean()))
                + "</div>",
            )
    note = "Mean over the seeds, at equal false-positive rates and at equal recalls. Dotted: guessing."
    return f'<p class="note">{note} Beside each name: image AUROC in %.</p>{"".join(parts)}' if parts else ""


def _interval_figures(comparison: FinishedCells) -> str:
    parts = []
    for (name, k_shot, method), found in groupby(
        comparison.pairs, key=lambda p: (p.first.set, p.first.k_shot, p.first.method)
    ):
        pairs = list(found)
        areas = [pair.differences["image_AUROC"] for pair in pairs]
        reach = max(0.05, *(abs(end) for area in areas for end in (area.low, area.high)))
        items = []
        for pair, area in zip(pairs, areas, strict=True):
            bar = interval_bar(area.mean, area.low, area.high, reach, _style(pair.second.method))
            items.append(f"<li><span>{escape(pair.second.method)}</span>{bar}<span>{_points(area)}</span></li>")
        ends = f'<span></span><span class="ends note"><span>← {escape(method)} worse</span><span>better →</span></span>'
        parts.append(
            f"<h3>{escape(name)}, {_shot(k_shot)}: {escape(method)} against each other method, "
            "image AUROC in points</h3>"
            f'<ul class="intervals">{"".join(items)}<li>{ends}<span></span></li></ul>',
        )
    return "".join(parts)


def _histograms(comparison: FinishedCells) -> str:
    parts = []
    for name in comparison.sets:
        for k_shot in comparison.shots:
            figures = []
            for group in comparison.select(name, k_shot):
                cell = group.cells[min(group.cells)]
                labels, scores = cell.scores.labels, cell.scores.scores
                missed = ""
                if cell.threshold is not None:
                    hits = float((scores[labels] >= cell.threshold).mean())
                    passed = float((scores[~labels] < cell.threshold).mean())
                    missed = f"sensitivity {100 * hits:.0f} %, specificity {100 * passed:.0f} %"
                said = missed or "no threshold"
                drawing = histogram(
                    scores[~labels], scores[labels], cell.threshold, f"Scores of {group.method} on {name}: {said}."
                )
                figures.append(
                    f"<figure>{drawing}<figcaption>{escape(group.method)}, seed {cell.seed}: {said}</figcaption>"
                    "</figure>",
                )
            if figures:
                parts.append(
                    f'<h3>{escape(name)}, {_shot(k_shot)}</h3><div class="small-plots">{"".join(figures)}</div>'
                )
    keys = (
        '<ul class="legend"><li><span class="key normal"></span>normal images, upwards</li>'
        '<li><span class="key abnormal"></span>abnormal images, downwards</li><li>dashed: the threshold</li></ul>'
    )
    note = '<p class="note">Raw scores of the first seed. Heights are shares of a class.</p>'
    return keys + note + "".join(parts) if parts else ""


def _chosen(groups: Sequence[Group], limit: int) -> dict[str, list[str]]:
    """Choose images by rank error: path to reasons, at most so many paths, the methods taking turns."""
    wanted: list[list[tuple[str, str]]] = []
    for group in groups:
        scores = group.cells[min(group.cells)].scores
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
        wanted.append([(scores.paths[index], f"{reason} of {group.method}") for index, reason in picks])
    chosen: dict[str, list[str]] = {}
    for turn in zip(*wanted, strict=True):
        for path, reason in turn:
            if path in chosen or len(chosen) < limit:
                chosen.setdefault(path, []).append(reason)
    return chosen


def _maps(cell: Cell) -> Maps | None:
    try:
        return cell.read_maps()
    except ValueError as error:
        logger.warning("No pictures of this cell: %s", error)
        return None


def _input(root: Path | None, path: str) -> NDArray[np.uint8] | None:
    """Read an image and shrink it; ``None`` if there is none."""
    if root is None:
        return None
    try:
        pixels = read_image(root / path).permute(1, 2, 0).numpy()
    except (OSError, ValueError, ImportError) as error:
        logger.warning("An image is not shown on the page: %s", error)
        return None
    return thumbnail((255 * pixels).round().astype(np.uint8))


def _panel(group: Group, maps: Maps | None, path: str) -> Panel:
    cell = group.cells[min(group.cells)]
    scores = cell.scores
    if path not in scores.paths:
        return Panel(group.method, None, "not tested on this image")
    index = scores.paths.index(path)
    score = float(scores.scores[index])
    called = ""
    if cell.threshold is not None:
        right = (score >= cell.threshold) == bool(scores.labels[index])
        called = f"{'✓' if right else '✗'} called {'abnormal' if score >= cell.threshold else 'normal'}"
    below = float((scores.scores[~scores.labels] < score).mean())
    detail = f"above {100 * below:.0f} % of normal"
    return Panel(group.method, maps.values[index] if maps else None, f"{score:.3g} {called}".strip(), detail)


def _pictures(comparison: FinishedCells, roots: Mapping[str, Path], show_paths: bool) -> str:
    parts = []
    limit = max(4, GALLERY_ROWS // max(1, len(comparison.sets)))
    for name in comparison.sets:
        shots = [k for k in comparison.shots if comparison.select(name, k)]
        k_shot = 4 if 4 in shots else max(shots)
        groups = comparison.select(name, k_shot, zero_too=True)
        chosen = _chosen(groups, limit)
        maps = [_maps(group.cells[min(group.cells)]) for group in groups]
        labels: dict[str, bool] = {}
        for group in groups:
            scores = group.cells[min(group.cells)].scores
            labels.update(zip(scores.paths, scores.labels.tolist(), strict=True))
        numbers = {path: number for number, path in enumerate(sorted(labels), start=1)}
        rows = []
        for path in sorted(chosen, key=lambda path: (not labels[path], numbers[path])):
            mask = None
            for group, own in zip(groups, maps, strict=True):
                paths = group.cells[min(group.cells)].scores.paths
                if mask is None and own is not None and own.masks is not None and path in paths:
                    mask = own.masks[paths.index(path)]
            rows.append(
                GalleryRow(
                    name=path if show_paths else f"Image {numbers[path]}",
                    label="abnormal" if labels[path] else "normal",
                    image=_input(roots.get(name), path),
                    mask=mask,
                    panels=[_panel(group, own, path) for group, own in zip(groups, maps, strict=True)],
                    remark="; ".join(chosen[path]),
                ),
            )
        parts.append(f"<h3>{escape(name)}, {_shot(k_shot)}</h3>{gallery(rows)}")
    if not parts:
        return ""
    note = (
        "Rank error of an image: the share of images of the other class that the method puts on the wrong side of it; "
        "among equals the surer image is the better one. Shown are each method's best, median and worst abnormal image "
        "and its worst normal image, with the models of the first seed, as far as the page has room. One colour scale "
        "for all images of a method: it reaches from the 0.5 % to the 99.5 % quantile of the method's map values on "
        "the whole set. ✓ and ✗: the call at the method's own threshold is right or wrong."
    )
    ends = ("0.5 % quantile of the method's maps", "99.5 %")
    return f'<p class="note">{note}</p>{colour_bar(*ends)}{"".join(parts)}'


def _provenance(comparison: FinishedCells, command: str | None, show_paths: bool) -> str:
    facts = [
        ("anomalib-mvfa", ", ".join(sorted({cell.version for cell in comparison.cells}))),
        ("backbone", ", ".join(comparison.backbones)),
        ("seeds", ", ".join(map(str, sorted({cell.seed for cell in comparison.cells})))),
        (
            "page written with",
            f"anomalib {version('anomalib')}, torch {version('torch')}, Python {platform.python_version()}",
        ),
    ]
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    rows = []
    for (name, k_shot, seed), members in groupby(
        sorted(comparison.cells, key=lambda c: (c.set, c.k_shot, c.seed)), key=lambda c: (c.set, c.k_shot, c.seed)
    ):
        supports = dict.fromkeys(path for cell in members for path in cell.supports)
        if supports:
            said = ", ".join(supports) if show_paths else str(len(supports))
            rows.append([name, str(k_shot), str(seed), said])
    table = Table("Supports of all methods", ["set", "k", "seed", "images"], rows)
    shown = f"<pre>{escape(command)}</pre>" if command else ""
    folded = f"<details><summary>Supports by set, k and seed</summary>{table.to_html()}</details>" if rows else ""
    return f"{shown}<dl>{listed}</dl>{folded}"


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
            tell who a patient is, so that images are numbered by default.
        command: How the comparison was run.
        title: Title of the page.

    Raises:
        ValueError: If two cells are of the same method, set, shot and seed.
    """
    comparison = FinishedCells(cells)
    roots: dict[str, Path]
    if isinstance(data_root, Mapping):
        roots = {name: Path(root) for name, root in data_root.items()}
    else:
        roots = dict.fromkeys(comparison.sets, Path(data_root)) if data_root is not None else {}
    warning = f'<p class="warning">{escape(DEMONSTRATION)}</p>' if comparison.demonstration else ""
    intro = "".join(f'<p class="lead">{escape(sentence)}</p>' for sentence in _summary(comparison))
    results = _html(_paper_tables(comparison))
    if any(paper_set(name) for name in comparison.sets):
        results += f'<p class="note">Published figures: {escape(SOURCE)}.</p>'
    missing = _failure_table(comparison, show_paths)
    compared = _html(_pair_tables(comparison))
    sections = [
        Section("results", "Results", results),
        Section("figures", "All figures", f'<p class="note">{MEASURED}</p>{_html(_metric_tables(comparison))}'),
        Section(
            "tests",
            "Paired tests",
            f'<p class="note">{TESTED}</p>{_interval_figures(comparison)}{compared}' if compared else "",
        ),
        Section("curves", "Curves", _curve_figures(comparison)),
        Section("scores", "Scores", _histograms(comparison)),
        Section("images", "Images", _pictures(comparison, roots, show_paths)),
        Section("cost", "Cost", _html(_cost_tables(comparison))),
        Section("missing", "Missing", missing.to_html() if missing else ""),
        Section("made", "How it was made", _provenance(comparison, command, show_paths)),
    ]
    document = page(title, sections, warning + intro, f"<p>{escape(NOT_CLINICAL)}</p>")
    with replacing(path) as partial:
        partial.write_text(document, encoding="utf-8")


def _html(tables: Sequence[Table]) -> str:
    return "".join(table.to_html() for table in tables)


def main(arguments: Sequence[str] | None = None) -> None:
    """Report a comparison anew from the command line."""
    parser = argparse.ArgumentParser(description="Write results.csv, results.md and report.html of a comparison.")
    parser.add_argument("folder", type=Path, help="folder of the comparison, the one that holds 'cells'")
    parser.add_argument("--data_root", type=Path, help="folder that the paths of the images are relative to")
    parser.add_argument("--show_paths", action="store_true", help="show file names, which may tell who a patient is")
    options: Any = parser.parse_args(arguments)
    cells = load_cells(options.folder)
    write_tables(cells, options.folder)
    write_page(cells, options.folder / "report.html", options.data_root, show_paths=options.show_paths)


if __name__ == "__main__":
    main()
