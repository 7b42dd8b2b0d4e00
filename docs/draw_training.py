# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Draw the training of the tiny CLIP from its history: ``python docs/draw_training.py``."""

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

IMAGES = Path(__file__).with_name("images")


def main() -> None:
    """Read ``images/tiny_training.json`` and write ``images/tiny_training.png``."""
    history = json.loads((IMAGES / "tiny_training.json").read_text(encoding="utf-8"))
    steps = [entry["step"] for entry in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    names = {"probe_auroc": "patches, linear probe", "patch_auroc_5": "patches against text", "image_auroc": "images"}
    for key, label in names.items():
        left.plot(steps, [entry[key] for entry in history], label=label)
    left.plot(
        steps, [entry["modality_accuracy"] for entry in history], label="modality predicted correctly (share)", ls=":"
    )
    left.set(xlabel="step", ylabel="AUROC on 192 held-out images", ylim=(0, 1))
    left.legend(frameon=False, fontsize=8)
    for key in ("patch", "probe", "image", "caption"):
        known = [(entry["step"], entry[key]) for entry in history if key in entry]
        right.plot(*zip(*known, strict=True), label=key)
    right.set(xlabel="step", ylabel="loss, running mean", ylim=(0, None))
    right.legend(frameon=False, fontsize=8)
    figure.savefig(IMAGES / "tiny_training.png", dpi=110)


if __name__ == "__main__":
    main()
