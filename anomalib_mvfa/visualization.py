# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Pictures of predictions: the image, its heatmap, and the outlines of mask and prediction, at the image's own size."""

import dataclasses
import logging
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from anomalib.data import ImageItem, PredictDataset
from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image import visualize_image_item
from anomalib.visualization.image.functional import (
    add_text_to_image,
    create_image_grid,
    overlay_image,
    visualize_anomaly_map,
    visualize_image,
    visualize_mask,
)
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from anomalib_mvfa.files import replacing

__all__ = ["MVFAVisualizer", "heatmap", "loaded_dataset", "outlines", "overlay", "results_dir"]

logger = logging.getLogger(__name__)

DRAWING_THREADS = 2
MAX_DRAWING = 16  # pictures under way, whose maps are kept until they are drawn
THRESHOLD = 0.5  # normalised score from which on a pixel is called abnormal
OPACITY = 0.75  # of the heatmap at the largest score
MASK_COLOUR, PREDICTION_COLOUR = (0, 230, 255), (255, 60, 0)


def results_dir(trainer: Trainer) -> Path:
    """Return the folder for pictures and tables of a run."""
    return Path(trainer.default_root_dir) / "images"


def claim_name(target: Path, source: str, taken: dict[Path, str]) -> Path:
    """Return a file name that no other source has: the one wanted, or with ``_2``, ``_3`` and so on before its suffix.

    ``taken`` holds the names in use with their sources, and is extended.
    """
    suffix = ".nii.gz" if target.name.endswith(".nii.gz") else target.suffix
    stem = target.name.removesuffix(suffix)
    candidate, number = target, 1
    while taken.setdefault(candidate, source) != source:
        number += 1
        candidate = target.with_name(f"{stem}_{number}{suffix}")
    return candidate


def heatmap(image: Image.Image, anomaly_map: Tensor) -> Image.Image:
    """Colour an image (RGB) where its map is high, and leave it as it is below half of the threshold.

    The map ``(h, w)`` has normalised scores in [0, 1], whose threshold is one half. The opacity grows in proportion
    from half of the threshold up to `OPACITY` at 1.
    """
    scores = anomaly_map.detach().float().cpu().clamp(0, 1)
    heat = visualize_anomaly_map(scores).resize(image.size, Image.Resampling.BILINEAR)
    opacity = ((scores - THRESHOLD / 2) / (1 - THRESHOLD / 2)).clamp(min=0) * OPACITY
    heat.putalpha(to_pil_image(opacity[None]).resize(image.size, Image.Resampling.BILINEAR))
    return Image.alpha_composite(image.convert("RGBA"), heat).convert("RGB")


def outlines(image: Image.Image, mask: Tensor | None, prediction: Tensor | None) -> Image.Image:
    """Outline mask (cyan) and prediction (red), ``(h, w)`` or ``None`` where not known, in one image (RGB)."""
    for region, colour in ((mask, MASK_COLOUR), (prediction, PREDICTION_COLOUR)):
        if region is not None:
            shown = to_pil_image(region.detach().squeeze().bool().cpu().byte() * 255)
            shown = shown.resize(image.size, Image.Resampling.BILINEAR).point([0] * 128 + [255] * 128)
            image = overlay_image(image, visualize_mask(shown, mode="contour", color=colour), alpha=1.0)
    return image.convert("RGB")


def overlay(image: Image.Image, anomaly_map: Tensor, threshold: float, strength: float) -> Image.Image:
    """Colour an image (RGB) by its map ``(h, w)`` in [0, 1] and outline what is above a threshold in (0, 1).

    ``strength`` is the share of the colours. The threshold is moved to one half, where :func:`heatmap` expects it.
    """
    below, above = anomaly_map * (0.5 / threshold), 1 - (1 - anomaly_map) * (0.5 / (1 - threshold))
    moved = torch.where(anomaly_map > threshold, above, below)
    return outlines(Image.blend(image, heatmap(image, moved), strength), None, moved > 0.5)


def loaded_dataset(trainer: Trainer) -> Any:
    """Return the dataset that is tested or predicted, or ``None`` if there are several or none."""
    loaders = trainer.predict_dataloaders if trainer.predicting else trainer.test_dataloaders
    if isinstance(loaders, list) and len(loaders) == 1:
        loaders = loaders[0]
    return getattr(loaders, "dataset", None)


def image_paths(dataset: Any) -> list[str]:
    """List the ``image_path`` of every item, as far as a dataset knows them without reading."""
    paths = dataset.image_filenames if isinstance(dataset, PredictDataset) else getattr(dataset, "image_paths", None)
    return [str(path) for path in (getattr(dataset, "samples", {}).get("image_path", ()) if paths is None else paths)]


