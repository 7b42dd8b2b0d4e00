# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Stops a training whose loss or adapters are not finite, and explains why."""

from typing import TYPE_CHECKING, NoReturn

import torch
from anomalib.data import ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from anomalib_mvfa.weights.checkpoints import checkpoint_folder

if TYPE_CHECKING:
    from anomalib_mvfa.model import MVFA

__all__ = ["NonFiniteLoss", "explain_non_finite"]


class NonFiniteLoss(Callback):
    """Ends a training whose loss or adapters are not finite, with the adapters that the epoch began with.

    They are saved as ``last_good.safetensors`` beside the checkpoints. Lightning's early stopping on a metric that
    is not finite would end the training with the damaged adapters, and without a reason.
    """

    def __init__(self) -> None:
        self._adapters: dict[str, Tensor] = {}
        self._batch: ImageBatch | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: "MVFA") -> None:
        """Keep the adapters."""
        del trainer
        self._adapters = {
            name: value.detach().to("cpu", copy=True)
            for name, value in pl_module.model.state_dict().items()
            if name.startswith(("seg_adapters.", "det_adapters."))
        }

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: ImageBatch, batch_idx: int
    ) -> None:
        """Keep the batch, whose images may be the reason."""
        del trainer, pl_module, batch_idx
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: "MVFA", loss: Tensor) -> None:
        """Check the loss before it reaches the adapters.

        Raises:
            FloatingPointError: If it is not finite.
        """
        if not loss.isfinite():
            self._stop(trainer, pl_module, self._batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: "MVFA") -> None:
        """Check the adapters.

        Raises:
            FloatingPointError: If they are not finite.
        """
        if not _all_finite(pl_module.model):
            self._stop(trainer, pl_module, None)

    def on_validation_start(self, trainer: Trainer, pl_module: "MVFA") -> None:
        """Check the adapters that a training is about to validate."""
        if self._adapters:
            self.on_train_epoch_end(trainer, pl_module)

    def _stop(self, trainer: Trainer, module: "MVFA", batch: ImageBatch | None) -> NoReturn:
        reason = explain_non_finite(
            batch,
            weights_are_finite=_all_finite(module.model),
            precision=str(trainer.precision),
            learning_rate=module.option("learning_rate"),
        )
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


def explain_non_finite(
    batch: ImageBatch | None,
    *,
    weights_are_finite: bool,
    precision: str,
    learning_rate: float,
) -> str:
    """Explain a non-finite loss, of a batch if one is given, and suggest a remedy."""
    images: Tensor = torch.empty(0) if batch is None else batch.image  # type: ignore[assignment]
    if batch is not None and not images.isfinite().all():
        paths = batch.image_path or ["an image without a file"] * len(images)
        bad = [str(path) for path, image in zip(paths, images, strict=True) if not image.isfinite().all()]
        return f"Pixels are not finite in {', '.join(bad)}. Repair or remove them."
    if weights_are_finite:
        reason = "Images and adapters are finite, the loss is not: numbers overflow on the way."
    else:
        reason = f"The adapters are not finite: the steps were too large ({learning_rate=:g})."
    if "16" in precision:
        return f"{reason} Train with --trainer.precision 32 or bf16-mixed (now {precision}), or lower the step size."
    return f"{reason} Lower --model.learning_rate."
