# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Batch prediction of an archive of any size on Ray Data, which can be stopped and goes on.

    python -m anomalib_mvfa.deploy.archive SOURCE OUT --model model.xml

Readers decode files in processes of their own, predictors have one compiled model each, and this process lists the
source and writes ``OUT/parts/*.parquet``. Files that have rows there are not read again.
"""

import argparse
import hashlib
import json
import logging
import os
import secrets
import signal
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms.v2.functional import to_pil_image

from anomalib_mvfa.data.readers import IMAGE_SUFFIXES, IntensityRule, UnreadableImageError, is_dicom, is_volume
from anomalib_mvfa.data.readers.files import has_suffix, walk
from anomalib_mvfa.files import replacing
from anomalib_mvfa.model import MVFA
from anomalib_mvfa.pre_processing import check_intensity
from anomalib_mvfa.visualization import heatmap
from anomalib_mvfa.weights.checkpoints import checkpoint_facts, read_checkpoint

from .decoding import Isolated, ReadOptions, address, list_frames, read_frame, relative_name, write_map
from .inferencer import image_size

__all__ = ["Counts", "predict_archive"]

logger = logging.getLogger(__name__)

INSTALL = 'pip install "anomalib-mvfa[ray]"'
CHUNK = 64
"""Files that are handed on together: as many as a number of 64 bits has marks for those that are done."""
CHUNKS_IN_TASK = 16
PART_ROWS = 1000
LISTED = 2**13
OBJECT_STORE = 2**30
"""Bytes in which a local cluster keeps images between readers and predictors."""
BLOCK = 2**24
"""Bytes of images that are handed on together."""


class Counts(NamedTuple):
    """What a run has added to an archive."""

    images: int
    unreadable: int
    parts: int


@dataclass(frozen=True)
class _Settings:
    """What a predictor needs."""

    model: str
    pretrained: str | None
    threads: int
    gpu: bool
    heatmaps: float | None


class _Reader:
    """Stage of the pipeline: chunks of files to images, each with the number of images of its file."""

    def __init__(self, options: ReadOptions, batch: int) -> None:
        self.options, self.batch = options, batch
        self.isolated = Isolated(options.seconds, options.memory)

    def __call__(self, chunks: dict[str, Any]) -> Iterator[dict[str, Any]]:
        rows = self._rows(int(chunks["chunk"][0]), json.loads(zlib.decompress(chunks["files"][0])))
        while some := list(islice(rows, self.batch)):
            yield {name: np.stack([row[name] for row in some]) for name in some[0]}

    def _rows(self, chunk: int, files: list[tuple[str, str | None]]) -> Iterator[dict[str, Any]]:
        blank = np.zeros((3, *self.options.size), np.float32)
        for position, (path, given) in enumerate(files):
            frames: list[int | None] = [None]
            group, error = -1, ""
            try:
                frames, group = self.isolated.call(list_frames, self.options, path, given)
            except UnreadableImageError as problem:
                error = problem.reason
            for frame in frames:
                image, reason = blank, error
                if not reason:
                    try:
                        image = self.isolated.call(read_frame, self.options, path, frame)
                    except UnreadableImageError as problem:
                        reason = problem.reason
                yield {
                    "chunk": chunk,
                    "position": position,
                    "images": len(frames),
                    "path": path,
                    "frame": -1 if frame is None else frame,
                    "group": group,
                    "error": reason,
                    "image": image,
                }


class _Predictor:
    """Stage of the pipeline: images to scores."""

    def __init__(self, settings: _Settings) -> None:
        self.settings = settings
        torch.set_num_threads(settings.threads)
        load = self._load_checkpoint if settings.model.endswith(".ckpt") else self._load_graph
        self.predict = load(Path(settings.model))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        images = batch.pop("image")
        good = np.flatnonzero(batch["error"] == "")
        count = len(images)
        values = {name: np.full(count, np.nan, np.float32) for name in ("score", "raw_score", "label", "area")}
        maps = np.full(count, b"", dtype=object)
        if len(good):
            predicted = self.predict(np.ascontiguousarray(images[good]))
            for name, column in values.items():
                column[good] = predicted[name]
            limit = self.settings.heatmaps
            if limit is not None:
                for index, place in enumerate(good):
                    if values["score"][place] > limit:
                        anomaly_map = predicted["map"][index].astype(np.float32)
                        volume = is_volume(batch["path"][place])
                        maps[place] = anomaly_map.tobytes() if volume else _picture(images[place], anomaly_map)
        return {**batch, **values, "map": maps}

    def _load_graph(self, path: Path) -> Any:
        """Compile a graph of OpenVINO or ONNX."""
        import openvino

        graph = openvino.Core().read_model(path)
        raw = _raw_score(graph)
        if raw is not None:
            graph.add_outputs(raw)
        # anomalib's inferencer would write a cache into the working directory.
        precision = {"INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": False}
        threads = {"INFERENCE_NUM_THREADS": self.settings.threads}
        model = openvino.Core().compile_model(graph, "GPU" if self.settings.gpu else "CPU", {**precision, **threads})

        def predict(images: NDArray[np.float32]) -> dict[str, Any]:
            outputs = model(images)
            count = len(images)
            return {
                "score": outputs["pred_score"].reshape(count),
                "raw_score": np.nan if raw is None else outputs[len(outputs) - 1].reshape(count),
                "label": outputs["pred_label"].reshape(count),
                "area": outputs["pred_mask"].reshape(count, -1).mean(axis=1, dtype=np.float32),
                "map": outputs["anomaly_map"].reshape(count, *images.shape[-2:]),
            }

        return predict

    def _load_checkpoint(self, path: Path) -> Any:
        """Load a trained model."""
        given = {} if self.settings.pretrained is None else {"pretrained": self.settings.pretrained}
        model = MVFA.load_from_checkpoint(path, **given).eval()
        model.calibration.check(model)
        post_processor: Any = model.post_processor
        device = torch.device("cuda" if self.settings.gpu else "cpu")
        model.to(device)

        @torch.inference_mode()
        def predict(images: NDArray[np.float32]) -> dict[str, Any]:
            raw = model.model(torch.from_numpy(images).to(device))
            final = post_processor(raw)
            labelled = not bool(post_processor.image_threshold.isnan())
            return {
                "score": final.pred_score.float().flatten().cpu().numpy(),
                "raw_score": raw.pred_score.float().flatten().cpu().numpy(),
                "label": final.pred_label.flatten().cpu().numpy() if labelled else np.nan,
                "area": final.pred_mask.float().flatten(1).mean(1).cpu().numpy() if labelled else np.nan,
                "map": final.anomaly_map.float().cpu().numpy().reshape(len(images), *images.shape[-2:]),
            }

        return predict


def _picture(image: NDArray[np.float32], anomaly_map: NDArray[np.float32]) -> bytes:
    """Return an image with its heatmap as PNG."""
    buffer = BytesIO()
    heatmap(to_pil_image(torch.from_numpy(image.copy())), torch.from_numpy(anomaly_map)).save(buffer, "png")
    return buffer.getvalue()


def _raw_score(graph: Any) -> Any:
    """Return the output of a graph that is the score before normalisation: all paths to the score lead through it."""
    end = graph.output("pred_score").get_node().input_value(0).get_node()
    if end.get_type_name() != "Select":  # between the two normalisations; in other graphs it is not found
        return None
    waiting = {end.get_friendly_name()}
    for node in reversed(graph.get_ordered_ops()):
        name = node.get_friendly_name()
        if name not in waiting:
            continue
        if len(waiting) == 1 and name != end.get_friendly_name():
            return node.output(0)
        waiting.remove(name)
        sources = (value.get_source_output().get_node() for value in node.inputs())
        waiting |= {source.get_friendly_name() for source in sources if source.get_type_name() != "Constant"}
    return None


def _files(source: str) -> tuple[str, Iterator[tuple[str, str | None]]]:
    """Return the root of a source and its files, relative to it, each with its group where a list has one."""
    if source.lower().endswith((".csv", ".parquet")):
        return str(Path(source).absolute().parent), _listed(source)
    if "://" in source:
        return source, _stored(source)
    path = Path(source).absolute()
    if not path.exists():
        msg = f"No such file or folder: {source}. Give a folder, an address such as s3://bucket/prefix, or a list."
        raise FileNotFoundError(msg)
    if path.is_file():
        return str(path.parent), iter([(path.name, None)])
    files = (file for file in walk(path) if has_suffix(file, IMAGE_SUFFIXES) or is_dicom(file))
    return str(path), ((file.relative_to(path).as_posix(), None) for file in files)


def _listed(source: str) -> Iterator[tuple[str, str | None]]:
    """Yield the rows of a CSV or Parquet file."""
    from pyarrow import csv, dataset

    columns = dataset.dataset(source, format="parquet" if source.lower().endswith(".parquet") else "csv").schema.names
    if "path" not in columns:
        msg = f"{source} needs a column 'path'; it has {', '.join(columns)}."
        raise ValueError(msg)
    used = [name for name in ("path", "group") if name in columns]
    if source.lower().endswith(".csv"):
        convert = csv.ConvertOptions(include_columns=used, column_types=dict.fromkeys(used, "string"))
        batches: Any = csv.open_csv(source, convert_options=convert)
    else:
        batches = dataset.dataset(source, format="parquet").to_batches(columns=used)
    for batch in batches:
        for row in batch.to_pylist():
            yield str(row["path"]), None if row.get("group") in {None, ""} else str(row["group"])


def _stored(source: str) -> Iterator[tuple[str, str | None]]:
    """Yield the files below an object-store prefix, folder by folder."""
    from pyarrow import fs

    store, root = fs.FileSystem.from_uri(source)
    root = root.rstrip("/")
    folders = [root]
    while folders:
        for info in store.get_file_info(fs.FileSelector(folders.pop())):
            if info.base_name.startswith("."):
                continue
            if info.type == fs.FileType.Directory:
                folders.append(info.path)
            # Whether a file without a suffix is a DICOM file is seen when it is read.
            elif has_suffix(Path(info.base_name), IMAGE_SUFFIXES) or "." not in info.base_name:
                yield info.path.removeprefix(f"{root}/"), None


def _digest(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big")


def _chunks(files: Iterator[tuple[str, str | None]], root: str, done: NDArray[np.uint64]) -> list[dict[str, Any]]:
    """Pack the files that are not done, about ten bytes for each; each file is in one chunk, once."""
    chunks: list[dict[str, Any]] = []
    packed = np.zeros(0, np.uint64)
    while batch := list(islice(files, LISTED)):
        keys = np.array([_digest(address(root, path)) for path, _ in batch], np.uint64)
        first = np.zeros(len(keys), bool)
        first[np.unique(keys, return_index=True)[1]] = True
        new = np.flatnonzero(first & ~np.isin(keys, done) & ~np.isin(keys, packed))
        packed = np.concatenate([packed, keys[new]])
        for start in range(0, len(new), CHUNK):
            rows = [batch[index] for index in new[start : start + CHUNK]]
            text = zlib.compress(json.dumps(rows).encode())
            chunks.append({"chunk": len(chunks), "files": text, "count": len(rows)})
    return chunks


@dataclass
class _Parts:
    """Rows on their way into ``OUT/parts``, a file as a whole."""

    out: Path
    options: ReadOptions
    todo: NDArray[np.uint64]  # marks of the files of each chunk that have no rows yet
    rows: list[dict[str, Any]] = field(default_factory=list)
    waiting: dict[tuple[int, int], dict[int, dict[str, Any]]] = field(default_factory=dict)
    images: int = 0
    unreadable: int = 0
    parts: int = 0

    def __post_init__(self) -> None:
        self.isolated = Isolated(max(self.options.seconds, 60), self.options.memory)
        numbers = [int(path.stem.split("-")[1]) for path in (self.out / "parts").glob("part-*.parquet")]
        self.next = max(numbers, default=-1) + 1

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row; rows that come twice, as after the loss of a machine, are dropped."""
        chunk, position = row["chunk"], row["position"]
        mark = np.uint64(1) << np.uint64(position)
        if not self.todo[chunk] & mark:
            return
        file = self.waiting.setdefault((chunk, position), {})
        file[row["frame"]] = row
        if len(file) < row["images"]:
            return
        del self.waiting[chunk, position]
        self._write_maps(file)
        self.rows += [file[frame] for frame in sorted(file)]
        self.todo[chunk] &= ~mark
        if len(self.rows) >= PART_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the rows of all files that are complete."""
        import pyarrow as pa
        from pyarrow import parquet

        if not self.rows:
            return
        table = pa.Table.from_pylist([_final(row, self.options.root) for row in self.rows], schema=_schema())
        with replacing(self.out / "parts" / f"part-{self.next:06}.parquet") as partial:
            parquet.write_table(table, partial)
        self.images += len(table)
        self.unreadable += len(table) - table["error"].null_count
        self.parts, self.next = self.parts + 1, self.next + 1
        self.rows = []
        logger.info("%d images in %d parts, %d of them unreadable", self.images, self.parts, self.unreadable)

    def _write_maps(self, file: dict[int, dict[str, Any]]) -> None:
        marked = {frame: row.pop("map") for frame, row in file.items() if row["map"]}
        if not marked:
            return
        path = next(iter(file.values()))["path"]
        if is_volume(path):
            maps = {frame: np.frombuffer(data, np.float32).reshape(self.options.size) for frame, data in marked.items()}
            target = self.out / "heatmaps" / f"{relative_name(self.options.root, path)}_anomaly.nii.gz"
            try:
                self.isolated.call(write_map, self.options, path, maps, target)
            except UnreadableImageError as problem:
                msg = f"A heatmap could not be written ({problem.reason}): is there space left in {self.out}?"
                raise OSError(msg) from None
            return
        for frame, picture in marked.items():
            name = relative_name(self.options.root, path, None if frame < 0 else frame)
            with replacing(self.out / "heatmaps" / f"{name}.png") as partial:
                partial.write_bytes(picture)


def _schema() -> Any:
    import pyarrow as pa

    numbers = [(name, pa.float32()) for name in ("score", "raw_score")]
    return pa.schema(
        [
            ("path", pa.string()),
            ("group", pa.int64()),
            *numbers,
            ("label", pa.int8()),
            ("area", pa.float32()),
            ("error", pa.string()),
        ]
    )


def _final(row: dict[str, Any], root: str) -> dict[str, Any]:
    """Return a row as it is written: empty where nothing is known."""
    path = address(root, row["path"])
    numbers = {name: None if np.isnan(row[name]) else row[name] for name in ("score", "raw_score", "label", "area")}
    label = numbers["label"]
    return {
        "path": path if row["frame"] < 0 else f"{path}#{row['frame']}",
        "group": None if row["group"] < 0 else row["group"],
        **numbers,
        "label": None if label is None else int(label),
        "error": row["error"] or None,
    }
