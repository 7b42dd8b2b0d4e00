# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Zero-shot MVFA: learn from some organs, test on another that was never seen, with its own prompts."""

from anomalib.engine import Engine

from anomalib_mvfa import MVFA
from anomalib_mvfa.data import LeaveOneOut
from anomalib_mvfa.demo.phantoms import write_phantoms

root = write_phantoms("sets", ["brain_mri", "liver_ct", "chest_xray"], {"train": 0, "valid": 8, "test": 8})
data = LeaveOneOut(target="BrainMRI", root=root, num_workers=0)
model = MVFA(backbone="tiny", memory=False, learning_rate=1e-4)
engine = Engine(max_epochs=2, check_val_every_n_epoch=2, enable_progress_bar=False)

engine.train(model, datamodule=data)
(figures,) = engine.test(model, datamodule=data)
print(model.model.class_name, {name: round(value, 3) for name, value in figures.items()})
