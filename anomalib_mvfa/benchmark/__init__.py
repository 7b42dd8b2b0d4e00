# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Methods side by side: what was measured, how sure it is, and a page that shows it."""
