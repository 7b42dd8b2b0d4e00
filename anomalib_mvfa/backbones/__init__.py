# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Names and files of backbones, and the embedded `tiny` CLIP."""
