# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""A page in the browser: drop images, train, look, correct. ``python -m anomalib_mvfa.app`` opens it."""
