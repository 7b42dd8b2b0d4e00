# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Results of the demonstration as table rows, pictures and a page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anomalib.data.utils import read_image
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from anomalib_mvfa.comparison.cells import Cell, load_cells
from anomalib_mvfa.comparison.page import picture
from anomalib_mvfa.comparison.report import environment
from anomalib_mvfa.visualization import heatmap, outlines

__all__ = ["Example", "StepError", "Summary", "summarise", "write_page"]

METHODS = {
    "MVFA": "MVFA, 4-shot",
    "MVFA (normal only)": "MVFA, 4 normal images",
    "MVFA (zero-shot)": "MVFA, zero-shot from other modalities",
    "WinCLIP": "WinCLIP, 4-shot, same backbone",
    "mean brightness": "mean brightness",
    "image variance": "image variance",
    "distance to mean normal": "distance to the mean normal image",
}
PICTURED = ("MVFA", "WinCLIP")
ABNORMAL_EXAMPLES, NORMAL_EXAMPLES = 3, 1
COLOURED = 0.99
"""Share of the pixels of normal images that a heatmap leaves below its threshold, for every method alike."""
PIXELS = 224
"""Side of a picture."""


class StepError(ValueError):
    """A step of the demonstration failed."""


@dataclass(frozen=True)
class Example:
    """A test image beside the heatmaps of the methods."""

    title: str  # name and state
    image: Image.Image  # with its lesion outlined
    heatmaps: dict[str, tuple[Image.Image, str]]  # by the name of the method, with the label that it predicted


@dataclass(frozen=True)
class Summary:
    """What was measured on a set."""

    rows: list[tuple[str, str, str, str]]  # method, image AUROC, pixel AUROC, share of correct labels
    examples: list[Example]  # test images at even distances in the list of files
    images: int


def summarise(folder: Path) -> Summary:
    """Read the comparison of one set from its output folder.

    Raises:
        StepError: If a cell failed.
    """
    cells = load_cells(folder)
    failed = [cell for cell in cells if cell.status != "done"]
    if failed:
        msg = f"{failed[0].folder.name} failed: {failed[0].error}"
        raise StepError(msg)
    groups = {title: [cell for cell in cells if cell.method == method] for method, title in METHODS.items()}
    rows = [(title, *_metrics(group)) for title, group in groups.items() if group]
    pictured = {method: next(cell for cell in cells if cell.method == method) for method in PICTURED}
    return Summary(rows, _examples(pictured), len(cells[0].scores.scores))


def _metrics(cells: Sequence[Cell]) -> tuple[str, str, str]:
    """Format mean and standard deviation over the draws: image AUROC, pixel AUROC, share of correct labels."""
    table = pd.DataFrame([cell.metrics for cell in cells]).reindex(columns=["image_AUROC", "pixel_AUROC"])
    image, pixel = (
        "-" if math.isnan(mean) else f"{mean:.3f} ± {spread:.3f}" if spread > 0 else f"{mean:.3f}"
        for mean, spread in zip(table.mean(), table.std(), strict=True)
    )
    known = [(cell.scores, cell.threshold) for cell in cells if cell.threshold is not None]
    correct = [np.mean((scores.scores > threshold) == scores.labels) for scores, threshold in known]
    return image, pixel, f"{100 * np.mean(correct):.0f} %" if correct else "-"


def _examples(cells: Mapping[str, Cell]) -> list[Example]:
    """Show some images with the heatmaps of the first draw."""
    first = next(iter(cells.values()))
    root = Path(first.config["source"]["init_args"]["root"])
    scores = first.scores
    order = np.argsort(scores.paths)
    chosen = []
    for abnormal, count in ((True, ABNORMAL_EXAMPLES), (False, NORMAL_EXAMPLES)):
        rows = order[scores.labels[order] == abnormal]
        chosen += [rows[(2 * index + 1) * len(rows) // (2 * count)] for index in range(min(count, len(rows)))]
    maps = {method: _display(cell) for method, cell in cells.items()}
    masks = getattr(first.read_maps(), "masks", None)
    examples = []
    for row in chosen:
        pixels = read_image(root / scores.paths[row], as_tensor=True)
        image = to_pil_image(pixels).convert("RGB").resize((PIXELS, PIXELS))
        shown = {}
        for method, cell in cells.items():
            index = cell.scores.paths.index(scores.paths[row])
            score, threshold = cell.scores.scores[index], cell.threshold
            label = "" if threshold is None else ("abnormal" if score > threshold else "normal")
            shown[method] = heatmap(image, torch.from_numpy(maps[method][index])), label
        outlined = outlines(image, None if masks is None else torch.from_numpy(masks[row]), None)
        state = "abnormal" if scores.labels[row] else "normal"
        examples.append(Example(f"{Path(scores.paths[row]).stem}, {state}", outlined, shown))
    return examples


def _display(cell: Cell) -> NDArray[np.float32]:
    """Scale maps ``(N, h, w)`` to [0, 1], with one half at the quantile `COLOURED` of the pixels of normal images."""
    stored = cell.read_maps()
    if stored is None:
        msg = f"{cell.folder} has no maps."
        raise ValueError(msg)
    maps = stored.levels.astype(np.float32)
    middle = max(float(np.quantile(maps[~cell.scores.labels], COLOURED)), 1.0)
    return np.interp(maps, [0, middle, max(255.0, middle + 1)], [0, 0.5, 1]).astype(np.float32)


def write_page(
    path: Path, summaries: Mapping[str, Summary], commands: Sequence[str], results: Mapping[str, Path], limits: str
) -> Path:
    """Write the page, one file without scripts, and return its path.

    Args:
        path: The file.
        summaries: By the name of the set.
        commands: As they were run.
        results: Files by what they hold.
        limits: What the results do not show.
    """
    page = environment().from_string(Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8"))
    page.globals["picture"] = picture
    links = {name: file.resolve() for name, file in results.items()}
    text = page.render(summaries=summaries, commands=commands, results=links, limits=limits, coloured=COLOURED)
    path.write_text(text, encoding="utf-8")
    return path.resolve()
