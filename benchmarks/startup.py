# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""What the plug-in adds to the start of programs and of the command, and what kept text features save.

    python -m benchmarks.startup                         # text tower of ViT-L-14-336 with random weights

Every start is a process of its own; the variants take turns. Without the plug-in means without its entry point.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time

from anomalib_mvfa.backbones.loading import load_clip, resolve_backbone
from anomalib_mvfa.model.prompts import encode_states
from benchmarks.timing import machine, make_parser, write_results

COMMAND = "import sys; sys.argv = ['anomalib', {arguments}]; from anomalib.cli.cli import main; main()"
VARIANTS = {
    "import anomalib.models": ("import anomalib.models", False),
    "import anomalib_mvfa": ("import anomalib_mvfa", True),
    "anomalib --help, without": (COMMAND.format(arguments="'--help'"), False),
    "anomalib --help, with": (COMMAND.format(arguments="'--help'"), True),
    "anomalib train --help, without": (COMMAND.format(arguments="'train', '--help'"), False),
    "anomalib train --help, with": (COMMAND.format(arguments="'train', '--help'"), True),
}


def start(program: str, *, plugged_in: bool) -> float:
    """Run a program and give its seconds; torch loads the entry points of other packages, or none."""
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(plugged_in))}
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, env=environment)  # noqa: S603
    return time.perf_counter() - began


def encode(backbone: str) -> dict[str, float]:
    """Give the seconds of the first encoding of a class and of the second, which reads the first."""
    clip, tokenizer = load_clip(resolve_backbone(backbone, "random"))
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ANOMALIB_MVFA_CACHE"] = folder
        for name in ("text features, encoded", "text features, kept"):
            began = time.perf_counter()
            encode_states(clip, tokenizer, "Brain")
            seconds[name] = time.perf_counter() - began
    return seconds


def main() -> None:
    """Time all variants in turns."""
    parser = make_parser(__doc__, "startup")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    facts = machine()
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(options.rounds + 1):  # the first round warms the file cache
        for name, (program, plugged_in) in VARIANTS.items():
            times[name].append(start(program, plugged_in=plugged_in))
    seconds = {name: statistics.median(values[1:]) for name, values in times.items()}
    seconds |= encode(options.backbone)
    rows, names = [], list(seconds)
    for first, second in zip(names[::2], names[1::2], strict=True):
        rows.append([first, f"{seconds[first]:.2f}", second, f"{seconds[second]:.2f}"])
        rows[-1].append(f"{100 * (seconds[second] / seconds[first] - 1):+.1f} %")
    results = {"machine": facts, "seconds": seconds, "times": times}
    write_results(options.output, results, ["start", "seconds", "beside it", "seconds", "difference"], rows)


if __name__ == "__main__":
    main()
