# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The residual adapters: the only weights of MVFA that learn.

One adapter maps a token ``x`` of width ``D`` to a *hidden* vector in CLIP's text space and back:

    hidden = act(W1 x)        compared with text and with the memory bank
    output = act(W2 hidden)   mixed into the token that enters the next stage
"""

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
        >>> import torch
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

    def forward(self, tokens: Tensor, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """Map tokens to hidden vectors and to the residual.

        Args:
            tokens: Tokens ``(B, L, D)``.
            frozen: Let gradients pass to the tokens but not to this adapter's weights.

        Returns:
            Hidden vectors ``(B, L, E)`` and output ``(B, L, D)``.
        """
        hidden = self._layer(self.fc1, tokens, frozen)
        return hidden, self._layer(self.fc2, hidden, frozen)

    @staticmethod
    def _layer(layer: nn.Sequential, inputs: Tensor, frozen: bool) -> Tensor:
        if not frozen:
            result: Tensor = layer(inputs)
            return result
        linear, activation = layer
        activated: Tensor = activation(functional.linear(inputs, linear.get_parameter("weight").detach()))
        return activated
