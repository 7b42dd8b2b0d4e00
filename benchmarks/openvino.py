# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""What compression costs and gains: AUROC on a folder of images, and size, memory and time of a large backbone.

    python -m benchmarks.openvino accuracy --root DIR --draws 3
    python -m benchmarks.openvino latency --backbone ViT-L-14-336 --pretrained random

``DIR`` holds ``normal``, ``abnormal`` and ``masks``. Latency needs no data: drawn images calibrate, and weights may be
random, since time and size do not depend on them. Both write a table and ``OUTPUT/accuracy.json`` or ``latency.json``.
"""

import argparse
import json
import logging
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import openvino
import torch
from anomalib.deploy import CompressionType
from anomalib.engine import Engine
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc
from torchvision.tv_tensors import Mask

from anomalib_mvfa import MVFA, AdapterSets
from anomalib_mvfa.data import FewShot, MedicalBMAD
from anomalib_mvfa.data.phantoms import write_phantoms
from anomalib_mvfa.model.memory import Support
from anomalib_mvfa.model.processing import EightBitResize

from .few_shot import make_data, make_parser

F32 = {"INFERENCE_PRECISION_HINT": "f32"}  # some processors would otherwise compute in bfloat16
KINDS = {"FP32": None, "FP16": CompressionType.FP16, "INT8": CompressionType.INT8, "INT8_PTQ": CompressionType.INT8_PTQ}


def size_of(model: Path) -> float:
    """Give the size of an OpenVINO model in MB."""
    return sum(model.with_suffix(suffix).stat().st_size for suffix in (".xml", ".bin")) / 1e6


def test_part(mvfa: MVFA, data: FewShot) -> tuple[Tensor, Tensor, Tensor]:
    """Give the test images as the model reads them, labels and masks."""
    items = [data.test_data[index] for index in range(len(data.test_data))]
    resize = EightBitResize(mvfa.model.image_size)
    images = torch.stack([resize(torch.as_tensor(item.image).as_subclass(Tensor)) for item in items])
    masks = torch.stack([torch.as_tensor(resize(Mask(item.gt_mask))).bool() for item in items])
    return images, torch.stack([torch.as_tensor(item.gt_label) for item in items]), masks


def auroc(path: Path, images: Tensor, labels: Tensor, masks: Tensor) -> dict[str, float]:
    """Test an OpenVINO model."""
    model = openvino.Core().compile_model(path, "CPU", F32)
    outputs = [model(batch.numpy()) for batch in images.split(16)]
    scores, maps = (
        torch.cat([torch.from_numpy(output[name].copy()) for output in outputs])
        for name in ("pred_score", "anomaly_map")
    )
    return {
        "image_AUROC": float(binary_auroc(scores.flatten(), labels)),
        "pixel_AUROC": float(binary_auroc(maps.flatten(), masks.flatten().int())),
    }


def quantise_plainly(path: Path, images: Tensor) -> Path:
    """Quantise all of a model as NNCF does unless told otherwise, for comparison."""
    model = nncf.quantize(openvino.Core().read_model(path), nncf.Dataset(list(images.split(1)), Tensor.numpy))
    plain = path.with_name("plain.xml")
    openvino.save_model(model, plain, compress_to_fp16=False)
    return plain


def accuracy(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Train, export in every way, test."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in range(options.draws):
        data = make_data(options, seed, "auto")
        torch.manual_seed(seed)
        mvfa = MVFA(options.backbone, options.pretrained, class_name=options.class_name, visualizer=False)
        folder = options.output / str(seed)
        Engine(
            max_epochs=options.epochs,
            check_val_every_n_epoch=options.epochs,
            default_root_dir=folder,
            enable_progress_bar=False,
        ).fit(mvfa, datamodule=data)
        test = test_part(mvfa, data)
        paths = {
            name: mvfa.to_openvino(folder / name, compression_type=kind, datamodule=data)
            for name, kind in KINDS.items()
        }
        resize = EightBitResize(mvfa.model.image_size)
        images = torch.stack(
            [
                resize(torch.as_tensor(item.image).as_subclass(Tensor))
                for item in map(data.val_data.__getitem__, range(len(data.val_data)))
            ]
        )
        paths["INT8_PTQ, all nodes, no scheme"] = quantise_plainly(paths["FP32"], images)
        for name, path in paths.items():
            rows.setdefault(name, []).append({**auroc(path, *test), "size_mb": size_of(path)})
            print(seed, name, rows[name][-1], flush=True)
    return rows


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Give the median time of a call, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


def peak_gb() -> float:
    """Give the greatest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


