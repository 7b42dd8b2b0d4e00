# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Baselines: WinCLIP on any backbone, and trivial scores."""

from .trivial import DistanceToMean, GreyLevels
from .win_clip import WinClipAny

MODELS = ("WinClipAny",)
"""Names that are registered with anomalib."""

__all__ = ["MODELS", "DistanceToMean", "GreyLevels", "WinClipAny"]
