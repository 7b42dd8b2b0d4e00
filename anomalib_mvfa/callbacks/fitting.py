# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""What ends, interrupts or resumes a training: choice of the epoch, last validation, resume point, non-finite loss."""

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import ImageBatch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.callbacks import ModelCheckpoint as LightningCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from anomalib_mvfa.metrics import SelectionScore
from anomalib_mvfa.processes import gather_objects
from anomalib_mvfa.training.token_cache import TokenCache
from anomalib_mvfa.weights.checkpoints import checkpoint_folder

if TYPE_CHECKING:
    from anomalib_mvfa.model import MVFA

__all__ = ["BestEpoch", "CompleteTraining", "NonFiniteLoss", "ResumePoint"]

logger = logging.getLogger(__name__)

SCORE = "selection_score"
RESUME_POINT = "resume.ckpt"


class BestEpoch(ModelCheckpoint):
    """Keeps the epoch with the greatest image AUROC (plus pixel AUROC where there are masks) in validation."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder, filename="model", monitor=SCORE, mode="max", save_on_train_epoch_end=False)
        self._score = SelectionScore()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best epoch of an interrupted training, also in another folder."""
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})

    def on_train_start(self, trainer: Trainer, pl_module: "MVFA") -> None:
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

    def on_validation_start(self, trainer: Trainer, pl_module: "MVFA") -> None:
        """Drop what an interrupted validation has left."""
        super().on_validation_start(trainer, pl_module)
        self._score.reset()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: "MVFA", outputs: Any, *args: Any) -> None:
        """Add a batch to the score."""
        self._score.update(outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: "MVFA") -> None:
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


class CompleteTraining(Callback):
    """Validates and saves the last adapters if no validation followed the last step.

    Early stopping, ``max_steps``, ``max_time`` and an interval that does not divide the epochs all end a training
    between two validations.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: "MVFA") -> None:
        """Raise a ``RuntimeError`` for a second training with a trainer whose epochs are used up."""
        if trainer.current_epoch and not trainer.ckpt_path:
            msg = (
                f"This Engine has already trained for {trainer.current_epoch} epochs, so that another fit would end at "
                "once. Make a new Engine for it, or go on from a checkpoint with ckpt_path."
            )
            raise RuntimeError(msg)

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
        if isinstance(callback, LightningCheckpoint) and callback.monitor is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = callback.best_model_path or checkpoint_folder(trainer) / f"{callback.filename or 'model'}.ckpt"
            trainer.save_checkpoint(path)
            callback.best_model_path = str(path)


class ResumePoint(Checkpoint):
    """Keeps ``resume.ckpt`` beside the other checkpoints until the training is complete and saved.

    ``anomalib train ... --ckpt_path resume.ckpt`` ends with the adapters of an uninterrupted training: random numbers
    continue where they stopped. The file is written at the end of an epoch, once a minute at most. Lightning's
    checkpoints by time are written within an epoch, whose order of images cannot be restored, and its checkpoint on an
    exception does not survive a kill.
    """

    SECONDS = 60.0

    def __init__(self) -> None:
        self._saved = time.monotonic()
        self._module: MVFA | None = None
        self._resumed: dict[str, Any] = {}

    @property
    def _token_cache(self) -> TokenCache | None:
        return None if self._module is None or self._module.fit_state is None else self._module.fit_state.token_cache

    def state_dict(self) -> dict[str, Any]:
        """Return random state and cache state of every process."""
        cache = self._token_cache
        return {
            "random_states": gather_objects(torch.get_rng_state()),
            "token_caches": gather_objects(None if cache is None else cache.state()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint holds until the fit starts."""
        self._resumed = state_dict

    def on_fit_start(self, trainer: Trainer, pl_module: "MVFA") -> None:
        """Start the clock, and restore the random state of the checkpoint."""
        self._saved, self._module = time.monotonic(), pl_module
        states = self._resumed.get("random_states", ())
        if len(states) == trainer.world_size:
            torch.set_rng_state(states[trainer.global_rank].cpu())

    def on_train_epoch_start(self, trainer: Trainer, pl_module: "MVFA") -> None:
        """Restore the cache of the checkpoint, on which the way tokens are computed depends."""
        states, self._resumed = self._resumed.get("token_caches", ()), {}
        cache = self._token_cache
        if cache is not None and len(states) == trainer.world_size and states[trainer.global_rank]:
            cache.restore(states[trainer.global_rank])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: "MVFA") -> None:
        """Save, if it is time."""
        due = trainer.strategy.broadcast(time.monotonic() - self._saved >= self.SECONDS)
        if due and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by Lightning
            trainer.save_checkpoint(checkpoint_folder(trainer) / RESUME_POINT)
            self._saved = time.monotonic()

    def on_fit_end(self, trainer: Trainer, pl_module: "MVFA") -> None:
        """Remove the file, once the training is complete and saved."""
        point = checkpoint_folder(trainer) / RESUME_POINT
        if trainer.is_global_zero and any(path != point for path in point.parent.glob("*.ckpt")):
            point.unlink(missing_ok=True)