class MVFAVisualizer(ImageVisualizer):
    """anomalib's visualizer, each panel at the size of the image it shows, drawn while the model goes on.

    The panels are the image, its :func:`heatmap` and its :func:`outlines`, unless ``fields`` or ``overlay_fields`` name
    those of anomalib. Pictures are written as PNG; images of the same name from different folders get names of their
    own. A dataset that has ``original(image_path)`` and ``output_name(image_path)`` is asked for image and name; other
    images are opened with Pillow.

    Args:
        field_size: Width and height of a panel in pixels; ``None`` takes the image's own.
        **kwargs: Arguments of anomalib's visualizer.
    """

    def __init__(self, field_size: tuple[int, int] | None = None, **kwargs: Any) -> None:
        super().__init__(field_size=field_size or (256, 256), **kwargs)
        self.own_panels = not (kwargs.get("fields") or kwargs.get("overlay_fields"))
        self.own_size = field_size is None
        self._sources: dict[Path, str] = {}
        self._named: object = None
        self._pool: ThreadPoolExecutor | None = None
        self._drawing: deque[Future[None]] = deque()

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any, **__: Any) -> None:
        """Begin to draw one picture an image; wait only when many are under way."""
        del pl_module, outputs
        folder = Path(self.output_dir or results_dir(trainer))
        dataset = loaded_dataset(trainer)
        self._pool = self._pool or ThreadPoolExecutor(DRAWING_THREADS, thread_name_prefix="drawing")
        for item in batch:
            if item.image_path is None or (item.explanation and trainer.predicting):  # the image could not be read
                continue
            target = self._target(item.image_path, folder, trainer)
            while len(self._drawing) >= MAX_DRAWING:
                self._drawing.popleft().result()
            self._drawing.append(self._pool.submit(self._draw, item, dataset, target))

    def _draw(self, item: ImageItem, dataset: Any, target: Path) -> None:
        if hasattr(dataset, "original"):
            original: Tensor = dataset.original(item.image_path)
            item, image = dataclasses.replace(item, image=original, image_path=None), visualize_image(original)
        else:
            with Image.open(str(item.image_path)) as file:
                image = file.convert("RGB")
        size = image.size if self.own_size else self.field_size
        text = {**self.text_config, "size": self.text_config["size"] or max(8, size[0] // 20)}
        picture: Image.Image | None
        if self.own_panels:
            picture = self._panels(item, image.resize(size), text)
        else:
            picture = visualize_image_item(
                item,
                fields=self.fields,
                overlay_fields=self.overlay_fields,
                field_size=size,
                fields_config=self.fields_config,
                overlay_fields_config=self.overlay_fields_config,
                text_config=text,
            )
        if picture is not None:
            with replacing(target) as partial:
                picture.save(partial)

    @staticmethod
    def _panels(item: ImageItem, image: Image.Image, text: dict[str, Any]) -> Image.Image:
        """Draw image, heatmap and outlines side by side."""
        panels = {"Image": image}
        if item.anomaly_map is not None:
            panels["Heatmap"] = heatmap(image, item.anomaly_map.as_subclass(Tensor).squeeze())
        shown = {"mask": item.gt_mask, "prediction": item.pred_mask}
        if title := " and ".join(name for name, region in shown.items() if region is not None):
            panels[title.capitalize()] = outlines(image, *shown.values())
        options = {name: value for name, value in text.items() if name != "enable"}
        drawn = [
            add_text_to_image(panel.copy(), title, **options) if text.get("enable", True) else panel
            for title, panel in panels.items()
        ]
        return create_image_grid(drawn, nrow=len(drawn))

    def _finish(self) -> None:
        """Wait for the pictures that are under way, and free the names of this run."""
        try:
            while self._drawing:
                self._drawing.popleft().result()
        finally:
            self._drawing.clear()
            self._sources.clear()
            self._named = None
            if self._pool is not None:
                self._pool.shutdown()
                self._pool = None

    def on_test_end(self, *_: Any) -> None:
        """Complete the pictures."""
        self._finish()

    def on_predict_end(self, *_: Any) -> None:
        """Complete the pictures."""
        self._finish()

    def on_exception(self, *_: Any) -> None:
        """Complete the pictures of what was predicted before an interruption."""
        with suppress(Exception):  # the first failure is the one to report
            self._finish()

    def _target(self, source: str, folder: Path, trainer: Trainer) -> Path:
        """Choose the file of a picture, never one that another image has."""
        dataset = loaded_dataset(trainer)
        if trainer.world_size > 1 and dataset is not self._named:  # all processes claim names, in the same order
            self._named = dataset
            for path in image_paths(dataset):
                self._claim(path, folder, trainer)
        return self._claim(source, folder, trainer)

    def _claim(self, source: str, folder: Path, trainer: Trainer) -> Path:
        dataset = loaded_dataset(trainer)
        if hasattr(dataset, "output_name"):
            target = folder / f"{dataset.output_name(source)}.png"
        else:
            datamodule = getattr(trainer, "datamodule", None)
            target = generate_output_filename(
                input_path=source,
                output_path=folder,
                dataset_name=getattr(datamodule, "name", None),
                category=getattr(datamodule, "category", None),
            ).with_suffix(".png")
        return claim_name(target, source, self._sources)
