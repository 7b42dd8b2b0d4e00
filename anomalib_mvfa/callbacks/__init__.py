# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Lightning callbacks for what surrounds a run: records, resuming, loading, prediction table."""

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn

from .fitting import BestEpoch, CompleteTraining, NonFiniteLoss, ResumePoint
from .prediction_table import PredictionTable
from .run_record import RunRecord

if TYPE_CHECKING:
    from anomalib_mvfa.model import MVFA

__all__ = ["surrounding_callbacks"]


def surrounding_callbacks(module: "MVFA") -> list[Callback]:
    """Return new callbacks for the run that a model's trainer is about to start."""
    trainer = module.trainer
    if trainer.state.fn != TrainerFn.FITTING:
        return [PredictionTable()]
    callbacks: list[Callback] = [RunRecord(), NonFiniteLoss(), CompleteTraining()]
    if module.option("selection") == "best":  # takes the place of anomalib's callback of the same class
        callbacks.append(BestEpoch(Path(trainer.default_root_dir) / "weights" / "lightning"))
    if trainer.checkpoint_callback is not None:
        callbacks.append(ResumePoint())
    return callbacks
