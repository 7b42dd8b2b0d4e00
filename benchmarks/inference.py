# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""How long an image takes: tower, both branches and scores, beside a naive variant, fewer levels and WinCLIP.

    python -m benchmarks.inference                       # ViT-L-14-336 with random weights, 240 px
    python -m benchmarks.inference --backbone tiny

The naive variant computes in float32 with gradients for all of CLIP, one image at a time, normalises the bank at every
query, and holds all distances between patches and bank at once, as the released code does. On a processor the model is
also exported to OpenVINO in eight bits, calibrated with a few drawn images: time and size do not depend on them.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from anomalib.deploy import CompressionType
from torch import Tensor
from torch.nn import functional

from anomalib_mvfa import MVFA, AdapterSets, MVFAModel
from anomalib_mvfa.baselines.win_clip import WinClipAny
from anomalib_mvfa.training.calibration import Calibration
from benchmarks.timing import machine, make_parser, peak_memory_mb, side_by_side, write_results

CALIBRATION_IMAGES = 8


def naive(model: MVFAModel, image: Tensor) -> Tensor:
    """Predict one image without any of the savings.

    Args:
        model: With a bank; the parameters of its tower require gradients.
        image: ``(1, 3, H, W)``.

    Returns:
        Map ``(1, H, W)``.
    """
    hidden = model.hidden_tokens(image)
    language = model.language_branch(hidden.segmentation)
    model.language_branch(hidden.detection)
    maps = []
    for level, tokens in enumerate(hidden.segmentation):
        bank = functional.normalize(2 * model.seg_memory[level], dim=-1)  # normalised anew
        patches = functional.normalize(tokens[:, 1:], dim=-1)
        distances = 1 - patches[0] @ bank.T  # (P, N)
        grid = distances.amin(dim=1).view(1, 1, *model.tower.grid_size)
        maps.append(functional.interpolate(grid, size=model.image_size, mode="bilinear", align_corners=True)[0])
    return model.fusion(language.anomaly_map, torch.stack(maps).sum(dim=0), kind="map")


def predictor(model: MVFAModel, images: Tensor, dtype: torch.dtype | None = None) -> Callable[[], object]:
    """Give a call that predicts images as a user of the model would."""

    @torch.inference_mode()
    def call() -> object:
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            return model(images)

    return call


def build(options: argparse.Namespace, levels: str | None = None, coreset: float = 1.0) -> MVFA:
    """Build a model with random adapters, and a bank of the size that eleven versions of each support make."""
    mvfa = MVFA(options.backbone, "random", class_name="Brain", levels=levels, coreset=coreset, visualizer=False).eval()
    mvfa.configure_model()
    mvfa.trained, mvfa.calibration = True, Calibration(bank_holds=True, thresholds_hold=True)  # random, but exportable
    model = mvfa.model.to(options.device)
    images, patches = 11 * options.k_shot, model.tower.grid_size[0] * model.tower.grid_size[1]
    model.memory.remember(
        [
            torch.randn(images, 1 + patches, model.backbone.model["embed_dim"], device=options.device)
            for _ in model.levels
        ]
    )
    return mvfa


def quantised(mvfa: MVFA, folder: Path, threads: int) -> tuple[Callable[[Tensor], object], dict[str, float]]:
    """Export in eight bits, calibrated with a few drawn images.

    Returns:
        The compiled model, and what the export cost.
    """
    import openvino

    from anomalib_mvfa.data import FewShot, MedicalBMAD
    from anomalib_mvfa.demo.phantoms import write_phantoms

    root = write_phantoms(folder / "phantoms", ["brain_mri"], size=max(mvfa.model.image_size))
    data = FewShot(MedicalBMAD(root, "BrainMRI", num_workers=0))
    data.setup("fit")
    data.val_data = data.val_data.subsample(list(range(min(CALIBRATION_IMAGES, len(data.val_data)))))
    began = time.perf_counter()
    path = mvfa.to_openvino(folder, compression_type=CompressionType.INT8_PTQ, datamodule=data)
    costs = {
        "export_s": time.perf_counter() - began,
        "size_mb": sum(path.with_suffix(suffix).stat().st_size for suffix in (".xml", ".bin")) / 1e6,
        "bank_mb": 4 * sum(bank.numel() for bank in mvfa.model.memory.buffers()) / 1e6,
        "peak_mb": peak_memory_mb(),
    }
    # Threads that are tied to cores wait for each other where anything else runs.
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
    model = openvino.Core().compile_model(path, "CPU", config)
    return lambda images: model(images.numpy()), costs


