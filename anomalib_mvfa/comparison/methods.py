# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Builds and trains the methods of a comparison, and records what each of them was shown."""

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.engine import Engine
from anomalib.models import get_model
from anomalib.models.components import AnomalibModule
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from anomalib_mvfa import MVFA
from anomalib_mvfa.baselines import DistanceToMean, GreyLevels, WinClipAny
from anomalib_mvfa.data import FewShot, LeaveOneOut
from anomalib_mvfa.data.few_shot import SupportDataset
from anomalib_mvfa.pre_processing import EightBitResize

from .report import TRIVIAL

if TYPE_CHECKING:
    from .runner import Spec

__all__ = ["BUILT_IN", "Ready", "sees_supports", "train"]

BUILT_IN = ("MVFA", "MVFA (normal only)", "MVFA (zero-shot)", "WinCLIP", "WinCLIP (zero-shot)", *TRIVIAL)
WITHOUT_SUPPORTS = frozenset({"MVFA (zero-shot)", "WinCLIP (zero-shot)", "mean brightness", "image variance"})
PEER_KEYS = frozenset({"class_path", "init_args", "weights", "trained_on", "image_size", "epochs", "trainer"})
RANDOM = "random"


def sees_supports(method: str, arguments: Mapping[str, Any]) -> bool:
    """Return whether a method depends on the draw of supports. Methods that do not are run once."""
    return method not in WITHOUT_SUPPORTS and arguments.get("trained_on", "supports") == "supports"


NOTHING = {"normal": 0, "abnormal": 0, "masks": 0, "remark": ""}
"""What a method was shown of the set before it was tested: numbers of images, of masks, and what else it knows."""


@dataclass(frozen=True)
class Ready:
    """A method that is ready to predict."""

    model: nn.Module  # to move to the device
    network: nn.Module  # its part that maps images (B, 3, H, W) to an `InferenceBatch`
    transform: Callable[[Tensor], Tensor]  # of an image (3, h, w) in [0, 1], as it was read, to the network's input
    threshold: float | None  # raw score from which on an image is called abnormal
    shown: Mapping[str, Any]  # see `NOTHING`
    supports: tuple[str, ...]  # paths of those that it saw


Trained = tuple[nn.Module, dict[str, Any], float | None, tuple[str, ...]]  # model, shown, threshold, supports


def train(spec: "Spec", data: FewShot, image_size: tuple[int, int]) -> Ready:
    """Train the method of a cell on an episode, which is set up; for ``MVFA (normal only)`` with synthetic lesions.

    MVFA, WinCLIP and the trivial baselines read the images at ``image_size``, height and width in pixels.
    """
    resize, own = EightBitResize(image_size), dict(spec.arguments)
    if "class_path" in own:
        trained = _peer(spec, own, data)
    elif spec.method in TRIVIAL:
        trained = _trivial(spec, own, data, resize)
    else:
        trained = (_win_clip if spec.method.startswith("WinCLIP") else _mvfa)(spec, own, data)
    model, shown, threshold, supports = trained
    transform = getattr(getattr(model, "pre_processor", None), "transform", None) or resize
    network = model.model if isinstance(model, AnomalibModule) else model
    return Ready(model, network, transform, threshold, shown, supports)


def _trivial(spec: "Spec", own: dict[str, Any], data: FewShot, resize: EightBitResize) -> Trained:
    if spec.method != "distance to mean normal":
        return GreyLevels(variance=spec.method == "image variance"), NOTHING, None, ()
    normal = _normal(data, "supports")
    normal.augmentations = resize
    images = torch.stack([torch.as_tensor(normal[index].image) for index in range(len(normal))])
    return DistanceToMean(images, **own), NOTHING | {"normal": len(normal)}, None, _paths(data)


def _win_clip(spec: "Spec", own: dict[str, Any], data: FewShot) -> Trained:
    model = WinClipAny(**spec.comparison.tower, k_shot=spec.k_shot, visualizer=False, evaluator=False, **own)
    threshold = _fit(spec, model, {"max_epochs": 1}, datamodule=data)
    return model, NOTHING | {"normal": spec.k_shot}, threshold, _paths(data) if spec.k_shot else ()


def _mvfa(spec: "Spec", own: dict[str, Any], data: FewShot) -> Trained:
    options = _trainer_options(spec, own)
    data.train_batch_size = own.pop("train_batch_size", 1)
    others = own.pop("data", None)
    source: AnomalibDataModule = data
    support: SupportDataset = data.train_data  # type: ignore[assignment]
    masks = sum(support[index].gt_mask is not None for index in range(support.num_abnormal))
    shown = NOTHING | {"normal": support.num_normal, "abnormal": support.num_abnormal, "masks": masks}
    if spec.method == "MVFA (zero-shot)":
        if (others is None) == (own.get("adapters") is None):
            msg = (
                "comparison.methods.'MVFA (zero-shot)' needs either adapters, a file of adapters that were trained "
                "on other sets, or data, arguments of LeaveOneOut such as root."
            )
            raise ValueError(msg)
        own |= {"memory": False, "class_name": own.get("class_name", data.class_name)}
        shown = NOTHING | {"remark": "adapters from a file" if others is None else "adapters trained on other sets"}
    if own.get("adapters") is not None:
        own["adapters"] = str(own["adapters"]).format(set=spec.set)
    if others is not None:
        if not data.category:
            msg = f"The set {spec.set} has no category, by which LeaveOneOut excludes it from the sets to train on."
            raise ValueError(msg)
        own.setdefault("learning_rate", 1e-4)
        source = LeaveOneOut(**{"target": data.category, "seed": data.seed, **others})
    model = MVFA(**spec.comparison.tower, visualizer=False, evaluator=False, **own)
    threshold = _fit(spec, model, options, datamodule=source)
    if own.get("fusion_scale") == "test" and own.get("memory", True):
        # Takes the ranges of the fusion from all test images; predicting a batch of them is enough to start it.
        _engine(spec, {"limit_test_batches": 1}).test(model, datamodule=data, verbose=False)
        data.trainer = None
    return model, shown, threshold, _paths(data, abnormal=bool(shown["abnormal"])) if shown["normal"] else ()


