# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The main job, offline: few-shot training, testing and prediction on drawn images with the embedded backbone.

It runs the stock ``anomalib`` command, and prints each command so that it can be typed again with other data.
"""

import shlex
import subprocess
import sys
import time
from pathlib import Path

from anomalib_mvfa.data.phantoms import write_phantoms

__all__ = ["main"]

ROOT = Path("results/demo")
SET = "BrainMRI"
EPOCHS = 15


def _anomalib(*arguments: str) -> None:
    """Run the stock command that belongs to this Python."""
    command = [str(Path(sys.executable).with_name("anomalib")), *arguments]
    print(f"\n$ anomalib {shlex.join(arguments)}\n", flush=True)  # noqa: T201 - this is a command's output
    subprocess.run(command, check=True)  # noqa: S603 - fixed arguments


def main() -> None:
    """Write phantoms, train MVFA on 4 + 4 of them, test it, predict a folder."""
    began = time.monotonic()
    data = write_phantoms(ROOT / "phantoms", ["brain_mri"], size=224)
    _anomalib(
        *("train", "--model", "MVFA", "--model.backbone", "tiny"),
        *("--data", "FewShot", "--data.k_shot", "4", "--data.train_batch_size", "4"),
        *("--data.source", "MedicalBMAD", "--data.source.root", str(data), "--data.source.category", SET),
        *("--data.source.num_workers", "0", "--trainer.accelerator", "cpu"),
        *("--trainer.max_epochs", str(EPOCHS), "--trainer.check_val_every_n_epoch", str(EPOCHS)),
        *("--default_root_dir", str(ROOT), "--seed_everything", "0"),
    )
    trained = max(
        (ROOT / "MVFA" / "MedicalBMAD" / SET).glob("v*/weights/lightning/model.ckpt"),
        key=lambda path: path.stat().st_mtime,
    )
    _anomalib(
        *("predict", "--model", "MVFA", "--ckpt_path", str(trained)),
        *("--data", str(data / SET / "test" / "Ungood" / "img")),
        *("--default_root_dir", str(ROOT), "--trainer.accelerator", "cpu"),
    )
    tested = trained.parents[2] / "images"
    predicted = ROOT / "MVFA" / "latest" / "images"
    print(  # noqa: T201
        f"\nDone in {time.monotonic() - began:.0f} s. The images are drawn by a program and the backbone is a small "
        "untrained demonstration: the figures show that the software works, not how good MVFA is.\n"
        f"Checkpoint         {trained}\n"
        f"Test pictures      {tested.resolve()}\n"
        f"Predicted pictures {predicted.resolve()}\n"
        f"Prediction table   {predicted.resolve() / 'predictions.csv'}",
    )


if __name__ == "__main__":
    main()
