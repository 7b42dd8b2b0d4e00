# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Selection of the epoch, as in the published protocol."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalib.callbacks import ModelCheckpoint
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_mvfa.metrics import SelectionScore

if TYPE_CHECKING:
    from anomalib_mvfa.model import MVFA

__all__ = ["BestEpoch"]

logger = logging.getLogger(__name__)

SCORE = "selection_score"


class BestEpoch(ModelCheckpoint):
    """Keeps the epoch with the greatest image AUROC (plus pixel AUROC where there are masks) in validation."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder, filename="model", monitor=SCORE, mode="max", save_on_train_epoch_end=False)
        self._score = SelectionScore()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best epoch of an interrupted training, also in another folder."""
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn where the epoch is chosen on the test images."""
        super().on_train_start(trainer, pl_module)
        datamodule = getattr(trainer, "datamodule", None)
        samples = [getattr(getattr(datamodule, f"{part}_data", None), "samples", {}) for part in ("val", "test")]
        shared = set.intersection(*(set(part.get("image_path", ())) for part in samples))
        if shared:
            logger.warning(
                "selection='best' on a validation part that shares %d images with the test part, as in the published "
                "protocol: the test figures are those of the epoch that suits the test images best.",
                len(shared),
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop what an interrupted validation has left."""
        super().on_validation_start(trainer, pl_module)
        self._score.reset()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Add a batch."""
        del trainer, pl_module, args, kwargs
        self._score.update(outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the score of the epoch."""
        if trainer.state.fn == TrainerFn.FITTING:
            pl_module.log(SCORE, self._score.compute(), prog_bar=True)

    def on_fit_end(self, trainer: Trainer, pl_module: "MVFA") -> None:
        """Restore the best epoch."""
        if not self.best_model_path:
            return
        checkpoint = trainer.strategy.load_checkpoint(self.best_model_path, weights_only=True)
        pl_module.on_load_checkpoint(checkpoint)
        pl_module.load_state_dict(checkpoint["state_dict"])
        score = float(self.best_model_score or 0)
        epochs = trainer.current_epoch
        logger.info("Kept epoch %d of %d, selection score %.4f.", checkpoint["epoch"] + 1, epochs, score)
