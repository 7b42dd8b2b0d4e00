# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""MVFA, the multi-level adaptation of CLIP to medical images, as a plug-in of anomalib.

Importing this package registers the model and the datamodules with anomalib.
"""

from anomalib_mvfa.model import MVFA, MVFAModel  # isort: skip  # first: everything else builds on it
from anomalib_mvfa import data, deploy
from anomalib_mvfa.deploy import AdapterSets
from anomalib_mvfa.registration import register

__all__ = ["MVFA", "AdapterSets", "MVFAModel", "data", "deploy"]
__version__ = "0.1.0"

register()
