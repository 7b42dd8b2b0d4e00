# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Effect of each choice of the method on a folder of images: several draws of supports, one row per choice.

    python -m benchmarks.ablation --root DIR --draws 5 --epochs 10

``DIR`` holds ``normal``, ``abnormal`` and ``masks``. All rows train on the same supports and are tested on the same
images. The released code's choices are the first row; each other row changes what its name says. What was measured is
kept in ``draws.json``; the same command goes on where it stopped.
"""

import json
from pathlib import Path
from typing import Any

from rich.progress import track

from anomalib_mvfa.model.variant import Variant
from benchmarks.few_shot import brightness, evaluate, make_data, make_parser, print_table, test_on_the_same_images

RELEASED = "released"
BRIGHTNESS = "mean brightness"
CHOICES: dict[str, dict[str, Any]] = {
    RELEASED: {},
    "paper, all of the following eight": {"variant": "paper"},
    "QuickGELU": {"variant": Variant(quick_gelu=True)},
    "CLIP mean and std": {"variant": Variant(normalize_input=True)},
    "ReLU": {"variant": Variant(activation="relu")},
    "residual (0.9, 0.05, 0.05)": {"variant": Variant(residual=(0.9, 0.05, 0.05))},
    "linear projector at the last level": {"variant": Variant(last_level_projector=True)},
    "maximum over positions": {"variant": Variant(pooling="max")},
    "mean over levels": {"variant": Variant(level_reduction="mean")},
    "BCE on probabilities": {"variant": Variant(bce_as_logits=False)},
    "residual at the token's length": {"variant": Variant(residual_norm=True)},
    "windows 1, 3, 5": {"variant": Variant(window_sizes=(1, 3, 5))},
    "map blur, 2 pixels": {"variant": Variant(map_blur=2.0)},
    "Dice on the background too": {"variant": Variant(background_dice=True)},
    "language branch alone": {"memory": False},
    "memory branch alone": {"language_weight": 0.0},
    "ranges from the test set": {"fusion_scale": "test"},
    "levels: half": {"levels": "half"},
    "levels: middle": {"levels": "middle"},
    "coreset 0.25": {"coreset": 0.25},
    "coreset 0.1": {"coreset": 0.1},
    "4 images a step": {"train_batch_size": 4},
    "16 images a step": {"train_batch_size": 16},
}


def main() -> None:
    """Run all rows and print a table."""
    parser = make_parser(__doc__, epochs=10)
    parser.add_argument("--output", type=Path, default=Path("results/ablation"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "draws.json"
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in (*CHOICES, BRIGHTNESS)}
    if path.exists():
        rows |= json.loads(path.read_text(encoding="utf-8"))
    work = [(seed, name) for seed in range(options.draws) for name in rows if len(rows[name]) <= seed]
    for seed, name in track(work, description="Ablation"):
        data = make_data(options, seed, "auto")
        test_on_the_same_images([data])
        choices = dict(CHOICES.get(name, {}))
        data.train_batch_size = choices.pop("train_batch_size", data.train_batch_size)
        rows[name].append(brightness(data) if name == BRIGHTNESS else evaluate(options, data, seed, **choices))
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print_table(rows)


if __name__ == "__main__":
    main()
