# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Groups the cells of a comparison, compares the methods, and writes the results as tables."""

import csv
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from anomalib_mvfa.files import replacing

from .cells import Cell
from .published import PAPER_SETS, PUBLISHED, SOURCE, paper_set
from .statistics import (
    IMAGE_METRICS,
    Difference,
    differences,
    holm,
    intervals,
    mean_and_spread,
)

__all__ = ["FinishedCells", "write_tables"]

logger = logging.getLogger(__name__)

ORDER = (
    "MVFA",
    "MVFA (normal only)",
    "MVFA (zero-shot)",
    "WinCLIP",
    "WinCLIP (zero-shot)",
    "",  # models of anomalib
    "distance to mean normal",
    "mean brightness",
    "image variance",
)
TRIVIAL = frozenset({"mean brightness", "image variance", "distance to mean normal"})
NORMAL_ONLY = "MVFA (normal only)"
TITLES = {
    "image_AUROC": "AUROC",
    "image_AP": "AP",
    "image_F1Max": "F1-max",
    "image_sensitivity_at_95_specificity": "sensitivity at 95 % spec.",
    "pixel_AUROC": "pixel AUROC",
    "pixel_AP": "pixel AP",
    "pixel_AUPRO": "AUPRO",
    "pixel_Dice": "best Dice, all pixels",
    "pixel_Dice_mean": "Dice per image",
    "pixel_Dice_sd": "its SD over images",
}
COSTS = {
    "train_seconds": "training, seconds",
    "train_peak_mb": "training peak on the card, MB",
    "predict_ms": "prediction, ms per image",
    "size_mb": "shipped, MB",
}
LEVEL = 0.05


