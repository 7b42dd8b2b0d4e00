# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""What MVFA is compared with: WinCLIP on any backbone."""

from .win_clip import WinClipAny

MODELS = ("WinClipAny",)
"""Names that the stock command knows."""

__all__ = ["MODELS", "WinClipAny"]
