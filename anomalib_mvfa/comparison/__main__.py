# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Reports a comparison again, also while it is running.

python -m anomalib_mvfa.comparison FOLDER --data_root DATA
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import load_cells, write_page, write_tables


def main(arguments: Sequence[str] | None = None) -> None:
    """Report a comparison again from the command line."""
    parser = argparse.ArgumentParser(description="Write results.csv, results.md and index.html of a comparison.")
    parser.add_argument("folder", type=Path, help="folder of the comparison, the one that holds 'cells'")
    parser.add_argument("--data_root", type=Path, help="folder that the paths of the images are relative to")
    parser.add_argument("--show_paths", action="store_true", help="show file names, which may identify patients")
    options: Any = parser.parse_args(arguments)
    cells = load_cells(options.folder)
    write_tables(cells, options.folder)
    roots = {cell.set: options.data_root for cell in cells} if options.data_root else None
    write_page(cells, options.folder / "index.html", roots, show_paths=options.show_paths)


if __name__ == "__main__":
    main()