@torch.no_grad()
def latency(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Time one image in torch and in OpenVINO, and a switch of adapter sets."""
    torch.set_num_threads(options.threads)
    mvfa = MVFA(options.backbone, options.pretrained, class_name=options.class_name, visualizer=False)
    mvfa.configure_model()
    mvfa.eval()
    size = mvfa.model.image_size
    noise = torch.rand(options.k_shot, 3, *size)
    mvfa.model.remember(Support(noise[None], noise[:0]), batch_size=1)
    bank_mb = sum(mvfa.model.memory[level].numel() for level in range(len(mvfa.model.levels))) * 4 / 1e6
    image = torch.rand(1, 3, *size)
    state_mb = sum(value.numel() * value.element_size() for value in mvfa.state_dict().values()) / 1e6
    rows = {
        "torch FP32": [
            {"latency_ms": milliseconds(lambda: mvfa(image), options.repeats), "size_mb": state_mb - bank_mb}
        ]
    }
    print(rows, flush=True)

    data = FewShot(
        MedicalBMAD(
            write_phantoms(options.output / "phantoms", ["brain_mri"], size=max(size)), "BrainMRI", num_workers=0
        )
    )
    data.setup("fit")
    chosen = range(min(options.calibration_images, len(data.val_data)))
    data.val_data = data.val_data.subsample(list(chosen))
    began = time.perf_counter()
    path = mvfa.to_openvino(options.output, compression_type=CompressionType.INT8_PTQ, datamodule=data)
    seconds, memory = time.perf_counter() - began, peak_gb()
    model = openvino.Core().compile_model(path, "CPU", {**F32, "INFERENCE_NUM_THREADS": options.threads})
    rows["OpenVINO INT8_PTQ"] = [
        {
            "latency_ms": milliseconds(lambda: model(image.numpy()), options.repeats),
            "size_mb": size_of(path) - bank_mb,
            "quantisation_s": seconds,
            "calibration_images": len(chosen),
            "peak_memory_gb": memory,
        }
    ]
    adapters = mvfa.save_adapters(options.output / "adapters.safetensors", torch.float16)
    sets = AdapterSets(mvfa)
    for name in ("first", "second"):
        sets.add(name, adapters)
    rows["switch of adapter sets"] = [
        {
            "latency_ms": milliseconds(lambda: (sets.use("first"), sets.use("second")), 1000) / 2,
            "size_mb": adapters.stat().st_size / 1e6,
        }
    ]
    return rows


def print_table(rows: dict[str, list[dict[str, Any]]]) -> None:
    """Print the mean over the draws."""
    names = list(dict.fromkeys(name for draws in rows.values() for draw in draws for name in draw))
    print(f"\n| | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for row, draws in rows.items():
        cells = [f"{statistics.mean(draw[name] for draw in draws):.4g}" if name in draws[0] else "-" for name in names]
        print(f"| {row} | {' | '.join(cells)} |")


def main() -> None:
    """Measure, write the figures, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output", type=Path, default=Path("results/openvino"))
    commands.add_parser("accuracy", parents=[common, make_parser(None, epochs=10)], add_help=False)
    timed = commands.add_parser("latency", parents=[common])
    timed.add_argument("--backbone", default="ViT-L-14-336")
    timed.add_argument("--pretrained", default="random")
    timed.add_argument("--class_name", default="Brain")
    timed.add_argument("--k_shot", type=int, default=4, help="images in the bank")
    timed.add_argument("--threads", type=int, default=1)
    timed.add_argument("--repeats", type=int, default=5)
    timed.add_argument("--calibration_images", type=int, default=8)
    options = parser.parse_args()
    logging.getLogger("nncf").setLevel(logging.WARNING)
    options.output.mkdir(parents=True, exist_ok=True)
    rows = accuracy(options) if options.command == "accuracy" else latency(options)
    file = options.output / f"{options.command}.json"
    file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print_table(rows)


if __name__ == "__main__":
    main()
