# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Exports of a trained model: adapters in files and on the hub, graphs for torch, ONNX and OpenVINO."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType
from anomalib.models.components.base.export_mixin import ExportMixin as AnomalibExportMixin
from torchmetrics import Metric

from anomalib_mvfa.training.state import choose_class_name
from anomalib_mvfa.weights.adapter_files import upload, write_adapters

from .quantisation import compress

if TYPE_CHECKING:
    from anomalib_mvfa.model import MVFA

__all__ = ["ExportMixin"]


class ExportMixin(AnomalibExportMixin):
    """anomalib's exports for MVFA, and its adapters alone."""

    def save_adapters(self, path: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Save the adapters alone: as ``.safetensors`` with :meth:`facts`, or as ``.pth`` in the released format.

        ``dtype`` is the storage type; ``None`` keeps float32.
        """
        module = cast("MVFA", self)
        return write_adapters(path, module.model.seg_adapters, module.model.det_adapters, module.facts(), dtype)

    def push_to_hub(self, repository: str, licence: str, private: bool = True) -> str:
        """Upload the adapters in half precision, with a model card made of :meth:`facts`, and return the address.

        ``adapters="hf-hub:owner/name"`` then loads them. Neither images nor the memory bank are uploaded.

        Args:
            repository: ``owner/name``; made unless it exists.
            licence: Identifier of the licence, such as ``"cc-by-nc-sa-4.0"``. That of the training data counts.
            private: Whether a new repository is visible to its owner only.
        """
        module = cast("MVFA", self)
        return upload(repository, module.model, module.facts(), licence, private=private)

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export as a torch file.

        Raises:
            ValueError: If the model is not trained, or its bank or thresholds do not fit.
        """
        self._ready()
        return super().to_torch(export_root, model_file_name)

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export as an ONNX graph from images in [0, 1] to normalised maps and scores, labels and masks.

        The graph resizes images of any size, or of a fixed ``input_size``, to the model's own, as training did; the
        batch is dynamic. OpenVINO models are made of it. Other arguments are those of ``torch.onnx.export``.

        Raises:
            ValueError: If the model is not trained, or its bank or thresholds do not fit.
        """
        self._ready()
        options = {"opset_version": 18, "verbose": False, **kwargs}
        return super().to_onnx(export_root, model_file_name, input_size, **options)

    def _compress_ov_model(  # anomalib's hook for its compression types
        self,
        model: Any,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: Metric | None = None,
        task: Any = None,  # noqa: ARG002 - follows from the data
        max_drop: float = 0.01,
    ) -> Any:
        return compress(model, compression_type, datamodule, metric, max_drop)

    def _ready(self) -> None:
        module = cast("MVFA", self)
        module.fit_state = None  # of a training that was interrupted
        module.ensure_model()
        choose_class_name(module)
        module.calibration.check(module)