def _peer(spec: "Spec", own: dict[str, Any], data: FewShot) -> Trained:
    """Train a model of anomalib on normal images alone."""
    options = _trainer_options(spec, own)
    weights, size, trained_on = own.get("weights"), own.get("image_size"), own.get("trained_on", "supports")
    if weights not in {None, RANDOM} and not Path(weights).is_file():
        msg = f"No weights at {weights}: give a .safetensors file of the timm backbone, or 'random' for a test run."
        raise FileNotFoundError(msg)
    entry = {"class_path": own["class_path"], "init_args": dict(own.get("init_args") or {})}
    with _timm_weights(weights):
        model = get_model(entry, visualizer=False, evaluator=False)
    if size is not None:
        size = (size, size) if isinstance(size, int) else tuple(size)
        model.pre_processor = type(model).configure_pre_processor(size)
    normal, validation = _normal(data, trained_on), copy.copy(data.val_data)
    normal.augmentations = validation.augmentations = _without_crop(model)
    batch = {"batch_size": min(8, len(normal)), "collate_fn": normal.collate_fn}
    loaders = {
        "train_dataloaders": DataLoader(normal, shuffle=True, **batch),  # type: ignore[arg-type]
        "val_dataloaders": DataLoader(validation, **batch),  # type: ignore[arg-type]
    }
    threshold = _fit(spec, model, options, **loaders)
    remarks = {"random weights": weights == RANDOM, "whole training part": trained_on == "train"}
    remark = ", ".join(remark for remark, holds in remarks.items() if holds)
    supports = _paths(data) if trained_on == "supports" else ()
    return model, NOTHING | {"normal": len(normal), "remark": remark}, threshold, supports


def _normal(data: FewShot, trained_on: str) -> AnomalibDataset:
    """Return the normal supports as they are, or all normal training images."""
    support: SupportDataset = data.train_data  # type: ignore[assignment]
    if trained_on == "supports":
        return support.images.subsample(list(range(support.num_abnormal, len(support.images))))
    train = data._source_parts()[0]
    return train.subsample((train.samples.label_index == 0).to_numpy().nonzero()[0].tolist())


def _trainer_options(spec: "Spec", own: dict[str, Any]) -> dict[str, Any]:
    """Take the arguments of Lightning's trainer out of those of a method."""
    epochs = own.pop("epochs", spec.comparison.epochs)
    return {"max_epochs": epochs, "check_val_every_n_epoch": epochs} | dict(own.pop("trainer", None) or {})


def _engine(spec: "Spec", options: Mapping[str, Any], folder: str = tempfile.gettempdir()) -> Engine:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    chosen = {"accelerator": spec.comparison.accelerator, "devices": 1, **quiet, **options}
    return Engine(**chosen, default_root_dir=folder)


def _fit(spec: "Spec", model: AnomalibModule, options: Mapping[str, Any], **data: Any) -> float | None:
    with tempfile.TemporaryDirectory() as folder:
        _engine(spec, options, folder).fit(model, **data)
    if "datamodule" in data:
        data["datamodule"].trainer = None  # it holds the model, which would stay in memory during the next cells
    threshold = float(getattr(model.post_processor, "image_threshold", torch.tensor(torch.nan)))
    return threshold if np.isfinite(threshold) else None


def _paths(data: FewShot, abnormal: bool = False) -> tuple[str, ...]:
    """Return the paths of the supports that a method saw."""
    samples = data.train_data.samples
    return tuple(samples.image_path if abnormal else samples.image_path[samples.label_index == 0])


@contextmanager
def _timm_weights(weights: str | None) -> Iterator[None]:
    """Let timm read weights from a file, or leave them random; anomalib's models have no argument for it."""
    import timm

    create = timm.create_model

    def build(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        if not pretrained or weights == RANDOM:
            return create(name, pretrained=False, **options)
        if weights is not None:
            return create(name, pretrained=True, **options, pretrained_cfg_overlay={"file": weights})
        try:
            return create(name, pretrained=True, **options)
        except Exception as error:  # many kinds, without a network
            known = timm.models.get_pretrained_cfg(name)
            msg = (
                f"The weights of {name} are neither cached nor downloadable here. On a machine with a network download "
                f"model.safetensors of {known.hf_hub_id if known else name} from the Hugging Face hub, and name the "
                "file in the method's entry weights."
            )
            raise FileNotFoundError(msg) from error

    with mock.patch.object(timm, "create_model", build):
        yield


def _without_crop(model: AnomalibModule) -> Resize | None:
    """Replace a centre crop by a resize of the whole image to the crop's size, and return the resize.

    Pixel metrics count the whole image, and a lesion outside the crop would be none.
    """
    transform = getattr(model.pre_processor, "transform", None)
    steps = list(transform.transforms) if isinstance(transform, Compose) else [transform]
    crop = next((step for step in steps if isinstance(step, CenterCrop)), None)
    resize = next((step for step in steps if isinstance(step, Resize)), None)
    if crop is not None and resize is not None:
        resized = Resize(tuple(crop.size), interpolation=resize.interpolation, antialias=True)
        steps = [resized if step is resize else step for step in steps if step is not crop]
        model.pre_processor.transform = Compose(steps)  # type: ignore[union-attr]
        return resized
    return resize
