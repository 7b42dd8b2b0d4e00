# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""What the speed benchmarks share: side-by-side timing, peak memory, tables and JSON."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

__all__ = ["in_own_process", "machine", "make_parser", "peak_memory_mb", "side_by_side", "write_results"]


def make_parser(description: str | None, topic: str, *, backbone: bool = True) -> argparse.ArgumentParser:
    """Give the arguments that the speed benchmarks share.

    Args:
        description: Docstring of the script.
        topic: Its name.
        backbone: Whether it can be run on another backbone.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(f"results/benchmarks/{topic}.json"))
    if backbone:
        parser.add_argument("--backbone", default="ViT-L-14-336")
    return parser


def in_own_process(topic: str, **options: object) -> dict[str, float] | None:
    """Run one variant of a script in a process of its own, for the sake of its peak memory.

    Args:
        topic: Name of the script; it prints the figures of the variant as JSON in its last line.
        **options: Its options.

    Returns:
        The figures; ``None`` if the process failed, for want of memory for instance.
    """
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", f"benchmarks.{topic}", *arguments]
    answer = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)  # noqa: S603 - ourselves
    figures: dict[str, float] | None = None if answer.returncode else json.loads(answer.stdout.splitlines()[-1])
    print(options, figures or f"ended with {answer.returncode}", flush=True)
    return figures


def machine(device: torch.device | None = None) -> dict[str, object]:
    """Say what was measured on."""
    name = torch.cuda.get_device_name(device) if device and device.type == "cuda" else platform.processor()
    return {
        "device": name or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
    }


def side_by_side(variants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Time variants in turns, so that a busy moment meets all of them.

    Args:
        variants: What to time, by name. Each is called once before, unmeasured.
        repeats: Rounds.

    Returns:
        Median seconds of a call.
    """
    for call in variants.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, call in variants.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            began = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory_mb() -> float:
    """Give the largest memory that this process ever held, in MB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def write_results(path: Path, results: dict[str, object], columns: list[str], rows: list[list[str]]) -> None:
    """Print a table, and write it and the numbers to files.

    Args:
        path: JSON file; the table goes beside it as Markdown.
        results: Numbers.
        columns: Headings of the table.
        rows: Its rows.
    """
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    table = "\n".join(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1), encoding="utf-8")
    path.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\nWritten to {path}")
