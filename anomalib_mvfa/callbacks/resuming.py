# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""A checkpoint to go on from when a training is interrupted."""

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
    """Keeps a checkpoint to go on from when a training is interrupted: ``resume.ckpt`` beside the others.

    ``anomalib train ... --ckpt_path resume.ckpt`` ends with the adapters of a training that was not interrupted: random
    numbers go on where they stopped. Lightning's own checkpoints by time are written in the middle of an epoch, from
    where the order of the images cannot be restored, and its checkpoint on an exception does not survive a kill. The
    file is written at the end of an epoch, once a minute at most, and is removed when another checkpoint holds the end
    of the training.
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

    def on_fit_start(self, trainer: Trainer, pl_module: "MVFA") -> None:  # type: ignore[override]
        """Start the clock, and go on with the random numbers of the checkpoint."""
        self._saved, self._module = time.monotonic(), pl_module
        states = self._resumed.get("random_states", ())
        if len(states) == trainer.world_size:
            torch.set_rng_state(states[trainer.global_rank].cpu())

    def on_train_epoch_start(self, trainer: Trainer, pl_module: "MVFA") -> None:  # type: ignore[override]
        """Go on with the cache of the checkpoint, which decides how tokens are computed."""
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
