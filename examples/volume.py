# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""A NIfTI volume, slice by slice, with normal images alone: the anomaly volume lies in the grid of the input.

Needs the readers: pip install ".[medical]" in a copy of the sources.
"""

from pathlib import Path

import nibabel
import numpy as np
from anomalib.engine import Engine

from anomalib_mvfa import MVFA
from anomalib_mvfa.data import MedicalFolder
from anomalib_mvfa.demo.phantoms import draw_phantom


def write_volume(path: Path, lesion: str | None, seed: int) -> None:
    """Stack generated slices into a volume with voxels of 1 x 1 x 3 mm."""
    slices = [draw_phantom("brain_mri", 112, lesion, np.random.default_rng((seed, z))).image[..., 0] for z in range(4)]
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.stack(slices, axis=-1).astype(np.float32), np.diag([1, 1, 3, 1])), path)


root = Path("volumes")
for number in range(4):
    write_volume(root / "normal" / f"{number}.nii.gz", None, number)
write_volume(root / "new" / "case.nii.gz", "random", 9)

# No abnormal image: half of what is shown in training gets a synthetic lesion. Volumes are never split.
training = MedicalFolder(root, normal_dir="normal", num_workers=0, eval_batch_size=4, train_batch_size=4, seed=0)
model = MVFA(backbone="tiny", class_name="brain MRI", threshold="fpr", target_fpr=0.1)
engine = Engine(max_epochs=2, check_val_every_n_epoch=2, enable_progress_bar=False)
engine.fit(model, datamodule=training)

batches = engine.predict(model, datamodule=MedicalFolder(root / "new", num_workers=0))
print(sum(len(batch) for batch in batches), "slices")
(written,) = Path("results").resolve().rglob("case_anomaly.nii.gz")
print(nibabel.load(written).shape, nibabel.load(written).header.get_zooms())
