# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The table of predictions."""

import csv
import logging
from pathlib import Path
from typing import Any

from anomalib.data import ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from anomalib_mvfa.files import partial_name, replacing
from anomalib_mvfa.processes import gather_objects, interleave
from anomalib_mvfa.visualization import results_dir

__all__ = ["PredictionTable"]

logger = logging.getLogger(__name__)


def from_command_line(trainer: Trainer) -> bool:
    """Tell whether the command line runs this: it adds a callback that a program has no use for."""
    return any(isinstance(callback, SaveConfigCallback) for callback in trainer.callbacks)  # type: ignore[attr-defined]


class PredictionTable(Callback):
    """Writes ``predictions.csv`` beside the heatmaps, in testing and in prediction.

    Rows are written to ``partial-predictions.csv`` as they come; the table gets its name when it is complete. Several
    processes write one table, in the order of the images.

    Columns: ``path``; ``score`` in [0, 1]; ``label`` (1 abnormal, 0 normal, empty without a threshold); ``threshold``,
    to which the score is compared; ``abnormal_area``, the share of abnormal pixels; in prediction ``error``, why an
    image could not be read; in testing ``true_label``.

    The command ends with exit status 1 when images could not be read, after everything else was written.
    """

    COLUMNS = ("path", "score", "label", "threshold", "abnormal_area")

    def __init__(self) -> None:
        self._images = self._unread = 0

    def _path(self, trainer: Trainer) -> Path:
        return results_dir(trainer) / "predictions.csv"

    def _partial(self, trainer: Trainer) -> Path:
        """Name the file of this process's rows."""
        path = partial_name(self._path(trainer))
        return path if trainer.is_global_zero else path.with_name(f"{path.stem}-{trainer.global_rank}.csv")

    def _start(self, trainer: Trainer, columns: tuple[str, ...]) -> None:
        path = self._partial(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(columns)

    def _append(self, trainer: Trainer, module: LightningModule, batch: ImageBatch, with_truth: bool) -> None:
        post_processor = getattr(module, "post_processor", None)
        threshold = ""
        # Without a threshold of its own anomalib labels raw scores by one half, which means nothing.
        if post_processor is not None and not post_processor.image_threshold.isnan():
            threshold = f"{float(post_processor.normalized_image_threshold):.6g}"
        with self._partial(trainer).open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            for item in batch:
                error = "" if with_truth else item.explanation or ""
                self._images += 1
                self._unread += bool(error)
                if error:
                    writer.writerow([item.image_path, "", "", "", "", error])
                    continue
                score = "" if item.pred_score is None else f"{float(item.pred_score):.8g}"
                label = str(int(item.pred_label)) if threshold and item.pred_label is not None else ""
                area = f"{float(item.pred_mask.float().mean()):.6f}" if threshold and item.pred_mask is not None else ""
                truth = "" if item.gt_label is None else str(int(item.gt_label))
                row = [item.image_path, score, label, threshold, area]
                writer.writerow([*row, truth if with_truth else error])

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a table."""
        del pl_module
        self._images = self._unread = 0
        if from_command_line(trainer):  # nobody receives the predictions, which would fill the memory
            trainer.predict_loop.return_predictions = False
        self._start(trainer, (*self.COLUMNS, "error"))

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

    def _finish(self, trainer: Trainer) -> None:
        """Give the table its name, the rows of all processes in it."""
        partial, path = self._partial(trainer), self._path(trainer)
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
        """Complete the table and say where the results are."""
        del pl_module
        self._finish(trainer)
        logger.info("Heatmaps and predictions.csv are in %s", results_dir(trainer))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the table and say where the results are."""
        self.on_predict_end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say how many images could not be read, once everything is written, and let the command fail.

        Raises:
            SystemExit: If images could not be read and the command line runs this.
        """
        del pl_module
        if stage != "predict" or not self._unread:
            return
        msg = (
            f"{self._unread} of {self._images} images could not be read; the column 'error' of {self._path(trainer)} "
            "tells why. The others were predicted."
        )
        if from_command_line(trainer):  # a program gets its predictions instead
            raise SystemExit(msg)
        logger.error(msg)
