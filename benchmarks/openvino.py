# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The cost of compression: AUROC on a folder of images, and the size of the file.

    python -m benchmarks.openvino --root DIR --draws 5 --epochs 10

``DIR`` holds ``normal``, ``abnormal`` and ``masks``. Its gain in speed is measured by ``benchmarks.inference``.
"""

import argparse
import json
import logging
import statistics
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

from anomalib_mvfa import MVFA
from anomalib_mvfa.data import FewShot
from anomalib_mvfa.pre_processing import EightBitResize

from .few_shot import make_data, make_parser

F32 = {"INFERENCE_PRECISION_HINT": "f32"}  # some processors would otherwise compute in bfloat16
KINDS = {"FP32": None, "FP16": CompressionType.FP16, "INT8": CompressionType.INT8, "INT8_PTQ": CompressionType.INT8_PTQ}


def size_of(model: Path) -> float:
    """Return the size of an OpenVINO model in MB."""
    return sum(model.with_suffix(suffix).stat().st_size for suffix in (".xml", ".bin")) / 1e6


def test_part(mvfa: MVFA, data: FewShot) -> tuple[Tensor, Tensor, Tensor]:
    """Return the test images as the model reads them, labels and masks."""
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
    """Quantise all of a model, as NNCF does by default, for comparison."""
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


def print_table(rows: dict[str, list[dict[str, Any]]]) -> None:
    """Print the mean over the draws."""
    names = list(dict.fromkeys(name for draws in rows.values() for draw in draws for name in draw))
    print(f"\n| | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for row, draws in rows.items():
        cells = [f"{statistics.mean(draw[name] for draw in draws):.4g}" if name in draws[0] else "-" for name in names]
        print(f"| {row} | {' | '.join(cells)} |")


def main() -> None:
    """Measure, write the results, print a table."""
    parser = make_parser(__doc__, epochs=10)
    parser.add_argument("--output", type=Path, default=Path("results/openvino"))
    options = parser.parse_args()
    logging.getLogger("nncf").setLevel(logging.WARNING)
    options.output.mkdir(parents=True, exist_ok=True)
    rows = accuracy(options)
    (options.output / "accuracy.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print_table(rows)


if __name__ == "__main__":
    main()
