# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Reads the cells of a comparison: one method on one set, with one number of supports and one seed each."""

import json
import logging
import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .statistics import ImageScores, image_metrics

__all__ = ["Cell", "Maps", "load_cells"]

logger = logging.getLogger(__name__)

_REMEDY = "Delete the folder and run the comparison again: this cell is then computed again."
_TOLERANCE = 0.01  # between the AUROC in cell.json and that of scores.csv; single precision ties some scores


@dataclass(frozen=True, eq=False)
class Maps:
    """Small anomaly maps for display, in the order of the scores."""

    levels: NDArray[np.uint8]  # (N, h, w)
    low: float  # map value of 0
    high: float  # map value of 255
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
    images: ImageScores | None = None

    @property
    def scores(self) -> ImageScores:
        """Labels and scores of the test images of a cell that is done."""
        if self.images is None:
            msg = f"{self.folder} has no scores: the cell is {self.status}."
            raise ValueError(msg)
        return self.images

    def read_maps(self) -> Maps | None:
        """Read the maps from disk, ``None`` if the method computes none.

        Raises:
            ValueError: If the file is damaged or does not fit the scores.
        """
        path = self.folder / "maps.npz"
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as archive:
                masks = archive["masks"] > 0 if "masks" in archive else None
                maps = Maps(archive["maps"], float(archive["low"]), float(archive["high"]), masks)
        except Exception as error:  # a damaged archive raises many kinds
            msg = f"{path} is damaged. {_REMEDY}"
            raise ValueError(msg) from error
        shape = (len(self.scores.paths), *maps.levels.shape[1:])
        shapes = {maps.levels.shape} if masks is None else {maps.levels.shape, masks.shape}
        if maps.levels.dtype != np.uint8 or maps.levels.ndim != 3 or shapes != {shape}:
            msg = f"{path}: 'maps' and 'masks' are not one 8-bit picture per line of scores.csv. {_REMEDY}"
            raise ValueError(msg)
        return maps


class _UnreadableError(Exception):
    """A cell cannot be used; the reason names no file but its own."""


def load_cells(folder: Path | str) -> list[Cell]:
    """Read the cells of a comparison, in the order of their folders' names.

    A cell whose files are missing or damaged is logged and returned with the status ``"unreadable"``; the others are
    read. A folder without ``cell.json`` was not finished, and counts as unreadable too.

    Args:
        folder: The folder of the comparison, the one that holds ``cells``.

    Raises:
        FileNotFoundError: If there are no cells.
    """
    root = Path(folder) / "cells"
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if not folders:
        msg = f"No cells in {root}: run `anomalib benchmark` with a comparison first, or name its output folder."
        raise FileNotFoundError(msg)
    cells = []
    for path in folders:
        try:
            cells.append(_load(path))
        except _UnreadableError as error:
            logger.warning("%s is left out: %s", path, error)
            cells.append(Cell(path, status="unreadable", error=str(error)))
    return cells


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Convert to numbers, without those that were not measured."""
    return {str(name): float(value) for name, value in values.items() if value is not None}


_KINDS: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("method", "set", "backbone", "status", "machine"), str),
    **dict.fromkeys(("k_shot", "seed"), int),
    **dict.fromkeys(("metrics", "cost"), _numbers),
    **dict.fromkeys(("shown", "config"), dict),
    "error": lambda value: None if value is None else str(value),
    "threshold": lambda value: None if value is None else float(value),
    "supports": lambda value: tuple(map(str, value)),
}


def _load(folder: Path) -> Cell:
    try:
        stored = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
        known = {name: kind(stored[name]) for name, kind in _KINDS.items()}
        cell = Cell(folder, **known, version=str(stored["anomalib_mvfa"]))
    except FileNotFoundError:
        msg = "cell.json is missing: the cell was not finished. Run the comparison again, which continues there."
        raise _UnreadableError(msg) from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        msg = f"cell.json is damaged. {_REMEDY}"
        raise _UnreadableError(msg) from None
    except KeyError as error:
        msg = f"cell.json lacks {error}. {_REMEDY}"
        raise _UnreadableError(msg) from None
    except (TypeError, ValueError, AttributeError):
        msg = f"cell.json holds a value of the wrong kind. {_REMEDY}"
        raise _UnreadableError(msg) from None
    if cell.status not in {"done", "failed"}:
        msg = f"cell.json has a status that is neither 'done' nor 'failed'. {_REMEDY}"
        raise _UnreadableError(msg)
    if cell.status == "done":
        cell = replace(cell, images=_read_scores(folder / "scores.csv"))
        _check(cell)
    return cell


def _read_scores(path: Path) -> ImageScores:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError):
        msg = f"scores.csv is {'damaged' if path.is_file() else 'missing'}. {_REMEDY}"
        raise _UnreadableError(msg) from None
    reason = None
    if not {"path", "label", "score"} <= set(table):
        reason = f"scores.csv lacks a column path, label or score. {_REMEDY}"
        raise _UnreadableError(reason)
    scores = pd.to_numeric(table.score, errors="coerce").to_numpy(dtype=np.float64)
    labels = (table.label == "1").to_numpy()
    wrong = np.flatnonzero(~table.label.isin(["0", "1"]) | ~np.isfinite(scores))
    if len(wrong):
        reason = f"scores.csv, line {wrong[0] + 2}: the label is not 0 or 1, or the score is not finite. {_REMEDY}"
    elif table.path.duplicated().any():
        reason = f"scores.csv names an image twice. {_REMEDY}"
    elif labels.all() or not labels.any():
        reason = "scores.csv has no normal or no abnormal image: give a test part with both, and run the cell again."
    if reason:
        raise _UnreadableError(reason)
    return ImageScores(tuple(table.path), labels, scores, tuple(table.get("group", ())))


def _check(cell: Cell) -> None:
    """Check that the files of a cell agree."""
    known = cell.metrics.get("image_AUROC", math.nan)
    area = float(image_metrics(cell.scores.labels, cell.scores.scores)["image_AUROC"][0])
    maps = cell.folder / "maps.npz"
    reason = None
    if not abs(known - area) <= _TOLERANCE:
        reason = f"cell.json has an image AUROC of {known:.4f}, but scores.csv gives {area:.4f}. {_REMEDY}"
    elif maps.is_file() and not zipfile.is_zipfile(maps):
        reason = f"maps.npz is damaged. {_REMEDY}"
    elif not maps.is_file() and any(name.startswith("pixel_") for name in cell.metrics):
        reason = f"maps.npz is missing. {_REMEDY}"
    if reason:
        raise _UnreadableError(reason)
