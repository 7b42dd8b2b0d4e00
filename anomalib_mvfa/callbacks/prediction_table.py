# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Tables of predictions, of images and of groups such as patients."""

import logging
from itertools import zip_longest
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from torchmetrics.functional.classification import binary_auroc, binary_average_precision, binary_f1_score

from anomalib_mvfa.files import replacing
from anomalib_mvfa.processes import gather_objects
from anomalib_mvfa.visualization import image_paths, loaded_dataset, results_dir

__all__ = ["PredictionTable"]

logger = logging.getLogger(__name__)

HIGHEST = 3
"""Scores of a group whose mean is written."""
COLUMNS = ("path", "group", "score", "label", "threshold", "abnormal_area", "error", "true_label")


def _from_command_line(trainer: Trainer) -> bool:
    """Return whether the command line runs this, which adds a callback to save its configuration."""
    return any(isinstance(callback, SaveConfigCallback) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def _groups(trainer: Trainer) -> dict[str, int]:
    dataset = loaded_dataset(trainer)
    samples = getattr(dataset, "samples", None)
    if samples is None or "group" not in samples or samples["group"].is_unique:
        return {}
    return dict(zip(image_paths(dataset), pd.factorize(samples["group"])[0].tolist(), strict=True))


class PredictionTable(Callback):
    """Writes ``predictions.csv`` beside the heatmaps, in testing and in prediction.

    Several processes write one table, in the order of the images.

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
        self._groups: dict[str, int] = {}
        self._rows: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a table."""
        if trainer.predicting and _from_command_line(trainer):  # they are not used and would fill the memory
            trainer.predict_loop.return_predictions = False
        self._groups, self._rows = _groups(trainer), []

    on_test_start = on_predict_start

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Add the rows of a batch."""
        post_processor = getattr(pl_module, "post_processor", None)
        threshold = None
        # Without a threshold of its own anomalib labels raw scores by one half, which means nothing.
        if post_processor is not None and not post_processor.image_threshold.isnan():
            threshold = f"{float(post_processor.normalized_image_threshold):.6g}"
        for item in outputs:
            error = (item.explanation or None) if trainer.predicting else None
            score = None if error or item.pred_score is None else f"{float(item.pred_score):.8g}"
            label = int(item.pred_label) if score and threshold and item.pred_label is not None else None
            mask = None if label is None else item.pred_mask
            self._rows.append(
                {
                    "path": item.image_path,
                    "group": self._groups.get(str(item.image_path)),
                    "score": score,
                    "label": label,
                    "threshold": None if error else threshold,
                    "abnormal_area": None if mask is None else f"{float(mask.float().mean()):.6f}",
                    "error": error,
                    "true_label": None if item.gt_label is None else int(item.gt_label),
                }
            )

    on_test_batch_end = on_predict_batch_end

    def _by_group(self) -> pd.DataFrame:
        """Return one row per group, of the images of all processes."""
        rows = [row for part in gather_objects(self._rows) for row in part]
        table = pd.DataFrame(rows, columns=COLUMNS, dtype=object)
        groups = table.astype({"score": "float", "label": "Int64", "true_label": "Int64"}).groupby("group")
        return pd.DataFrame(
            {
                "score": groups["score"].max(),
                f"mean_of_highest_{HIGHEST}": groups["score"].agg(lambda scores: scores.nlargest(HIGHEST).mean()),
                "label": groups["label"].max(),
                "abnormal_images": groups["label"].sum(min_count=1),
                "images": groups.size(),
                "unreadable_images": groups.size() - groups["score"].count(),
                "true_label": groups["true_label"].max(),
            }
        )

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the image metrics of groups, where images belong together and both classes are present."""
        rows = self._by_group()
        truths = torch.tensor([bool(truth) for truth in rows["true_label"].fillna(0)], dtype=torch.int64)
        if len(truths.unique()) < 2:
            return
        scores = torch.tensor(rows["score"].fillna(0).to_numpy(), dtype=torch.float32)
        metrics = {"group_AUROC": binary_auroc(scores, truths), "group_AUPR": binary_average_precision(scores, truths)}
        if rows["label"].notna().all():
            metrics["group_F1Score"] = binary_f1_score(torch.tensor(rows["label"].to_numpy(int)), truths)
        pl_module.log_dict(metrics)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the tables, with the rows of all processes, and log where the results are."""
        folder, groups = results_dir(trainer), self._by_group()
        turns = zip_longest(*gather_objects(self._rows))  # images were distributed in turn
        self._rows = [row for turn in turns for row in turn if row is not None]
        if trainer.is_global_zero:
            if len(groups):
                other = "true_label" if trainer.predicting else "unreadable_images"
                with replacing(folder / "predictions_by_group.csv") as partial:
                    groups.drop(columns=other).to_csv(partial, float_format="%.8g")
            left_out = {"true_label" if trainer.predicting else "error", "" if self._groups else "group"}
            table = pd.DataFrame(self._rows, columns=COLUMNS, dtype=object)
            with replacing(folder / "predictions.csv") as partial:
                table[[name for name in COLUMNS if name not in left_out]].to_csv(partial, index=False)
        logger.info("Heatmaps and predictions.csv are in %s", folder)

    on_test_end = on_predict_end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Report how many images could not be read, once everything is written, and let the command fail."""
        unread = sum(bool(row["error"]) for row in self._rows)
        if stage != "predict" or not unread:
            return
        msg = (
            f"{unread} of {len(self._rows)} images could not be read; the column 'error' of "
            f"{results_dir(trainer) / 'predictions.csv'} has the reasons. The others were predicted."
        )
        if _from_command_line(trainer):  # a program gets its predictions instead
            raise SystemExit(msg)
        logger.error(msg)
