# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Tables of predictions, of images and of groups such as patients."""

import csv
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from anomalib.data import ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from torchmetrics.functional.classification import binary_auroc, binary_average_precision, binary_f1_score

from anomalib_mvfa.files import partial_name, replacing
from anomalib_mvfa.processes import gather_objects, interleave
from anomalib_mvfa.visualization import image_paths, loaded_dataset, results_dir

__all__ = ["PredictionTable"]

logger = logging.getLogger(__name__)

HIGHEST = 3
"""Scores of a group whose mean is written."""


def from_command_line(trainer: Trainer) -> bool:
    """Return whether the command line runs this, which adds a callback to save its configuration."""
    return any(isinstance(callback, SaveConfigCallback) for callback in trainer.callbacks)  # type: ignore[attr-defined]


class _Result(NamedTuple):
    """One image in the table of groups."""

    group: int
    score: float
    label: int | None
    truth: int | None


def _groups(trainer: Trainer) -> dict[str, int]:
    """Return the group of each image, or nothing where no group has several images."""
    dataset = loaded_dataset(trainer)
    samples = getattr(dataset, "samples", None)
    if samples is None or "group" not in samples or samples["group"].is_unique:
        return {}
    numbers = {group: number for number, group in enumerate(samples["group"].drop_duplicates())}
    return dict(zip(image_paths(dataset), samples["group"].map(numbers), strict=True))