class NonFiniteLoss(Callback):
    """Ends a training whose loss or adapters are not finite, with the adapters that the epoch began with.

    They are saved as ``last_good.safetensors`` beside the checkpoints, and the ``FloatingPointError`` suggests a
    remedy. Lightning's early stopping on a metric that is not finite would end the training with the damaged adapters,
    and without a reason.
    """

    def __init__(self) -> None:
        self._adapters: dict[str, Tensor] = {}
        self._batch: ImageBatch | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: "MVFA") -> None:
        """Keep the adapters."""
        self._adapters = {
            name: value.detach().to("cpu", copy=True)
            for name, value in pl_module.model.state_dict().items()
            if name.startswith(("seg_adapters.", "det_adapters."))
        }

    def on_train_batch_start(self, trainer: Trainer, pl_module: "MVFA", batch: ImageBatch, batch_idx: int) -> None:
        """Keep the batch, whose images may be the reason."""
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: "MVFA", loss: Tensor) -> None:
        """Check the loss before it reaches the adapters."""
        if not loss.isfinite():
            self._stop(trainer, pl_module, self._batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: "MVFA") -> None:
        """Check the adapters."""
        if not _all_finite(pl_module.model):
            self._stop(trainer, pl_module, None)

    def on_validation_start(self, trainer: Trainer, pl_module: "MVFA") -> None:
        """Check the adapters that a training is about to validate."""
        if self._adapters:
            self.on_train_epoch_end(trainer, pl_module)

    def _stop(self, trainer: Trainer, module: "MVFA", batch: ImageBatch | None) -> NoReturn:
        reason = _explain(trainer, module, batch)
        module.model.load_state_dict(self._adapters, strict=False)
        msg = (
            f"The training has diverged in epoch {trainer.current_epoch + 1}, step {trainer.global_step + 1}. {reason}"
        )
        if trainer.current_epoch:
            path = checkpoint_folder(trainer) / "last_good.safetensors"
            if trainer.is_global_zero:
                module.save_adapters(path)
            msg += f" The adapters of {trainer.current_epoch} complete epochs are in {path}."
        raise FloatingPointError(msg)


def _all_finite(module: nn.Module) -> bool:
    return all(bool(weight.isfinite().all()) for weight in module.parameters() if weight.requires_grad)


def _explain(trainer: Trainer, module: "MVFA", batch: ImageBatch | None) -> str:
    images: Tensor = torch.empty(0) if batch is None else batch.image  # type: ignore[assignment]
    if batch is not None and not images.isfinite().all():
        paths = batch.image_path or ["an image without a file"] * len(images)
        bad = [str(path) for path, image in zip(paths, images, strict=True) if not image.isfinite().all()]
        return f"Pixels are not finite in {', '.join(bad)}. Repair or remove them."
    if _all_finite(module.model):
        reason = "Images and adapters are finite, the loss is not: numbers overflow on the way."
    else:
        learning_rate = module.option("learning_rate")
        reason = f"The adapters are not finite: the steps were too large ({learning_rate=:g})."
    precision = str(trainer.precision)
    if "16" in precision:
        return f"{reason} Train with --trainer.precision 32 or bf16-mixed (now {precision}), or lower the step size."
    return f"{reason} Lower --model.learning_rate."
