# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The three terms of the training loss, each one value a sample."""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["dice_loss", "focal_loss", "score_loss"]

FOCAL_GAMMA = 2
FOCAL_SMOOTHING = 1e-5
DICE_SMOOTHING = 1.0


def focal_loss(probabilities: Tensor, masks: Tensor) -> Tensor:
    """Focal loss on a map of state probabilities.

    Args:
        probabilities: ``(B, 2, H, W)``, summing to one over the states.
        masks: ``(B, H, W)`` in {0, 1}.

    Returns:
        Loss ``(B,)``, the mean over the pixels. Source: Lin et al. 2017, gamma 2, labels smoothed by 1e-5.
    """
    target = functional.one_hot(masks.long(), 2).movedim(-1, 1).to(probabilities.dtype)
    target = target.clamp(FOCAL_SMOOTHING, 1 - FOCAL_SMOOTHING)
    confidence = (target * probabilities).sum(dim=1) + FOCAL_SMOOTHING  # (B, H, W)
    return (-((1 - confidence) ** FOCAL_GAMMA) * confidence.log()).mean(dim=(1, 2))


def dice_loss(abnormal: Tensor, masks: Tensor) -> Tensor:
    """Dice loss on the map of one state.

    Args:
        abnormal: Probabilities ``(B, H, W)``.
        masks: ``(B, H, W)`` in {0, 1}.

    Returns:
        Loss ``(B,)`` in [0, 1].
    """
    masks = masks.to(abnormal.dtype)
    overlap = (abnormal * masks).sum(dim=(1, 2))
    total = abnormal.sum(dim=(1, 2)) + masks.sum(dim=(1, 2))
    return 1 - (2 * overlap + DICE_SMOOTHING) / (total + DICE_SMOOTHING)


def score_loss(scores: Tensor, labels: Tensor, as_logits: bool = True) -> Tensor:
    """Binary cross-entropy on an image score.

    Args:
        scores: ``(B,)`` in [0, 1].
        labels: ``(B,)`` in {0, 1}.
        as_logits: The released code hands the probability to a cross-entropy that expects a logit. ``False`` treats
            it as the probability it is, as the paper's formula does.

    Returns:
        Loss ``(B,)``.
    """
    labels = labels.to(scores.dtype)
    if as_logits:
        return functional.binary_cross_entropy_with_logits(scores, labels, reduction="none")
    # Written out, because the library's version refuses to run under autocast.
    scores = scores.clamp(torch.finfo(scores.dtype).eps, 1 - torch.finfo(scores.dtype).eps)
    return -(labels * scores.log() + (1 - labels) * (1 - scores).log())
