# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""What MVFA is compared with: WinCLIP on any backbone, and scores that know nothing."""

from .trivial import DistanceToMean, ImageVariance, MeanBrightness
from .win_clip import WinClipAny

MODELS = ("WinClipAny",)
"""Names that the stock command knows."""

__all__ = ["MODELS", "DistanceToMean", "ImageVariance", "MeanBrightness", "WinClipAny"]
