# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Inference with exported models, quantisation, several adapter sets on one backbone."""

from .adapter_sets import AdapterSets
from .inferencer import OpenVINOInferencer

__all__ = ["AdapterSets", "OpenVINOInferencer"]
