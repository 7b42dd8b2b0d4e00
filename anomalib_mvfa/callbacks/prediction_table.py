# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Tables of predictions, of images and of groups such as patients."""

import csv
import logging
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
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
    score: float | None
    label: int | None
    truth: int | None


def _groups(trainer: Trainer) -> dict[str, int]:
    """Return the group of each image, or nothing where no group has several images."""
    dataset = loaded_dataset(trainer)
    samples = getattr(dataset, "samples", None)
    if samples is None or "group" not in samples or samples["group"].is_unique:
        return {}
    return dict(zip(image_paths(dataset), pd.factorize(samples["group"])[0].tolist(), strict=True))


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

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a table."""
        del pl_module
        if trainer.predicting and from_command_line(trainer):  # they are not used and would fill the memory
            trainer.predict_loop.return_predictions = False
        self._images = self._unread = 0
        self._groups, self._results = _groups(trainer), []
        path = self._partial(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(self._columns(trainer))

    on_test_start = on_predict_start

    def _columns(self, trainer: Trainer) -> list[str]:
        last = "error" if trainer.predicting else "true_label"
        return ["path", *(["group"] if self._groups else []), "score", "label", "threshold", "abnormal_area", last]

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Append a batch."""
        del args, kwargs
        post_processor = getattr(pl_module, "post_processor", None)
        threshold = ""
        # Without a threshold of its own anomalib labels raw scores by one half, which means nothing.
        if post_processor is not None and not post_processor.image_threshold.isnan():
            threshold = f"{float(post_processor.normalized_image_threshold):.6g}"
        with self._partial(trainer).open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            for item in outputs:
                error = (item.explanation or "") if trainer.predicting else ""
                self._images += 1
                self._unread += bool(error)
                truth = None if item.gt_label is None else int(item.gt_label)
                score = "" if error or item.pred_score is None else f"{float(item.pred_score):.8g}"
                label = int(item.pred_label) if score and threshold and item.pred_label is not None else None
                mask = None if label is None else item.pred_mask
                group = self._groups.get(str(item.image_path))
                row = {
                    "path": item.image_path,
                    "group": group,
                    "score": score,
                    "label": label,
                    "threshold": "" if error else threshold,
                    "abnormal_area": "" if mask is None else f"{float(mask.float().mean()):.6f}",
                    "error": error,
                    "true_label": truth,
                }
                if group is not None:
                    self._results.append(_Result(group, float(score) if score else None, label, truth))
                writer.writerow([row[column] for column in self._columns(trainer)])

    on_test_batch_end = on_predict_batch_end

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the image metrics of groups, where images belong together and both classes are present."""
        del trainer
        rows = self._group_rows()
        truths = torch.tensor([bool(truth) for truth in rows["true_label"].fillna(0)], dtype=torch.int64)
        if len(truths.unique()) < 2:
            return
        scores = torch.tensor(rows["score"].fillna(0).to_numpy(), dtype=torch.float32)
        metrics = {
            "group_AUROC": binary_auroc(scores, truths),
            "group_AUPR": binary_average_precision(scores, truths),
        }
        if rows["label"].notna().all():
            metrics["group_F1Score"] = binary_f1_score(torch.tensor(rows["label"].to_numpy(int)), truths)
        pl_module.log_dict(metrics)

    def _group_rows(self) -> pd.DataFrame:
        """Return one row per group, of the images of all processes."""
        results = [result for part in gather_objects(self._results) for result in part]
        table = pd.DataFrame(results, columns=_Result._fields)
        groups = table.astype({"score": "float", "label": "Int64", "truth": "Int64"}).groupby("group")
        return pd.DataFrame(
            {
                "score": groups["score"].max(),
                f"mean_of_highest_{HIGHEST}": groups["score"].agg(lambda scores: scores.nlargest(HIGHEST).mean()),
                "label": groups["label"].max(),
                "abnormal_images": groups["label"].sum(min_count=1),
                "images": groups.size(),
                "unreadable_images": groups.size() - groups["score"].count(),
                "true_label": groups["truth"].max(),
            }
        )

    def _finish(self, trainer: Trainer) -> None:
        """Complete the tables, with the rows of all processes."""
        partial, path = self._partial(trainer), self._path(trainer)
        rows = self._group_rows()
        if len(rows) and trainer.is_global_zero:
            left_out = "true_label" if trainer.predicting else "unreadable_images"
            with replacing(path.with_name("predictions_by_group.csv")) as by_group:
                rows.drop(columns=left_out).to_csv(by_group, float_format="%.8g")
        if trainer.world_size == 1:
            partial.replace(path)
            return
        with partial.open(newline="", encoding="utf-8") as file:
            columns, *own = csv.reader(file)
        parts = gather_objects(own)
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
        """Report how many images could not be read, once everything is written, and let the command fail."""
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
