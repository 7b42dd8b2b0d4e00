# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Inference with an exported model, with the resize of training to the last grey level."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from anomalib import deploy
from anomalib.data import NumpyImageBatch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    import openvino

__all__ = ["OpenVINOInferencer", "image_size"]


def image_size(model: "openvino.Model | openvino.CompiledModel") -> tuple[int, int]:
    """Return the height and width in pixels that a graph reads: those of its input, or of its maps if it resizes."""
    shape = model.input(0).get_partial_shape()
    if shape[2].is_dynamic or shape[3].is_dynamic:
        shape = model.output("anomaly_map").get_partial_shape()
    return shape[-2].get_length(), shape[-1].get_length()


class OpenVINOInferencer(deploy.OpenVINOInferencer):
    """anomalib's inferencer for OpenVINO and ONNX files, with files and Pillow images resized by Pillow as in training.

    The graph resizes images of any size itself and agrees with Pillow to one grey level in 255; here the agreement is
    exact. Arrays are resized by the graph.

    Its arguments are anomalib's, such as ``config={"INFERENCE_PRECISION_HINT": "f32"}``.
    """

    def predict(self, image: str | Path | np.ndarray[Any, Any] | Image.Image | Tensor) -> NumpyImageBatch:
        """Predict an image, or an array of several.

        Args:
            image: A file, a Pillow image, or an array or tensor ``(H, W, 3)``, ``(3, H, W)`` or a batch of these, in
                [0, 1] or [0, 255]. It is not changed.

        Returns:
            ``pred_score``, ``pred_label``, ``anomaly_map`` and ``pred_mask``, with ``image`` as the graph read it.
        """
        if isinstance(image, str | Path):
            with Image.open(image) as opened:
                image = opened.convert("RGB")
        if isinstance(image, Image.Image):
            height, width = image_size(self.model)
            resized = image.convert("RGB").resize((width, height), resample=Image.Resampling.BICUBIC)
            return super().predict(np.asarray(resized, np.float32) / 255)
        array = image.numpy(force=True) if isinstance(image, Tensor) else image
        return super().predict(array.copy())  # anomalib scales it in place
