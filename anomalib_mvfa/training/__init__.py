# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""What a fit needs besides the method: state, calibration, token cache, synthetic lesions."""
