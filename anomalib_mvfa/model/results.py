# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""What a person gets to see: heatmaps at the image's own size and a table of predictions."""

import csv
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalib.data import ImageBatch
from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image import visualize_image_item
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from .processing import MVFAPostProcessor

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule

__all__ = ["MVFAVisualizer", "PredictionTable", "results_dir"]

logger = logging.getLogger(__name__)


def results_dir(trainer: Trainer) -> Path:
    """Give the folder for pictures and tables of a run."""
    return Path(trainer.default_root_dir) / "images"


class MVFAVisualizer(ImageVisualizer):
    """anomalib's visualizer, each panel at the size of the image it shows.

    Pictures are written as PNG; images of the same name from different folders get names of their own.

    Args:
        field_size: Width and height of a panel in pixels; ``None`` takes the image's own.
        **kwargs: Arguments of anomalib's visualizer.
    """

    def __init__(self, field_size: tuple[int, int] | None = None, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(field_size=field_size or (256, 256), **kwargs)
        self.own_size = field_size is None
        self._sources: dict[Path, str] = {}

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: "AnomalibModule",  # type: ignore[override]  # as anomalib's own visualizer
        outputs: ImageBatch,  # type: ignore[override]
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write one picture an image."""
        del pl_module, outputs, batch_idx, dataloader_idx
        folder = Path(self.output_dir or results_dir(trainer))
        for item in batch:
            if item.image_path is None:
                continue
            size = self.field_size
            if self.own_size:
                with Image.open(item.image_path) as image:
                    size = image.size
            picture = visualize_image_item(
                item,
                fields=self.fields,
                overlay_fields=self.overlay_fields,
                field_size=size,
                fields_config=self.fields_config,
                overlay_fields_config=self.overlay_fields_config,
                text_config={**self.text_config, "size": self.text_config["size"] or max(8, size[0] // 20)},
            )
            if picture is not None:
                picture.save(self._target(item.image_path, folder, trainer))

    def _target(self, source: str, folder: Path, trainer: Trainer) -> Path:
        """Choose the file of a picture, never one that another image has."""
        datamodule = getattr(trainer, "datamodule", None)
        target = generate_output_filename(
            input_path=source,
            output_path=folder,
            dataset_name=getattr(datamodule, "name", None),
            category=getattr(datamodule, "category", None),
        ).with_suffix(".png")
        number = 1
        candidate = target
        while self._sources.setdefault(candidate, source) != source:
            number += 1
            candidate = target.with_stem(f"{target.stem}_{number}")
        return candidate


class PredictionTable(Callback):
    """Writes ``predictions.csv`` beside the heatmaps, row by row, in testing and in prediction.

    Columns: ``path``; ``score`` in [0, 1]; ``label`` (1 abnormal, 0 normal, empty without a threshold); ``threshold``,
    to which the score is compared; ``abnormal_area``, the share of abnormal pixels; ``normal_percentile``, the share of
    normal reference images that score lower, in [0, 1], which compares across models and is empty without reference;
    in testing also ``true_label``.
    """

    COLUMNS = ("path", "score", "label", "threshold", "abnormal_area", "normal_percentile")

    def _path(self, trainer: Trainer) -> Path:
        return results_dir(trainer) / "predictions.csv"

    def _start(self, trainer: Trainer, columns: tuple[str, ...]) -> None:
        path = self._path(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(columns)

    def _append(self, trainer: Trainer, module: LightningModule, batch: ImageBatch, with_truth: bool) -> None:
        post_processor = getattr(module, "post_processor", None)
        threshold = ""
        # Without a threshold of its own anomalib labels raw scores by one half, which means nothing.
        if post_processor is not None and not post_processor.image_threshold.isnan():
            threshold = f"{float(post_processor.normalized_image_threshold):.6g}"
        percentiles = None
        if isinstance(post_processor, MVFAPostProcessor) and batch.pred_score is not None:
            percentiles = post_processor.normal_percentile(batch.pred_score)
        with self._path(trainer).open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            for index, item in enumerate(batch):
                score = "" if item.pred_score is None else f"{float(item.pred_score):.8g}"
                label = str(int(item.pred_label)) if threshold and item.pred_label is not None else ""
                area = f"{float(item.pred_mask.float().mean()):.6f}" if threshold and item.pred_mask is not None else ""
                percentile = "" if percentiles is None else f"{float(percentiles[index]):.6g}"
                truth = "" if item.gt_label is None else str(int(item.gt_label))
                row = [item.image_path, score, label, threshold, area, percentile]
                writer.writerow([*row, truth] if with_truth else row)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a table."""
        del pl_module
        self._start(trainer, self.COLUMNS)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a table."""
        del pl_module
        self._start(trainer, (*self.COLUMNS, "true_label"))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401 - an ImageBatch; Lightning says otherwise
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Append a batch."""
        del args, kwargs
        self._append(trainer, pl_module, outputs, with_truth=False)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401 - an ImageBatch; Lightning says otherwise
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Append a batch."""
        del args, kwargs
        self._append(trainer, pl_module, outputs, with_truth=True)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the results are."""
        del pl_module
        logger.info("Heatmaps and predictions.csv are in %s", results_dir(trainer))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the results are."""
        self.on_predict_end(trainer, pl_module)
