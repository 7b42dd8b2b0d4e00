# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""``run.json`` beside the checkpoints: all that is needed to repeat a training, and nothing that names a patient.

Names of files and folders may contain names of patients, so none is written. Files are identified by the SHA-256 of
their content.
"""

import hashlib
import inspect
import json
import logging
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from anomalib.data import AnomalibDataModule
from lightning.pytorch import Callback, Trainer
from open_clip.factory import HF_HUB_PREFIX

from anomalib_mvfa.files import DIGITS, content_digest, replacing
from anomalib_mvfa.processes import gather_objects
from anomalib_mvfa.training.state import training_data
from anomalib_mvfa.weights.checkpoints import checkpoint_folder

if TYPE_CHECKING:
    from anomalib_mvfa.model import MVFA

__all__ = ["RunRecord", "data_fingerprint"]

logger = logging.getLogger(__name__)

SAMPLE = 4096  # bytes at either end
LIBRARIES = ("anomalib", "lightning", "nibabel", "numpy", "open-clip-torch", "pillow", "pydicom")
TORCH = ("torch", "torchmetrics", "torchvision")
TRAINING = ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val", "overfit_batches")
LIMITS = ("check_val_every_n_epoch", "val_check_interval", "limit_train_batches", "limit_val_batches")
PROCESSES = ("world_size", "num_nodes")


class RunRecord(Callback):
    """Writes ``run.json`` when a training starts, and checks that all processes and a resumed training have one set."""

    def __init__(self) -> None:
        self._digest: str | None = None
        self._resumed: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the digest of the training images."""
        return {"training_images": self._digest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the digest of the training that is resumed."""
        self._resumed = state_dict["training_images"]

    def on_train_start(self, trainer: Trainer, pl_module: "MVFA") -> None:
        """Write the record; raise a ``ValueError`` if processes have different data."""
        datamodule = getattr(trainer, "datamodule", None)
        parts = {name: getattr(datamodule, f"{name}_data", None) for name in ("train", "val", "test")}
        parts["train"] = training_data(trainer)
        prints = {name: data_fingerprint(part) for name, part in parts.items()}
        if len({str(found) for found in gather_objects(prints)}) > 1:
            msg = (
                "The processes have different images: their datamodule splits at random. Give it a seed, or set "
                "--seed_everything."
            )
            raise ValueError(msg)
        self._digest = (prints["train"] or {}).get("digest")
        if self._resumed not in (None, self._digest):
            logger.warning("The training images are not those that the checkpoint was made with.")
        self._resumed = None
        saves = trainer.checkpoint_callback is not None and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if saves and trainer.is_global_zero:
            with replacing(checkpoint_folder(trainer) / "run.json") as partial:
                record = _record(trainer, pl_module, prints)
                partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def data_fingerprint(dataset: Any) -> dict[str, Any] | None:
    """Digest the files of a dataset, independent of their names and folders.

    Of each file the size and the first and last 4096 bytes count, so that large sets are digested in seconds. A dataset
    without ``samples`` has none.
    """
    samples = getattr(dataset, "samples", None)
    if samples is None or "image_path" not in samples:
        return None
    ends = cache(_ends)  # many frames share a file
    columns = [samples.get(name, pd.Series("", samples.index)).fillna("") for name in ("image_path", "mask_path")]
    frames = samples.get("frame", [0] * len(samples))
    lines = [
        f"{ends(image)} {frame} {label} {ends(mask)}"
        for image, mask, label, frame in zip(*columns, samples["label_index"], frames, strict=True)
    ]
    digest = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:DIGITS]
    return {"images": len(lines), "digest": digest}


def _ends(path: str) -> str:
    if not path:
        return ""
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            content = file.read(SAMPLE)
            file.seek(max(0, size - SAMPLE))
            content += file.read(SAMPLE)
    except OSError:
        return "unreadable"
    return hashlib.sha256(f"{size}:".encode() + content).hexdigest()


def _record(trainer: Trainer, module: "MVFA", fingerprints: Mapping[str, Any]) -> dict[str, Any]:
    datamodule = getattr(trainer, "datamodule", None)
    return {
        "model": _arguments(module, module.arguments),
        "data": None if datamodule is None else _arguments(datamodule, vars(datamodule)),
        "trainer": {name: _plain(getattr(trainer, name, None)) for name in (*TRAINING, *LIMITS, *PROCESSES)}
        | {"strategy": type(trainer.strategy).__name__, "accelerator": type(trainer.accelerator).__name__},
        "seeds": {"global": os.environ.get("PL_GLOBAL_SEED"), "torch": torch.initial_seed()},
        "supports": _supports(datamodule),
        "fingerprints": dict(fingerprints),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("anomalib-mvfa", *LIBRARIES, *TORCH)},
        },
        "machine": {"processor": platform.machine(), "system": platform.system(), "threads": torch.get_num_threads()},
    }


def _supports(datamodule: Any) -> dict[str, list[str]] | None:
    samples = getattr(getattr(datamodule, "train_data", None), "samples", None)
    if samples is None or not hasattr(datamodule, "support"):
        return None
    return {
        name: [content_digest(path) for path in samples["image_path"][samples["label_index"] == label]]
        for label, name in enumerate(("normal", "abnormal"))
    }


def _version(package: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _arguments(instance: object, values: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(type(instance).__init__).parameters
    return {"class": type(instance).__name__} | {
        name: _plain(values[name], may_be_path="Path" in str(parameter.annotation))
        for name, parameter in parameters.items()
        if name in values
    }


def _plain(value: Any, *, may_be_path: bool = False) -> Any:
    """Convert a value to types of JSON: a file becomes its digest, the name of a folder is omitted."""
    if value is None or isinstance(value, bool | int | float | Enum):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, str | Path):
        with suppress(OSError):  # longer than a path can be
            if Path(value).is_file():
                return f"file sha256:{content_digest(value)}"
        hidden = (may_be_path or isinstance(value, Path)) and not str(value).startswith(HF_HUB_PREFIX)
        return "folder or file" if hidden else value
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, may_be_path=may_be_path) for item in value]
    return _arguments(value, vars(value)) if isinstance(value, AnomalibDataModule) else type(value).__name__
