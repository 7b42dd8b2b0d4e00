# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Anomaly maps of predicted volumes, as volumes."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch.nn import functional

from anomalib_mvfa.processes import gather_objects
from anomalib_mvfa.visualization import claim_name, loaded_dataset, results_dir

from .medical_dataset import MedicalDataset
from .readers import ImageRef, read_volume, volume_slice, write_volume
from .readers.files import is_volume

__all__ = ["AnomalyVolumes"]


class AnomalyVolumes(Callback):
    """Writes the anomaly map of each predicted volume in the voxel grid of the volume, as NIfTI.

    ``<name>_anomaly.nii.gz`` is written beside the heatmaps. Its values are those of the maps, in [0, 1] with the
    threshold at one half once a model is calibrated; slices that were left out are 0. Of several processes the first
    writes, with the slices of all.
    """

    def __init__(self) -> None:
        self._parts: dict[ImageRef, str] = {}  # files of this process's slices, where there are several processes
        self._folder = tempfile.TemporaryDirectory(prefix="anomalib-mvfa-")
        self._ref: ImageRef | None = None
        self._scores: NDArray[np.float32] = np.zeros(0, dtype=np.float32)
        self._names: dict[Path, str] = {}

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Fill in the slices of a batch; write a volume when the next file begins."""
        del pl_module, args, kwargs
        dataset = loaded_dataset(trainer)
        if not isinstance(dataset, MedicalDataset) or outputs.anomaly_map is None:
            return
        for item in outputs:
            ref = dataset.ref(item.image_path)
            if self._ref is None or ref.path != self._ref.path:
                self._write(trainer)
            if is_volume(ref.path) and not item.explanation:
                if self._ref is None:
                    volume = read_volume(ref.path, ref.volume, ref.max_pixels)[0]
                    self._ref, self._scores = ref, np.zeros_like(volume)
                view = volume_slice(self._scores, ref.frame or 0, ref.axis)
                anomaly_map = item.anomaly_map.detach().float().cpu()[None, None]
                size = (view.shape[0], view.shape[1])
                resized = functional.interpolate(anomaly_map, size, mode="bilinear", align_corners=False)
                view[...] = resized[0, 0].numpy()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last volume, or merge the slices of several processes."""
        del pl_module
        self._write(trainer)
        volumes = {ref for refs in gather_objects(set(self._parts)) for ref in refs}
        for ref in sorted(volumes, key=lambda ref: ref.path):
            own = self._parts.pop(ref, None)
            parts = gather_objects(None if own is None else np.load(own))
            if trainer.is_global_zero:
                self._save(trainer, ref, sum(part for part in parts if part is not None))

    def _write(self, trainer: Trainer) -> None:
        ref, self._ref = self._ref, None
        if ref is None:
            return
        if trainer.world_size == 1:
            self._save(trainer, ref, self._scores)
            return
        ref = replace(ref, frame=None)
        self._parts[ref] = f"{self._folder.name}/{len(self._parts)}.npy"
        np.save(self._parts[ref], self._scores)

    def _save(self, trainer: Trainer, ref: ImageRef, scores: NDArray[np.float32]) -> None:
        name = ImageRef(ref.path, root=ref.root).name
        target = claim_name(results_dir(trainer) / f"{name}_anomaly.nii.gz", str(ref.path), self._names)
        write_volume(target, scores, like=ref.path)
