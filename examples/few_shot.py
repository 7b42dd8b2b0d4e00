# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Few-shot MVFA on folders of images: train, test, predict, keep the adapters.

Replace the generated images by your own: normal ones, abnormal ones, and masks with the names of the abnormal ones. For
real results leave ``backbone`` out, which takes the published one and downloads its weights.
"""

from anomalib.data import Folder, PredictDataset
from anomalib.engine import Engine

from anomalib_mvfa import MVFA
from anomalib_mvfa.data import FewShot
from anomalib_mvfa.demo.phantoms import write_phantoms

root = write_phantoms("phantoms", ["brain_mri"], {"train": 16, "valid": 0, "test": 16}) / "BrainMRI"

source = Folder(
    name="brain MRI",
    root=root,
    normal_dir="train/good",
    normal_test_dir="test/good/img",
    abnormal_dir="test/Ungood/img",
    mask_dir="test/Ungood/label",
    eval_batch_size=8,
    num_workers=0,
)
data = FewShot(source, k_shot=4, seed=0, train_batch_size=4)
model = MVFA(backbone="tiny")
engine = Engine(max_epochs=5, check_val_every_n_epoch=5, enable_progress_bar=False)

engine.train(model, datamodule=data)
(figures,) = engine.test(model, datamodule=data)
print({name: round(value, 3) for name, value in figures.items()})

for batch in engine.predict(model, dataset=PredictDataset(root / "test/Ungood/img")):
    for path, score, label in zip(batch.image_path, batch.pred_score, batch.pred_label, strict=True):
        print(path, f"{float(score):.3f}", "abnormal" if label else "normal")

model.save_adapters("brain.safetensors")