class PredictionTable(Callback):
    """Writes ``predictions.csv`` beside the heatmaps, in testing and in prediction.

    Rows are written to ``partial-predictions.csv`` as they come; the table is renamed when it is complete. Several
    processes write one table, in the order of the images.

    Columns: ``path``; where images belong together ``group``, a number; ``score`` in [0, 1]; ``label`` (1 abnormal,
    0 normal, empty without a threshold); ``threshold``, to which the score is compared; ``abnormal_area``, the fraction
    of abnormal pixels; in prediction ``error``, why an image could not be read; in testing ``true_label``.

    Where images belong together ``predictions_by_group.csv`` has one row per group: ``score``, the highest of its
    images; ``mean_of_highest_3``; ``label``, 1 if an image is called abnormal; ``abnormal_images``, their number;
    ``images``; in prediction ``unreadable_images``, in testing ``true_label``. Testing also logs ``group_AUROC``,
    ``group_AUPR`` and ``group_F1Score`` of these scores and labels.

    The command ends with exit status 1 when images could not be read, after everything else was written.
    """

    def __init__(self) -> None:
        self._images = self._unread = 0
        self._groups: dict[str, int] = {}
        self._results: list[_Result] = []

    def _path(self, trainer: Trainer) -> Path:
        return results_dir(trainer) / "predictions.csv"

    def _partial(self, trainer: Trainer) -> Path:
        """Return the file of this process's rows."""
        path = partial_name(self._path(trainer))
        return path if trainer.is_global_zero else path.with_name(f"{path.stem}-{trainer.global_rank}.csv")

    def _start(self, trainer: Trainer) -> None:
        self._images = self._unread = 0
        self._groups, self._results = _groups(trainer), []
        path = self._partial(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = ["path", *(["group"] if self._groups else []), "score", "label", "threshold", "abnormal_area"]
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([*columns, "error" if trainer.predicting else "true_label"])

    def _append(self, trainer: Trainer, module: LightningModule, batch: ImageBatch) -> None:
        post_processor = getattr(module, "post_processor", None)
        threshold = ""
        # Without a threshold of its own anomalib labels raw scores by one half, which means nothing.
        if post_processor is not None and not post_processor.image_threshold.isnan():
            threshold = f"{float(post_processor.normalized_image_threshold):.6g}"
        with self._partial(trainer).open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            for item in batch:
                error = (item.explanation or "") if trainer.predicting else ""
                self._images += 1
                self._unread += bool(error)
                truth = None if item.gt_label is None else int(item.gt_label)
                last = error if trainer.predicting else "" if truth is None else str(truth)
                score = "" if error or item.pred_score is None else f"{float(item.pred_score):.8g}"
                label = str(int(item.pred_label)) if score and threshold and item.pred_label is not None else ""
                area = f"{float(item.pred_mask.float().mean()):.6f}" if label and item.pred_mask is not None else ""
                group = self._groups.get(str(item.image_path))
                if group is not None:
                    value = float(score) if score else math.nan
                    self._results.append(_Result(group, value, int(label) if label else None, truth))
                writer.writerow(
                    [
                        item.image_path,
                        *([group] if self._groups else []),
                        score,
                        label,
                        "" if error else threshold,
                        area,
                        last,
                    ]
                )

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a table."""
        del pl_module
        if from_command_line(trainer):  # the predictions are not used and would fill the memory
            trainer.predict_loop.return_predictions = False
        self._start(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a table."""
        del pl_module
        self._start(trainer)

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
        self._append(trainer, pl_module, outputs)

    on_test_batch_end = on_predict_batch_end

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the image metrics of groups, where images belong together and both classes are present."""
        del trainer
        rows = self._group_rows()
        truths = torch.tensor([int(bool(row["true_label"])) for row in rows])
        if len(truths.unique()) < 2:
            return
        scores = torch.tensor([float(row["score"] or 0) for row in rows])
        metrics = {
            "group_AUROC": binary_auroc(scores, truths),
            "group_AUPR": binary_average_precision(scores, truths),
        }
        if all(row["label"] is not None for row in rows):
            labels = torch.tensor([int(row["label"] or 0) for row in rows])
            metrics["group_F1Score"] = binary_f1_score(labels, truths)
        pl_module.log_dict(metrics)

    def _group_rows(self) -> list[dict[str, float | int | None]]:
        """Return one row per group, of the images of all processes."""
        groups: dict[int, list[_Result]] = {}
        for results in gather_objects(self._results):
            for result in results:
                groups.setdefault(result.group, []).append(result)
        rows: list[dict[str, float | int | None]] = []
        for group, results in sorted(groups.items()):
            scores = sorted((result.score for result in results if not math.isnan(result.score)), reverse=True)
            labels = [result.label for result in results if result.label is not None]
            truths = [result.truth for result in results if result.truth is not None]
            highest = scores[:HIGHEST]
            rows.append(
                {
                    "group": group,
                    "score": highest[0] if highest else None,
                    f"mean_of_highest_{HIGHEST}": sum(highest) / len(highest) if highest else None,
                    "label": max(labels, default=None),
                    "abnormal_images": sum(labels) if labels else None,
                    "images": len(results),
                    "unreadable_images": len(results) - len(scores),
                    "true_label": max(truths, default=None),
                }
            )
        return rows

    def _write_groups(self, trainer: Trainer) -> None:
        rows = self._group_rows()
        if not rows or not trainer.is_global_zero:
            return
        left_out = "true_label" if trainer.predicting else "unreadable_images"
        columns = [column for column in rows[0] if column != left_out]
        path = self._path(trainer).with_name("predictions_by_group.csv")
        with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            for row in rows:
                formatted = {name: f"{value:.8g}" if isinstance(value, float) else value for name, value in row.items()}
                writer.writerow(formatted)

    def _finish(self, trainer: Trainer) -> None:
        """Rename the complete table, with the rows of all processes in it."""
        partial, path = self._partial(trainer), self._path(trainer)
        self._write_groups(trainer)
        if trainer.world_size == 1:
            partial.replace(path)
            return
        with partial.open(newline="", encoding="utf-8") as file:
            columns, *rows = csv.reader(file)
        parts = gather_objects(rows)
        counts = gather_objects((self._images, self._unread))
        self._images, self._unread = (sum(count) for count in zip(*counts, strict=True))
        if trainer.is_global_zero:
            with replacing(path) as complete, complete.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([columns, *interleave(parts)])
        else:
            partial.unlink()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the tables and log where the results are."""
        del pl_module
        self._finish(trainer)
        logger.info("Heatmaps and predictions.csv are in %s", results_dir(trainer))

    on_test_end = on_predict_end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Report how many images could not be read, once everything is written, and let the command fail.

        Raises:
            SystemExit: If images could not be read and the command line runs this.
        """
        del pl_module
        if stage != "predict" or not self._unread:
            return
        msg = (
            f"{self._unread} of {self._images} images could not be read; the column 'error' of {self._path(trainer)} "
            "has the reasons. The others were predicted."
        )
        if from_command_line(trainer):  # a program gets its predictions instead
            raise SystemExit(msg)
        logger.error(msg)
