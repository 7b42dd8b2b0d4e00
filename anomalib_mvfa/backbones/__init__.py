# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The embedded ``tiny`` CLIP, a demonstration that needs no download.

It is **untrained**: seeded random weights whose blocks stay close to the identity, so that a token still describes its
patch after the whole tower. It shows that the software works, not how good the method is.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from torch import nn

__all__ = ["TINY", "TINY_CONFIG", "initialise_tiny"]

logger = logging.getLogger(__name__)

TINY = "tiny"
TINY_CONFIG: dict[str, Any] = json.loads(Path(__file__).with_name("tiny.json").read_text(encoding="utf-8"))
TINY_SEED = 2403
BLOCK_GAIN = 0.1
"""Standard deviation of what a block adds, relative to PyTorch's default: small keeps blocks close to the identity."""


@torch.no_grad()
def initialise_tiny(model: CLIP) -> None:
    """Give a tiny CLIP its weights, in place.

    Args:
        model: open_clip model built from ``tiny.json``.
    """
    logger.warning(
        "Backbone 'tiny' is a small untrained demonstration model inside this package. "
        "Its results show that the software works, not how good MVFA is.",
    )
    generator = torch.Generator().manual_seed(TINY_SEED)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:  # biases and norms keep open_clip's zeros and ones
            if name.endswith("class_embedding"):
                nn.init.normal_(parameter, std=0.02, generator=generator)
            continue
        fan_in = parameter[0].numel()
        std = fan_in**-0.5
        if "positional_embedding" in name or "token_embedding" in name:
            std = 0.02
        elif name.endswith(("out_proj.weight", "c_proj.weight")):
            std *= BLOCK_GAIN
        nn.init.normal_(parameter, std=std, generator=generator)
