# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Runs the published protocols on the six sets and compares the results with published and independent ones.

    python -m tools.reproduce --data DATA --lists LISTS [--weights WEIGHTS]

``DATA`` holds the sets, ``LISTS`` the support lists ``<Set>/4-shot.txt`` and ``<Set>/shot4_sample1.txt`` to ``9``,
``WEIGHTS`` the released adapters ``few-shot/<Set>.pth`` and ``zero-shot/<Set>.pth``. What was computed is kept in
``--output``: the same command resumes a run that was stopped.
"""

import argparse
import logging
import math
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anomalib.data import get_datamodule
from anomalib.engine import Engine
from lightning.pytorch import Callback

from anomalib_mvfa import MVFA
from anomalib_mvfa.comparison.cells import Cell, load_cells
from anomalib_mvfa.comparison.report import PAPER_SETS, PUBLISHED, Table, environment
from anomalib_mvfa.comparison.runner import Comparison, run_comparison
from anomalib_mvfa.data import FewShot
from anomalib_mvfa.files import replacing

__all__ = ["main", "protocols", "results"]

logger = logging.getLogger(__name__)

DRAWS = ("4-shot", *(f"shot4_sample{number}" for number in range(1, 10)))
FEW, ZERO = "MVFA", "MVFA (zero-shot)"
TEMPLATE = Path(__file__).with_name("reproduce.md.jinja")

# Ten draws of 4 + 4 supports: the lists shot4_sample1 to shot4_sample9, and the published list 4-shot at the end.
_TEN_IMAGE = {
    "Histopathology": (78.23, 78.71, 71.21, 63.63, 70.46, 80.33, 75.64, 80.52, 77.12, 83.58),
    "Chest": (58.85, 84.92, 75.07, 78.36, 79.48, 80.86, 80.94, 75.65, 79.96, 82.46),
    "Retina_OCT2017": (99.57, 93.53, 98.58, 98.54, 96.27, 99.97, 99.45, 98.68, 98.50, 99.57),
    "Brain": (94.41, 90.94, 86.04, 86.39, 94.16, 91.45, 92.50, 92.64, 94.45, 90.94),
    "Liver": (86.76, 82.76, 85.84, 87.91, 84.45, 86.23, 81.40, 84.92, 78.47, 86.94),
    "Retina_RESC": (95.18, 97.82, 93.40, 96.86, 93.23, 91.37, 95.73, 96.88, 93.24, 95.86),
}
_TEN_PIXEL = {
    "Brain": (97.81, 97.16, 97.13, 97.45, 98.08, 97.42, 97.50, 97.67, 97.40, 96.89),
    "Liver": (99.38, 97.67, 99.06, 99.52, 96.82, 98.63, 97.41, 98.78, 96.14, 99.57),
    "Retina_RESC": (98.78, 98.99, 97.93, 99.12, 97.98, 98.41, 98.37, 98.71, 98.58, 99.16),
}
TEN_DRAWS: Mapping[str, Mapping[str, tuple[float, ...]]] = {"image": _TEN_IMAGE, "pixel": _TEN_PIXEL}
"""AUROC in percent of the released code on ten draws, by level and set: forPaperOfCwj/SGGP, tables S.IV and S.V."""


def protocols(options: argparse.Namespace) -> dict[str, Comparison]:
    """Return the comparisons to run, by the name of the protocol.

    Args:
        options: Of the command line.
    """

    def make(name: str, method: str, arguments: Mapping[str, Any], draws: Sequence[str], **source: Any) -> Comparison:
        common = {"root": str(options.data), "eval_batch_size": 16, "num_workers": options.num_workers, **source}
        sets = {each: {"class_path": "MedicalBMAD", "init_args": {"category": each, **common}} for each in options.sets}
        return Comparison(
            sets=sets,
            methods={method: arguments},
            output=str(options.output / name.replace(" ", "-").replace(",", "")),
            backbone=options.backbone,
            pretrained=options.pretrained,
            k_shot=(options.k_shot,),
            pixel_metrics="network",
            epochs=options.epochs,
            accelerator=options.accelerator,
            support_list=f"{options.lists}/{{set}}/{{draw}}.txt",
            draws=tuple(draws),
        )

    whole_test = {"val_split_mode": "same_as_test"}
    others = {"root": str(options.data), "num_workers": options.num_workers}
    best = {"selection": "best", "fusion_scale": "test", "trainer": {"check_val_every_n_epoch": 1}}
    looks = {"check_val_every_n_epoch": 1, "val_check_interval": 0.2}
    best_zero = {"selection": "best", "trainer": looks, "data": others | whole_test | {"train_split": "test"}}
    draws = DRAWS[: options.draws]
    made = {
        "published few-shot": make("published few-shot", FEW, best, draws, **whole_test),
        "published zero-shot": make("published zero-shot", ZERO, best_zero, draws[:1]),
        "default few-shot": make("default few-shot", FEW, {}, draws),
        "default zero-shot": make("default zero-shot", ZERO, {"data": others | {"train_split": "valid"}}, draws[:1]),
    }
    if options.weights:
        few = {"adapters": f"{options.weights}/few-shot/{{set}}.pth", "fusion_scale": "test"}
        zero = {"adapters": f"{options.weights}/zero-shot/{{set}}.pth"}
        made["released few-shot adapters"] = make("released few-shot adapters", FEW, few, draws[:1], **whole_test)
        made["released zero-shot adapters"] = make("released zero-shot adapters", ZERO, zero, draws[:1])
    return {name: comparison for name, comparison in made.items() if not options.only or name in options.only}


class _Clock(Callback):
    """Times the batches of a short training; the first of each kind warms up."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"train": [], "image": []}
        self._began = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds["train"].append(time.perf_counter() - self._began)

    def on_validation_batch_start(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def on_validation_batch_end(self, _trainer: Any, _module: Any, _outputs: Any, batch: Any, *_: Any) -> None:
        self.seconds["image"].append((time.perf_counter() - self._began) / len(batch.image))


def estimate(made: Mapping[str, Comparison], options: argparse.Namespace) -> str:
    """Time a start, a training step and a test image of the first set, and estimate how long everything left takes.

    Args:
        made: The protocols.
        options: Of the command line.

    Returns:
        A sentence.
    """
    pending = [(name, spec) for name, comparison in made.items() for spec in comparison.cells() if not spec.is_done]
    if not pending:
        return "Everything has been computed."
    images: dict[str, tuple[int, int]] = {}  # test and validation images
    for name, config in pending[0][1].comparison.sets.items():
        data = get_datamodule(dict(config))
        data.setup()
        images[name] = (len(data.test_data), len(data.val_data))
    spec = pending[0][1]
    source = get_datamodule({**spec.source, "init_args": {**spec.source["init_args"], "eval_batch_size": 1}})
    clock = _Clock()
    engine = Engine(
        max_epochs=1,
        limit_train_batches=3,
        limit_val_batches=3,
        num_sanity_val_steps=0,
        accelerator=options.accelerator,
        devices=1,
        logger=False,
        callbacks=[clock],
        enable_progress_bar=False,
        default_root_dir=options.output / "timing",
    )
    began = time.perf_counter()
    model = MVFA(backbone=options.backbone, pretrained=options.pretrained, visualizer=False, evaluator=False)
    engine.fit(model, datamodule=FewShot(source, k_shot=1))
    start = time.perf_counter() - began - sum(map(sum, clock.seconds.values()))  # weights, prompts, supports
    step, image = (float(np.median(clock.seconds[kind][1:])) for kind in ("train", "image"))
    total = 0.0
    for name, spec in pending:
        test, valid = images[spec.set]
        epochs = 0 if name.startswith("released") else options.epochs
        steps = 22 * options.k_shot
        if name.endswith("zero-shot"):
            steps = sum(counts[name.startswith("default")] for other, counts in images.items() if other != spec.set)
        looks = epochs * (5 if name == "published zero-shot" else 2) if name.startswith("published") else 1
        seen = test if not name.startswith("default") else valid
        total += start + epochs * steps * step + (looks * seen + 3 * test) * image
    return (
        f"{len(pending)} runs are left: about {timedelta(seconds=round(total))} (h:mm:ss) on this machine "
        f"({start:.1f} s per start, {1000 * step:.0f} ms per training step, {1000 * image:.0f} ms per test image)."
    )


def _auroc(cells: Sequence[Cell], name: str, level: str) -> list[float]:
    """Return the AUROC in percent by draw; NaN where it is missing."""
    found = sorted((cell for cell in cells if cell.set == name and cell.status == "done"), key=lambda cell: cell.seed)
    return [100 * cell.metrics.get(f"{level}_AUROC", math.nan) for cell in found]


def results(made: Mapping[str, Comparison]) -> list[Table]:
    """Return one table per protocol: ours, published, and independent results.

    Args:
        made: The protocols.
    """
    header = [
        "set",
        "AUROC of",
        "ours, published list",
        "published",
        "ours, all draws",
        "independent, ten draws",
        "inside",
    ]
    tables = []
    for name, comparison in made.items():
        method = next(iter(comparison.methods))
        published = PUBLISHED[method, 0 if method == ZERO else 4]
        cells = load_cells(comparison.output) if (Path(comparison.output) / "cells").is_dir() else []
        rows = []
        for each in comparison.sets:
            for level in ("image", "pixel"):
                known = published.get((each, level))
                ours = _auroc(cells, each, level)
                if known is None and all(map(math.isnan, ours)):
                    continue
                ten = TEN_DRAWS[level].get(each) if method == FEW else None
                first = ours[0] if ours and cells else math.nan
                verdict = "-"
                if ten and ours and not math.isnan(ours[0]):
                    verdict = "yes" if abs(np.mean(ours) - np.mean(ten)) <= 2 * np.std(ten, ddof=1) else "no"
                rows.append([each, level, _number(first), _number(known), _spread(ours), _spread(ten or ()), verdict])
        note = "nothing is taken from the test set"
        if name.startswith("published"):
            note = "the epoch is chosen on the test set"
        elif name == "released few-shot adapters":
            note = "ranges of the fusion from the test set"
        tables.append(Table(f"{name[0].upper()}{name[1:]} ({note}), percent", pd.DataFrame(rows, columns=header)))
    return tables


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2 or any(map(math.isnan, values)):
        return "-"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} ({len(values)})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and write ``reproduce.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the six sets")
    parser.add_argument("--lists", type=Path, required=True, help="folder of the support lists")
    parser.add_argument("--weights", type=Path, help="folder of the released adapters")
    parser.add_argument("--output", type=Path, default=Path("results/reproduce"))
    parser.add_argument("--sets", nargs="+", default=list(PAPER_SETS))
    parser.add_argument("--only", nargs="+", help="names of protocols, such as 'published few-shot'")
    parser.add_argument("--draws", type=int, default=len(DRAWS), help="number of support lists, at most 10")
    parser.add_argument("--k_shot", type=int, default=4, help="number of normal supports in the lists")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--backbone", default="ViT-L-14-336")
    parser.add_argument("--pretrained", default="openai")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--num_workers", type=int, default=2)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    made = protocols(options)
    print(estimate(made, options), flush=True)
    failed = []
    template = environment(markdown=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    for comparison in made.values():
        failed += run_comparison(comparison)
        with replacing(options.output / "reproduce.md") as partial:
            partial.write_text(template.render(tables=results(made)), encoding="utf-8")
    print((options.output / "reproduce.md").read_text(encoding="utf-8"))
    if failed:
        names = "\n".join(f"  {folder / 'cell.json'}" for folder in failed)
        msg = f"{len(failed)} runs failed; the same command tries them again. The reasons are in\n{names}"
        raise SystemExit(msg)


if __name__ == "__main__":
    main()
