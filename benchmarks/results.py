# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Compares the methods of ``configs/benchmark.yaml`` on real images, and writes the tables of the documentation.

    python -m benchmarks.results --data DIR br35h busi

``DIR/br35h`` and ``DIR/busi`` hold ``normal``, ``abnormal`` and ``masks``. The same command continues a run that was
stopped, and computes again what a change of the configuration or of the embedded backbone made obsolete. The tables go
into ``docs/results.md``, between the two comments that name this module.
"""

import argparse
import hashlib
import re
import shutil
from importlib.resources import files
from pathlib import Path

import yaml

from anomalib_mvfa.comparison.runner import Comparison, run_comparison, write_report

PAGE = Path("docs/results.md")
CONFIG = Path("configs/benchmark.yaml")


def comparison(options: argparse.Namespace) -> Comparison:
    """Return the comparison on the folders, without zero-shot MVFA, which needs other sets to learn from."""
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["comparison"]
    methods = {name: dict(own or {}) for name, own in config["methods"].items() if name != "MVFA (zero-shot)"}
    for name in ("MVFA", "MVFA (normal only)"):
        methods[name]["train_batch_size"] = 1
    folder = {"normal_dir": "normal", "abnormal_dir": "abnormal", "mask_dir": "masks", "test_split_ratio": 0.8}
    return Comparison(
        sets={
            name: {
                "class_path": "Folder",
                "init_args": {"name": name, "root": str(options.data / name), "num_workers": 0, **folder},
            }
            for name in options.sets
        },
        methods=methods,
        output=str(options.output),
        backbone="tiny",
        seeds=range(options.draws),
        epochs=options.epochs,
        accelerator="cpu",
    )


def main() -> None:
    """Run what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("sets", nargs="+")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("results/real"))
    options = parser.parse_args()
    tower = hashlib.sha256(files("anomalib_mvfa.backbones").joinpath("tiny.safetensors").read_bytes()).hexdigest()
    stamp = options.output / "tower.txt"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") != tower:
        for pattern in ("*-MVFA-*", "*-WinCLIP-*"):
            for cell in (options.output / "cells").glob(pattern):
                shutil.rmtree(cell)
    options.output.mkdir(parents=True, exist_ok=True)
    stamp.write_text(tower, encoding="utf-8")
    grid = comparison(options)
    failed = run_comparison(grid)
    print(f"{len(failed)} cells failed. Page: {write_report(grid)}")
    tables = (options.output / "results.md").read_text(encoding="utf-8").partition("\n")[2]
    tables = re.sub(r"^## ", "### ", tables, flags=re.MULTILINE).strip()
    begin, end = "<!-- benchmarks.results -->", "<!-- end of benchmarks.results -->"
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(begin)
    PAGE.write_text(f"{before}{begin}\n\n{tables}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
