# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Runs the grid of a comparison: method x set x number of supports x seed, one folder per cell.

At one seed all methods get the same supports, and all methods and numbers of supports the same test images: those that
remain beside the supports of the largest number. Methods that see no supports are run once, on the whole test part.
"""

import contextlib
import copy
import json
import logging
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anomalib.data import AnomalibDataModule, ImageItem, get_datamodule
from lightning import seed_everything
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from anomalib_mvfa import __version__
from anomalib_mvfa.backbones.loading import resolve_backbone
from anomalib_mvfa.data import FewShot
from anomalib_mvfa.files import replacing
from anomalib_mvfa.metrics import PixelFigures

from .cells import load_cells
from .methods import BUILT_IN, PEER_KEYS, Ready, sees_supports, train
from .page import write_page
from .report import write_tables
from .statistics import image_metrics

__all__ = ["Comparison", "run_comparison", "write_report"]

logger = logging.getLogger(__name__)

PICTURE_SIZE = 112
QUANTILES = (0.005, 0.995)
MEGABYTE = 2**20


@dataclass(frozen=True)
class Comparison:
    """The grid, as the section ``comparison`` of a configuration gives it.

    Args:
        sets: An anomalib datamodule by the name of the set: its ``class_path`` and ``init_args``.
        methods: Arguments by the name of the method. Those of MVFA and WinCLIP are arguments of their models, and for
            MVFA ``epochs``, ``train_batch_size`` and arguments of Lightning's ``trainer``. ``MVFA (zero-shot)`` needs
            either ``adapters``, a file, in whose name ``{set}`` stands for the set's name, or ``data``, arguments
            of ``LeaveOneOut`` but the target, which is the category of the set. Any other name is a model of anomalib,
            given by ``class_path`` and ``init_args``, that learns from the normal supports, or with
            ``trained_on: train`` from all normal training images; ``weights`` is a ``.safetensors`` file of its timm
            backbone, or ``random``; ``image_size``, ``epochs`` and ``trainer`` are optional.
        output: Folder that receives one folder per cell.
        backbone: As of MVFA, like ``pretrained`` and ``image_size``; the same for MVFA and WinCLIP.
        k_shot: Numbers of supports.
        group_by: As of ``FewShot``: which part of a file name the images of a patient share, for sets whose datamodules
            know no patients.
        seeds: Each draws other supports.
        support_list: File with published supports instead of drawn ones; ``{set}`` and ``{draw}`` in its name stand for
            the set and for one of ``draws``, names that then take the place of the seeds.
        pixel_metrics: ``"mask"`` computes pixel metrics at the size of each mask, ``"network"`` at the size that the
            backbone reads, as published figures are, and in less memory.
        epochs: Epochs of a training.

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
    group_by: str | None = None
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    support_list: str | None = None
    draws: Sequence[str] = ()
    pixel_metrics: str = "mask"
    epochs: int = 50
    accelerator: str = "auto"

    def __post_init__(self) -> None:
        for msg in (*(_method_fault(name, own or {}) for name, own in self.methods.items()), self._fault()):
            if msg:
                raise ValueError(msg)
        if self.draws:
            object.__setattr__(self, "seeds", tuple(range(len(self.draws))))

    @property
    def tower(self) -> dict[str, Any]:
        """The arguments that name the backbone."""
        return {name: getattr(self, name) for name in ("backbone", "pretrained", "image_size")}

    def _fault(self) -> str:
        empty = [name for name in ("sets", "methods", "k_shot", "seeds") if not getattr(self, name)]
        msg = ""
        if empty:
            msg = f"comparison.{empty[0]} is empty: nothing to compare."
        elif min(self.k_shot) < 1:
            msg = f"comparison.k_shot counts supports, at least 1, got {min(self.k_shot)}."
        elif self.pixel_metrics not in {"mask", "network"}:
            msg = f"comparison.pixel_metrics must be mask or network, got '{self.pixel_metrics}'."
        elif (self.support_list is None) != (not self.draws) or (self.draws and len(self.k_shot) > 1):
            msg = (
                "comparison.support_list and comparison.draws belong together, with the one k_shot of the lists: "
                "support_list: LISTS/{set}/{draw}.txt and draws: [4-shot, shot4_sample1]."
            )
        return msg

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Comparison":
        """Make a comparison of a configuration, whose entries must be known."""
        fields = cls.__dataclass_fields__
        unknown, missing = sorted(config.keys() - fields), sorted({"sets", "methods"} - config.keys())
        if unknown or missing:
            msg = f"comparison: unknown entries {unknown}, missing entries {missing}. Known are {', '.join(fields)}."
            raise ValueError(msg)
        return cls(**config)

    def cells(self) -> Iterator["Spec"]:
        """Yield all cells, those of one set and seed together."""
        for (name, source), seed in product(self.sets.items(), self.seeds):
            for method, given in self.methods.items():
                arguments = dict(given or {})
                if sees_supports(method, arguments):
                    for k_shot in self.k_shot:
                        yield Spec(self, method, name, k_shot, seed, arguments, dict(source))
                elif seed == self.seeds[0]:
                    yield Spec(self, method, name, 0, seed, arguments, dict(source))


