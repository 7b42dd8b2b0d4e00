# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Groups the cells of a comparison, compares the methods, and writes the results as tables."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pandas as pd

from anomalib_mvfa.files import replacing

from .cells import Cell
from .statistics import IMAGE_METRICS, Difference, differences, holm, intervals

__all__ = ["PAPER_SETS", "PUBLISHED", "FinishedCells", "write_tables"]

logger = logging.getLogger(__name__)

NORMAL_ONLY = "MVFA (normal only)"
TRIVIAL = ("distance to mean normal", "mean brightness", "image variance")
ORDER = ("MVFA", NORMAL_ONLY, "MVFA (zero-shot)", "WinCLIP", "WinCLIP (zero-shot)", "models of anomalib", *TRIVIAL)
SHOWN = ("normal shown", "abnormal shown", "masks shown", "remark")
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

# Results that others published, to stand beside what was measured here

SOURCE = (
    "Huang et al., Adapting Visual-Language Models for Generalizable Anomaly Detection in Medical Images, CVPR 2024, "
    "arXiv 2403.12570"
)
PAPER_SETS = ("Histopathology", "Chest", "Retina_OCT2017", "Brain", "Liver", "Retina_RESC")
"""The sets in the order of the paper's tables. The last three have masks."""


def _published() -> dict[tuple[str, int], dict[tuple[str, str], float]]:
    found: dict[tuple[str, int], dict[tuple[str, str], float]] = {}
    for row in pd.read_csv(Path(__file__).with_name("published.csv")).to_dict("records"):
        known = {(name, row["level"]): row[name] for name in PAPER_SETS if not math.isnan(row[name])}
        found.setdefault((row["method"], row["k_shot"]), {}).update(known)
    return found


PUBLISHED = _published()
"""AUROC in percent of the paper's tables, by method and shot, then by set and level (image or pixel)."""


def paper_set(name: str) -> str | None:
    """Find the published name of a set, whatever its letter case and with or without ``_AD``.

    Example:
        >>> paper_set("brain_AD"), paper_set("BrainMRI")
        ('Brain', None)
    """
    known = {published.lower(): published for published in PAPER_SETS}
    return known.get(name.lower().removesuffix("_ad"))


class Table(NamedTuple):
    """A table of text with a row of headings; the first column holds the headings of the rows."""

    caption: str
    frame: pd.DataFrame
    published: frozenset[int] = frozenset()  # indices of the rows with numbers that others published


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
    def shown(self) -> dict[str, str]:
        """What the method was shown, by the columns of a table."""
        known = {name: self.first.shown.get(name.removesuffix(" shown")) for name in SHOWN}
        return {"method": self.label} | {
            name: "-" if value in {None, ""} else str(value) for name, value in known.items()
        }

    def values(self, metric: str) -> list[float]:
        """Return a metric for each seed, NaN where it was not measured."""
        return [cell.metrics.get(metric, math.nan) for cell in self.cells.values()]

    def text(self, metric: str) -> str:
        """Format the mean over the seeds in percent, with the standard deviation of several seeds."""
        return _percent(self.values(metric))


class Pair(NamedTuple):
    """Two methods on one set, by the seeds of the first."""

    first: Group
    second: Group
    differences: Mapping[str, Difference]
    adjusted: float  # p-value of the image AUROC by Holm's rule
    family: int  # comparisons that it was corrected for

    @property
    def area(self) -> Difference:
        """The difference in image AUROC."""
        return self.differences["image_AUROC"]


