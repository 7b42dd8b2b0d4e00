# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Facts about a model in adapters files, checkpoints and model cards, in types of JSON.

No path is among them, as names of files and folders may contain names of patients.
"""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from anomalib_mvfa.model.prompts import prompt_ensemble
from anomalib_mvfa.model.torch_model import MVFAModel

__all__ = ["evaluation_facts", "model_facts", "training_facts"]


def model_facts(model: MVFAModel) -> dict[str, Any]:
    """Describe what the adapters of a network fit: backbone, fingerprint, levels, prompts, choices of the method."""
    return {
        "backbone": _without_folder(model.backbone.name),
        "pretrained": _without_folder(model.backbone.weights),
        "fingerprint": model.fingerprint,
        "levels": list(model.levels),
        "image_size": list(model.image_size),
        "class_name": model.class_name,
        "prompts": prompt_ensemble(),
        "has_masks": model.has_masks,
        "variant": model.variant.plain(),
        "language_weight": model.fusion.language_weight,
    }


def training_facts(trainer: Trainer, learning_rate: float, *, synthetic_lesions: bool) -> dict[str, Any]:
    """Describe a training: its data, its length, and whether normal images get synthetic lesions."""
    datamodule = getattr(trainer, "datamodule", None)
    return {
        "data": _data_name(datamodule),
        "k_shot": getattr(datamodule, "k_shot", None),
        "seed": getattr(datamodule, "seed", None),
        "synthetic_lesions": synthetic_lesions or getattr(datamodule, "abnormal_source", None) == "synthetic",
        "epochs": trainer.max_epochs,
        "learning_rate": learning_rate,
    }


def evaluation_facts(trainer: Trainer, fusion_scale: str) -> dict[str, Any]:
    """Return the metrics of a test that has ended, and how they were obtained."""
    datamodule = getattr(trainer, "datamodule", None)
    return {
        "data": _data_name(datamodule),
        "images": len(getattr(datamodule, "test_data", ())),
        "fusion_scale": fusion_scale,
        "metrics": {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(("image_", "pixel_"))
        },
    }


def _without_folder(name: str | None) -> str | None:
    """Return the file name of a local path, and other names unchanged."""
    return Path(name).name if name and Path(name).is_file() else name


def _data_name(datamodule: object) -> str | None:
    names = (getattr(datamodule, "name", None), getattr(datamodule, "category", None))
    return "/".join(dict.fromkeys(name for name in names if name)) or None
