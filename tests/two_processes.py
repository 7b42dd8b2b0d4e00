# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""A user's script: fit, test and predict with as many processes as asked for. Run by ``test_processes.py``."""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch
from anomalib.data import Folder
from anomalib.engine import Engine

from anomalib_mvfa import MVFA
from anomalib_mvfa.data import FewShot, MedicalFolder


def run(root: Path, out: Path, backbone: str, devices: int) -> None:
    """Write adapters, metrics and tables below ``out``, and of every process the digest of its bank."""
    torch.set_num_threads(1)
    source = Folder(
        "disks",
        normal_dir="normal",
        abnormal_dir="abnormal",
        mask_dir="masks",
        root=root,
        eval_batch_size=2,
        num_workers=0,
        seed=0,
        test_split_ratio=0.5,
    )
    data = FewShot(source, k_shot=2, train_batch_size=4 // devices)
    torch.manual_seed(0)
    model = MVFA(backbone, "random", class_name="Brain")
    options = {"accelerator": "cpu", "devices": devices, "logger": False, "enable_progress_bar": False}
    engine = Engine(strategy="ddp" if devices > 1 else "auto", default_root_dir=out, max_epochs=2, **options)
    engine.fit(model, datamodule=data)
    rank = engine.trainer.global_rank
    bank = torch.cat([model.model.memory[level] for level in range(len(model.model.levels))])
    fact = {"entries": len(bank), "digest": hashlib.sha256(bank.numpy().tobytes()).hexdigest()}
    metrics = engine.test(model, datamodule=data)[0]
    table = Path(engine.trainer.default_root_dir) / "images" / "predictions.csv"
    engine.trainer.strategy.barrier()
    if rank == 0:
        table.rename(out / "tested.csv")
        model.save_adapters(out / "adapters.safetensors")
    predictions = engine.predict(model, datamodule=MedicalFolder(root / "scans", num_workers=0, eval_batch_size=2))
    fact |= {"metrics": metrics, "predicted": [path for batch in predictions for path in batch.image_path]}
    fact["threshold"] = float(model.post_processor.image_threshold)
    (out / f"rank{rank}.json").write_text(json.dumps(fact), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("root", "out", "backbone"):
        parser.add_argument(name)
    parser.add_argument("devices", type=int)
    given = parser.parse_args(sys.argv[1:])
    run(Path(given.root), Path(given.out), given.backbone, given.devices)
