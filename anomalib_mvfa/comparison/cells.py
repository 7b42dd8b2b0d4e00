# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Reads the cells of a comparison: one method on one set, with one number of supports and one seed each."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .statistics import ImageScores, image_metrics

__all__ = ["Cell", "Maps", "load_cells"]

logger = logging.getLogger(__name__)

_REMEDY = "Delete the folder and run the comparison again: this cell is then computed again."
_TOLERANCE = 0.01  # between the AUROC in cell.json and that of scores.csv; single precision ties some scores
_NO_SCORES = ImageScores((), np.zeros(0, dtype=np.bool_), np.zeros(0))


class Maps(NamedTuple):
    """Small anomaly maps for display, in the order of the scores."""

    levels: NDArray[np.uint8]  # (N, h, w)
    masks: NDArray[np.bool_] | None  # (N, h, w), true inside lesions


@dataclass(frozen=True, eq=False)
class Cell:
    """One method on one set, with one number of supports and one seed."""

    folder: Path
    method: str = ""
    set: str = ""
    k_shot: int = 0  # number of normal supports; 0 for methods without supports
    seed: int = 0
    backbone: str = ""
    status: str = "done"  # or "failed" while it was computed, or "unreadable": its files are damaged
    error: str | None = None  # that of a failed cell may name files, that of an unreadable one only the cell's own
    metrics: Mapping[str, float] = field(default_factory=dict)  # in [0, 1]
    cost: Mapping[str, float] = field(default_factory=dict)  # train_seconds, train_peak_mb, predict_ms, size_mb
    threshold: float | None = None  # score from which on an image is called abnormal
    supports: tuple[str, ...] = ()  # paths, relative to the data root
    shown: Mapping[str, Any] = field(default_factory=dict)  # see `methods.Shown`
    machine: str = ""
    version: str = ""  # of this package
    config: Mapping[str, Any] = field(default_factory=dict)
    scores: ImageScores = _NO_SCORES  # of a cell that is done

    def read_maps(self) -> Maps | None:
        """Read the maps from disk, ``None`` if the method computes none, or if they are damaged, which is logged."""
        path = self.folder / "maps.npz"
        try:
            with np.load(path, allow_pickle=False) as archive:
                maps = Maps(archive["maps"], archive["masks"] > 0 if "masks" in archive else None)
            if all(array is None or len(array) == len(self.scores.paths) for array in maps):
                return maps
        except FileNotFoundError:
            return None
        except Exception:  # a damaged archive raises many kinds
            logger.debug("Damaged maps", exc_info=True)
        logger.warning("%s is damaged, or does not hold one map per line of scores.csv. %s", path, _REMEDY)
        return None


def load_cells(folder: Path | str) -> list[Cell]:
    """Read the cells of a comparison, in the order of their folders' names.

    A cell whose files are missing or damaged is logged and returned with the status ``"unreadable"``; the others are
    read. A folder without ``cell.json`` was not finished, and counts as unreadable too.

    Args:
        folder: The folder of the comparison, the one that holds ``cells``.

    Raises:
        FileNotFoundError: If there are no cells.
    """
    folders = sorted(path for path in Path(folder).glob("cells/*") if path.is_dir())
    if not folders:
        msg = f"No cells in {folder}: run `anomalib benchmark` with a comparison first, or name its output folder."
        raise FileNotFoundError(msg)
    cells = []
    for path in folders:
        reason = "cell.json is missing: the cell was not finished. Run the comparison again, which continues there."
        try:
            if (path / "cell.json").is_file():
                reason = f"cell.json is damaged. {_REMEDY}"
                cell = _load(path)
                reason = f"scores.csv is missing or damaged, or names an image twice. {_REMEDY}"
                if cell.status == "done":
                    cell = replace(cell, scores=_read_scores(path))
                    reason = f"cell.json does not fit scores.csv, or maps.npz is missing. {_REMEDY}"
                    _check(cell)
                cells.append(cell)
                continue
        except Exception:  # damaged files raise many kinds, whose texts may name images
            logger.debug("A damaged cell", exc_info=True)
        logger.warning("%s is left out: %s", path, reason)
        cells.append(Cell(path, status="unreadable", error=reason))
    return cells


def _load(folder: Path) -> Cell:
    stored = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
    stored["version"] = stored.pop("anomalib_mvfa")
    for name in ("metrics", "cost"):  # without what was not measured
        stored[name] = {key: float(value) for key, value in stored[name].items() if value is not None}
    for name, kind in {"k_shot": int, "seed": int, "supports": tuple, "shown": dict, "config": dict}.items():
        stored[name] = kind(stored[name])
    if stored["status"] not in {"done", "failed"}:
        raise ValueError
    return Cell(folder, **stored)


def _read_scores(folder: Path) -> ImageScores:
    table = pd.read_csv(folder / "scores.csv", dtype=str, keep_default_na=False)
    labels, scores = table.label.astype(int), table.score.astype(float).to_numpy()
    if set(labels) != {0, 1} or not np.isfinite(scores).all() or table.path.duplicated().any():
        raise ValueError
    return ImageScores(tuple(table.path), labels.to_numpy() == 1, scores, tuple(table.get("group", ())))


def _check(cell: Cell) -> None:
    """Raise a ValueError if the files of a cell are not of one run."""
    area = float(image_metrics(cell.scores.labels, cell.scores.scores)["image_AUROC"][0])
    needs_maps = any(name.startswith("pixel_") for name in cell.metrics)
    fits = abs(cell.metrics.get("image_AUROC", math.nan) - area) <= _TOLERANCE  # never with NaN
    if not fits or (needs_maps and not (cell.folder / "maps.npz").is_file()):
        raise ValueError