class FinishedCells:
    """The finished cells, grouped and ordered for display.

    Raises:
        ValueError: If two cells are of the same method, set, shot and seed.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        def order(cell: Cell) -> tuple[Any, ...]:
            method = ORDER.index(cell.method if cell.method in ORDER else "models of anomalib")
            return (self.sets.index(cell.set), cell.k_shot == 0, cell.k_shot, method, cell.method, cell.seed)

        self.cells = [cell for cell in cells if cell.status == "done"]
        self.others = [cell for cell in cells if cell.status != "done"]
        sets = dict.fromkeys(cell.set for cell in self.cells)
        self.sets = sorted(sets, key=lambda name: PAPER_SETS.index(paper_set(name) or "") if paper_set(name) else 99)
        self.cells.sort(key=order)
        for first, second in pairwise(self.cells):
            if order(first) == order(second):
                msg = (
                    f"{first.folder} and {second.folder} are of the same method, set, shot and seed: "
                    "write one report per backbone, each with cells of its own."
                )
                raise ValueError(msg)
        grouped = groupby(self.cells, key=lambda cell: (cell.set, cell.k_shot, cell.method))
        self.groups = [Group(*key, {cell.seed: cell for cell in members}) for key, members in grouped]
        self.shots = sorted({cell.k_shot for cell in cells if cell.method}, key=lambda k: (k == 0, k))
        self.backbones = sorted({cell.backbone for cell in self.cells if cell.backbone})

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
        """Comparisons by set and shot, one family of Holm's correction each.

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
        found = []
        for first, second in wanted:
            once = first.k_shot and not second.k_shot  # the second was run once, for all draws
            seeds = [seed for seed in first.cells if once or seed in second.cells]
            ours = [first.cells[seed].scores for seed in seeds]
            theirs = [(second.first if once else second.cells[seed]).scores for seed in seeds]
            try:
                if seeds:
                    found.append((first, second, differences(ours, theirs)))
            except ValueError as error:
                logger.warning("%s and %s are not compared on %s: %s", first.method, second.method, name, error)
        adjusted = holm([measured["image_AUROC"].p_value for *_, measured in found])
        family = int(np.isfinite(adjusted).sum())
        return [Pair(*members, float(p_value), family) for members, p_value in zip(found, adjusted, strict=True)]


# Formatting


def shot(k_shot: int) -> str:
    return f"k = {k_shot}" if k_shot else "no supports"


def _percent(values: Sequence[float], digits: int = 1) -> str:
    known = [100 * value for value in values if not math.isnan(value)]
    spread = f" ± {np.std(known, ddof=1):.{digits}f}" if len(known) > 1 else ""
    return f"{np.mean(known):.{digits}f}{spread}" if known else "-"


def _p_value(value: float) -> str:
    return "-" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def points(difference: Difference) -> str:
    if math.isnan(difference.mean):
        return "-"
    return f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def _units(group: Group) -> str:
    """Describe the test images and how they are grouped."""
    scores = group.first.scores
    patients = f" of {len(set(scores.groups))} patients" if scores.groups else ""
    return f"{int((~scores.labels).sum())} normal and {int(scores.labels.sum())} abnormal test images{patients}"


def _findings(comparison: FinishedCells) -> list[dict[str, Any]]:
    """Choose what to state of each set and shot: like with like first, then what labels add, then trivial scores."""
    findings = []
    for (name, k_shot), pairs in comparison.pairs.items():
        first = pairs[0].first
        by_name = {(pair.first.method, pair.second.method): pair for pair in pairs}
        said = []
        if like := by_name.get((NORMAL_ONLY, "WinCLIP")):
            said.append(("Of methods that are shown the same normal images,", like))
        if labels := by_name.get((first.method, NORMAL_ONLY)):
            extra = f"{first.first.shown.get('abnormal')} abnormal images and {first.first.shown.get('masks')} masks"
            said.append((f"Given {extra} as well,", labels))
        rest = [] if like else [pair for pair in pairs if pair.second.method.startswith("WinCLIP")][:1]
        trivial = [pair for pair in pairs if pair.first is first and pair.second.method in TRIVIAL]
        rest += sorted(trivial, key=lambda pair: np.nan_to_num(pair.area.mean, nan=9))[:1]
        said += [("", pair) for pair in rest or ([] if said else pairs[:1])]
        seeds = f"mean of {len(first.cells)} draws of supports" if len(first.cells) > 1 else "one run"
        findings.append({"title": f"{name}, {shot(k_shot)}, {seeds}, {_units(first)}.", "verdicts": said})
    return findings


# Tables


