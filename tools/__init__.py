# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The demonstration, re-runs of the published protocols, training of the embedded backbone; not installed."""
