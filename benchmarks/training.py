# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""How long a few-shot training step takes and what memory it needs, beside a naive variant.

    python -m benchmarks.training                        # ViT-L-14-336 with random weights, 240 px

The naive variant computes gradients for all of CLIP and runs the whole tower at every step, as the released code does.
Each variant runs in a process of its own, for the sake of its peak memory; the processes take turns.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from anomalib_mvfa import MVFA
from anomalib_mvfa.model.token_cache import TokenCache
from benchmarks.timing import machine, peak_memory_mb, write_results

VARIANTS = ("naive", "frozen", "frozen, cached", "frozen, cached, levels=half")


def measure(variant: str, backbone: str, steps: int) -> dict[str, float]:
    """Train some steps on one image.

    Args:
        variant: One of `VARIANTS`.
        backbone: Backbone with random weights.
        steps: Steps after the first, which is not counted.

    Returns:
        ``seconds`` a step, the least of all, and ``peak_mb``.
    """
    torch.manual_seed(0)
    levels = "half" if variant.endswith("half") else None
    model = MVFA(backbone=backbone, pretrained="random", class_name="Brain", levels=levels)
    model.configure_model()
    if variant == "naive":
        model.model.tower.requires_grad_()
    elif "cached" in variant:
        model._token_cache = TokenCache(2**30, max_images=88)
    optimizer = torch.optim.Adam([*model.model.seg_adapters.parameters(), *model.model.det_adapters.parameters()])
    size = model.model.image_size
    images, labels, masks = torch.rand(1, 3, *size), torch.tensor([1]), torch.rand(1, *size) > 0.9
    times = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        loss = torch.stack(list(model.losses(images, labels, masks).values())).sum()
        model.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - began)
    return {"seconds": min(times[1:]), "peak_mb": peak_memory_mb()}


def main() -> None:
    """Measure all variants, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="ViT-L-14-336")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/training.json"))
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options.variant, options.backbone, options.steps)))
        return
    facts = machine()
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(options.rounds):
        for variant in VARIANTS:
            command = [sys.executable, "-m", "benchmarks.training", "--backbone", options.backbone]
            command += ["--steps", str(options.steps), "--variant", variant]
            answer = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - ourselves
            found[variant].append(json.loads(answer.stdout.splitlines()[-1]))
            print(variant, found[variant][-1], flush=True)
    seconds = {variant: min(run["seconds"] for run in runs) for variant, runs in found.items()}
    memory = {variant: max(run["peak_mb"] for run in runs) for variant, runs in found.items()}
    rows = [
        [
            variant,
            f"{seconds[variant]:.2f}",
            f"{seconds['naive'] / seconds[variant]:.2f}",
            f"{memory[variant]:,.0f}",
            f"{100 * memory[variant] / memory['naive']:.0f} %",
        ]
        for variant in VARIANTS
    ]
    columns = ["variant", "seconds a step", "times as fast as naive", "peak MB", "of naive"]
    write_results(options.output, {"machine": facts, "seconds": seconds, "peak_mb": memory}, columns, rows)


if __name__ == "__main__":
    main()
