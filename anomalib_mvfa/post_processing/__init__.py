# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Thresholds and normalisation of scores, after the model."""

from .post_processor import MVFAPostProcessor

__all__ = ["MVFAPostProcessor"]
