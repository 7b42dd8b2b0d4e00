# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""``run.json`` beside the checkpoints: all that is needed to repeat a training, and nothing that names a patient.

Names of files and folders may hold names of patients, so none is written. Files are known by their content: a support
by the SHA-256 of its file, which whoever has the images can compute and nobody else can lead back.
"""

import hashlib
import inspect
import json
import os
import platform
from collections.abc import Mapping
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from lightning.pytorch import LightningModule, Trainer

from anomalib_mvfa.files import replacing

__all__ = ["content_digest", "data_fingerprint", "run_record", "write_run_record"]

DIGITS = 16
SAMPLE = 4096  # bytes at either end
PACKAGES = (
    "anomalib-mvfa",
    "anomalib",
    "lightning",
    "nibabel",
    "numpy",
    "open-clip-torch",
    "pillow",
    "pydicom",
    "torch",
    "torchmetrics",
    "torchvision",
)
TRAINER = (
    "max_epochs",
    "max_steps",
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "check_val_every_n_epoch",
    "val_check_interval",
    "limit_train_batches",
    "limit_val_batches",
    "overfit_batches",
    "world_size",
    "num_nodes",
)


def content_digest(path: str | Path) -> str:
    """Digest a file.

    Args:
        path: The file.

    Returns:
        The first 16 hexadecimal digits of its SHA-256, as ``sha256sum`` prints them.
    """
    with Path(path).open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()[:DIGITS]


def data_fingerprint(dataset: Any) -> dict[str, Any] | None:  # noqa: ANN401 - any dataset
    """Digest the files of a dataset, whatever they are called and wherever they are.

    Of each file the size and the first and last 4096 bytes count, so that large sets are digested in seconds.

    Args:
        dataset: With ``samples`` as anomalib keeps them.

    Returns:
        Number of images and digest; ``None`` without such a table.
    """
    samples = getattr(dataset, "samples", None)
    if samples is None or "image_path" not in samples:
        return None
    known: dict[str, str] = {"": ""}
    columns = [
        samples[name].fillna("") if name in samples else [""] * len(samples) for name in ("image_path", "mask_path")
    ]
    frames = samples["frame"] if "frame" in samples else [0] * len(samples)
    lines = []
    for image, mask, label, frame in zip(*columns, samples["label_index"], frames, strict=True):
        for path in (image, mask):
            if path not in known:
                known[path] = _ends(Path(path))
        lines.append(f"{known[image]} {frame} {label} {known[mask]}")
    digest = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:DIGITS]
    return {"images": len(lines), "digest": digest}


def _ends(path: Path) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            content = file.read(SAMPLE)
            file.seek(max(0, size - SAMPLE))
            content += file.read(SAMPLE)
    except OSError:
        return "unreadable"
    return hashlib.sha256(f"{size}:".encode() + content).hexdigest()


def run_record(trainer: Trainer, module: LightningModule, fingerprints: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a training.

    Args:
        trainer: Lightning's trainer.
        module: The model.
        fingerprints: Digests of the parts of the data by name.

    Returns:
        Configuration of model, data and trainer, versions, seeds, supports and fingerprints, in what JSON can hold.
    """
    datamodule = getattr(trainer, "datamodule", None)
    return {
        "model": {"class": type(module).__name__, **{name: _plain(value) for name, value in module.hparams.items()}},
        "data": None if datamodule is None else _arguments(datamodule),
        "trainer": {name: _plain(getattr(trainer, name, None)) for name in TRAINER}
        | {"strategy": type(trainer.strategy).__name__, "accelerator": type(trainer.accelerator).__name__},
        "seeds": {"global": os.environ.get("PL_GLOBAL_SEED"), "torch": torch.initial_seed()},
        "supports": _supports(datamodule),
        "fingerprints": dict(fingerprints),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": {"processor": platform.machine(), "system": platform.system(), "threads": torch.get_num_threads()},
    }


def write_run_record(folder: Path, record: Mapping[str, Any]) -> Path:
    """Write ``run.json``.

    Args:
        folder: Folder of the checkpoints.
        record: What :func:`run_record` gave.

    Returns:
        The file.
    """
    path = folder / "run.json"
    with replacing(path) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def _supports(datamodule: Any) -> dict[str, list[str]] | None:  # noqa: ANN401 - any datamodule
    """Give the digests of the supports in their order, for datamodules that know them."""
    samples = getattr(getattr(datamodule, "train_data", None), "samples", None)
    if samples is None or not hasattr(datamodule, "support"):
        return None
    paths = {
        name: samples.loc[samples["label_index"] == label, "image_path"]
        for label, name in enumerate(("normal", "abnormal"))
    }
    return {name: [content_digest(path) for path in column] for name, column in paths.items()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _arguments(instance: object) -> dict[str, Any]:
    """Give what an object was made with, as far as it keeps it."""
    names = [name for name in inspect.signature(type(instance).__init__).parameters if hasattr(instance, name)]
    return {"class": type(instance).__name__, **{name: _plain(getattr(instance, name)) for name in names}}


def _plain(value: Any) -> Any:  # noqa: ANN401 - what is asked
    """Turn a value into what JSON can hold; files become digests and folders say no more than that."""
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str | Path):
        return _plain_text(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _arguments(value) if isinstance(value, AnomalibDataModule) else type(value).__name__


def _plain_text(value: str | Path) -> str:
    path = Path(value)
    try:
        if str(value) and path.is_file():
            return f"file sha256:{content_digest(path)}"
        is_path = isinstance(value, Path) or path.is_absolute() or path.is_dir() or len(path.parts) > 1
    except OSError:  # longer than a path can be
        is_path = True
    return "folder or file" if is_path and not str(value).startswith("hf-hub:") else str(value)
