# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""State of one fit, and the number of its epochs."""

import logging
from collections.abc import Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from anomalib_mvfa.model.prompts import prompt_name
from anomalib_mvfa.pre_processing import check_intensity
from anomalib_mvfa.training.lesions import LesionSynthesizer
from anomalib_mvfa.training.token_cache import TokenCache
from anomalib_mvfa.weights.adapter_files import training_facts

if TYPE_CHECKING:
    from anomalib_mvfa.model import MVFA

__all__ = [
    "FitState",
    "begin_training",
    "choose_class_name",
    "prepare_evaluation",
    "set_default_epochs",
    "training_data",
]

logger = logging.getLogger(__name__)

PUBLISHED_EPOCHS = 50
CACHE_IMAGES = 1000
CACHE_BYTES = 2**30


@dataclass
class FitState:
    """State of one fit, made anew when it starts."""

    lesions: LesionSynthesizer | None = None  # where the training data have no abnormal images
    class_features: dict[str, Tensor] = field(default_factory=dict)  # ``(E, 2)`` by class, where there are several
    token_cache: TokenCache | None = None  # where the training set is small and fixed

    def text_features(self, batch: Any) -> Tensor | None:
        """Return the text features ``(B, E, 2)`` of a batch that names its classes, else ``None``."""
        names = getattr(batch, "class_name", None)
        if names is None or not self.class_features:
            return None
        return torch.stack([self.class_features[name] for name in names]).to(batch.image.device)


def begin_training(module: "MVFA") -> None:
    """Set class names, masks, intensity rule, lesion synthesis and token cache for the training data.

    Raises:
        ValueError: If ``threshold="fpr"`` lacks normal images, or a resumed training has another intensity rule.
    """
    if module.option("threshold") == "fpr" and not module.option("memory") and not module.validates:
        msg = (
            "threshold='fpr' is set by normal images that the model was not trained on, but there is no validation "
            "part, and no supports as memory=False. Add normal validation images, or take another threshold."
        )
        raise ValueError(msg)
    trainer, network = module.trainer, module.model
    datamodule, data = getattr(trainer, "datamodule", None), training_data(trainer)
    rule = getattr(datamodule, "intensity", None)
    if module.resumed_from is not None:
        check_intensity(module.intensity, rule)
    module.intensity = rule
    module.fit_state = state = FitState()
    choose_class_name(module)
    names = list(getattr(datamodule, "class_names", ()))
    if names:
        logger.info("Prompts of the training images are written for %s.", ", ".join(f"'{name}'" for name in names))
        state.class_features = network.encode_classes(names)
    if not getattr(data, "has_anomalous", True):
        state.lesions = LesionSynthesizer()
        logger.info("No abnormal training images: half of the normal ones get synthetic lesions.")
    elif isinstance(data, Sized) and len(data) <= CACHE_IMAGES:
        state.token_cache = TokenCache(CACHE_BYTES, max_images=len(data))
    network.has_masks = state.lesions is not None or _has_masks(data)
    facts = training_facts(trainer, module.option("learning_rate"), synthetic_lesions=state.lesions is not None)
    module.history = {"training": {**facts, "classes": names or [network.class_name]}, "figures": {}}


def training_data(trainer: Trainer) -> Any:
    """Return the training set of a datamodule or of a plain loader; ``None`` where there is none."""
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is not None:
        return getattr(datamodule, "train_data", None)
    return getattr(trainer.train_dataloader, "dataset", None)


def _has_masks(data: Any) -> bool:
    """Return whether a data set has masks, by its task, else by its first image; true where neither is known."""
    samples = getattr(data, "samples", None)
    if samples is not None:
        return bool(samples.attrs.get("task", "segmentation") == "segmentation")
    if not hasattr(data, "__getitem__") or not len(data):
        return True
    with torch.random.fork_rng(devices=[]):  # augmentations must not change the random numbers of a seeded training
        return getattr(data[0], "gt_mask", None) is not None


def choose_class_name(module: "MVFA") -> None:
    """Choose the class name: the argument, that of the training, the datamodule's, the adapters', or "object"."""
    datamodule = getattr(module._trainer, "datamodule", None)
    category = getattr(datamodule, "category", None)
    from_data = getattr(datamodule, "class_name", None) or (prompt_name(category) if category else None)
    trained = module.model.class_name if module.trained and module.fit_state is None else None
    known = trained or from_data or module.adapter_facts.get("class_name") or "object"
    name = module.option("class_name") or known
    if name != module.model.class_name:
        logger.info("Prompts are written for the class '%s'.", name)
        module.model.set_class_name(name)


def prepare_evaluation(module: "MVFA") -> None:
    """Build the network, and raise a ``ValueError`` if images are read by another intensity rule than in training."""
    module.ensure_model()
    if not module.trained:
        module.model.has_masks = bool(module.adapter_facts.get("has_masks", _evaluates_masks(module)))
    choose_class_name(module)
    check_intensity(module.intensity, getattr(getattr(module.trainer, "datamodule", None), "intensity", None))
    if not module.trained and module.option("adapters") is None:
        logger.warning(
            "The adapters are untrained: train first, or give --ckpt_path or --model.adapters. "
            "The predictions mean nothing."
        )


def _evaluates_masks(module: "MVFA") -> bool:
    """Return whether the data that are validated or tested have masks; a prediction, without any, changes nothing."""
    trainer = module.trainer
    if trainer.state.fn == TrainerFn.PREDICTING:
        return module.model.has_masks
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is not None:
        return _has_masks(getattr(datamodule, "test_data", None))
    loaders = trainer.val_dataloaders if trainer.validating else trainer.test_dataloaders
    return _has_masks(getattr(loaders[0] if isinstance(loaders, list) else loaders, "dataset", None))


def set_default_epochs(trainer: Trainer) -> None:
    """Set the published number of epochs where no limit was given, before Lightning sets its own."""
    limited = trainer.max_steps != -1 or any(isinstance(callback, Timer) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if trainer.max_epochs is not None or limited:
        return
    trainer.fit_loop.max_epochs = PUBLISHED_EPOCHS
    logger.info("Training for %d epochs, as published; --trainer.max_epochs changes it.", PUBLISHED_EPOCHS)
