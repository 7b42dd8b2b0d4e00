# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Methods side by side: what was measured, how certain it is, and a page that shows it."""

from .cells import Cell, load_cells
from .page import write_page
from .report import write_tables

__all__ = ["Cell", "load_cells", "write_page", "write_tables"]
