# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Runs the grid of a comparison: method x set x number of supports x seed, one folder a cell.

At a seed all methods meet the same supports, and all methods and numbers of supports the same test images: those that
are left beside the supports of the largest number. All read the same pixels, resized to the backbone's image size.
"""

import contextlib
import ctypes
import gc
import json
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import psutil
import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset, InferenceBatch, get_datamodule
from anomalib.engine import Engine
from anomalib.models import AnomalyDINO, Patchcore
from anomalib.models.components import AnomalibModule
from lightning import seed_everything
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from anomalib_mvfa import MVFA, __version__
from anomalib_mvfa.backbones.loading import resolve_backbone
from anomalib_mvfa.baselines import DistanceToMean, ImageVariance, MeanBrightness, WinClipAny
from anomalib_mvfa.data import FewShot, LeaveOneOut
from anomalib_mvfa.data.few_shot import SupportDataset
from anomalib_mvfa.files import replacing
from anomalib_mvfa.metrics import PixelFigures
from anomalib_mvfa.pre_processing import EightBitResize

from .cells import load_cells
from .figures import image_figures
from .report import write_page, write_tables

__all__ = ["METHODS", "Comparison", "run_comparison", "write_report"]

logger = logging.getLogger(__name__)

ZERO_SHOT = frozenset({"MVFA (zero-shot)", "WinCLIP (zero-shot)", "mean brightness", "image variance"})
"""Methods that see no supports; their cells have ``k_shot`` 0."""
METHODS = (
    "MVFA",
    "MVFA (normal only)",
    "MVFA (zero-shot)",
    "WinCLIP",
    "WinCLIP (zero-shot)",
    "PatchCore",
    "AnomalyDINO",
    "mean brightness",
    "image variance",
    "distance to mean normal",
)
PICTURE_SIZE = 112
QUANTILES = (0.005, 0.995)
MEGABYTE = 2**20


@dataclass(frozen=True)
class Comparison:
    """The grid, as the section ``comparison`` of a configuration gives it.

    Args:
        sets: An anomalib datamodule by the name of the set: its ``class_path`` and ``init_args``.
        methods: Arguments by the name of the method. Those of MVFA and WinCLIP are arguments of their models, and for
            MVFA ``epochs`` and ``train_batch_size``. ``MVFA (zero-shot)`` needs either ``adapters``, a file, in whose
            name ``{set}`` stands for the set's name, or ``data``, arguments of ``LeaveOneOut`` but the target, which is
            the category of the set. ``PatchCore`` and ``AnomalyDINO`` need ``weights``, a ``.safetensors`` file with
            the weights of their timm backbone; they learn from the normal supports alone.
        output: Folder that receives one folder a cell.
        backbone: As of MVFA, the same for MVFA and WinCLIP.
        pretrained: As of MVFA.
        image_size: As of MVFA.
        k_shot: Numbers of supports.
        seeds: Each draws other supports.
        epochs: Epochs of a training of MVFA.
        accelerator: As of Lightning.

    Raises:
        ValueError: If something is missing or unknown.
    """

    sets: Mapping[str, Mapping[str, Any]]
    methods: Mapping[str, Mapping[str, Any] | None]
    output: str = "results/benchmark"
    backbone: str = "ViT-L-14-336"
    pretrained: str | None = None
    image_size: int | None = None
    k_shot: Sequence[int] = (4,)
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    epochs: int = 50
    accelerator: str = "auto"

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            msg = f"comparison.methods: unknown {', '.join(unknown)}. Known are {', '.join(METHODS)}."
            raise ValueError(msg)
        for name in ("sets", "methods", "k_shot", "seeds"):
            if not getattr(self, name):
                msg = f"comparison.{name} is empty: nothing to compare."
                raise ValueError(msg)
        if min(self.k_shot) < 1:
            msg = f"comparison.k_shot counts supports, at least 1, got {min(self.k_shot)}."
            raise ValueError(msg)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Comparison":
        """Check the names in a configuration.

        Raises:
            ValueError: If an entry is unknown or missing.
        """
        unknown = config.keys() - cls.__dataclass_fields__.keys()
        missing = {"sets", "methods"} - config.keys()
        if unknown or missing:
            known = ", ".join(cls.__dataclass_fields__)
            msg = (
                f"comparison: unknown entries {sorted(unknown)}, missing entries {sorted(missing)}. Known are {known}."
            )
            raise ValueError(msg)
        return cls(**config)

    def cells(self) -> Iterator["Spec"]:
        """Give all cells, those of one set and seed together."""
        for (name, source), seed in product(self.sets.items(), self.seeds):
            for method, arguments in self.methods.items():
                for k_shot in (0,) if method in ZERO_SHOT else self.k_shot:
                    yield Spec(self, method, name, k_shot, seed, dict(arguments or {}), dict(source))


@dataclass(frozen=True)
class Spec:
    """One cell of the grid."""

    comparison: Comparison
    method: str
    set: str
    k_shot: int
    seed: int
    arguments: dict[str, Any] = field(hash=False)
    source: dict[str, Any] = field(hash=False)

    @property
    def folder(self) -> Path:
        """Where its files go."""
        parts = (self.set, self.method, f"k{self.k_shot}", f"seed{self.seed}")
        name = "-".join(re.sub(r"[^A-Za-z0-9_]+", "-", part).strip("-") for part in parts)
        return Path(self.comparison.output) / "cells" / name

    @property
    def config(self) -> dict[str, Any]:
        """Everything that its result depends on, as plain data."""
        common = asdict(self.comparison)
        chosen = ("backbone", "pretrained", "image_size", "epochs", "accelerator")
        facts = {name: common[name] for name in chosen} | {"arguments": self.arguments, "source": self.source}
        facts["largest_k_shot"] = max(self.comparison.k_shot)  # decides which images are left to test on
        result: dict[str, Any] = json.loads(json.dumps(facts, default=str))
        return result

    @property
    def is_done(self) -> bool:
        """Whether it was finished, with the same configuration."""
        try:
            record = json.loads((self.folder / "cell.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        if record.get("status") == "done" and record.get("config") != self.config:
            logger.warning("%s was computed with another configuration and is computed anew.", self.folder.name)
            return False
        return bool(record.get("status") == "done")


def run_comparison(comparison: Comparison) -> list[Path]:
    """Compute the cells that are missing.

    Args:
        comparison: The grid.

    Returns:
        Folders of the cells that failed; the reason stands in ``cell.json``.
    """
    pending = [spec for spec in comparison.cells() if not spec.is_done]
    episodes = _Episodes()
    failed = []
    for spec in track(pending, description=f"Comparison, {len(pending)} cells"):
        spec.folder.mkdir(parents=True, exist_ok=True)
        (spec.folder / "cell.json").unlink(missing_ok=True)
        record: dict[str, Any] = {
            "method": spec.method,
            "set": spec.set,
            "k_shot": spec.k_shot,
            "seed": spec.seed,
            "backbone": comparison.backbone,
            "status": "done",
            "error": None,
            "metrics": {},
            "cost": {},
            "threshold": None,
            "supports": [],
            "anomalib_mvfa": __version__,
            "config": spec.config,
        }
        try:
            record |= _Run(spec, episodes).record()
        except Exception as error:
            logger.exception("Cell %s failed.", spec.folder.name)
            record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            failed.append(spec.folder)
        with replacing(spec.folder / "cell.json") as partial_file:
            partial_file.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return failed


def write_report(comparison: Comparison, command: str | None = None) -> Path:
    """Write ``results.csv``, ``results.md`` and ``index.html`` of the cells that are there.

    Args:
        comparison: The grid.
        command: How it was run.

    Returns:
        The page.
    """
    output = Path(comparison.output)
    made = {name: get_datamodule(dict(source)) for name, source in comparison.sets.items()}
    roots = {name: Path(getattr(source, "root")) for name, source in made.items() if hasattr(source, "root")}  # noqa: B009
    cells = load_cells(output)
    write_tables(cells, output)
    write_page(cells, output / "index.html", data_root=roots, command=command)
    return output / "index.html"


class _Episodes:
    """The supports and test images of the set and seed that are at work."""

    def __init__(self) -> None:
        self._key: tuple[str, int] | None = None
        self._made: dict[tuple[int, str], FewShot] = {}

    def get(self, spec: Spec, abnormal_source: str = "auto") -> FewShot:
        """Give an episode, set up, whose test part is that of the largest number of supports."""
        if self._key != (spec.set, spec.seed):
            self._key, self._made = (spec.set, spec.seed), {}
        largest = max(spec.comparison.k_shot)
        k_shot = spec.k_shot or largest
        for key in ((largest, "auto"), (k_shot, abnormal_source)):
            if key not in self._made:
                self._made[key] = self._make(spec, *key)
        return self._made[k_shot, abnormal_source]

    def _make(self, spec: Spec, k_shot: int, abnormal_source: str) -> FewShot:
        source = get_datamodule(dict(spec.source))
        episode = FewShot(source, k_shot=k_shot, seed=spec.seed, abnormal_source=abnormal_source)
        episode.prepare_data()
        episode.setup(TrainerFn.FITTING)  # the trainer then leaves it as it is
        if self._made:
            shared = next(iter(self._made.values())).test_data.samples.image_path
            kept = episode.test_data.samples.image_path.isin(shared)
            if kept.sum() != len(shared):
                msg = f"The test images of {spec.set} differ between numbers of supports."
                raise RuntimeError(msg)
            episode.test_data = episode.test_data.subsample(kept.to_numpy().nonzero()[0].tolist())
        return episode


class _Run:
    """The work of one cell."""

    def __init__(self, spec: Spec, episodes: _Episodes) -> None:
        self.spec = spec
        self.comparison = spec.comparison
        own = resolve_backbone(self.comparison.backbone, self.comparison.pretrained, self.comparison.image_size)
        self.image_size = own.image_size
        self.backbone = {name: getattr(self.comparison, name) for name in ("backbone", "pretrained", "image_size")}
        self.data = episodes.get(spec, "synthetic" if spec.method == "MVFA (normal only)" else "auto")
        self.resize = EightBitResize(self.image_size)

    def record(self) -> dict[str, Any]:
        """Train and test, write scores and maps, and give the rest."""
        seed_everything(self.spec.seed, verbose=False)
        with _Peak() as peak:
            began = time.monotonic()
            model, threshold = self._train()
            seconds = time.monotonic() - began
        network = model.model if isinstance(model, AnomalibModule) else model
        metrics, predict_ms = self._test(model, network)
        tensors = {tensor.data_ptr(): tensor for tensor in [*network.parameters(), *network.buffers()]}
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        return {
            "metrics": metrics,
            "cost": {
                "train_seconds": seconds,
                "train_peak_mb": peak.megabytes,
                "predict_ms": predict_ms,
                "size_mb": size / MEGABYTE,
            },
            "threshold": threshold,
            "supports": [self._relative(path) for path in self._supports().image_path],
        }

    def _supports(self) -> pd.DataFrame:
        """List the images that the method saw."""
        samples = self.data.train_data.samples
        if self.spec.method in ZERO_SHOT:
            return samples.iloc[:0]
        return samples if self.spec.method == "MVFA" else samples[samples.label_index == 0]

    def _relative(self, path: str) -> str:
        root = getattr(self.data.source, "root", None)
        return Path(os.path.relpath(path, root)).as_posix() if root else Path(path).name

    # Training

    def _train(self) -> tuple[nn.Module, float | None]:
        """Give the model, ready to predict, and its threshold on raw image scores."""
        method, arguments = self.spec.method, dict(self.spec.arguments)
        if method == "mean brightness":
            return MeanBrightness(), None
        if method == "image variance":
            return ImageVariance(), None
        if method == "distance to mean normal":
            normal = self._normal_supports()
            return DistanceToMean(
                torch.stack([torch.as_tensor(normal[index].image) for index in range(len(normal))]), **arguments
            ), None
        if method.startswith("MVFA"):
            model, data, epochs = self._mvfa(arguments)
            return self._fit(model, epochs, datamodule=data)
        if method.startswith("WinCLIP"):
            winclip = WinClipAny(
                **self.backbone, k_shot=self.spec.k_shot, visualizer=False, evaluator=False, **arguments
            )
            return self._fit(winclip, 1, datamodule=self.data)
        normal = self._normal_supports()
        loader = DataLoader(normal, batch_size=8, collate_fn=normal.collate_fn)
        self.data.val_data.augmentations = self.resize
        return self._fit(
            self._feature_model(arguments),
            1,
            train_dataloaders=loader,
            val_dataloaders=self.data.val_dataloader(),
        )

    def _mvfa(self, arguments: dict[str, Any]) -> tuple[MVFA, AnomalibDataModule, int]:
        """Build MVFA and give the data that it learns from."""
        epochs = arguments.pop("epochs", self.comparison.epochs)
        self.data.train_batch_size = arguments.pop("train_batch_size", 1)
        others, adapters = arguments.pop("data", None), arguments.get("adapters")
        make = partial(MVFA, **self.backbone, visualizer=False, evaluator=False)
        if self.spec.method != "MVFA (zero-shot)":
            return make(**arguments), self.data, epochs
        if (others is None) == (adapters is None):
            msg = (
                "comparison.methods.'MVFA (zero-shot)' needs either adapters, a file of adapters that were trained on "
                "other sets, or data, arguments of LeaveOneOut such as root."
            )
            raise ValueError(msg)
        arguments.setdefault("class_name", self.data.class_name)
        if adapters is not None:
            arguments["adapters"] = str(adapters).format(set=self.spec.set)
            return make(memory=False, **arguments), self.data, epochs
        target = self.data.category
        if not target:
            msg = f"The set {self.spec.set} has no category: LeaveOneOut cannot tell it from the sets to train on."
            raise ValueError(msg)
        arguments.setdefault("learning_rate", 1e-4)
        return make(memory=False, **arguments), LeaveOneOut(target=target, seed=self.spec.seed, **others), epochs

    def _feature_model(self, arguments: dict[str, Any]) -> AnomalibModule:
        """Build PatchCore or AnomalyDINO, with weights from a file where one is named."""
        weights = arguments.pop("weights", None)
        kind = Patchcore if self.spec.method == "PatchCore" else AnomalyDINO
        if weights is None:
            msg = (
                f"comparison.methods.{self.spec.method} needs weights, a .safetensors file with the weights of "
                "its timm backbone. Download it on a machine with a network and name it there, or "
                "leave the method out."
            )
            raise FileNotFoundError(msg)
        return _with_weights(kind, Path(weights), self.image_size, arguments)

    def _normal_supports(self) -> AnomalibDataset:
        """Give the normal supports, unchanged but for the size."""
        data: SupportDataset = self.data.train_data  # type: ignore[assignment]
        normal: AnomalibDataset = data.images.subsample(
            list(range(data.num_abnormal, data.num_abnormal + data.num_normal))
        )
        normal.augmentations = self.resize
        return normal

    def _fit(self, model: AnomalibModule, epochs: int, **data: Any) -> tuple[AnomalibModule, float | None]:  # noqa: ANN401
        with tempfile.TemporaryDirectory() as folder:
            engine = Engine(
                max_epochs=epochs,
                check_val_every_n_epoch=epochs,
                accelerator=self.comparison.accelerator,
                devices=1,
                default_root_dir=folder,
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            engine.fit(model, **data)
        self.data.trainer = None  # it holds the model, which would stay in memory during the next cells
        threshold = float(getattr(model.post_processor, "image_threshold", torch.tensor(torch.nan)))
        return model, threshold if np.isfinite(threshold) else None

    # Testing

    def _test(self, model: nn.Module, network: nn.Module) -> tuple[dict[str, float], float]:
        """Predict the test images; write raw scores and small maps; give figures and milliseconds an image."""
        data = self.data.test_data
        data.augmentations = self.resize
        device = torch.device("cuda" if self.comparison.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
        model.to(device).eval()
        transform = getattr(getattr(model, "pre_processor", None), "transform", None)
        pixels, scores, labels, small, masks, times = PixelFigures(), [], [], [], [], []
        has_masks = data.samples.attrs["task"] == "segmentation"
        for batch in self.data.test_dataloader():
            images = torch.as_tensor(batch.image).as_subclass(Tensor).to(device)
            began = time.perf_counter()
            with torch.inference_mode():
                output: InferenceBatch = network(images if transform is None else transform(images))
                score = torch.as_tensor(output.pred_score).flatten().float().cpu()
            times.append((time.perf_counter() - began) * 1000 / len(images))
            scores.append(score)
            labels.append(batch.gt_label.flatten().int())
            truth = batch.gt_mask.as_subclass(Tensor).bool() if has_masks else None
            if output.anomaly_map is None:
                continue
            maps = output.anomaly_map.float().cpu().reshape(len(images), 1, *output.anomaly_map.shape[-2:])
            if maps.shape[-2:] != images.shape[-2:]:
                maps = functional.interpolate(maps, images.shape[-2:], mode="bilinear")
            size = (min(PICTURE_SIZE, maps.shape[-2]), min(PICTURE_SIZE, maps.shape[-1]))
            small.append(functional.adaptive_avg_pool2d(maps, size)[:, 0].numpy())
            if truth is not None:
                pixels.update(maps[:, 0], truth)
                masks.append(
                    functional.adaptive_max_pool2d(truth[:, None].float(), size)[:, 0].numpy().astype(np.uint8)
                )
        table = pd.DataFrame(
            {
                "path": [self._relative(path) for path in data.samples.image_path],
                "label": torch.cat(labels).numpy(),
                "score": torch.cat(scores).double().numpy(),
            }
        )
        table.to_csv(self.spec.folder / "scores.csv", index=False)
        if small:
            _write_maps(self.spec.folder / "maps.npz", np.concatenate(small), masks)
        figures = image_figures(torch.cat(scores), torch.cat(labels))
        if small and has_masks:
            figures |= pixels.compute()
        warm = times[1:] or times  # the first batch pays for what is set up once
        return figures, float(np.median(warm))


def _with_weights(
    kind: type[AnomalibModule],
    path: Path,
    image_size: tuple[int, int],
    arguments: dict[str, Any],
) -> AnomalibModule:
    """Build a model on a timm backbone whose weights come from a file instead of the network."""
    import timm

    if path.suffix != ".safetensors" or not path.is_file():
        msg = f"No weights at {path}: give a .safetensors file of the timm backbone, as the hub offers it."
        raise FileNotFoundError(msg)
    from_file = partial(timm.create_model, pretrained_cfg_overlay={"file": str(path)})
    with mock.patch.object(timm, "create_model", from_file):  # anomalib has no argument for it
        return kind(
            pre_processor=kind.configure_pre_processor(image_size),
            visualizer=False,
            evaluator=False,
            **arguments,
        )


def _write_maps(path: Path, maps: NDArray[np.float32], masks: list[NDArray[np.uint8]]) -> None:
    """Write maps ``(N, h, w)`` in eight bits on one scale, with their masks."""
    low, high = np.quantile(maps[:: max(1, len(maps) // 2000)], QUANTILES)
    levels = np.clip((maps - low) / max(high - low, 1e-12) * 255, 0, 255).round().astype(np.uint8)
    truth = {"masks": np.concatenate(masks)} if masks else {}
    arrays: dict[str, Any] = {"maps": levels, "low": low, "high": high, **truth}
    np.savez_compressed(path, **arrays)


class _Peak:
    """Watches how much memory is taken: on the device where there is one, otherwise by the process beyond its start."""

    INTERVAL = 0.02

    def __enter__(self) -> "_Peak":
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # what earlier cells left goes back; glibc alone offers it
            ctypes.CDLL(None).malloc_trim(0)
        self._process = psutil.Process()
        self._start = self._most = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(self.INTERVAL):
            self._most = max(self._most, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._most = max(self._most, self._process.memory_info().rss)
        self._stop.set()
        self._thread.join()

    @property
    def megabytes(self) -> float:
        """The greatest use that was seen."""
        on_device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        return (on_device or self._most - self._start) / MEGABYTE
