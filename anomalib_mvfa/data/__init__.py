# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Datamodules and readers for medical images."""

from .bmad import MedicalBMAD
from .few_shot import FewShot
from .leave_one_out import LeaveOneOut
from .medical_folder import MedicalFolder

DATAMODULES = ("FewShot", "LeaveOneOut", "MedicalBMAD", "MedicalFolder")
"""Names that the stock command knows."""

__all__ = ["DATAMODULES", "FewShot", "LeaveOneOut", "MedicalBMAD", "MedicalFolder"]
