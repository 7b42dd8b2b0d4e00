# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The method."""

from .lightning_model import MVFA
from .torch_model import MVFAModel

__all__ = ["MVFA", "MVFAModel"]
