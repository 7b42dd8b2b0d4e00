# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""A checkpoint to go on from when a training is interrupted."""

import time

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from anomalib_mvfa.weights.checkpoints import checkpoint_folder

__all__ = ["ResumePoint"]

RESUME_POINT = "resume.ckpt"


class ResumePoint(Checkpoint):
    """Keeps a checkpoint to go on from when a training is interrupted: ``resume.ckpt`` beside the others.

    ``anomalib train ... --ckpt_path resume.ckpt`` ends with the adapters of a training that was not interrupted. The
    file is written at the end of an epoch, once a minute at most, and is removed when the training has ended.
    """

    SECONDS = 60.0

    def __init__(self) -> None:
        self._saved = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        del trainer, pl_module
        self._saved = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, if it is time."""
        del pl_module
        due = trainer.strategy.broadcast(time.monotonic() - self._saved >= self.SECONDS)
        if due and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by Lightning
            trainer.save_checkpoint(checkpoint_folder(trainer) / RESUME_POINT)
            self._saved = time.monotonic()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the file: the training is complete."""
        del pl_module
        if trainer.is_global_zero:
            (checkpoint_folder(trainer) / RESUME_POINT).unlink(missing_ok=True)
