# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Bank, ranges and thresholds for the checkpoint of a training, whatever ended it."""

import logging
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from anomalib_mvfa.weights.checkpoints import checkpoint_folder

if TYPE_CHECKING:
    from anomalib_mvfa.model import MVFA

__all__ = ["CompleteTraining"]

logger = logging.getLogger(__name__)


class CompleteTraining(Callback):
    """Validates and saves the last adapters if no validation followed the last step.

    Early stopping, ``max_steps``, ``max_time`` and an interval that does not divide the epochs all end a training
    between two validations.
    """

    def on_train_end(self, trainer: Trainer, pl_module: "MVFA") -> None:
        """Validate and save, unless that was done after the last step."""
        if pl_module.calibration.holds:
            return
        logger.info("Validating the adapters of step %d, with which the training ended.", trainer.global_step)
        if pl_module.validates:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True
        else:
            pl_module.calibration.complete(pl_module)
        callback = trainer.checkpoint_callback
        if isinstance(callback, ModelCheckpoint) and callback.monitor is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = callback.best_model_path or checkpoint_folder(trainer) / f"{callback.filename or 'model'}.ckpt"
            trainer.save_checkpoint(path)
            callback.best_model_path = str(path)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a second training with a trainer whose epochs are used up.

        Raises:
            RuntimeError: If the trainer has trained before and goes on from no checkpoint.
        """
        del pl_module
        if trainer.current_epoch and not trainer.ckpt_path:
            msg = (
                f"This Engine has already trained for {trainer.current_epoch} epochs, so that another fit would end at "
                "once. Make a new Engine for it, or go on from a checkpoint with ckpt_path."
            )
            raise RuntimeError(msg)