def switch_seconds(mvfa: MVFA, folder: Path) -> float:
    """Time a switch between two named adapter sets on one live model."""
    adapters = mvfa.save_adapters(folder / "adapters.safetensors", torch.float16)
    sets = AdapterSets(mvfa)
    for name in ("first", "second"):
        sets.add(name, adapters)
    pair = side_by_side({"pair": lambda: (sets.use("first"), sets.use("second"))}, 100)
    return pair["pair"] / 2


def main() -> None:
    """Time all variants in turns."""
    parser = make_parser(__doc__, "inference")
    parser.add_argument("--winclip_backbone", default="ViT-B-16-plus-240")
    parser.add_argument("--k_shot", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--batch", type=int, default=1, help="images at once; the naive variant takes one after another"
    )
    parser.add_argument("--bf16", action="store_true", help="also bfloat16, which only some processors compute fast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    facts = machine(device)
    torch.manual_seed(0)
    variants: dict[str, Callable[[], object]] = {}
    exports: dict[str, dict[str, float]] = {}

    mvfa = build(options)
    full = mvfa.model
    images = torch.rand(options.batch, 3, *full.image_size, device=device)
    if device.type == "cpu":
        for name, model in (("INT8", mvfa), ("INT8, levels=middle", build(options, "middle"))):
            folder = options.output.parent / name.replace(", ", "-").replace("=", "-")
            run, exports[name] = quantised(model, folder, torch.get_num_threads())
            variants[f"OpenVINO {name}"] = partial(run, images)
            print(name, exports[name], flush=True)
    reference = build(options).model
    reference.tower.requires_grad_()
    win_clip = WinClipAny(options.winclip_backbone, pretrained="random", k_shot=options.k_shot)
    win_size = win_clip.pre_processor.transform(torch.rand(1, 3, 240, 240)).shape[-2:]  # type: ignore[union-attr,operator]
    win_clip.model.to(device).setup("Brain", torch.rand(options.k_shot, 3, *win_size, device=device))
    win_images = torch.rand(options.batch, 3, *win_size, device=device)

    variants = {
        "naive": lambda: [naive(reference, image) for image in images.split(1)],
        "float32": predictor(full, images),
        "float32, coreset=0.1": predictor(build(options, coreset=0.1).model, images),
        "float32, levels=half": predictor(build(options, "half").model, images),
        "float32, levels=middle": predictor(build(options, "middle").model, images),
        f"WinCLIP, {options.winclip_backbone}, float32": lambda: win_clip.model(win_images),
        **variants,
    }
    if options.bf16:
        variants["bfloat16"] = predictor(full, images, torch.bfloat16)
        variants["bfloat16, levels=middle"] = predictor(build(options, "middle").model, images, torch.bfloat16)
    seconds = side_by_side(variants, options.repeats)
    switch = switch_seconds(mvfa, options.output.parent)
    print(f"A switch between two adapter sets takes {1000 * switch:.3f} ms.")
    rows = [
        [name, f"{1000 * value / options.batch:,.0f}", f"{seconds['naive'] / value:.2f}"]
        for name, value in seconds.items()
    ]
    results = {
        "machine": facts,
        "options": {k: str(v) for k, v in vars(options).items()},
        "seconds": seconds,
        "exports": exports,
        "switch_s": switch,
    }
    write_results(options.output, results, ["variant", "ms an image", "times as fast as naive"], rows)


if __name__ == "__main__":
    main()