def _paper_tables(comparison: FinishedCells) -> list[Table]:
    """AUROC of images and pixels, one method per row, the sets side by side, the mean at the end."""
    tables = []
    for k_shot in comparison.shots:
        groups = {(g.method, g.set): g for g in comparison.groups if g.k_shot == k_shot}
        sets = [name for name in comparison.sets if any(key[1] == name for key in groups)]
        masked = {name for (_, name), group in groups.items() if not np.isnan(group.values("pixel_AUROC")).all()}
        columns = [(name, level) for level in ("image", "pixel") for name in sets if level == "image" or name in masked]
        published = {method: row for (method, k), row in PUBLISHED.items() if k == k_shot and any(map(paper_set, sets))}
        failed = {cell.method for cell in comparison.others if cell.status == "failed" and cell.k_shot == k_shot}
        rows: list[dict[str, str]] = []
        grey = set()
        for method in dict.fromkeys([*(method for method, _ in groups), *sorted(failed), *published]):
            own = {name: groups[method, name] for name in sets if (method, name) in groups}
            if own:
                values = {(n, level): own[n].values(f"{level}_AUROC") for n, level in columns if n in own}
                rows.append(next(iter(own.values())).shown | _paper_row(columns, values, 1))
            elif method in failed:
                rows.append({"method": method, SHOWN[0]: "failed, see Missing"})
            if method in published:
                grey.add(len(rows))
                known = {(n, w): published[method].get((paper_set(n) or "", w), math.nan) for n, w in columns}
                values = {column: [value / 100] for column, value in known.items()}
                rows.append({"method": f"{method}, published"} | _paper_row(columns, values, 2))
        header = ["method", *SHOWN[:3], *_paper_row(columns, {}, 1)]
        kind = f"Few-shot, k = {k_shot}" if k_shot else "Without supports"
        note = "; in italics: published, not measured here" if grey else ""
        frame = pd.DataFrame(rows, columns=header).fillna("-")
        tables.append(Table(f"{kind}: AUROC in percent{note}", frame, frozenset(grey)))
    return tables


Column = tuple[str, str]  # set, and image or pixel


def _paper_row(columns: Sequence[Column], values: Mapping[Column, Sequence[float]], digits: int) -> dict[str, str]:
    """Format the values of a row, and with several sets their means, missing where a set is."""
    row = {f"{name}, {level}": _percent(values.get((name, level), ()), digits) for name, level in columns}
    if len({name for name, _ in columns}) > 1:
        for level in dict.fromkeys(level for _, level in columns):
            means = [np.mean(values.get(column, [math.nan])) for column in columns if column[1] == level]
            row[f"mean, {level}"] = _percent([float(np.mean(means))], digits)
    return row


def _metric_tables(comparison: FinishedCells) -> list[Table]:
    """All metrics with their intervals, one table per set and shot."""
    tables = []
    for name, k_shot in comparison.places:
        groups = comparison.select(name, k_shot)
        shown = [m for m in TITLES if any(m in cell.metrics for g in groups for cell in g.cells.values())]
        rows = []
        for group in groups:
            ends = intervals([cell.scores for cell in group.cells.values()])
            texts = {TITLES[metric]: group.text(metric) for metric in shown}
            for metric in IMAGE_METRICS:
                texts[TITLES[metric]] += f" [{100 * ends[metric][0]:.1f}, {100 * ends[metric][1]:.1f}]"
            rows.append(group.shown | texts | {"runs": str(len(group.cells))})
        size = "the network's" if groups[0].first.config.get("pixel_metrics") == "network" else "each mask's own"
        caption = f"{name}, {shot(k_shot)}: {_units(groups[0])}"
        caption += f"; pixel metrics at {size} size" if any(metric.startswith("pixel") for metric in shown) else ""
        tables.append(Table(caption, pd.DataFrame(rows)))
    return tables


