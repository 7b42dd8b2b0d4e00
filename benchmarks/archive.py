# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Prediction of an archive on Ray beside ``anomalib predict``, and the memory of a large archive.

    python -m benchmarks.archive --model model.ckpt                                # both, side by side
    python -m benchmarks.archive --model model.ckpt --memory --images 100000       # memory alone, many minutes

Each command is run with a small and a large number of images; their difference is the time of an image without the
start. Seconds of processor time depend less on what else runs than those of the clock.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from shutil import rmtree

import numpy as np
import psutil
from PIL import Image

from anomalib_mvfa import MVFA
from benchmarks.timing import machine, make_parser, write_results

DISTINCT = 200
PERIOD = 2.0


def write_images(folder: Path, count: int, size: int) -> Path:
    """Write some generated images, and links to them until there are enough, a thousand to a folder."""
    rmtree(folder, ignore_errors=True)
    rng, originals = np.random.default_rng(0), []
    for number in range(count):
        path = folder / f"{number // 1000:03}" / f"{number:06}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < DISTINCT:
            Image.fromarray(rng.integers(0, 160, (size, size)).astype(np.uint8)).save(path)
            originals.append(path)
        else:
            os.link(originals[number % DISTINCT], path)
    return folder


def run(command: list[str], threads: int) -> dict[str, object]:
    """Run a command, and return its seconds, those of its processors, and its memory in MB over time."""
    began, cpu, memory = time.monotonic(), {}, []
    child = subprocess.Popen(  # noqa: S603 - ourselves
        [sys.executable, "-W", "ignore", "-m", *command], env={**os.environ, "OMP_NUM_THREADS": str(threads)}
    )
    root = psutil.Process(child.pid)
    while child.poll() is None:
        total = 0
        for process in [root, *root.children(recursive=True)] if root.is_running() else []:
            try:
                times = process.cpu_times()
                cpu[process.pid] = times.user + times.system
                total += process.memory_full_info().pss  # memory that several share counts once
            except psutil.Error:
                continue
        memory.append(round(total / 2**20))
        time.sleep(PERIOD)
    if child.returncode:
        msg = f"{command} ended with {child.returncode}"
        raise RuntimeError(msg)
    return {"seconds": time.monotonic() - began, "cpu": sum(cpu.values()), "memory": memory}


def main() -> None:
    """Measure, write the results, print a table."""
    parser = make_parser(__doc__, "archive", backbone=False)
    parser.add_argument("--model", type=Path, required=True, help="trained checkpoint")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--fewer", type=int, default=200)
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--memory", action="store_true", help="only predict --images with the exported graph")
    options = parser.parse_args()
    work = options.output.parent / "archive"
    graph = MVFA.load_from_checkpoint(options.model).to_openvino(work)
    ours = ["anomalib_mvfa.deploy.archive", "SOURCE", "OUT", "--model"]
    host = ["anomalib.cli.cli", "predict", "--model", "MVFA", "--model.visualizer", "false", "--ckpt_path"]
    host += [str(options.model), "--data", "MedicalFolder", "--data.path", "SOURCE", "--default_root_dir", "OUT"]
    variants = {
        "`anomalib predict`, 1 thread": (host, 1),
        "archive, checkpoint, 1 worker": ([*ours, str(options.model)], 1),
        "`anomalib predict`, 2 threads": (host, 2),
        "archive, checkpoint, 2 workers": ([*ours, str(options.model), "--workers", "2"], 1),
        "archive, OpenVINO, 1 worker": ([*ours, str(graph)], 1),
        "archive, OpenVINO, 2 workers": ([*ours, str(graph), "--workers", "2"], 1),
    }
    counts = [options.fewer, options.images]
    if options.memory:
        variants, counts = {"archive, OpenVINO, 1 worker": variants["archive, OpenVINO, 1 worker"]}, [options.images]
    facts, found, rows = machine(), {}, []
    for count in counts:
        source = write_images(work / "images", count, options.size)
        for name, (command, threads) in variants.items():
            out = work / "out"
            rmtree(out, ignore_errors=True)
            places = {"SOURCE": str(source), "OUT": str(out)}
            found[name, count] = run([places.get(part, part) for part in command], threads)
            print(name, count, {key: found[name, count][key] for key in ("seconds", "cpu")}, flush=True)
    for name in variants:
        last = found[name, counts[-1]]
        first = found[name, counts[0]] if len(counts) > 1 else {"seconds": 0, "cpu": 0}
        many = counts[-1] - (counts[0] if len(counts) > 1 else 0)
        clock, cpu = ((last[key] - first[key]) / many for key in ("seconds", "cpu"))
        rows.append(
            [name, f"{1 / clock:.1f}", f"{1000 * cpu:.1f}", f"{first['seconds']:.0f}", str(max(last["memory"]))]
        )
    columns = ["command", "images/s", "CPU ms an image", f"seconds for {counts[0]}", "peak MB"]
    results = {"machine": facts, "found": {f"{name}, {count}": value for (name, count), value in found.items()}}
    write_results(options.output, results, columns, rows)


if __name__ == "__main__":
    main()
