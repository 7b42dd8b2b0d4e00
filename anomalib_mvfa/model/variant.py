# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The choices in which the released code, the paper and later work differ."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .adapters import ACTIVATIONS

__all__ = ["NETWORK_CHOICES", "VARIANTS", "Variant"]

NETWORK_CHOICES = ("quick_gelu", "normalize_input", "activation", "residual", "last_level_projector", "residual_norm")
"""Choices that change the tokens: adapters fit only the ones that they were trained with."""


@dataclass(frozen=True)
class Variant:
    """Choices of the method. The defaults are those of the released code.

    Args:
        quick_gelu: Whether the tower runs QuickGELU. ``None`` runs what the weights were trained with, except for
            ``ViT-L-14-336``, where the released code runs the exact GELU and the released adapters expect it.
        normalize_input: Whether to apply mean and standard deviation. ``None`` applies those that come with the
            weights, except for ``ViT-L-14-336``, where the released code feeds [0, 1].
        activation: Non-linearity of the adapters, ``"leaky_relu"`` or ``"relu"`` (paper).
        residual: Shares of the token, the segmentation output and the detection output in what enters the next stage.
            The paper's gamma = 0.1 for one adapter is shared by two here: (0.9, 0.05, 0.05).
        last_level_projector: Whether the hidden vector of the last level is a linear projection (paper).
        pooling: Image score from the patches: ``"mean"`` or ``"max"`` (paper).
        level_reduction: Levels added up by ``"sum"`` or ``"mean"`` (paper).
        bce_as_logits: Whether the cross-entropy treats the probability as a logit. The paper's formula does not.
        residual_norm: Rescale the adapters' outputs to the token's own length first. Source: AA-CLIP, MoECLIP.
        window_sizes: Average each patch with its neighbours at these odd side lengths. Source: MoECLIP.
        map_blur: Standard deviation in pixels of a Gaussian blur of the anomaly map, 0 for none. Source: AA-CLIP.
        background_dice: Add a Dice term on the normal state's map. Source: later work on MVFA.

    Raises:
        ValueError: If a choice is unknown.
    """

    quick_gelu: bool | None = None
    normalize_input: bool | None = None
    activation: str = "leaky_relu"
    residual: tuple[float, float, float] = (0.8, 0.1, 0.1)
    last_level_projector: bool = False
    pooling: str = "mean"
    level_reduction: str = "sum"
    bce_as_logits: bool = True
    residual_norm: bool = False
    window_sizes: tuple[int, ...] = (1,)
    map_blur: float = 0.0
    background_dice: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "residual", tuple(self.residual))
        object.__setattr__(self, "window_sizes", tuple(self.window_sizes))
        choices = {"activation": ACTIVATIONS, "pooling": ("mean", "max"), "level_reduction": ("sum", "mean")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                msg = f"{name} must be one of {', '.join(allowed)}, got '{getattr(self, name)}'."
                raise ValueError(msg)
        if len(self.residual) != 3:
            msg = f"residual takes three shares (token, segmentation, detection), got {list(self.residual)}."
            raise ValueError(msg)
        if not self.window_sizes or any(side < 1 or side % 2 == 0 for side in self.window_sizes):
            msg = f"window_sizes must be odd side lengths such as [1, 3, 5], got {list(self.window_sizes)}."
            raise ValueError(msg)
        if self.map_blur < 0:
            msg = f"map_blur is a standard deviation in pixels and cannot be negative, got {self.map_blur}."
            raise ValueError(msg)

    @classmethod
    def of(cls, value: "Variant | Mapping[str, Any] | str | None") -> "Variant":
        """Return a variant by its fields (others keep the released choice), or by name; ``None`` is ``"released"``.

        Raises:
            ValueError: If the preset or a field is unknown, or a choice is not allowed.

        Example:
            >>> Variant.of("paper").pooling, Variant.of({"pooling": "max"}).level_reduction
            ('max', 'sum')
        """
        if isinstance(value, Variant):
            return value
        if isinstance(value, Mapping):
            unknown = value.keys() - {field.name for field in fields(cls)}
            if unknown:
                msg = f"variant has no choice named {', '.join(sorted(unknown))}."
                raise ValueError(msg)
            return cls(**value)
        name = value or "released"
        if name not in VARIANTS:
            msg = f"variant must be one of {', '.join(VARIANTS)}, or choices by name; got '{name}'."
            raise ValueError(msg)
        return VARIANTS[name]

    def on(self, *, published_backbone: bool, normalized: bool = False) -> "Variant":
        """Return the variant for a backbone, ``ViT-L-14-336`` or one whose weights come with mean and deviation.

        The presets define the activation of ``ViT-L-14-336`` only.
        """
        normalize = normalized and not published_backbone if self.normalize_input is None else self.normalize_input
        if published_backbone:
            return replace(self, quick_gelu=bool(self.quick_gelu), normalize_input=normalize)
        quick_gelu = None if self == VARIANTS["paper"] else self.quick_gelu
        return replace(self, quick_gelu=quick_gelu, normalize_input=normalize)

    def plain(self) -> dict[str, Any]:
        """Return the choices by name, in types of JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


VARIANTS: dict[str, Variant] = {
    "released": Variant(),
    "paper": Variant(
        quick_gelu=True,
        normalize_input=True,
        activation="relu",
        residual=(0.9, 0.05, 0.05),
        last_level_projector=True,
        pooling="max",
        level_reduction="mean",
        bce_as_logits=False,
    ),
}