def _pair_tables(comparison: FinishedCells) -> list[Table]:
    tables = []
    for (name, k_shot), pairs in comparison.pairs.items():
        rows = [
            {
                "methods": f"{pair.first.label} - {pair.second.label}",
                "AUROC": points(pair.area),
                "p": _p_value(pair.area.p_value),
                "Holm's p": _p_value(pair.adjusted),
                "ahead, draws": f"{pair.area.ahead} of {pair.area.seeds}",
                **{TITLES[metric]: points(pair.differences[metric]) for metric in IMAGE_METRICS[1:]},
            }
            for pair in pairs
        ]
        family = f"Holm's family: the {pairs[0].family} comparison{'s' * (pairs[0].family > 1)} of this table"
        grouped = "patients resampled" if pairs[0].first.first.scores.groups else "images taken as independent"
        tables.append(Table(f"{name}, {shot(k_shot)}. {family}; {grouped}", pd.DataFrame(rows)))
    return tables


def _cost_tables(comparison: FinishedCells) -> list[Table]:
    tables = []
    for name in comparison.sets:
        groups = [group for group in comparison.groups if group.set == name]
        means = pd.DataFrame([pd.DataFrame([cell.cost for cell in g.cells.values()]).mean() for g in groups])
        frame = means.reindex(columns=list(COSTS)).rename(columns=COSTS).map(_cost)
        frame.insert(0, "k", [str(group.k_shot) for group in groups])
        frame.insert(0, "method", [group.label for group in groups])
        machines = "; ".join(sorted({cell.machine for cell in comparison.cells if cell.set == name and cell.machine}))
        tables.append(Table(f"{name}: mean over the runs, on {machines}", frame))
    return tables


def _cost(mean: float) -> str:
    return "-" if math.isnan(mean) else f"{mean:,.3g}" if mean < 100 else f"{mean:,.0f}"


def failures(comparison: FinishedCells) -> list[Table]:
    """List the cells without results; reasons that may name files are left out."""
    rows = []
    for cell in comparison.others:
        error = cell.error or ""
        public = error.startswith(("FileNotFoundError: The weights of", "FileNotFoundError: No weights"))
        if not (public or cell.status == "unreadable"):
            error = f"see {Path('cells', cell.folder.name, 'cell.json').as_posix()}"
        rows.append({"cell": cell.folder.name, "status": cell.status, "reason": error})
    return [Table("Cells without results", pd.DataFrame(rows))] if rows else []


def _markdown(value: Any) -> Any:
    """Escape what Markdown would read as markup."""
    text = re.sub(r"([\\`*_|])|<(?=[A-Za-z/!?])|(?<=\])\(", lambda match: "\\" + match[0], str(value))
    return " ".join(text.split())


def environment(markdown: bool = False) -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "templates"),
        autoescape=not markdown,  # noqa: S701 - Markdown has an escape of its own
        finalize=_markdown if markdown else None,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters["p_value"] = _p_value
    return made


def facts(comparison: FinishedCells) -> dict[str, Any]:
    """Return what both templates show."""
    return {
        "findings": _findings(comparison),
        "demonstration": "tiny" in comparison.backbones,
        "paper": _paper_tables(comparison),
        "source": SOURCE if any(map(paper_set, comparison.sets)) else "",
        "metrics": _metric_tables(comparison),
        "tests": _pair_tables(comparison),
        "costs": _cost_tables(comparison),
    }


def write_tables(cells: Sequence[Cell], folder: Path | str) -> None:
    """Write ``results.csv``, one row per cell with everything that was measured, and ``results.md``, the tables.

    The reasons of failed cells, which may name files, are in ``results.csv`` alone.

    Raises:
        ValueError: If two cells are of the same method, set, shot and seed.
    """
    comparison = FinishedCells(cells)
    known = ("method", "set", "k_shot", "seed", "backbone", "status", "threshold", "version", "machine", "error")
    rows = [{"cell": c.folder.name, **{name: getattr(c, name) for name in known}, **c.metrics, **c.cost} for c in cells]
    frame = pd.DataFrame(rows)
    columns = list(dict.fromkeys(["cell", *known[:6], *TITLES, *COSTS, *frame]))
    with replacing(Path(folder) / "results.csv") as partial:
        frame.reindex(columns=columns).to_csv(partial, index=False)
    template = environment(markdown=True).get_template("results.md.jinja")
    with replacing(Path(folder) / "results.md") as partial:
        text = template.render(**facts(comparison), missing=failures(comparison))
        partial.write_text(text, encoding="utf-8")
