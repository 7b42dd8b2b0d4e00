# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The residual adapters: the only weights of MVFA that learn.

One adapter maps a token ``x`` of width ``D`` to a *hidden* vector in CLIP's text space and back:

    hidden = act(W1 x)        compared with text and with the memory bank
    output = act(W2 hidden)   mixed into the token that enters the next stage
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ACTIVATIONS", "ResidualAdapter"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"leaky_relu": nn.LeakyReLU, "relu": nn.ReLU}


class ResidualAdapter(nn.Module):
    """Two linear layers without bias, each followed by a non-linearity.

    Args:
        width: Token width ``D``.
        hidden_width: Width ``E`` of the text space.
        activation: ``"leaky_relu"`` as released, ``"relu"`` as in the paper.
        linear: Replace the first non-linearity by the identity, which makes the hidden vector a linear projection
            (the paper's choice for the last level).

    Example:
        >>> hidden, output = ResidualAdapter(32, 24)(torch.zeros(1, 17, 32))
        >>> hidden.shape, output.shape
        (torch.Size([1, 17, 24]), torch.Size([1, 17, 32]))
    """

    def __init__(self, width: int, hidden_width: int, activation: str = "leaky_relu", linear: bool = False) -> None:
        super().__init__()
        act = ACTIVATIONS[activation]
        # Sequential keeps the parameter names of the released files: fc1.0.weight, fc2.0.weight.
        self.fc1 = nn.Sequential(nn.Linear(width, hidden_width, bias=False), nn.Identity() if linear else act())
        self.fc2 = nn.Sequential(nn.Linear(hidden_width, width, bias=False), act())

    def forward(
        self, tokens: Tensor, frozen: Tensor | bool = False, last: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Map tokens ``(B, L, D)`` to hidden vectors ``(B, L, E)`` and, except at the last level, output ``(B, L, D)``.

        With ``frozen``, for all images or ``(B,)`` for those that are true, gradients pass to the tokens but not to
        this adapter's weights.
        """
        hidden = self._layer(self.fc1, tokens, frozen)
        return hidden, None if last else self._layer(self.fc2, hidden, frozen)

    @staticmethod
    def _layer(layer: nn.Sequential, inputs: Tensor, frozen: Tensor | bool) -> Tensor:
        if frozen is False:
            learning: Tensor = layer(inputs)
            return learning
        linear, activation = layer
        resting: Tensor = activation(functional.linear(inputs, linear.get_parameter("weight").detach()))
        return resting if frozen is True else torch.where(frozen.view(-1, 1, 1), resting, layer(inputs))
