# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Few-shot accuracy on a folder of images: several draws of supports, with mean brightness beside them.

    python -m benchmarks.few_shot --root DIR --draws 5
    python -m benchmarks.few_shot --root DIR --draws 5 --abnormal_source auto synthetic

``DIR`` holds ``normal``, ``abnormal`` and ``masks``. The test part is the same for every draw, apart from the supports.
The second line trains twice on the same normal supports, with real abnormal supports and with synthetic lesions on the
normal ones, and tests both on the same images.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from anomalib.data import Folder
from anomalib.data.utils import read_image
from anomalib.engine import Engine
from lightning.pytorch.trainer.states import TrainerFn
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


def make_data(options: argparse.Namespace, seed: int, abnormal_source: str) -> FewShot:
    """Return the episode of one draw."""
    source = Folder(
        name=options.root.name,
        root=options.root,
        normal_dir="normal",
        abnormal_dir="abnormal",
        mask_dir="masks",
        test_split_ratio=0.8,  # few normal images are needed for training, and many reduce the variance of the metrics
        num_workers=0,
        eval_batch_size=16,
    )
    return FewShot(source, k_shot=options.k_shot, seed=seed, abnormal_source=abnormal_source)


def test_on_the_same_images(episodes: list[FewShot]) -> None:
    """Keep the test images that all episodes have: abnormal supports may have been taken out of some."""
    for data in episodes:
        data.setup(TrainerFn.FITTING)  # the trainer then leaves it as it is
    shared = set.intersection(*(set(data.test_data.samples.image_path) for data in episodes))
    for data in episodes:
        kept = data.test_data.samples.image_path.isin(shared)
        data.test_data = data.test_data.subsample(kept.to_numpy().nonzero()[0].tolist())


def evaluate(options: argparse.Namespace, data: FewShot, seed: int, **choices: Any) -> dict[str, float]:
    """Train on one episode and test, with arguments of MVFA beyond those of the options."""
    torch.manual_seed(seed)
    arguments = {"backbone": options.backbone, "pretrained": options.pretrained, "class_name": options.class_name}
    model = MVFA(**arguments, visualizer=False, **choices)
    engine = Engine(
        max_epochs=options.epochs,
        check_val_every_n_epoch=options.epochs,
        default_root_dir=options.output,
        enable_progress_bar=False,
    )
    engine.fit(model, datamodule=data)
    result = engine.test(model, datamodule=data, verbose=False)[0]
    return {name: float(result[name]) for name in METRICS}


def print_table(rows: dict[str, list[dict[str, float]]]) -> None:
    """Print mean and standard deviation over the draws."""
    print(f"\n| method | {' | '.join(METRICS)} |\n|---|{'---|' * len(METRICS)}")
    for method, draws in rows.items():
        cells = []
        for name in METRICS:
            values = [draw[name] for draw in draws if name in draw]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}" if values else "-")
        print(f"| {method} | {' | '.join(cells)} |")


def make_parser(description: str | None, epochs: int) -> argparse.ArgumentParser:
    """Return a parser with the arguments that the benchmarks on a folder of images share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--k_shot", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--pretrained", help="tag, file or 'random' (default: the backbone's own)")
    parser.add_argument("--class_name", default="Brain")
    return parser


def main() -> None:
    """Run the draws and print a table."""
    parser = make_parser(__doc__, epochs=50)
    parser.add_argument("--abnormal_source", nargs="+", default=["auto"], help="one row of the table each")
    parser.add_argument("--output", type=Path, default=Path("results/few_shot"))
    options = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.draws):
        episodes = [make_data(options, seed, abnormal_source) for abnormal_source in options.abnormal_source]
        test_on_the_same_images(episodes)
        for abnormal_source, data in zip(options.abnormal_source, episodes, strict=True):
            lesions = "synthetic" if abnormal_source == "synthetic" else "real"
            result = evaluate(options, data, seed)
            rows.setdefault(f"MVFA, {lesions} lesions", []).append(result)
            print(seed, lesions, len(data.test_data), result, flush=True)
        rows.setdefault("mean brightness", []).append(brightness(episodes[0]))
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "draws.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print_table(rows)


if __name__ == "__main__":
    main()
