# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Builds and trains the methods of a comparison, and records what each of them was shown."""

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
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
from anomalib_mvfa.baselines import DistanceToMean, ImageVariance, MeanBrightness, WinClipAny
from anomalib_mvfa.data import FewShot, LeaveOneOut
from anomalib_mvfa.data.few_shot import SupportDataset
from anomalib_mvfa.pre_processing import EightBitResize

from .report import TRIVIAL

__all__ = ["BUILT_IN", "Ready", "Shown", "Trainer", "sees_supports"]

BUILT_IN = ("MVFA", "MVFA (normal only)", "MVFA (zero-shot)", "WinCLIP", "WinCLIP (zero-shot)", *TRIVIAL)
WITHOUT_SUPPORTS = frozenset({"MVFA (zero-shot)", "WinCLIP (zero-shot)", "mean brightness", "image variance"})
PEER_KEYS = frozenset({"class_path", "init_args", "weights", "trained_on", "image_size", "epochs", "trainer"})
RANDOM = "random"


def sees_supports(method: str, arguments: Mapping[str, Any]) -> bool:
    """Return whether a method depends on the draw of supports. Methods that do not are run once."""
    return method not in WITHOUT_SUPPORTS and arguments.get("trained_on", "supports") == "supports"


@dataclass(frozen=True)
class Shown:
    """What a method was shown of the set before it was tested: numbers of images, and of those with a mask."""

    normal: int = 0
    abnormal: int = 0
    masks: int = 0
    remark: str = ""  # what else it knows, in a few words


@dataclass(frozen=True)
class Ready:
    """A method that is ready to predict."""

    model: nn.Module  # to move to the device
    network: nn.Module  # its part that maps images (B, 3, H, W) to an `InferenceBatch`
    transform: Callable[[Tensor], Tensor]  # of an image (3, h, w) in [0, 1], as it was read, to the network's input
    threshold: float | None  # raw score from which on an image is called abnormal
    shown: Shown
    supports: tuple[str, ...] = ()  # paths of those that it saw