def _method_fault(name: str, own: Mapping[str, Any]) -> str:
    msg, known = "", ", ".join(sorted(PEER_KEYS))
    if "class_path" not in own and name not in BUILT_IN:
        msg = (
            f"comparison.methods: unknown {name}. Known are {', '.join(BUILT_IN)}; any other name "
            "needs the class_path of a model of anomalib, such as Patchcore."
        )
    elif "class_path" in own and own.keys() - PEER_KEYS:
        msg = f"comparison.methods.{name}: unknown entries {sorted(own.keys() - PEER_KEYS)}. Known are {known}."
    elif own.get("trained_on", "train") not in {"supports", "train"}:
        msg = f"comparison.methods.{name}: trained_on must be supports or train, got '{own['trained_on']}'."
    return msg


@dataclass(frozen=True)
class Spec:
    """One cell of the grid."""

    comparison: Comparison
    method: str
    set: str
    k_shot: int
    seed: int
    arguments: dict[str, Any]
    source: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where its files go."""
        parts = (self.set, self.method, f"k{self.k_shot}", f"seed{self.seed}")
        name = "-".join(re.sub(r"[^A-Za-z0-9_]+", "-", part).strip("-") for part in parts)
        return Path(self.comparison.output) / "cells" / name

    @property
    def config(self) -> dict[str, Any]:
        """Everything that its result depends on, as plain data."""
        chosen = ("epochs", "accelerator", "support_list", "pixel_metrics", "group_by")
        facts = self.comparison.tower | {name: getattr(self.comparison, name) for name in chosen}
        facts |= {"arguments": self.arguments, "source": self.source}
        facts["draw"] = self.comparison.draws[self.seed] if self.comparison.draws else None
        facts["largest_k_shot"] = max(self.comparison.k_shot) if self.k_shot else None  # decides which images remain
        result: dict[str, Any] = json.loads(json.dumps(facts, default=str))
        return result

    @property
    def is_done(self) -> bool:
        """Whether it was finished, with the same configuration."""
        try:
            record = json.loads((self.folder / "cell.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        done = bool(record.get("status") == "done")
        if done and record.get("config") != self.config:
            logger.warning("%s was computed with another configuration and is computed again.", self.folder.name)
            return False
        return done


def run_comparison(comparison: Comparison) -> list[Path]:
    """Compute the cells that are missing.

    Returns:
        Folders of the cells that failed; the reason is in ``cell.json``.
    """
    pending = [spec for spec in comparison.cells() if not spec.is_done]
    episodes: dict[tuple[str, int, int, str], FewShot] = {}
    failed = []
    for spec in track(pending, description=f"Comparison, {len(pending)} cells"):
        spec.folder.mkdir(parents=True, exist_ok=True)
        (spec.folder / "cell.json").unlink(missing_ok=True)
        record = {name: getattr(spec, name) for name in ("method", "set", "k_shot", "seed", "config")}
        record |= {"backbone": comparison.backbone, "machine": _machine(), "anomalib_mvfa": __version__}
        record |= {"status": "done", "error": None, "threshold": None, "supports": []}
        record |= {"metrics": {}, "cost": {}, "shown": {}}
        try:
            record |= _run(spec, episodes)
        except Exception as error:
            logger.exception("Cell %s failed.", spec.folder.name)
            record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            failed.append(spec.folder)
        with replacing(spec.folder / "cell.json") as partial_file:
            partial_file.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return failed


def write_report(comparison: Comparison) -> Path:
    """Write ``results.csv``, ``results.md`` and ``index.html`` of the cells that exist, and return the page."""
    output = Path(comparison.output)
    made = {name: getattr(get_datamodule(dict(source)), "root", None) for name, source in comparison.sets.items()}
    roots = {name: Path(root) for name, root in made.items() if root is not None}
    cells = load_cells(output)
    write_tables(cells, output)
    write_page(cells, output / "index.html", data_root=roots)
    return output / "index.html"


def _episode(spec: Spec, made: dict[tuple[str, int, int, str], FewShot]) -> FewShot:
    """Return the supports of a cell, set up, with the test part of the largest number of supports.

    ``made`` keeps the episodes of the set and seed that are being computed.
    """
    largest = max(spec.comparison.k_shot)
    widest = (spec.set, spec.seed, largest, "auto")
    key = (*widest[:2], spec.k_shot or largest, "synthetic" if spec.method == "MVFA (normal only)" else "auto")
    if widest not in made:
        made.clear()
        made[widest] = _make_episode(spec, largest, "auto")
    if key not in made:
        made[key] = episode = _make_episode(spec, *key[2:])
        kept = episode.test_data.samples.image_path.isin(made[widest].test_data.samples.image_path)
        if kept.sum() != len(made[widest].test_data.samples):
            msg = f"The test images of {spec.set} differ between numbers of supports."
            raise RuntimeError(msg)
        episode.test_data = episode.test_data.subsample(kept.to_numpy().nonzero()[0].tolist())
    return made[key]


def _make_episode(spec: Spec, k_shot: int, abnormal_source: str) -> FewShot:
    listed = spec.comparison.support_list
    if listed:
        listed = listed.format(set=spec.set, draw=spec.comparison.draws[spec.seed])
    episode = FewShot(
        get_datamodule(dict(spec.source)),
        k_shot=k_shot,
        abnormal_source=abnormal_source,
        seed=spec.seed,
        group_by=spec.comparison.group_by,
        support_list=listed,
    )
    episode.prepare_data()
    episode.setup(TrainerFn.FITTING)  # the trainer then leaves it as it is
    if (found := int((episode.train_data.samples.label_index == 0).sum())) != k_shot:
        msg = f"The support list of {spec.set} names {found} normal images, but comparison.k_shot is {k_shot}."
        raise ValueError(msg)
    return episode


def _run(spec: Spec, episodes: dict[tuple[str, int, int, str], FewShot]) -> dict[str, Any]:
    """Train and test one cell, write scores and maps, and return what belongs into its record."""
    image_size = resolve_backbone(**spec.comparison.tower).image_size
    data = _episode(spec, episodes)
    seed_everything(spec.seed, verbose=False)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    ready = train(spec, data, image_size)
    seconds = time.monotonic() - began
    peak = torch.cuda.max_memory_allocated() / MEGABYTE if torch.cuda.is_available() else None
    metrics, predict_ms = _Test(spec, ready, data, image_size).run()
    tensors = {tensor.data_ptr(): tensor for tensor in [*ready.network.parameters(), *ready.network.buffers()]}
    size = sum(tensor.nbytes for tensor in tensors.values()) / MEGABYTE
    return {
        "metrics": metrics,
        "cost": {"train_seconds": seconds, "train_peak_mb": peak, "predict_ms": predict_ms, "size_mb": size},
        "threshold": ready.threshold,
        "shown": ready.shown,
        "supports": [_relative(path, data.source) for path in ready.supports],
    }


def _relative(path: str, source: AnomalibDataModule) -> str:
    root = getattr(source, "root", None)
    return Path(os.path.relpath(path, root)).as_posix() if root else Path(path).name


class _Pixels(PixelFigures):
    """Pixel metrics that also know at which threshold the Dice of all pixels is greatest."""

    def best_threshold(self) -> float:
        scores, counts = np.unique(np.asarray(self._abnormal), return_counts=True)
        hits = counts[::-1].cumsum()[::-1]
        alarms = self._normal_above(scores)[2]
        return float(scores[np.argmax(2 * hits / (hits + alarms + hits[0]))])


class _Test:
    """Predicts the test images of one cell, and writes raw scores and small maps."""

    def __init__(self, spec: Spec, ready: Ready, data: FewShot, image_size: tuple[int, int]) -> None:
        self.spec, self.ready, self.datamodule, self.image_size = spec, ready, data, image_size
        self.size = tuple(min(PICTURE_SIZE, side) for side in image_size)
        self.whole = data._source_parts()[2]  # with the supports and their copies, read as all parts are
        self.data = copy.copy(data.test_data if sees_supports(spec.method, spec.arguments) else self.whole)
        self.data.augmentations = None  # images and masks as they were read
        self.pixels = _Pixels()
        self.small: list[NDArray[np.float32]] = []
        self.masks: list[NDArray[np.uint8]] = []
        self.lesions: list[tuple[Tensor, Tensor]] = []  # maps and masks of abnormal images

    def run(self) -> tuple[dict[str, float], float]:
        """Predict, and return the metrics and the milliseconds per image."""
        use_gpu = self.spec.comparison.accelerator != "cpu" and torch.cuda.is_available()
        device = torch.device("cuda" if use_gpu else "cpu")
        self.ready.model.to(device).eval()
        scores, labels, times = [], [], []
        options = {"batch_size": self.datamodule.eval_batch_size, "num_workers": self.datamodule.num_workers}
        for items in DataLoader(self.data, collate_fn=list, **options):  # type: ignore[arg-type]
            images = [torch.as_tensor(item.image).as_subclass(Tensor) for item in items]
            inputs = torch.stack([self.ready.transform(image) for image in images]).to(device)
            began = time.perf_counter()
            with torch.inference_mode():
                output = self.ready.network(inputs)
                scores.append(torch.as_tensor(output.pred_score).flatten().double().cpu().numpy())
            times.append((time.perf_counter() - began) * 1000 / len(items))
            labels += [bool(item.gt_label) for item in items]
            if output.anomaly_map is not None:
                maps = output.anomaly_map.float().cpu()
                for one, item in zip(maps.reshape(len(items), 1, *maps.shape[-2:]), items, strict=True):
                    self._add_map(one, item)
        self._write_scores(np.concatenate(scores), np.array(labels))
        metrics = image_metrics(np.array(labels), np.concatenate(scores))
        found = {name: float(value[0]) for name, value in metrics.items()} | self._finish_maps()
        return found, float(np.median(times[1:] or times))

    def _add_map(self, one: Tensor, item: ImageItem) -> None:
        """Keep a map ``(1, h, w)`` in small, and count its pixels at the size of the mask."""
        self.small.append(functional.interpolate(one[None], self.size, mode="area")[0, 0].numpy())
        if item.gt_mask is None:
            return
        mask = torch.as_tensor(item.gt_mask).as_subclass(Tensor).bool().squeeze()
        if self.spec.comparison.pixel_metrics == "network":
            mask = functional.interpolate(mask[None, None].float(), self.image_size, mode="nearest-exact")[0, 0] > 0
        self.pixels.update(functional.interpolate(one[None], mask.shape, mode="bilinear")[0], mask[None])
        small = functional.adaptive_max_pool2d(mask[None].float(), self.size)[0]
        self.masks.append(small.numpy().astype(np.uint8))
        if mask.any():
            self.lesions.append((one, mask))

    def _write_scores(self, scores: NDArray[np.float64], labels: NDArray[np.bool_]) -> None:
        msg = ""
        if not np.isfinite(scores).all():
            msg = f"{int((~np.isfinite(scores)).sum())} of {len(scores)} image scores are not finite numbers."
        if labels.all() or not labels.any():
            msg = "The test images are all normal or all abnormal: nothing can be compared on them."
        if msg:
            raise ValueError(msg)
        paths = [_relative(path, self.datamodule.source) for path in self.data.samples.image_path]
        table = pd.DataFrame({"path": paths, "label": labels.astype(int), "score": scores})
        if "group" in self.data.samples:  # numbered, for names of groups may be those of patients; alone where unknown
            known = sorted(self.whole.samples.group.dropna().unique(), key=str)
            numbers = {name: str(number) for number, name in enumerate(known)}
            groups = zip(self.data.samples.group, paths, strict=True)
            table["group"] = [numbers.get(name, path) for name, path in groups]
        table.to_csv(self.spec.folder / "scores.csv", index=False)

    def _finish_maps(self) -> dict[str, float]:
        """Write the maps ``(N, h, w)`` in eight bits on one scale, with their masks, and return the pixel metrics."""
        if self.small:
            maps = np.stack(self.small)
            low, high = np.quantile(maps[:: max(1, len(maps) // 2000)], QUANTILES)
            levels = np.clip((maps - low) / max(high - low, 1e-12) * 255, 0, 255).round().astype(np.uint8)
            truth: dict[str, Any] = {"masks": np.stack(self.masks)} if self.masks else {}
            np.savez_compressed(self.spec.folder / "maps.npz", maps=levels, low=low, high=high, **truth)
        if not self.lesions:
            return {}
        threshold, each = self.pixels.best_threshold(), []
        for one, mask in self.lesions:
            called = functional.interpolate(one[None], mask.shape, mode="bilinear")[0, 0] >= threshold
            each.append(float(2 * (called & mask).sum() / (called.sum() + mask.sum())))
        return self.pixels.compute() | {"pixel_Dice_mean": float(np.mean(each)), "pixel_Dice_sd": float(np.std(each))}


def _machine() -> str:
    """Return the processor, the number of threads and the graphics card, for times."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    card = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor}, {torch.get_num_threads()} threads{card}"
