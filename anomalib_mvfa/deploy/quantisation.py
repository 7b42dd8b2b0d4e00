# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Compression of exported OpenVINO graphs with NNCF.

The tower and the adapters are where the time and the size are, and they tolerate eight bits. The resize before them and
the head behind them do not: similarities are multiplied by 100 before a softmax, and distances to the bank differ in
the third digit. Both stay in floating point.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.deploy import CompressionType
from anomalib.metrics import F1Score
from torch import Tensor
from torchmetrics import Metric
from torchvision.tv_tensors import Mask

from anomalib_mvfa.pre_processing import EightBitResize

from .inferencer import image_size

if TYPE_CHECKING:
    import openvino

__all__ = ["compress", "sensitive_nodes"]

logger = logging.getLogger(__name__)

CALIBRATION_IMAGES = 300
"""More images make calibration longer, not better."""


def sensitive_nodes(graph: "openvino.Model") -> list[str]:
    """Return the names of the nodes before the tower (the resize), and of all that follow tower and adapters.

    The tower begins with the convolution over the patches. It ends where hidden vectors are brought to unit length;
    what leads from there back into a layer normalisation belongs to the tower, whose variant ``residual_norm`` divides
    by lengths, too.
    """
    nodes = graph.get_ordered_ops()
    patches = next(node for node in nodes if node.get_type_name() == "Convolution")
    before_patches = _leading_to([patches], nodes) - {patches.get_friendly_name()}
    before_norm = _leading_to([node for node in nodes if node.get_type_name() == "MVN"], nodes)
    behind_norm = {node.get_friendly_name() for node in nodes} - before_norm
    return sorted(_following("Parameter", nodes, before_patches) | _following("ReduceL2", nodes, behind_norm))


def _leading_to(targets: Sequence[Any], nodes: Sequence[Any]) -> set[str]:
    """Return the names of given nodes and of all that a path connects with one of them."""
    leading = {node.get_friendly_name() for node in targets}
    for node in reversed(nodes):
        readers = {value.get_node().get_friendly_name() for out in node.outputs() for value in out.get_target_inputs()}
        if readers & leading:
            leading.add(node.get_friendly_name())
    return leading


def _following(kind: str, nodes: Sequence[Any], region: set[str]) -> set[str]:
    """Return the names of the nodes of a region that have a type, or that a path within it reaches from such nodes."""
    following: set[str] = set()
    for node in nodes:
        name = node.get_friendly_name()
        sources = {value.get_source_output().get_node().get_friendly_name() for value in node.inputs()}
        if name in region and (node.get_type_name() == kind or sources & following):
            following.add(name)
    return following


def compress(
    graph: "openvino.Model",
    kind: CompressionType | None,
    datamodule: AnomalibDataModule | None,
    metric: Metric | None = None,
    max_drop: float = 0.01,
) -> "openvino.Model":
    """Compress an exported model.

    ``INT8`` stores weights in eight bits and computes in floating point; ``INT8_PTQ`` computes in eight bits, too;
    ``INT8_ACQ`` restores layers until the metric (larger is better, by default F1 of the images) drops by no more than
    ``max_drop``. The last two calibrate on the validation part, or on the training part where there is no other.

    Raises:
        ValueError: If there are no images to calibrate with, or the kind is unknown.
    """
    import nncf  # slow to import, and only needed here

    kinds = (CompressionType.INT8, CompressionType.INT8_PTQ, CompressionType.INT8_ACQ)
    if kind not in kinds:
        msg = f"Unknown compression {kind}. Give one of {', '.join(each.name for each in kinds)}."
        raise ValueError(msg)
    scope = nncf.IgnoredScope(names=sensitive_nodes(graph))
    if kind == CompressionType.INT8:
        return nncf.compress_weights(graph, ignored_scope=scope)
    data = _calibration_data(datamodule, CompressionType(kind))
    resize = EightBitResize(image_size(graph))

    def image(index: int) -> np.ndarray[Any, Any]:
        return np.asarray(resize(torch.as_tensor(data[index].image).as_subclass(Tensor)).unsqueeze(0))

    chosen = _spread(len(data))
    calibration = nncf.Dataset(chosen, image)
    options = {"model_type": nncf.ModelType.TRANSFORMER, "ignored_scope": scope, "subset_size": len(chosen)}
    logger.info("Calibrating with %d images.", len(chosen))
    if kind == CompressionType.INT8_PTQ:
        return nncf.quantize(graph, calibration, **options)
    judge = F1Score(fields=["pred_label", "gt_label"]) if metric is None else metric

    def measure(model: "openvino.CompiledModel", indices: Iterable[int]) -> float:
        judge.reset()
        for index in indices:
            judge.update(_judged(model, image(index), data[index]))
        return float(judge.compute())

    validation = nncf.Dataset(list(range(len(data))))
    return nncf.quantize_with_accuracy_control(graph, calibration, validation, measure, max_drop=max_drop, **options)


def _spread(count: int) -> list[int]:
    """Choose images to calibrate with, evenly over all of them."""
    number = min(count, CALIBRATION_IMAGES)
    return [position * count // number for position in range(number)]


def _calibration_data(datamodule: AnomalibDataModule | None, kind: CompressionType) -> Any:
    """Return the validation part, else (to calibrate alone) the training part."""
    if datamodule is None:
        msg = (
            f"{kind.name} needs images to calibrate with: those that the model was trained with, such as "
            "--data FewShot --data.source ... (datamodule=... in Python). INT8 and FP16 need none."
        )
        raise ValueError(msg)
    datamodule.prepare_data()
    datamodule.setup("fit")
    validation, training = (getattr(datamodule, f"{part}_data", None) for part in ("val", "train"))
    if validation is not None and len(validation):
        return validation
    if kind == CompressionType.INT8_ACQ:
        msg = (
            "INT8_ACQ measures the drop of the metric on validation images, but the data have none. Set val_split_mode "
            "of the datamodule, or choose INT8_PTQ."
        )
        raise ValueError(msg)
    if training is None or not len(training):
        msg = "There is no image to calibrate with: the data have neither a validation nor a training part."
        raise ValueError(msg)
    return training


def _judged(model: "openvino.CompiledModel", image: np.ndarray[Any, Any], item: Any) -> ImageBatch:
    """Predict an image and add its ground truth."""
    outputs = {next(iter(port.get_names())): torch.from_numpy(np.array(value)) for port, value in model(image).items()}
    mask = item.gt_mask
    if mask is not None:
        height, width = outputs["anomaly_map"].shape[-2:]
        mask = EightBitResize((height, width))(Mask(mask)).as_subclass(Tensor).bool().unsqueeze(0)
    return ImageBatch(
        image=torch.from_numpy(image),
        pred_score=outputs["pred_score"].reshape(1),
        pred_label=outputs["pred_label"].reshape(1).bool(),
        anomaly_map=outputs["anomaly_map"],
        pred_mask=outputs["pred_mask"].bool(),
        gt_label=torch.as_tensor(item.gt_label).reshape(1),
        gt_mask=mask,
    )
