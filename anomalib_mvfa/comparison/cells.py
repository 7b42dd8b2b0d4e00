# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Reads the cells of a comparison: one method on one set, with one number of supports and one seed each."""

import json
import logging
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
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
    """Small anomaly maps for display.

    Attributes:
        levels: ``(N, h, w)``, uint8, in the order of the scores.
        low: Map value of 0.
        high: Map value of 255.
        masks: ``(N, h, w)``, true inside lesions, or ``None``.
    """

    levels: NDArray[np.uint8]
    low: float
    high: float
    masks: NDArray[np.bool_] | None


@dataclass(frozen=True, eq=False)
class Cell:
    """One method on one set, with one number of supports and one seed.

    Attributes:
        folder: Where its files lie.
        method: Name of the method.
        set: Name of the set.
        k_shot: Number of normal supports; 0 for methods without supports.
        seed: Seed of the supports and of the training.
        backbone: Name of the backbone.
        status: ``"done"``, ``"failed"`` while it was computed, or ``"unreadable"``: its files are damaged.
        error: Why it is not done. That of a failed cell may name files; that of an unreadable one names none but the
            cell's own.
        metrics: Metrics in [0, 1] by name.
        cost: ``train_seconds``, ``train_peak_mb``, ``predict_ms`` an image, ``size_mb`` of what is shipped.
        threshold: Score from which on an image is called abnormal.
        supports: Their paths, relative to the data root.
        shown: What the method was shown, see :class:`~anomalib_mvfa.comparison.methods.Shown`.
        machine: Processor, threads and graphics card that it was computed with.
        version: Version of this package that computed it.
        config: Everything that it was run with.
        images: Labels and scores of the test images, if it is done.
    """

    folder: Path
    method: str = ""
    set: str = ""
    k_shot: int = 0
    seed: int = 0
    backbone: str = ""
    status: str = "done"
    error: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    threshold: float | None = None
    supports: tuple[str, ...] = ()
    shown: Mapping[str, Any] = field(default_factory=dict)
    machine: str = ""
    version: str = ""
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
        """Read the maps from disk.

        Returns:
            The maps, or ``None`` if the method gives none.

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
        if maps.levels.dtype != np.uint8 or maps.levels.ndim != 3 or maps.levels.shape != shape:
            msg = f"{path}: 'maps' are not one 8-bit picture per line of scores.csv. {_REMEDY}"
            raise ValueError(msg)
        if maps.masks is not None and maps.masks.shape != shape:
            msg = f"{path}: 'masks' do not have the shape of 'maps'. {_REMEDY}"
            raise ValueError(msg)
        return maps


class _UnreadableError(Exception):
    """A cell cannot be used; the reason names no file but its own."""


def load_cells(folder: Path | str) -> list[Cell]:
    """Read the cells of a comparison.

    A cell whose files are missing or damaged is logged and returned with the status ``"unreadable"``; the others are
    read. A folder without ``cell.json`` was not finished, and counts as unreadable too.

    Args:
        folder: The folder of the comparison, the one that holds ``cells``.

    Returns:
        The cells, in the order of their folders' names.

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


def _load(folder: Path) -> Cell:
    try:
        stored = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        msg = "cell.json is missing: the cell was not finished. Run the comparison again, which continues there."
        raise _UnreadableError(msg) from None
    except (OSError, ValueError):
        msg = f"cell.json is damaged. {_REMEDY}"
        raise _UnreadableError(msg) from None
    try:
        cell = Cell(
            folder=folder,
            method=str(stored["method"]),
            set=str(stored["set"]),
            k_shot=int(stored["k_shot"]),
            seed=int(stored["seed"]),
            backbone=str(stored["backbone"]),
            status=str(stored["status"]),
            error=None if stored["error"] is None else str(stored["error"]),
            metrics=_numbers(stored["metrics"]),
            cost=_numbers(stored["cost"]),
            threshold=None if stored["threshold"] is None else float(stored["threshold"]),
            supports=tuple(map(str, stored["supports"])),
            shown=dict(stored["shown"]),
            machine=str(stored["machine"]),
            version=str(stored["anomalib_mvfa"]),
            config=dict(stored["config"]),
            images=_read_scores(folder / "scores.csv") if stored["status"] == "done" else None,
        )
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
        _check(cell)
    return cell


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Convert to numbers, without those that were not measured."""
    return {str(name): float(value) for name, value in values.items() if value is not None}


def _read_scores(path: Path) -> ImageScores:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        msg = f"scores.csv is missing. {_REMEDY}"
        raise _UnreadableError(msg) from None
    except (OSError, ValueError):
        msg = f"scores.csv is damaged. {_REMEDY}"
        raise _UnreadableError(msg) from None
    if not {"path", "label", "score"} <= set(table):
        msg = f"scores.csv lacks a column path, label or score. {_REMEDY}"
        raise _UnreadableError(msg)
    scores = pd.to_numeric(table.score, errors="coerce").to_numpy(dtype=np.float64)
    wrong = np.flatnonzero(~table.label.isin(["0", "1"]).to_numpy() | ~np.isfinite(scores))
    if len(wrong):
        msg = f"scores.csv, line {wrong[0] + 2}: the label is not 0 or 1, or the score is not finite. {_REMEDY}"
        raise _UnreadableError(msg)
    if table.path.duplicated().any():
        msg = f"scores.csv names an image twice. {_REMEDY}"
        raise _UnreadableError(msg)
    labels = (table.label == "1").to_numpy()
    if labels.all() or not labels.any():
        msg = "scores.csv has no normal or no abnormal image: give a test part with both, and run the cell again."
        raise _UnreadableError(msg)
    groups = tuple(table.group) if "group" in table else ()
    return ImageScores(tuple(table.path), labels, scores, groups)


def _check(cell: Cell) -> None:
    """Check that the files of a cell agree."""
    known = cell.metrics.get("image_AUROC", math.nan)
    area = float(image_metrics(cell.scores.labels, cell.scores.scores)["image_AUROC"][0])
    if not abs(known - area) <= _TOLERANCE:
        msg = f"cell.json has an image AUROC of {known:.4f}, but scores.csv gives {area:.4f}. {_REMEDY}"
        raise _UnreadableError(msg)
    maps = cell.folder / "maps.npz"
    if maps.is_file():
        if not zipfile.is_zipfile(maps):
            msg = f"maps.npz is damaged. {_REMEDY}"
            raise _UnreadableError(msg)
    elif any(name.startswith("pixel_") for name in cell.metrics):
        msg = f"maps.npz is missing. {_REMEDY}"
        raise _UnreadableError(msg)
