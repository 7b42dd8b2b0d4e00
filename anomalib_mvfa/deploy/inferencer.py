# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Inference with an exported model on images of any size."""

from pathlib import Path
from typing import Any

import numpy as np
from anomalib import deploy
from anomalib.data import NumpyImageBatch
from PIL import Image
from torch import Tensor

__all__ = ["OpenVINOInferencer"]


class OpenVINOInferencer(deploy.OpenVINOInferencer):
    """anomalib's inferencer for OpenVINO and ONNX files, which resizes images to the size that the graph reads.

    An exported graph has a fixed input size. Files and Pillow images are brought to it as in training (Pillow's bicubic
    resize in eight bits); maps come at the size of the graph's input.

    Args:
        path: ``.xml``, ``.bin`` or ``.onnx``, or both files of OpenVINO as bytes.
        device: Device of OpenVINO. Defaults to ``"AUTO"``.
        config: Properties of OpenVINO, such as ``{"INFERENCE_PRECISION_HINT": "f32"}``. Defaults to ``None``.
    """

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width that the graph reads, in pixels."""
        height, width = (self.input_blob.get_partial_shape()[axis].get_length() for axis in (2, 3))
        return height, width

    def predict(self, image: str | Path | np.ndarray[Any, Any] | Image.Image | Tensor) -> NumpyImageBatch:
        """Predict an image, or an array of several.

        Args:
            image: A file or a Pillow image of any size; or an array or tensor ``(H, W, 3)``, ``(3, H, W)`` or a batch
                of these, of :attr:`image_size`, in [0, 1] or [0, 255].

        Returns:
            ``pred_score``, ``pred_label``, ``anomaly_map`` and ``pred_mask``, with ``image`` as the graph read it.

        Raises:
            ValueError: If an array has another size.
        """
        height, width = self.image_size
        if isinstance(image, str | Path):
            with Image.open(image) as opened:
                image = opened.convert("RGB")
        if isinstance(image, Image.Image):
            resized = image.convert("RGB").resize((width, height), resample=Image.Resampling.BICUBIC)
            return super().predict(np.asarray(resized, np.float32) / 255)
        array = self.pre_process(image.cpu().numpy() if isinstance(image, Tensor) else image.copy())
        if array.shape[-2:] != (height, width):
            msg = (
                f"The exported model reads images of {height} x {width} pixels, but this array has "
                f"{array.shape[-2]} x {array.shape[-1]}. Give the file or a Pillow image, which are resized as in "
                f'training, or export for this size with --input_size "[{array.shape[-2]},{array.shape[-1]}]".'
            )
            raise ValueError(msg)
        return super().predict(array)
