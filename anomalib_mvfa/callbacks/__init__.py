# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Lightning callbacks for what surrounds a run: records, resuming, loading, prediction table."""
