# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""A training that reports its progress and can be stopped, for programs with a user who waits, and its model."""

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from anomalib.engine import Engine
from lightning.pytorch import Callback, Trainer, seed_everything
from numpy.typing import NDArray
from torch import Tensor

from anomalib_mvfa import MVFA
from anomalib_mvfa.baselines import WinClipAny
from anomalib_mvfa.data import FewShot, MedicalFolder

__all__ = ["Options", "Progress", "Trained", "fit"]

POLL = 0.2
REFERENCES = 4
"""Normal supports that WinCLIP compares with."""
QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
_ONE_AT_A_TIME = threading.Lock()  # trainings share the cores, and the seed of torch


class Progress(NamedTuple):
    """What is being done, the part of it that is done, and the seconds that are left, if known."""

    text: str
    done: float
    left: float | None = None


@dataclass(frozen=True)
class Options:
    """Choices of a training, each an argument of the command line."""

    backbone: str = "tiny"
    epochs: int = 5
    abnormal: bool = True
    class_name: str = "object"
    seed: int = 0
    learning_rate: float = 1e-3
    intensity: str = "auto"


class Trained:
    """A trained model, with its checkpoint, and the files and scores of its supports."""

    def __init__(
        self, model: MVFA, data: FewShot, options: Options, images: Path, lists: tuple[Path, Path], folder: Path
    ) -> None:
        self.model, self.options, self.images, self.lists = model.eval(), options, images, lists
        self.checkpoint = next(folder.rglob("model.ckpt"))
        self.support = data.support
        # A normal support is compared with the bank of the others, so that its score is that of a new image.
        with torch.inference_mode():
            output: Any = model.model.remember(self.support)
            post_processor: Any = model.post_processor
            scores = post_processor(model.model.fuse(output.language, output.memory)).pred_score
        self.normal_scores: list[float] = scores[~output.labels].tolist()
        self.abnormal_scores: list[float] = scores[output.labels].tolist() if options.abnormal else []

    def predict(self, image: Tensor) -> tuple[float, NDArray[np.float32]]:
        """Return score and map ``(h, w)`` of an image ``(3, H, W)`` in [0, 1], both in [0, 1]."""
        with torch.inference_mode():
            batch = self.model(image[None].to(self.model.device))
        return float(batch.pred_score), batch.anomaly_map.squeeze().float().cpu().numpy()

    def save(self, folder: Path) -> None:
        """Write checkpoint, adapters, the graph for OpenVINO, and the supports with their lists."""
        shutil.copyfile(self.checkpoint, folder / "model.ckpt")
        self.model.save_adapters(folder / "adapters.safetensors")
        self.model.to_openvino(folder / "openvino")
        shutil.copytree(self.images, folder / "supports")
        for path in self.lists:
            shutil.copy(path, folder / "supports")

    @cached_property
    def _winclip(self) -> WinClipAny:
        references = self.support.normal[0, :REFERENCES]
        winclip = WinClipAny(self.options.backbone, prompts="mvfa", k_shot=len(references)).eval()
        transform: Any = winclip.pre_processor.transform  # type: ignore[union-attr]
        winclip.model.setup(self.options.class_name, transform(references))
        return winclip

    def winclip_map(self, image: Tensor) -> NDArray[np.float32]:
        """Compute the map ``(h, w)`` of WinCLIP on the same backbone, prompts and normal supports.

        It has no threshold, so that it runs from 0 at its least to 1 at its largest value.
        """
        with torch.inference_mode():
            found = self._winclip(image[None]).anomaly_map.squeeze().float().numpy()
        scaled: NDArray[np.float32] = (found - found.min()) / max(float(np.ptp(found)), 1e-9)
        return scaled


class StoppedError(Exception):
    """A training was stopped."""


class _Watch(Callback):
    def __init__(self, stop: threading.Event) -> None:
        self.stop, self.began = stop, 0.0
        self.progress = Progress("Reading the backbone", 0.0)

    def on_train_start(self, *_: Any) -> None:
        self.began = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.stop.is_set():
            raise StoppedError
        done = trainer.global_step / ((trainer.max_epochs or 1) * trainer.num_training_batches)
        left = (time.monotonic() - self.began) * (1 / done - 1)
        self.progress = Progress("Training", done, left) if done < 1 else Progress("Building the memory bank", 1.0)


def fit(
    options: Options, images: Path, lists: tuple[Path, Path], folder: Path, stop: threading.Event
) -> Iterator[Progress | Trained]:
    """Train in a thread of its own, and yield the progress, and at last the model, unless it was stopped.

    ``lists`` are the ``image_list`` of ``MedicalFolder`` and the ``support_list`` of ``FewShot``.
    """
    while not _ONE_AT_A_TIME.acquire(timeout=POLL):
        if stop.is_set():
            return
        yield Progress("Waiting for another training on this machine to end", 0.0)
    watch = _Watch(stop)
    try:
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(_train, options, images, lists, folder, watch)
            try:
                while not future.done():
                    yield watch.progress
                    wait([future], POLL)
            except GeneratorExit:  # the page that reads the progress has gone
                stop.set()
                raise
        yield future.result()
    except StoppedError:
        return
    finally:
        _ONE_AT_A_TIME.release()


def _train(options: Options, images: Path, lists: tuple[Path, Path], folder: Path, watch: _Watch) -> Trained:
    seed_everything(options.seed, workers=True, verbose=False)
    source = MedicalFolder(images, image_list=lists[0], intensity=options.intensity, num_workers=0)
    data = FewShot(source, support_list=lists[1], train_batch_size=4)
    model = MVFA(options.backbone, class_name=options.class_name, learning_rate=options.learning_rate, threshold="fpr")
    engine = Engine(default_root_dir=folder, max_epochs=options.epochs, callbacks=[watch], **QUIET)
    engine.fit(model, datamodule=data)
    return Trained(model, data, options, images, lists, folder)
