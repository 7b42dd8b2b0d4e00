# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""What to tell of a training whose loss is no finite number any more."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

__all__ = ["all_finite", "diagnosis"]


def all_finite(module: nn.Module) -> bool:
    """Tell whether every trained weight is a finite number."""
    return all(bool(weight.isfinite().all()) for weight in module.parameters() if weight.requires_grad)


def diagnosis(
    terms: Mapping[str, Tensor],
    images: Tensor | None,
    paths: Sequence[str],
    *,
    weights_are_finite: bool,
    precision: str,
    learning_rate: float,
) -> str:
    """Word why a loss may be no finite number, and what helps.

    Args:
        terms: Terms of the loss, one value an image.
        images: ``(B, 3, H, W)``, if the loss of a batch is at fault.
        paths: Their files.
        weights_are_finite: Whether the adapters still hold finite numbers.
        precision: Lightning's name of the precision.
        learning_rate: Step size.

    Returns:
        Sentences.
    """
    if images is not None and not images.isfinite().all():
        bad = [path for path, image in zip(paths, images, strict=False) if not image.isfinite().all()]
        return f"Pixels are no finite numbers in {', '.join(bad) or 'images without a file'}. Repair or remove them."
    if not weights_are_finite:
        why = f"The adapters hold numbers that are not finite: the steps were too large ({learning_rate=:g})."
    else:
        bad = [name for name, values in terms.items() if not values.isfinite().all()]
        why = f"Images and adapters are finite, the loss ({', '.join(bad)}) is not: numbers overflow on the way."
    remedy = " Lower --model.learning_rate."
    if "16" in precision:
        remedy = (
            f" The precision is {precision}: train with --trainer.precision 32 or bf16-mixed, or lower the step size."
        )
    return why + remedy
