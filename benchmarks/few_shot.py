# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Few-shot accuracy on a folder of images: several draws of supports, with mean brightness beside them.

    python -m benchmarks.few_shot --root DIR --draws 5

``DIR`` holds ``normal``, ``abnormal`` and ``masks``. The test part is the same for every draw, apart from the supports.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from anomalib.data import Folder
from anomalib.data.utils import read_image
from anomalib.engine import Engine
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from anomalib_mvfa import MVFA
from anomalib_mvfa.data import FewShot

METRICS = ("image_AUROC", "image_AUPR", "pixel_AUROC", "pixel_AUPR")


def brightness(datamodule: FewShot) -> dict[str, float]:
    """Score the test part by mean brightness alone."""
    samples = datamodule.test_data.samples
    means = torch.stack([read_image(path, as_tensor=True).mean() for path in samples.image_path])
    labels = torch.tensor(samples.label_index.to_numpy(dtype=int))
    return {
        "image_AUROC": float(binary_auroc(means, labels)),
        "image_AUPR": float(binary_average_precision(means, labels)),
    }


def main() -> None:
    """Run the draws and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--k_shot", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--abnormal_source", default="auto")
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--pretrained", help="tag, file or 'random' (default: the backbone's own)")
    parser.add_argument("--class_name", default="Brain")
    parser.add_argument("--output", type=Path, default=Path("results/few_shot"))
    options = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {"MVFA": [], "mean brightness": []}
    for seed in range(options.draws):
        torch.manual_seed(seed)
        source = Folder(
            name=options.root.name,
            root=options.root,
            normal_dir="normal",
            abnormal_dir="abnormal",
            mask_dir="masks",
            num_workers=0,
            eval_batch_size=16,
        )
        data = FewShot(source, k_shot=options.k_shot, seed=seed, abnormal_source=options.abnormal_source)
        model = MVFA(
            backbone=options.backbone,
            pretrained=options.pretrained,
            class_name=options.class_name,
            visualizer=False,
        )
        engine = Engine(
            max_epochs=options.epochs,
            check_val_every_n_epoch=options.epochs,
            default_root_dir=options.output,
            enable_progress_bar=False,
        )
        engine.fit(model, datamodule=data)
        result = engine.test(model, datamodule=data, verbose=False)[0]
        rows["MVFA"].append({name: float(result[name]) for name in METRICS})
        rows["mean brightness"].append(brightness(data))
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "draws.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        print(seed, rows["MVFA"][-1], flush=True)
    print(f"\n| method | {' | '.join(METRICS)} |\n|---|{'---|' * len(METRICS)}")
    for method, draws in rows.items():
        cells = []
        for name in METRICS:
            values = [draw[name] for draw in draws if name in draw]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}" if values else "-")
        print(f"| {method} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
