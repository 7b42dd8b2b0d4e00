# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Arguments of a model: defaults, and which may differ from those of a checkpoint."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from anomalib_mvfa.backbones.loading import PUBLISHED_BACKBONE, resolve_backbone
from anomalib_mvfa.model.tower import resolve_levels
from anomalib_mvfa.model.variant import NETWORK_CHOICES, VARIANTS, Variant

from .checkpoints import checkpoint_facts, is_fitting

if TYPE_CHECKING:
    from anomalib_mvfa.model import MVFA

__all__ = ["CHOICES", "DEFAULTS", "NETWORK", "Settled", "settle", "settle_arguments"]

DEFAULTS: dict[str, Any] = {
    "backbone": PUBLISHED_BACKBONE,
    "memory": True,
    "max_support": 32,
    "learning_rate": 1e-3,
    "selection": "last",
    "fusion_scale": "support",
    "language_weight": 0.5,
    "coreset": 1.0,
    "threshold": "f1",
    "target_fpr": 0.01,
    "variant": "released",
}
CHOICES = {"fusion_scale": ("support", "test"), "selection": ("last", "best")}
NETWORK = ("backbone", "pretrained", "image_size", "levels", "variant")
ARCHITECTURE = ("backbone", "image_size", "levels")
TRAINING = ("learning_rate", "selection")
TRAINING_CHOICES = ("bce_as_logits", "background_dice")
THRESHOLDS = ("threshold", "target_fpr", "language_weight", "map_blur")
"""Arguments that change scores or thresholds, but neither the bank nor the ranges of the branches."""


class Settled(NamedTuple):
    """Arguments of a checkpoint and given ones combined, and whether its bank and ranges, its thresholds fit them."""

    arguments: dict[str, Any]
    bank_holds: bool
    thresholds_hold: bool


def settle_arguments(saved: dict[str, Any], given: Mapping[str, Any], *, resuming: bool) -> Settled:
    """Combine the arguments of a checkpoint with those given beside it: honour each of them, or refuse it.

    What the weights fix may not differ. What concerns evaluation may, except when a training is resumed. Arguments that
    only training reads have no effect on an evaluation. ``pretrained`` may name another copy of the weights, which are
    compared by their fingerprint.

    Raises:
        ValueError: If an argument contradicts the checkpoint.

    Example:
        >>> saved = {"memory": True, "threshold": "f1", "backbone": "tiny", "variant": Variant().plain()}
        >>> settle_arguments(saved, {"threshold": "fpr"}, resuming=False)[1:]
        (True, False)
    """
    if given.get("adapters") is not None:
        msg = "A checkpoint holds adapters of its own. Give --ckpt_path or --model.adapters, not both."
        raise ValueError(msg)
    own = asked = Variant.of(saved["variant"])
    if "variant" in given:
        asked = Variant.of(given["variant"])
        decided = {"quick_gelu": asked.quick_gelu, "normalize_input": asked.normalize_input}
        if asked in VARIANTS.values():
            decided["quick_gelu"] = None
        # What is None was decided by the backbone.
        asked = replace(asked, **{name: getattr(own, name) for name, value in decided.items() if value is None})
    arguments = {**saved, **given, "variant": asked.plain()}
    # Each argument and each choice of the variant: name of its option, value in the checkpoint, value in force.
    values = {name: (f"--model.{name}", saved.get(name), value) for name, value in given.items() if name != "variant"}
    values |= {name: (f"--model.variant.{name}", own.plain()[name], value) for name, value in asked.plain().items()}
    changed = {name for name, (_, before, now) in values.items() if _comparable(before) != _comparable(now)}
    fixed = changed if resuming else changed & {*ARCHITECTURE, *NETWORK_CHOICES}
    for name in sorted(fixed - {"pretrained"}):
        option, before, now = values[name]
        why = "a training goes on with the arguments that it began with" if resuming else "its weights fit no other"
        msg = (
            f"The checkpoint was made with {option} {before}, but {now} was given; {why}. Leave it out, or train anew."
        )
        raise ValueError(msg)
    effective = changed - {"pretrained", *TRAINING, *TRAINING_CHOICES}
    if "memory" in changed and not given["memory"]:
        effective = (effective - {"memory"}) | {"threshold"}  # a bank that is not used needs no change
    return Settled(arguments, bank_holds=effective <= set(THRESHOLDS), thresholds_hold=not effective)


def _comparable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def settle(module: "MVFA", checkpoint: dict[str, Any]) -> Settled:
    """Combine the arguments of a checkpoint with those given to a model, as :func:`settle_arguments` does."""
    facts = checkpoint_facts(checkpoint)
    saved = facts["arguments"]
    given = {name: module.hparams_initial[name] for name in module.explicit}
    if isinstance(given.get("image_size"), int):
        given["image_size"] = [given["image_size"]] * 2
    if isinstance(given.get("levels"), str):
        config = resolve_backbone(saved["backbone"], saved["pretrained"])
        given["levels"] = resolve_levels(given["levels"], config.model["vision_cfg"]["layers"])
    settled = settle_arguments({**saved, "class_name": facts["class_name"]}, given, resuming=is_fitting(module))
    kept = given.get("class_name", saved["class_name"])
    return settled._replace(arguments={**settled.arguments, "class_name": kept})
