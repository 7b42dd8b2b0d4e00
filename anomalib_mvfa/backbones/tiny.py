# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The embedded ``tiny`` CLIP, a demonstration that needs no download.

It was trained on generated images alone (`tools/train_tiny.py`; `README.md` is its card). It shows that the software
works, not how good the method is. With ``pretrained="random"`` it has seeded random weights instead, whose blocks stay
close to the identity, so that a token still describes its patch after the whole tower.
"""

import json
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from torch import nn

__all__ = ["TINY", "TINY_CONFIG", "TINY_WEIGHTS", "initialise_tiny"]

TINY = "tiny"
TINY_CONFIG: dict[str, Any] = json.loads(Path(__file__).with_name("tiny.json").read_text(encoding="utf-8"))
TINY_WEIGHTS = Path(__file__).with_name("tiny.safetensors")
TINY_SEED = 2403
BLOCK_GAIN = 0.1
"""Size of what a block adds, relative to a usual start: small keeps blocks close to the identity."""
COMMON_STD = 0.3
"""Size of the vector that all positions share: it keeps the noise of dark patches small beside it."""
POSITION_STD = 0.1


@torch.no_grad()
def initialise_tiny(model: CLIP) -> None:
    """Initialise a tiny CLIP with seeded random weights, in place."""
    generator = torch.Generator().manual_seed(TINY_SEED)
    for name, parameter in model.named_parameters():
        if name.endswith("class_embedding") or "token_embedding" in name:
            std = 0.02
        elif parameter.ndim < 2:  # biases, norms and the temperature keep open_clip's zeros and ones
            continue
        elif "positional_embedding" in name:
            std = POSITION_STD
        else:
            std = parameter[0].numel() ** -0.5
            if name.endswith(("out_proj.weight", "c_proj.weight")):
                std *= BLOCK_GAIN
        nn.init.normal_(parameter, std=std, generator=generator)
        if name == "visual.positional_embedding":
            parameter.add_(COMMON_STD * torch.randn(parameter.shape[1], generator=generator))