class Trainer:
    """Trains one method on one episode, with the backbone and the settings that the methods share.

    MVFA, WinCLIP and the trivial baselines read the images at ``image_size``, height and width in pixels.
    """

    def __init__(self, backbone: Mapping[str, Any], image_size: tuple[int, int], epochs: int, accelerator: str) -> None:
        self.backbone = dict(backbone)
        self.resize = EightBitResize(image_size)
        self.epochs = epochs
        self.accelerator = accelerator

    def train(self, method: str, arguments: Mapping[str, Any], data: FewShot, set_name: str, k_shot: int) -> Ready:
        """Train a method, a name of `BUILT_IN` or any other if its arguments have a ``class_path``.

        The episode is set up; for ``MVFA (normal only)`` it has synthetic lesions. ``{set}`` in the name of an adapters
        file stands for ``set_name``.
        """
        own = dict(arguments)
        if "class_path" in own:
            return self._peer(own, data)
        if method == "distance to mean normal":
            normal = self._normal(data, "supports")
            normal.augmentations = self.resize
            images = torch.stack([torch.as_tensor(normal[index].image) for index in range(len(normal))])
            return self._ready(DistanceToMean(images, **own), Shown(len(normal)), None, _paths(data, 0))
        if method in TRIVIAL:
            return self._ready(MeanBrightness() if method == "mean brightness" else ImageVariance(), Shown())
        if method.startswith("WinCLIP"):
            k_shot = k_shot if method == "WinCLIP" else 0
            model = WinClipAny(**self.backbone, k_shot=k_shot, visualizer=False, evaluator=False, **own)
            threshold = self._fit(model, {"max_epochs": 1}, datamodule=data)
            return self._ready(model, Shown(k_shot), threshold, _paths(data, 0) if k_shot else ())
        return self._mvfa(method, own, data, set_name)

    def _mvfa(self, method: str, arguments: dict[str, Any], data: FewShot, set_name: str) -> Ready:
        options = self._trainer_options(arguments)
        data.train_batch_size = arguments.pop("train_batch_size", 1)
        others = arguments.pop("data", None)
        source: AnomalibDataModule = data
        support: SupportDataset = data.train_data  # type: ignore[assignment]
        masks = sum(support[index].gt_mask is not None for index in range(support.num_abnormal))
        shown = Shown(support.num_normal, support.num_abnormal, masks)
        if method == "MVFA (zero-shot)":
            if (others is None) == (arguments.get("adapters") is None):
                msg = (
                    "comparison.methods.'MVFA (zero-shot)' needs either adapters, a file of adapters that were trained "
                    "on other sets, or data, arguments of LeaveOneOut such as root."
                )
                raise ValueError(msg)
            arguments |= {"memory": False, "class_name": arguments.get("class_name", data.class_name)}
            shown = Shown(remark="adapters from a file" if others is None else "adapters trained on other sets")
        if arguments.get("adapters") is not None:
            arguments["adapters"] = str(arguments["adapters"]).format(set=set_name)
        if others is not None:
            if not data.category:
                msg = f"The set {set_name} has no category, by which LeaveOneOut excludes it from the sets to train on."
                raise ValueError(msg)
            arguments.setdefault("learning_rate", 1e-4)
            source = LeaveOneOut(**{"target": data.category, "seed": data.seed, **others})
        model = MVFA(**self.backbone, visualizer=False, evaluator=False, **arguments)
        threshold = self._fit(model, options, datamodule=source)
        if arguments.get("fusion_scale") == "test" and arguments.get("memory", True):
            # Takes the ranges of the fusion from all test images; predicting a batch of them is enough to start it.
            self._engine({"limit_test_batches": 1}).test(model, datamodule=data, verbose=False)
            data.trainer = None
        return self._ready(model, shown, threshold, _paths(data, shown.abnormal) if shown.normal else ())

    def _peer(self, arguments: dict[str, Any], data: FewShot) -> Ready:
        """Train a model of anomalib on normal images alone."""
        options = self._trainer_options(arguments)
        weights, size = arguments.get("weights"), arguments.get("image_size")
        trained_on = arguments.get("trained_on", "supports")
        if weights not in {None, RANDOM} and not Path(weights).is_file():
            msg = f"No weights at {weights}: give a .safetensors file of the timm backbone, or 'random' for a test run."
            raise FileNotFoundError(msg)
        entry = {"class_path": arguments["class_path"], "init_args": dict(arguments.get("init_args") or {})}
        with _timm_weights(weights):
            model = get_model(entry, visualizer=False, evaluator=False)
        if size is not None:
            size = (size, size) if isinstance(size, int) else tuple(size)
            model.pre_processor = type(model).configure_pre_processor(size)
        resize = _without_crop(model)
        normal = self._normal(data, trained_on)
        validation = copy.copy(data.val_data)
        normal.augmentations = validation.augmentations = resize
        batch = {"batch_size": min(8, len(normal)), "collate_fn": normal.collate_fn}
        train = DataLoader(normal, shuffle=True, **batch)  # type: ignore[arg-type]
        valid = DataLoader(validation, **batch)  # type: ignore[arg-type]
        threshold = self._fit(model, options, train_dataloaders=train, val_dataloaders=valid)
        remarks = {"random weights": weights == RANDOM, "whole training part": trained_on == "train"}
        shown = Shown(len(normal), remark=", ".join(remark for remark, holds in remarks.items() if holds))
        supports = _paths(data, 0) if trained_on == "supports" else ()
        return self._ready(model, shown, threshold, supports)

    def _normal(self, data: FewShot, trained_on: str) -> AnomalibDataset:
        """Return the normal supports as they are, or all normal training images."""
        support: SupportDataset = data.train_data  # type: ignore[assignment]
        if trained_on == "supports":
            indices = list(range(support.num_abnormal, support.num_abnormal + support.num_normal))
            return support.images.subsample(indices)
        train = data._source_parts()[0]
        return train.subsample((train.samples.label_index == 0).to_numpy().nonzero()[0].tolist())

    def _trainer_options(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Take the arguments of Lightning's trainer out of those of a method."""
        epochs = arguments.pop("epochs", self.epochs)
        return {"max_epochs": epochs, "check_val_every_n_epoch": epochs} | dict(arguments.pop("trainer", None) or {})

    def _engine(self, options: Mapping[str, Any], folder: str = tempfile.gettempdir()) -> Engine:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        chosen = {"accelerator": self.accelerator, "devices": 1, **quiet, **options}
        return Engine(**chosen, default_root_dir=folder)

    def _fit(self, model: AnomalibModule, options: Mapping[str, Any], **data: Any) -> float | None:
        with tempfile.TemporaryDirectory() as folder:
            self._engine(options, folder).fit(model, **data)
        if "datamodule" in data:
            data["datamodule"].trainer = None  # it holds the model, which would stay in memory during the next cells
        threshold = float(getattr(model.post_processor, "image_threshold", torch.tensor(torch.nan)))
        return threshold if np.isfinite(threshold) else None

    def _ready(
        self, model: nn.Module, shown: Shown, threshold: float | None = None, supports: tuple[str, ...] = ()
    ) -> Ready:
        transform = getattr(getattr(model, "pre_processor", None), "transform", None) or self.resize
        network = model.model if isinstance(model, AnomalibModule) else model
        return Ready(model, network, transform, threshold, shown, supports)


def _paths(data: FewShot, abnormal: int) -> tuple[str, ...]:
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
