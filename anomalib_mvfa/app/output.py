# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Pictures, pieces of HTML, and the files that a person takes away."""

import base64
import io
import shutil
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from jinja2 import Environment, PackageLoader
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from anomalib_mvfa import MVFA
from anomalib_mvfa.deploy import OpenVINOInferencer
from anomalib_mvfa.visualization import heatmap, outlines

from .fitting import Progress, Trained
from .intake import read_source
from .session import Picture, Session

__all__ = ["PIECES", "TEMPLATES", "figures", "heated", "image_tag", "overlay", "take_away", "thumbnail"]

TEMPLATES = Environment(
    loader=PackageLoader("anomalib_mvfa.app", "."), autoescape=True, trim_blocks=True, keep_trailing_newline=True
)
PIECES: Any = TEMPLATES.get_template("pieces.html.jinja").module
"""Macros that return pieces of the page."""
CHECKED = 4
"""Images whose scores are computed with the exported model, too."""
PICTURED = 24


def overlay(image: Image.Image, anomaly_map: NDArray[np.float32], threshold: float, strength: float) -> Image.Image:
    """Colour an image by its map ``(h, w)`` in [0, 1], and outline what is above the threshold, in (0, 1).

    ``strength`` of the colours is in [0, 1]. The threshold is moved to one half, which the drawing functions expect.
    """
    below, above = anomaly_map * (0.5 / threshold), 1 - (1 - anomaly_map) * (0.5 / (1 - threshold))
    moved = torch.from_numpy(np.where(anomaly_map > threshold, above, below).astype(np.float32))
    image = image.convert("RGB")
    return outlines(Image.blend(image, heatmap(image, moved), strength), None, moved > 0.5)


def heated(view: Picture, threshold: float, strength: float) -> Image.Image:
    """Return an image that is looked at with its :func:`overlay`."""
    with Image.open(view.file) as image:
        return overlay(image, view.map, threshold, strength)


def image_tag(image: Image.Image, text: str = "", side: int = 720) -> str:
    """Return an ``img`` element that holds its image, its longest side at ``side`` pixels, with a description."""
    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    file = io.BytesIO()
    image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(file, "WEBP", quality=85)
    return str(PIECES.image(base64.b64encode(file.getvalue()).decode(), text))


@lru_cache(maxsize=4096)
def thumbnail(file: Path, mask: Path | None = None) -> str:
    """Return a small ``img`` element of a file, with the outline of its mask."""
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    if mask is not None:
        with Image.open(mask) as region:
            image = outlines(image, torch.from_numpy(np.array(region) > 127), None)
    return image_tag(image, side=128)


def figures(trained: Trained, scores: Mapping[str, float], threshold: float) -> dict[str, str]:
    """Return what a threshold does to the supports of a model, and to images with given scores, by their names."""
    groups = {
        "False alarms on the normal supports": trained.normal_scores,
        "Abnormal supports called abnormal": trained.abnormal_scores,
        "Images looked at called abnormal": list(scores.values()),
    }
    rows = {name: f"{sum(s > threshold for s in found)} of {len(found)}" for name, found in groups.items() if found}
    verdicts = {name: f"{'abnormal' if s > threshold else 'normal'}, {s:.2f}" for name, s in scores.items()}
    return rows | dict(list(verdicts.items())[:PICTURED])


def take_away(session: Session, threshold: float, strength: float) -> Iterator[Progress | Path]:
    """Write everything into a zip, and yield the progress, and at last the file; a ValueError without a model."""
    trained = session.trained
    if trained is None:
        msg = "There is no model yet: train one in step 2."
        raise ValueError(msg)
    folder = session.folder / "results" / "anomalib-mvfa"
    shutil.rmtree(folder.parent, ignore_errors=True)
    (folder / "heatmaps").mkdir(parents=True)
    yield Progress("Copying the model and its supports", 0.0)
    shutil.copyfile(trained.checkpoint, folder / "model.ckpt")
    trained.model.save_adapters(folder / "adapters.safetensors")
    shutil.copytree(session.folder / "supports", folder / "supports")
    for name in ("supports.csv", "supports.txt"):
        shutil.copyfile(trained.folder / name, folder / "supports" / name)
    yield Progress("Drawing the heatmaps", 0.1)
    rows = []
    for number, study in enumerate(session.studies.values()):
        for view in study:
            area = float(np.mean(view.map > threshold))
            rows.append((view.name, number, view.score, int(view.score > threshold), threshold, area))
            stem = "".join(letter if letter.isalnum() else "_" for letter in view.name)
            heated(view, threshold, strength).save(folder / "heatmaps" / f"{len(rows):03d}_{stem}.png")
    table = pd.DataFrame(rows, columns=["path", "group", "score", "label", "threshold", "abnormal_area"])
    table.to_csv(folder / "predictions.csv", index=False, float_format="%.8g")
    yield Progress("Exporting to OpenVINO", 0.3)
    engine, model = Engine(default_root_dir=session.folder / "export", logger=False), MVFA(trained.options.backbone)
    engine.export(model, ExportType.OPENVINO, export_root=folder / "openvino", ckpt_path=trained.checkpoint)
    yield Progress("Checking the exported model", 0.8)
    views = [max(study, key=lambda view: view.score) for study in session.studies.values()]
    values = {
        "options": trained.options,
        "threshold": threshold,
        "figures": PIECES.figures(figures(trained, session.scores(), threshold)),
        "pictures": [(view, image_tag(heated(view, threshold, 1.0), view.name, 240)) for view in views[:PICTURED]],
        "difference": _difference(views[:CHECKED], next(folder.rglob("*.xml"))),
    }
    for name in ("index.html", "commands.sh"):
        (folder / name).write_text(TEMPLATES.get_template(f"{name}.jinja").render(values), encoding="utf-8")
    yield Progress("Packing", 0.9)
    yield Path(shutil.make_archive(str(folder), "zip", folder))


def _difference(views: list[Picture], exported: Path) -> float | None:
    """Return the largest difference in score between a model and its export; ``None`` without images."""
    inferencer = OpenVINOInferencer(path=exported, device="CPU", config={"INFERENCE_PRECISION_HINT": "f32"})
    images = [to_pil_image(read_source(view.source)) for view in views]
    scores = [float(np.asarray(inferencer.predict(image).pred_score).squeeze()) for image in images]
    return max((abs(score - view.score) for score, view in zip(scores, views, strict=True)), default=None)
