# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""What figures of pixels cost over a test set of the size of BMAD's Brain, beside anomalib's metrics.

    python -m benchmarks.metrics                         # 3,715 maps of 240 x 240
    python -m benchmarks.metrics --images 400

Maps and masks are drawn: 640 of 3,715 are normal, the others have a region or two. Each variant runs in a process of
its own, for the sake of its peak memory.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUPR, AUPRO, AUROC
from rich.progress import track
from torch import Tensor
from torch.nn import functional

from anomalib_mvfa.metrics import PixelFigures
from benchmarks.timing import in_own_process, machine, make_parser, peak_memory_mb, write_results

VARIANTS = ("ours", "anomalib's AUROC", "anomalib's AUPR", "anomalib's AUPRO")
FIELDS = ["anomaly_map", "gt_mask"]
NAMES = {"AUROC": "pixel_AUROC", "AUPR": "pixel_AP", "AUPRO": "pixel_AUPRO"}
NORMAL = 640 / 3715


def batches(images: int, side: int, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw maps and masks ``(B, H, W)``, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(side).view(-1, 1)
    for start in range(0, images, size):
        count = min(size, images - start)
        masks = torch.zeros(count, side, side, dtype=torch.bool)
        for index in range(int(NORMAL * count), count):
            for _ in range(1 + int(torch.rand((), generator=generator) < 0.3)):
                y, x, r = (torch.rand(3, generator=generator) * torch.tensor([side, side, side / 10])).tolist()
                masks[index] |= (rows - y) ** 2 + (rows.T - x) ** 2 < (2 + r) ** 2
        coarse = torch.randn(count, 1, 17, 17, generator=generator)
        maps = functional.interpolate(coarse, (side, side), mode="bilinear", align_corners=True)[:, 0]
        yield torch.sigmoid(2 * (maps + 1.5 * masks) - 4), masks


def measure(variant: str, images: int, side: int) -> dict[str, float]:
    """Compute the figures of all maps.

    Returns:
        The figures, ``seconds`` without the drawing, and ``peak_mb`` with ``base_mb`` of it there before.
    """
    base = peak_memory_mb()
    ours = PixelFigures()
    kinds = {"AUROC": AUROC, "AUPR": AUPR, "AUPRO": AUPRO}
    name = variant.rsplit(maxsplit=1)[-1]
    metric = None if variant == "ours" else kinds[name](fields=FIELDS)
    seconds = 0.0
    for maps, masks in track(batches(images, side), variant, total=-(-images // 32), disable=not sys.stderr.isatty()):
        began = time.perf_counter()
        if metric is None:
            ours.update(maps, masks)
        else:
            metric.update(ImageBatch(image=torch.zeros(len(maps), 3, 1, 1), anomaly_map=maps, gt_mask=masks))
        seconds += time.perf_counter() - began
    began = time.perf_counter()
    found = ours.compute() if metric is None else {NAMES[name]: float(metric.compute())}
    seconds += time.perf_counter() - began
    return {**found, "seconds": seconds, "peak_mb": peak_memory_mb(), "base_mb": base}


def main() -> None:
    """Measure all variants, one after another."""
    parser = make_parser(__doc__, "metrics", backbone=False)
    parser.add_argument("--images", type=int, default=3715)
    parser.add_argument("--side", type=int, default=240)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options.variant, options.images, options.side)))
        return
    facts = machine()
    found: dict[str, dict[str, float]] = {}
    for variant in VARIANTS:
        figures = in_own_process("metrics", images=options.images, side=options.side, variant=variant)
        if figures is not None:
            found[variant] = figures
    rows = []
    for variant, figures in found.items():
        others = {name: figures[name] - found["ours"][name] for name in NAMES.values() if name in figures}
        said = ", ".join(f"{name} {figures[name]:.6f}" for name in others)
        if variant != "ours":
            said += f" ({next(iter(others.values())):+.1e} from ours)"
        rows.append([variant, said, f"{figures['seconds']:.0f}", f"{figures['peak_mb']:,.0f}"])
    columns = ["metric", "figures", "seconds", "peak MB of the process"]
    write_results(options.output, {"machine": facts, "variants": found}, columns, rows)


if __name__ == "__main__":
    main()
