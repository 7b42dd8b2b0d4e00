# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""A checkpoint for resuming an interrupted training."""

import time
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from anomalib_mvfa.processes import gather_objects
from anomalib_mvfa.training.token_cache import TokenCache
from anomalib_mvfa.weights.checkpoints import checkpoint_folder

if TYPE_CHECKING:
    from anomalib_mvfa.model import MVFA

__all__ = ["ResumePoint"]

RESUME_POINT = "resume.ckpt"


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

    def state_dict(self) -> dict[str, Any]:
        """Return random state and cache state of every process."""
        cache = _token_cache(self._module)
        return {
            "random_states": gather_objects(torch.get_rng_state()),
            "token_caches": gather_objects(cache.state() if cache is not None else None),
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
        cache = _token_cache(pl_module)
        if cache is not None and len(states) == trainer.world_size and states[trainer.global_rank]:
            cache.restore(states[trainer.global_rank])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, if it is time."""
        del pl_module
        due = trainer.strategy.broadcast(time.monotonic() - self._saved >= self.SECONDS)
        if due and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by Lightning
            trainer.save_checkpoint(checkpoint_folder(trainer) / RESUME_POINT)
            self._saved = time.monotonic()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the file, once the training is complete and saved."""
        del pl_module
        point = checkpoint_folder(trainer) / RESUME_POINT
        if trainer.is_global_zero and any(path != point for path in point.parent.glob("*.ckpt")):
            point.unlink(missing_ok=True)


def _token_cache(module: "MVFA | None") -> TokenCache | None:
    return None if module is None or module.fit_state is None else module.fit_state.token_cache
