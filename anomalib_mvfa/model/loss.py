# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The terms of the training loss, each one value a sample."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from anomalib_mvfa.training.token_cache import TokenCache

    from .torch_model import MVFAModel

__all__ = ["dice_loss", "focal_loss", "score_loss", "training_losses"]

FOCAL_GAMMA = 2
FOCAL_SMOOTHING = 1e-5
DICE_SMOOTHING = 1.0


def focal_loss(probabilities: Tensor, masks: Tensor) -> Tensor:
    """Compute the focal loss ``(B,)`` of maps ``(B, 2, H, W)`` of state probabilities and masks ``(B, H, W)``.

    The mean over the pixels. Source: Lin et al. 2017, gamma 2, labels smoothed by 1e-5.
    """
    target = functional.one_hot(masks.long(), 2).movedim(-1, 1).to(probabilities.dtype)
    target = target.clamp(FOCAL_SMOOTHING, 1 - FOCAL_SMOOTHING)
    confidence = (target * probabilities).sum(dim=1) + FOCAL_SMOOTHING  # (B, H, W)
    return (-((1 - confidence) ** FOCAL_GAMMA) * confidence.log()).mean(dim=(1, 2))


def dice_loss(abnormal: Tensor, masks: Tensor) -> Tensor:
    """Compute the Dice loss ``(B,)`` in [0, 1] of the map of one state and masks in {0, 1}, ``(B, H, W)`` each."""
    masks = masks.to(abnormal.dtype)
    overlap = (abnormal * masks).sum(dim=(1, 2))
    total = abnormal.sum(dim=(1, 2)) + masks.sum(dim=(1, 2))
    return 1 - (2 * overlap + DICE_SMOOTHING) / (total + DICE_SMOOTHING)


def score_loss(scores: Tensor, labels: Tensor, as_logits: bool = True) -> Tensor:
    """Compute the binary cross-entropy ``(B,)`` of image scores in [0, 1] and labels in {0, 1}, ``(B,)`` each.

    ``as_logits`` passes the probability to a cross-entropy that expects a logit, as in the released code; the paper's
    formula takes it as a probability.
    """
    labels = labels.to(scores.dtype)
    if as_logits:
        return functional.binary_cross_entropy_with_logits(scores, labels, reduction="none")
    # torch's own function raises an error under autocast.
    scores = scores.clamp(torch.finfo(scores.dtype).eps, 1 - torch.finfo(scores.dtype).eps)
    return -(labels * scores.log() + (1 - labels) * (1 - scores).log())


def training_losses(
    model: "MVFAModel",
    images: Tensor,
    labels: Tensor,
    masks: Tensor | None,
    has_mask: Tensor | None = None,
    text_features: Tensor | None = None,
    cache: "TokenCache | None" = None,
) -> dict[str, Tensor]:
    """Compute the terms of the loss of a batch, summed over the levels.

    Args:
        model: The network.
        images: ``(B, 3, H, W)`` in [0, 1].
        labels: ``(B,)``.
        masks: ``(B, H, W)``; ``None`` for sets without masks, whose images do not move the segmentation adapters.
        has_mask: ``(B,)``, false for images of sets without masks in a batch of several; ``None`` when all have masks.
        text_features: ``(B, E, 2)`` when each image has a class of its own; ``None`` takes the model's own.
        cache: Keeps the tokens below the first adapters.

    Returns:
        ``bce`` and, with masks, ``focal`` and ``dice``, one value ``(B,)`` each.
    """
    if has_mask is not None and masks is not None:
        masks = masks if bool(has_mask.any()) else None
        has_mask = None if bool(has_mask.all()) else has_mask
    frozen = masks is None if has_mask is None or masks is None else ~has_mask
    hidden = model.hidden_tokens(images, frozen_segmentation=frozen, cache=cache)
    scores = [model.level_score(tokens, text_features) for tokens in hidden.detection]
    terms = {"bce": _sum([score_loss(score, labels, model.variant.bce_as_logits) for score in scores])}
    if masks is None:
        return terms
    maps = [model.level_map(tokens, text_features) for tokens in hidden.segmentation]
    on_masks = {
        "focal": _sum([focal_loss(state_map, masks) for state_map in maps]),
        "dice": _sum([dice_loss(state_map[:, 1], masks) for state_map in maps]),
    }
    if model.variant.background_dice:
        on_masks["background_dice"] = _sum([dice_loss(state_map[:, 0], ~masks.bool()) for state_map in maps])
    return terms | (on_masks if has_mask is None else {name: term * has_mask for name, term in on_masks.items()})


def _sum(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum(dim=0)
