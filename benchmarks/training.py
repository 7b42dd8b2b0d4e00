# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""How long a few-shot training step takes and what memory it needs, beside a naive variant.

    python -m benchmarks.training                        # ViT-L-14-336 with random weights, 240 px

The naive variant computes gradients for all of CLIP and runs the whole tower at every step, as the released code does.
Each variant runs in a process of its own, for the sake of its peak memory; the processes take turns.
"""

import argparse
import json
from typing import Any

import torch

from anomalib_mvfa import MVFA
from anomalib_mvfa.model.loss import training_losses
from anomalib_mvfa.training.token_cache import TokenCache
from benchmarks.timing import in_own_process, machine, make_parser, peak_memory_mb, side_by_side, write_results

VARIANTS: dict[str, dict[str, Any]] = {
    "naive": {"naive": True},
    "frozen": {},
    "frozen, cached": {"cached": True},
    "frozen, cached, 4 images a step": {"cached": True, "batch": 4},
    "frozen, cached, levels=half": {"cached": True, "levels": "half"},
    "frozen, cached, levels=middle": {"cached": True, "levels": "middle"},
    "frozen, cached, bfloat16": {"cached": True, "dtype": torch.bfloat16},
}
BFLOAT16 = "frozen, cached, bfloat16"


def measure(
    backbone: str,
    steps: int,
    device: torch.device,
    *,
    naive: bool = False,
    cached: bool = False,
    batch: int = 1,
    levels: str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Train some steps on one batch.

    Args:
        backbone: Backbone with random weights.
        steps: Steps that are timed, after one that is not.
        device: Where to train.
        naive: Compute gradients for all of CLIP.
        cached: Keep the tokens below the first adapter.
        batch: Images a step.
        levels: Preset of the levels.
        dtype: Type of autocast, ``None`` for float32.

    Returns:
        ``seconds`` an image, the median, and ``peak_mb``: of the device's memory, or of this process.
    """
    torch.manual_seed(0)
    model = MVFA(backbone=backbone, pretrained="random", class_name="Brain", levels=levels)
    model.configure_model()
    model.to(device)
    if naive:
        model.model.tower.requires_grad_()
    cache = TokenCache(2**30, max_images=88) if cached else None
    optimizer = torch.optim.Adam([*model.model.seg_adapters.parameters(), *model.model.det_adapters.parameters()])
    size = model.model.image_size
    images, labels = torch.rand(batch, 3, *size, device=device), torch.arange(batch, device=device) % 2 == 0
    masks = (torch.rand(batch, *size, device=device) > 0.9) & labels.view(-1, 1, 1)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            terms = training_losses(model.model, images, labels, masks, None, None, cache)
            loss = torch.stack(list(terms.values())).sum(dim=0).mean()
        model.zero_grad()
        loss.backward()
        optimizer.step()

    seconds = side_by_side({"step": step}, steps)["step"]
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_memory_mb()
    return {"seconds": seconds / batch, "peak_mb": peak}


def main() -> None:
    """Measure all variants, each in a process of its own."""
    parser = make_parser(__doc__, "training")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="also bfloat16, which only some processors compute fast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        device = torch.device(options.device)
        print(json.dumps(measure(options.backbone, options.steps, device, **VARIANTS[options.variant])))
        return
    facts = machine(torch.device(options.device))
    variants = [variant for variant in VARIANTS if options.bf16 or variant != BFLOAT16]
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for _ in range(options.rounds):
        for variant in variants:
            given = {name: getattr(options, name) for name in ("backbone", "steps", "device")}
            figures = in_own_process("training", **given, variant=variant)
            if figures is None:
                msg = f"The variant '{variant}' failed; its reason is above."
                raise SystemExit(msg)
            found[variant].append(figures)
    seconds = {variant: min(run["seconds"] for run in runs) for variant, runs in found.items()}
    memory = {variant: max(run["peak_mb"] for run in runs) for variant, runs in found.items()}
    rows = [
        [
            variant,
            f"{seconds[variant]:.3g}",
            f"{seconds['naive'] / seconds[variant]:.2f}",
            f"{memory[variant]:,.0f}",
            f"{100 * memory[variant] / memory['naive']:.0f} %",
        ]
        for variant in variants
    ]
    columns = ["variant", "seconds an image", "times as fast as naive", "peak MB", "of naive"]
    write_results(options.output, {"machine": facts, "seconds": seconds, "peak_mb": memory}, columns, rows)


if __name__ == "__main__":
    main()
