# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Datamodules and readers for medical images."""

from .bmad import MedicalBMAD
from .few_shot import FewShot
from .medical_folder import MedicalFolder

DATAMODULES = ("FewShot", "MedicalBMAD", "MedicalFolder")
"""Names that the stock command knows."""

__all__ = ["DATAMODULES", "FewShot", "MedicalBMAD", "MedicalFolder"]