class Table(NamedTuple):
    """A table of text; the first column holds the headings of the rows.

    Attributes:
        caption: Its title.
        header: One heading per column.
        rows: As many texts per row as there are columns.
        published: Indices of the rows with numbers that others published.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    published: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class Group:
    """One method on one set with one number of supports; its cells by seed."""

    set: str
    k_shot: int
    method: str
    cells: Mapping[int, Cell]

    @property
    def first(self) -> Cell:
        """The cell of the first seed."""
        return self.cells[min(self.cells)]

    @property
    def label(self) -> str:
        """Its name in tables."""
        remark = self.first.shown.get("remark", "")
        return f"{self.method}, random weights" if "random weights" in remark else self.method

    @property
    def shown(self) -> list[str]:
        """What the method was shown: normal images, abnormal images, masks, and a remark."""
        known = self.first.shown
        return [*(str(known.get(name, "-")) for name in ("normal", "abnormal", "masks")), known.get("remark") or "-"]

    def value(self, metric: str) -> str:
        """Format the mean over the seeds in percent, with the standard deviation of several seeds."""
        return _percent(cell.metrics.get(metric, math.nan) for cell in self.cells.values())

    def mean(self, metric: str) -> float:
        """Return the mean over the seeds, NaN if a seed lacks the metric."""
        return float(np.mean([cell.metrics.get(metric, math.nan) for cell in self.cells.values()]))


@dataclass(frozen=True, eq=False)
class Pair:
    """Two methods on one set, by the seeds of the first."""

    first: Group
    second: Group
    differences: Mapping[str, Difference]
    adjusted: float
    family: int

    @property
    def area(self) -> Difference:
        """The difference in image AUROC."""
        return self.differences["image_AUROC"]


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
        peers = ORDER.index("")
        rank = {name: index for index, name in enumerate(ORDER)}
        sets = dict.fromkeys(cell.set for cell in self.cells)
        self.sets = sorted(sets, key=lambda name: PAPER_SETS.index(paper_set(name) or "") if paper_set(name) else 99)
        self.cells.sort(
            key=lambda c: (self.sets.index(c.set), c.k_shot == 0, c.k_shot, rank.get(c.method, peers), c.method, c.seed)
        )
        self.groups: list[Group] = []
        for key, members in groupby(self.cells, key=lambda cell: (cell.set, cell.k_shot, cell.method)):
            found: dict[int, Cell] = {}
            for cell in members:
                if cell.seed in found:
                    msg = (
                        f"{found[cell.seed].folder} and {cell.folder} are of the same method, set, shot and seed: "
                        "write one report per backbone, each with cells of its own."
                    )
                    raise ValueError(msg)
                found[cell.seed] = cell
            self.groups.append(Group(*key, found))
        self.shots = sorted({cell.k_shot for cell in cells if cell.method}, key=lambda k: (k == 0, k))

    @cached_property
    def places(self) -> list[tuple[str, int]]:
        """Sets and numbers of supports that have results."""
        return [(name, k) for name in self.sets for k in self.shots if self.select(name, k)]

    def select(self, name: str, k_shot: int, zero_too: bool = False) -> list[Group]:
        """Return the groups of one set and shot, and on request those that see no support."""
        shots = {k_shot, 0} if zero_too else {k_shot}
        return [group for group in self.groups if group.set == name and group.k_shot in shots]

    @cached_property
    def pairs(self) -> dict[tuple[str, int], list[Pair]]:
        """Comparisons by set and shot: one family of Holm's correction each.

        The first method of MVFA is compared with every other method, and ``MVFA (normal only)`` with those that were
        shown normal supports and nothing else.
        """
        return {place: pairs for place in self.places if (pairs := self._compare(*place))}

    def _compare(self, name: str, k_shot: int) -> list[Pair]:
        own = [group for group in self.select(name, k_shot) if group.method.startswith("MVFA")]
        if not own:
            return []
        everything = self.select(name, k_shot, zero_too=True)
        wanted = [(own[0], other) for other in everything if other is not own[0]]
        like = [g for g in everything if g.k_shot and not g.first.shown.get("abnormal")]
        wanted += [(g, other) for g in own[1:] if g.method == NORMAL_ONLY for other in like if other is not g]
        found: dict[int, tuple[Group, Group, Mapping[str, Difference]]] = {}
        for number, (first, second) in enumerate(wanted):
            if not first.k_shot or second.k_shot:
                seeds = [seed for seed in first.cells if seed in second.cells]
                theirs = [second.cells[seed].scores for seed in seeds]
            else:  # run once, for all draws
                seeds, theirs = list(first.cells), [second.first.scores] * len(first.cells)
            if not seeds:
                continue
            try:
                measured = differences([first.cells[seed].scores for seed in seeds], theirs)
            except ValueError as error:
                logger.warning("%s and %s are not compared on %s: %s", first.method, second.method, name, error)
                continue
            found[number] = (first, second, measured)
        adjusted = holm({number: measured["image_AUROC"].p_value for number, (*_, measured) in found.items()})
        family = sum(not math.isnan(value) for value in adjusted.values())
        return [Pair(*members, adjusted[number], family) for number, members in found.items()]

    @property
    def backbones(self) -> list[str]:
        """Names of the backbones."""
        return sorted({cell.backbone for cell in self.cells if cell.backbone})


# Formatting


def shot(k_shot: int) -> str:
    return f"k = {k_shot}" if k_shot else "no supports"


def _percent(values: Iterable[float]) -> str:
    known = [100 * value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    mean, spread = mean_and_spread(known)
    return f"{mean:.1f}" if math.isnan(spread) else f"{mean:.1f} ± {spread:.1f}"


def _p_value(value: float) -> str:
    return "-" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def points(difference: Difference) -> str:
    if math.isnan(difference.mean):
        return "-"
    return f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def _units(group: Group) -> str:
    """Describe the test images and how they are grouped."""
    scores = group.first.scores
    images = f"{int((~scores.labels).sum())} normal and {int(scores.labels.sum())} abnormal test images"
    if scores.groups:
        return f"{images} of {len(set(scores.groups))} patients"
    return images


def _summary(comparison: FinishedCells) -> list[str]:
    """State for each set and shot what was found: like with like first, then what labels add, then trivial scores."""
    sentences = []
    for (name, k_shot), pairs in comparison.pairs.items():
        first = pairs[0].first
        count = len(first.cells)
        seeds = f"mean of {count} draws of supports" if count > 1 else "one run"
        said = [f"{name}, {shot(k_shot)}, {seeds}, {_units(first)}."]
        by_name = {(pair.first.method, pair.second.method): pair for pair in pairs}
        like = by_name.get((NORMAL_ONLY, "WinCLIP"))
        labels = by_name.get((first.method, NORMAL_ONLY))
        trivial = [pair for pair in pairs if pair.first is first and pair.second.method in TRIVIAL]
        trivial.sort(key=lambda pair: math.inf if math.isnan(pair.area.mean) else pair.area.mean)
        if like:
            said.append(f"Of methods that are shown the same normal images, {_verdict(like)}")
        if labels:
            shown = labels.first.first.shown
            extra = f"{shown.get('abnormal')} abnormal images and {shown.get('masks')} masks"
            said.append(f"Given {extra} as well, {_verdict(labels)}")
        others = [] if like else [pair for pair in pairs if pair.second.method.startswith("WinCLIP")][:1]
        said += [_verdict(pair) for pair in others + trivial[:1] or ([] if like or labels else pairs[:1])]
        sentences.append(" ".join([said[0], *(sentence[0].upper() + sentence[1:] for sentence in said[1:])]))
    return sentences or ["No two methods could be compared on the same images."]


def _verdict(pair: Pair) -> str:
    area = pair.area
    ours, theirs = (f"{group.label} ({group.value('image_AUROC')} %)" for group in (pair.first, pair.second))
    if math.isnan(area.mean):
        return f"{ours} and {theirs} cannot be compared: their common test images lack a class."
    numbers = f"{100 * area.mean:+.1f} points, 95 % interval {100 * area.low:+.1f} to {100 * area.high:+.1f}, "
    many = f" after Holm's correction for {pair.family} comparisons" if pair.family > 1 else ""
    p_value = _p_value(pair.adjusted)
    numbers += f"p {p_value if p_value.startswith('<') else '= ' + p_value}{many}"
    if not pair.first.first.scores.groups:
        numbers += "; no patients are known, images are taken as independent"
    if not pair.adjusted < LEVEL:
        return f"the image AUROC of {ours} does not differ significantly from that of {theirs} ({numbers})."
    direction = "higher" if area.mean > 0 else "lower"
    agreeing = area.ahead if area.mean > 0 else area.seeds - area.ahead
    said = f"the image AUROC of {ours} is significantly {direction} than that of {theirs} ({numbers})"
    if agreeing < area.seeds:
        said += f", but only with {agreeing} of {area.seeds} draws: other supports may reverse it"
    return said + "."


# Tables

SHOWN = ("normal shown", "abnormal shown", "masks shown", "remark")


def _paper_tables(comparison: FinishedCells) -> list[Table]:
    """AUROC of images and pixels, one method per row, the sets side by side, the mean at the end."""
    tables = []
    for k_shot in comparison.shots:
        groups = {(g.method, g.set): g for g in comparison.groups if g.k_shot == k_shot}
        sets = [name for name in comparison.sets if any(key[1] == name for key in groups)]
        masked = {
            name for (_, name), g in groups.items() if any("pixel_AUROC" in cell.metrics for cell in g.cells.values())
        }
        columns = [(name, level) for level in ("image", "pixel") for name in sets if level == "image" or name in masked]
        levels = list(dict.fromkeys(level for _, level in columns)) if len(sets) > 1 else []
        header = ["method", *SHOWN[:3], *(f"{name}, {level}" for name, level in columns)]
        header += [f"mean, {level}" for level in levels]
        published = {method: row for (method, k), row in PUBLISHED.items() if k == k_shot}
        if not any(paper_set(name) for name in sets):
            published = {}
        rows, grey = [], set()
        failed = {cell.method: None for cell in comparison.others if cell.status == "failed" and cell.k_shot == k_shot}
        for method in dict.fromkeys([*(method for method, _ in groups), *failed, *published]):
            own = [group for (named, _), group in groups.items() if named == method]
            if own:
                by_set = {group.set: group for group in own}
                cells = [by_set[n].value(f"{level}_AUROC") if n in by_set else "-" for n, level in columns]
                means = [
                    [
                        by_set[n].mean(f"{level}_AUROC") if n in by_set else math.nan
                        for n, kind in columns
                        if kind == level
                    ]
                    for level in levels
                ]
                rows.append([own[0].label, *own[0].shown[:3], *cells, *(_mean(values) for values in means)])
            if not own and method in failed:
                rows.append([method, "failed, see Missing", *["-"] * (len(header) - 2)])
            if method in published:
                grey.add(len(rows))
                values = [
                    (getattr(published[method].get(paper_set(n) or ""), level, None), level) for n, level in columns
                ]
                texts = ["-" if value is None else f"{value:.2f}" for value, _ in values]
                means = [[math.nan if v is None else v / 100 for v, kind in values if kind == w] for w in levels]
                rows.append([f"{method}, published", "-", "-", "-", *texts, *(_mean(values, 2) for values in means)])
        kind = f"Few-shot, k = {k_shot}" if k_shot else "Without supports"
        note = "; in italics: published, not measured here" if grey else ""
        tables.append(Table(f"{kind}: AUROC in percent{note}", header, rows, frozenset(grey)))
    return tables


def _mean(values: Sequence[float], digits: int = 1) -> str:
    mean = float(np.mean(values)) if values else math.nan
    return "-" if math.isnan(mean) else f"{100 * mean:.{digits}f}"


def _metric_tables(comparison: FinishedCells) -> list[Table]:
    """All metrics with their intervals, one table per set and shot."""
    tables = []
    for name, k_shot in comparison.places:
        groups = comparison.select(name, k_shot)
        shown = [m for m in TITLES if any(m in cell.metrics for g in groups for cell in g.cells.values())]
        rows = []
        for group in groups:
            ends = intervals([cell.scores for cell in group.cells.values()])
            row = [group.label, *group.shown]
            for metric in shown:
                text = group.value(metric)
                if metric in IMAGE_METRICS:
                    text += f" [{100 * ends[metric][0]:.1f}, {100 * ends[metric][1]:.1f}]"
                row.append(text)
            rows.append([*row, str(len(group.cells))])
        size = "the network's" if groups[0].first.config.get("pixel_metrics") == "network" else "each mask's own"
        caption = f"{name}, {shot(k_shot)}: {_units(groups[0])}"
        caption += f"; pixel metrics at {size} size" if any(metric.startswith("pixel") for metric in shown) else ""
        tables.append(Table(caption, ["method", *SHOWN, *(TITLES[metric] for metric in shown), "runs"], rows))
    return tables


def _pair_tables(comparison: FinishedCells) -> list[Table]:
    tables = []
    for (name, k_shot), pairs in comparison.pairs.items():
        rows = [
            [
                f"{pair.first.label} - {pair.second.label}",
                points(pair.area),
                _p_value(pair.area.p_value),
                _p_value(pair.adjusted),
                f"{pair.area.ahead} of {pair.area.seeds}",
                *(points(pair.differences[metric]) for metric in IMAGE_METRICS[1:]),
            ]
            for pair in pairs
        ]
        header = ["methods", "AUROC", "p", "Holm's p", "ahead, draws", *(TITLES[m] for m in IMAGE_METRICS[1:])]
        family = f"Holm's family: the {pairs[0].family} comparisons of this table"
        grouped = "patients resampled" if pairs[0].first.first.scores.groups else "images taken as independent"
        tables.append(Table(f"{name}, {shot(k_shot)}. {family}; {grouped}", header, rows))
    return tables


def _cost_tables(comparison: FinishedCells) -> list[Table]:
    tables = []
    for name in comparison.sets:
        rows = []
        for group in (group for group in comparison.groups if group.set == name):
            row = [group.label, str(group.k_shot)]
            for cost in COSTS:
                known = [
                    value for cell in group.cells.values() if not math.isnan(value := cell.cost.get(cost, math.nan))
                ]
                mean = float(np.mean(known)) if known else math.nan
                row.append("-" if not known else f"{mean:,.3g}" if mean < 100 else f"{mean:,.0f}")
            rows.append(row)
        machines = "; ".join(sorted({cell.machine for cell in comparison.cells if cell.set == name and cell.machine}))
        tables.append(Table(f"{name}: mean over the runs, on {machines}", ["method", "k", *COSTS.values()], rows))
    return tables


def failures(comparison: FinishedCells, show_paths: bool) -> list[Table]:
    rows = []
    for cell in comparison.others:
        hidden = f"see {Path('cells', cell.folder.name, 'cell.json').as_posix()}"
        error = cell.error or ""
        public = (
            show_paths
            or cell.status == "unreadable"
            or error.startswith(("FileNotFoundError: The weights of", "FileNotFoundError: No weights"))
        )
        rows.append([cell.folder.name, cell.status, error if public else hidden])
    return [Table("Cells without results", ["cell", "status", "reason"], rows)] if rows else []


def _markdown(value: Any) -> Any:  # noqa: ANN401 - whatever a template prints
    """Escape what Markdown would read as markup."""
    text = re.sub(r"([\\`*_|])|<(?=[A-Za-z/!?])|(?<=\])\(", lambda match: "\\" + match[0], str(value))
    return " ".join(text.split())


def environment(markdown: bool = False) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "templates"),
        autoescape=not markdown,  # noqa: S701 - Markdown has an escape of its own
        finalize=_markdown if markdown else None,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def facts(comparison: FinishedCells) -> dict[str, Any]:
    """Return what both templates show."""
    return {
        "summary": _summary(comparison),
        "demonstration": "tiny" in comparison.backbones,
        "paper": _paper_tables(comparison),
        "source": SOURCE if any(paper_set(name) for name in comparison.sets) else "",
        "metrics": _metric_tables(comparison),
        "tests": _pair_tables(comparison),
        "costs": _cost_tables(comparison),
    }


def write_tables(cells: Sequence[Cell], folder: Path | str) -> None:
    """Write ``results.csv``, one row per cell with everything that was measured, and ``results.md``, the tables.

    The reasons of failed cells, which may name files, are in ``results.csv`` alone.

    Args:
        cells: The cells of a comparison.
        folder: Folder that receives both.

    Raises:
        ValueError: If two cells are of the same method, set, shot and seed.
    """
    comparison = FinishedCells(cells)
    metrics = dict.fromkeys([*TITLES, *(name for cell in cells for name in cell.metrics)])
    costs = dict.fromkeys([*COSTS, *(name for cell in cells for name in cell.cost)])
    columns = ("method", "set", "k_shot", "seed", "backbone", "status", "threshold", "version", "machine", "error")
    with replacing(Path(folder) / "results.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["cell", *columns[:6], *metrics, *costs, *columns[6:]])
        for cell in cells:
            known = [getattr(cell, fact) for fact in columns]
            values = [cell.metrics.get(name) for name in metrics] + [cell.cost.get(name) for name in costs]
            writer.writerow([cell.folder.name, *known[:6], *values, *known[6:]])
    template = environment(markdown=True).get_template("results.md.jinja")
    with replacing(Path(folder) / "results.md") as partial:
        text = template.render(**facts(comparison), missing=failures(comparison, show_paths=False))
        partial.write_text(text, encoding="utf-8")
