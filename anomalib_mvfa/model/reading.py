# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""How images are read: with the grey levels of the training, ahead of the model, past files that cannot be read."""

import logging
import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch
from anomalib.data import ImageBatch, ImageItem, PredictDataset
from torch.utils.data import DataLoader

__all__ = ["ReportingDataset", "check_intensity", "read_ahead", "withhold"]

logger = logging.getLogger(__name__)

MAX_READERS = 4


class ReportingDataset(PredictDataset):
    """anomalib's dataset of a folder, in which a file that cannot be read does not end the prediction.

    Such a file becomes a black image whose ``explanation`` is the reason; the other explanations are empty.
    """

    @classmethod
    def adopt(cls, dataset: Any) -> None:  # noqa: ANN401 - any dataset
        """Turn a dataset of anomalib into one of these; leave others alone."""
        if type(dataset) is PredictDataset:
            dataset.__class__ = cls

    def __getitem__(self, index: int) -> ImageItem:
        """Read one image, or report why it cannot be read."""
        path = Path(self.image_filenames[index])
        try:
            item = super().__getitem__(index)
        except Exception as error:  # Pillow raises many kinds on damaged files
            reason = _why_unreadable(path, error)
            return ImageItem(image=torch.zeros(3, 1, 1), image_path=str(path), explanation=reason)
        item.explanation = ""
        return item


def _why_unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "permission denied"
    if not path.is_file():
        return "no such file"
    if path.stat().st_size == 0:
        return "the file is empty"
    return "truncated, damaged or not an image"


def withhold(batch: ImageBatch) -> None:
    """Replace the predictions of images that could not be read by NaN, in place.

    Args:
        batch: Predictions. Images with an ``explanation`` are those that could not be read.
    """
    unread = torch.tensor([bool(reason) for reason in batch.explanation or [""] * len(batch)])
    for name in ("pred_score", "anomaly_map"):
        values = getattr(batch, name)
        if values is not None and unread.any():
            values = values.clone()
            values[unread.to(values.device)] = torch.nan
            setattr(batch, name, values)


def read_ahead(loader: Any) -> Any:  # noqa: ANN401 - any loader
    """Let other processes read the images of a plain folder while the model computes.

    anomalib's loader for them reads one after the other. Loaders that have readers, and other data sets, stay as they
    are; so do all where starting a process would import everything anew.

    Args:
        loader: Any loader.

    Returns:
        A loader of the same batches.
    """
    if type(loader) is not DataLoader or not isinstance(loader.dataset, PredictDataset) or loader.num_workers:
        return loader
    readers = min(MAX_READERS, (os.cpu_count() or 1) - 1, len(loader.dataset))
    if multiprocessing.get_start_method() != "fork" or readers < 1:
        return loader
    return DataLoader(
        loader.dataset,
        batch_sampler=loader.batch_sampler,  # numbers the images, for Lightning
        collate_fn=loader.collate_fn,
        num_workers=readers,
        pin_memory=loader.pin_memory,
    )


def check_intensity(trained: str | None, given: str | None) -> None:
    """Refuse images that are read by another intensity rule than those of the training.

    Args:
        trained: Rule of the training images, ``None`` where they were read without one.
        given: Rule of the datamodule at hand, ``None`` where it has none.

    Raises:
        ValueError: If the rules differ.
    """
    if trained is None or given == trained:
        return
    if given is None:
        if trained != "auto":
            logger.warning(
                "The model was trained on images read with the intensity rule '%s', which these images were not: "
                "they must show the same grey levels already. --data MedicalFolder applies the rule.",
                trained,
            )
        return
    msg = (
        f"The model was trained on images read with the intensity rule '{trained}', but these are read with '{given}'. "
        f"Set the datamodule's intensity to '{trained}' (for prediction it may be left out), or train with the other "
        "rule."
    )
    raise ValueError(msg)
