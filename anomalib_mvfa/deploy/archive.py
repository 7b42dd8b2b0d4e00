# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Batch prediction of an archive of any size on Ray Data, which can be stopped and goes on.

    python -m anomalib_mvfa.deploy.archive SOURCE OUT --model model.xml

Readers decode files in processes of their own, predictors have one compiled model each, and this process lists the
source and writes ``OUT/parts/*.parquet``. Files that have rows there are not read again.
"""

import argparse
import fcntl
import json
import logging
import os
import secrets
import signal
import tempfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms.v2.functional import to_pil_image

from anomalib_mvfa.data.readers import IntensityRule, UnreadableImageError
from anomalib_mvfa.data.readers.files import MAX_PIXELS, is_volume
from anomalib_mvfa.files import content_digest, replacing
from anomalib_mvfa.model import MVFA
from anomalib_mvfa.pre_processing import check_intensity
from anomalib_mvfa.visualization import heatmap
from anomalib_mvfa.weights.checkpoints import checkpoint_facts, read_checkpoint

from .archive_files import (
    Isolated,
    ReadOptions,
    address,
    digest_of,
    list_files,
    list_frames,
    pack,
    read_frame,
    relative_name,
    write_map,
)
from .inferencer import image_size

__all__ = ["Counts", "Resources", "predict_archive"]

logger = logging.getLogger("anomalib_mvfa.deploy.archive")  # also where this file is the command
INSTALL = 'pip install "anomalib-mvfa[ray]"'

CHUNKS_IN_TASK = 16
PART_ROWS = 1000
OBJECT_STORE = 2**30
"""Bytes in which a local cluster keeps images between readers and predictors."""
BLOCK = 2**24
"""Bytes of images that are handed on together."""
LONGEST_FOLDER = 28
"""Characters of the folder for temporary files, in which names of sockets have room."""


class Counts(NamedTuple):
    """What a run has added to an archive."""

    images: int = 0
    unreadable: int = 0
    parts: int = 0


class Resources(NamedTuple):
    """What a run uses of a machine or a cluster."""

    address: str | None = None  # of a cluster; without one a local one is started
    workers: int = 1  # predictors, each with a model of its own
    readers: int | None = None  # as many as workers
    threads: int = 1  # of each predictor
    gpus: float = 0  # of each predictor, a fraction to share one
    batch: int = 16


class _Reader:
    """Stage of the pipeline: chunks of files to images, each with the number of images of its file."""

    def __init__(self, options: ReadOptions, batch: int) -> None:
        self.options, self.batch = options, batch
        self.isolated = Isolated(options.seconds, options.memory)

    def __call__(self, chunks: dict[str, Any]) -> Iterator[dict[str, Any]]:
        files = json.loads(zlib.decompress(chunks["files"][0]))
        rows = (row for place, file in enumerate(files) for row in self._rows(int(chunks["chunk"][0]), place, *file))
        while some := list(islice(rows, self.batch)):
            yield {name: np.stack([row[name] for row in some]) for name in some[0]}

    def _rows(self, chunk: int, place: int, path: str, given: str | None) -> Iterator[dict[str, Any]]:
        frames: list[int | None] = [None]
        group, error = -1, ""
        try:
            frames, group = self.isolated.call(list_frames, self.options, path, given)
        except UnreadableImageError as problem:
            error = problem.reason
        for frame in frames:
            image: NDArray[np.float32] = np.zeros((3, *self.options.size), np.float32)
            reason = error
            try:
                if not reason:
                    image = self.isolated.call(read_frame, self.options, path, frame)
            except UnreadableImageError as problem:
                reason = problem.reason
            number = -1 if frame is None else frame
            row = {"chunk": chunk, "place": place, "path": path, "frame": number, "images": len(frames)}
            yield {**row, "group": group, "error": reason, "image": image}


class _Predictor:
    """Stage of the pipeline: images to scores.

    Args:
        model: Trained or exported model.
        threads: Threads to compute with.
        gpu: Whether to compute on a GPU.
        above: Score above which a map is passed on; ``None`` passes none.
        options: Arguments of ``MVFA.load_from_checkpoint``.
    """

    def __init__(self, model: str, threads: int, gpu: bool, above: float | None, options: dict[str, Any]) -> None:
        torch.set_num_threads(threads)
        self.above = np.inf if above is None else above
        graph = not model.endswith(".ckpt")
        self.predict = _load_graph(model, threads, gpu) if graph else _load_checkpoint(model, gpu, options)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        images = batch.pop("image")
        good = np.flatnonzero(batch["error"] == "")
        values = {name: np.full(len(images), np.nan, np.float32) for name in ("score", "raw_score", "label", "area")}
        maps = np.full(len(images), b"", dtype=object)
        if len(good):
            predicted = self.predict(np.ascontiguousarray(images[good]))
            for name, column in values.items():
                column[good] = predicted[name]
            for place, anomaly_map in zip(good, predicted["map"].astype(np.float32), strict=True):
                if values["score"][place] > self.above:
                    volume = is_volume(batch["path"][place])
                    maps[place] = anomaly_map.tobytes() if volume else _picture(images[place], anomaly_map)
        return {**batch, **values, "map": maps}


def _load_graph(model: str, threads: int, gpu: bool) -> Any:
    """Compile a graph of OpenVINO or ONNX; anomalib's inferencer would write a cache into the working directory."""
    import openvino

    core = openvino.Core()
    graph = core.read_model(model)
    raw = _raw_score(graph)
    if raw is not None:
        graph.add_outputs(raw)
    config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if not gpu:  # threads that are tied to cores wait for each other where several models compute
        config |= {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
    compiled = core.compile_model(graph, "GPU" if gpu else "CPU", config)

    def predict(images: NDArray[np.float32]) -> dict[str, Any]:
        outputs, count = compiled(images), len(images)
        return {
            "score": outputs["pred_score"].reshape(count),
            "raw_score": np.nan if raw is None else outputs[len(outputs) - 1].reshape(count),
            "label": outputs["pred_label"].reshape(count),
            "area": outputs["pred_mask"].reshape(count, -1).mean(axis=1, dtype=np.float64),
            "map": outputs["anomaly_map"].reshape(count, *images.shape[-2:]),
        }

    return predict


def _load_checkpoint(path: str, gpu: bool, options: dict[str, Any]) -> Any:
    """Load a trained model."""
    model = MVFA.load_from_checkpoint(path, **options).eval()
    model.calibration.check(model)
    post_processor: Any = model.post_processor
    device = torch.device("cuda" if gpu else "cpu")
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


def _raw_score(graph: Any) -> Any:
    """Return the output of a graph that is the score before normalisation: all paths to the score lead through it."""
    end = graph.output("pred_score").get_node().input_value(0).get_node()
    waiting = {end.get_friendly_name()}
    if end.get_type_name() != "Select":  # of one of two normalisations, in every graph that this package exports
        return None
    for node in reversed(graph.get_ordered_ops()):
        name = node.get_friendly_name()
        if name in waiting:
            if waiting == {name} and name != end.get_friendly_name():
                return node.output(0)
            waiting.remove(name)
            sources = (value.get_source_output().get_node() for value in node.inputs())
            waiting |= {source.get_friendly_name() for source in sources if source.get_type_name() != "Constant"}
    return None


def _picture(image: NDArray[np.float32], anomaly_map: NDArray[np.float32]) -> bytes:
    """Return an image with its heatmap as PNG."""
    buffer = BytesIO()
    heatmap(to_pil_image(torch.from_numpy(image.copy())), torch.from_numpy(anomaly_map)).save(buffer, "png")
    return buffer.getvalue()


@dataclass
class _Parts:
    """Rows on their way into ``OUT/parts``, the images of a file as a whole."""

    out: Path
    options: ReadOptions
    todo: NDArray[np.uint64]  # marks of the files of each chunk that have no rows yet
    counts: Counts = field(default_factory=Counts)
    rows: list[dict[str, Any]] = field(default_factory=list)
    waiting: dict[tuple[int, int], dict[int, dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.isolated = Isolated(max(self.options.seconds, 60), self.options.memory)
        numbers = [int(path.stem.partition("-")[2]) for path in (self.out / "parts").glob("part-*.parquet")]
        self.next = max(numbers, default=-1) + 1

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row; rows that come twice, as after the loss of a machine, are dropped."""
        key, mark = (row["chunk"], row["place"]), np.uint64(1) << np.uint64(row["place"])
        if not self.todo[row["chunk"]] & mark:
            return
        file = self.waiting.setdefault(key, {})
        file[row["frame"]] = row
        if len(file) == row["images"]:
            del self.waiting[key]
            self._write_maps(row["path"], {frame: each.pop("map") for frame, each in file.items() if each["map"]})
            self.rows += [file[frame] for frame in sorted(file)]
            self.todo[row["chunk"]] &= ~mark
        if len(self.rows) >= PART_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the rows of all files that are complete."""
        import pyarrow as pa
        from pyarrow import parquet

        if not self.rows:
            return
        single, text = pa.float32(), pa.string()
        types = {
            "path": text,
            "frame": pa.int32(),
            "group": pa.int64(),
            "score": single,
            "raw_score": single,
            "label": pa.int8(),
        }
        schema = pa.schema({**types, "area": single, "error": text})
        table = pa.Table.from_pylist([_final(row, self.options.root) for row in self.rows], schema)
        with replacing(self.out / "parts" / f"part-{self.next:06}.parquet") as partial_file:
            parquet.write_table(table, partial_file)
        images, unreadable, parts = self.counts
        unreadable += len(table) - table["error"].null_count
        self.counts = Counts(images + len(table), unreadable, parts + 1)
        self.next, self.rows = self.next + 1, []
        logger.info("%d images written, %d of them unreadable, in %d parts.", *self.counts)

    def _write_maps(self, path: str, maps: dict[int, bytes]) -> None:
        root, folder = self.options.root, self.out / "heatmaps"
        if maps and is_volume(path):
            arrays = {frame: np.frombuffer(data, np.float32).reshape(self.options.size) for frame, data in maps.items()}
            target = folder / f"{relative_name(root, path)}_anomaly.nii.gz"
            try:
                self.isolated.call(write_map, self.options, path, arrays, target)
            except UnreadableImageError as problem:
                raise OSError(0, problem.reason) from None
            return
        for frame, picture in maps.items():
            name = relative_name(root, path, None if frame < 0 else frame)
            with replacing(folder / f"{name}.png") as partial_file:
                partial_file.write_bytes(picture)


def _final(row: dict[str, Any], root: str) -> dict[str, Any]:
    """Return a row as it is written: empty where nothing is known."""
    path, numbers = address(root, row["path"]), ("score", "raw_score", "label", "area")
    values = {name: None if np.isnan(row[name]) else row[name] for name in numbers}
    return {
        **values,
        "path": path if row["frame"] < 0 else f"{path}#{row['frame']}",
        "frame": None if row["frame"] < 0 else row["frame"],
        "group": None if row["group"] < 0 else row["group"],
        "label": None if values["label"] is None else int(values["label"]),
        "error": row["error"] or None,
    }


def _done(out: Path) -> NDArray[np.uint64]:
    """Return the sorted digests of the files that have rows."""
    from pyarrow import parquet

    found: list[NDArray[np.uint64]] = [np.zeros(0, np.uint64)]
    for part in (out / "parts").glob("part-*.parquet"):
        columns = parquet.read_table(part, columns=["path", "frame"]).to_pydict()
        files = {path.removesuffix(f"#{frame}") for path, frame in zip(*columns.values(), strict=True)}
        found.append(np.array([digest_of(file) for file in files], np.uint64))
    return np.unique(np.concatenate(found))


def _model_facts(model: Path) -> tuple[tuple[int, int], str | None, str]:
    """Return the size in pixels that a model reads, the intensity rule of its training if known, and its digest."""
    if not model.is_file() or model.suffix not in {".ckpt", ".xml", ".onnx"}:
        msg = f"No model at {model}. Give a trained .ckpt, or an exported .xml or .onnx."
        raise FileNotFoundError(msg)
    weights = model.with_suffix(".bin") if model.suffix == ".xml" else None
    digest = " ".join(content_digest(file) for file in (model, weights) if file is not None)
    if model.suffix == ".ckpt":
        facts = checkpoint_facts(read_checkpoint(model, MVFA.checkpoint_safe_globals(), mmap=True), model)
        return tuple(facts["image_size"]), facts["intensity"], digest
    import openvino

    return image_size(openvino.Core().read_model(model)), None, digest


@contextmanager
def _archive(out: Path, facts: dict[str, Any]) -> Iterator[bytes]:
    """Lock an archive, and yield its salt; refuse one that was begun with other options."""
    out.mkdir(parents=True, exist_ok=True)
    record = out / "archive.json"
    with (out / "archive.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            msg = f"Another run is writing to {out}. Wait for its end, or choose another folder."
            raise ValueError(msg) from None
        facts = json.loads(json.dumps(facts))
        if not record.exists():
            with replacing(record) as partial_file:
                partial_file.write_text(json.dumps({"salt": secrets.token_hex(16), **facts}), encoding="utf-8")
        begun = json.loads(record.read_text(encoding="utf-8"))
        others = [name for name, value in facts.items() if begun.get(name) != value]
        if others:
            msg = f"{out} was begun with another value of {', '.join(others)}. Give the same, or choose another folder."
            raise ValueError(msg)
        yield bytes.fromhex(begun["salt"])


@contextmanager
def _cluster(resources: Resources) -> Iterator[Any]:
    """Join a cluster, or start a local one that nobody else reaches; yield ``ray.data``, and leave nothing behind."""
    environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    try:
        yield from _joined(resources)
    finally:
        os.environ.clear()
        os.environ.update(environment)
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _joined(resources: Resources) -> Iterator[Any]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if resources.address is None:  # its processes listen on loopback, as they do by default elsewhere than on Linux
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))  # Ray would keep one in the home folder
    try:
        import ray
    except ImportError as error:
        msg = f"Archives are predicted with Ray: {INSTALL}"
        raise ImportError(msg) from error
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK
    if ray.is_initialized():
        yield ray.data
        return
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with ExitStack() as stack:
        stack.callback(ray.shutdown)
        if resources.address is not None:
            ray.init(resources.address, **common)
        else:
            short = None if len(tempfile.gettempdir()) < LONGEST_FOLDER else "/tmp"  # noqa: S108 - a private folder in it
            private = tempfile.TemporaryDirectory("", "mvfa-", short, ignore_cleanup_errors=True)
            folder = os.environ["TMPDIR"] = stack.enter_context(private)  # also that of the workers
            stack.callback(ray.shutdown)  # before its files are removed
            cpus = resources.workers * resources.threads + (resources.readers or resources.workers)
            local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
            ray.init(num_cpus=cpus, _temp_dir=folder, **local, **common)
        _end_on_sigterm()
        yield ray.data


def _end_on_sigterm() -> None:
    """Let SIGTERM end the run as Ctrl-C does; Ray's own handler, which it installs on start, aborts the process."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def predict_archive(
    source: str,
    out: str | Path,
    model: str | Path,
    *,
    intensity: str | Sequence[float] | None = None,
    heatmaps: float | None = None,
    pretrained: str | None = None,
    resources: Resources | None = None,
    **reading: Any,
) -> Counts:
    """Predict the files of a source that have no rows in an archive yet.

    Args:
        source: Folder, file, address of an object-store prefix, or CSV or Parquet file with a column ``path`` and if
            wanted ``group``; relative paths begin at its folder.
        out: Folder of the archive.
        model: Trained ``.ckpt``, or exported ``.xml`` or ``.onnx``; every machine reads it at this path.
        intensity: Intensity rule. Defaults to the checkpoint's, for other models to ``"auto"``.
        heatmaps: Score above which heatmaps are written. Defaults to ``None``: none.
        pretrained: Weights of a checkpoint's backbone, if elsewhere than in training.
        resources: What to use of the machine or cluster.
        **reading: Fields of :class:`~anomalib_mvfa.deploy.archive_files.ReadOptions`.

    Returns:
        What this run has added.

    Raises:
        FileNotFoundError: If there is no such source or model.
        ValueError: If the archive was begun with other options, or another run is writing to it.
        OSError: If the archive cannot be written.
        RuntimeError: If files have no rows at the end.
    """
    model, out, resources = Path(model).absolute(), Path(out).absolute(), resources or Resources()
    size, trained, digest = _model_facts(model)
    given = None if intensity is None else str(IntensityRule.parse(intensity))
    check_intensity(trained, given or trained)
    root, files = list_files(source)
    options = ReadOptions(root, size, intensity=given or trained or "auto", **reading)
    names = ("root", "intensity", "axis", "slices", "volume", "max_pixels", "blackout", "by_patient")
    facts = {"model": digest, "heatmaps": heatmaps, **{name: getattr(options, name) for name in names}}
    with _archive(out, facts) as salt:
        chunks, todo = pack(files, root, _done(out))
        if not todo.any():
            logger.info("Every file of the source has its rows in %s.", out)
            return Counts()
        parts = _Parts(out, ReadOptions(**{**vars(options), "salt": salt}), todo)
        weights = {} if pretrained is None else {"pretrained": pretrained}
        predictor = (str(model), resources.threads, resources.gpus > 0, heatmaps, weights)
        with _cluster(resources) as data:
            _run(data, chunks, parts, predictor, resources)
    return parts.counts


def _run(data: Any, chunks: list[dict[str, Any]], parts: _Parts, predictor: Sequence[Any], use: Resources) -> None:
    readers = use.readers or use.workers
    blocks = min(len(chunks), max(4 * readers, -(-len(chunks) // CHUNKS_IN_TASK)))
    images = data.from_items(chunks, override_num_blocks=blocks).map_batches(
        _Reader,
        fn_constructor_args=(parts.options, use.batch),
        batch_size=1,
        compute=data.ActorPoolStrategy(size=readers),
        num_cpus=1,
    )
    rows = images.map_batches(
        _Predictor,
        fn_constructor_args=predictor,
        batch_size=use.batch,
        compute=data.ActorPoolStrategy(size=use.workers),
        num_cpus=use.threads,
        num_gpus=use.gpus or None,
    )
    try:
        for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in batch.to_pylist():
                parts.add(row)
    except BaseException:
        with suppress(OSError):
            parts.flush()
        raise
    parts.flush()
    missing = sum(int(marks).bit_count() for marks in parts.todo)
    if missing:
        msg = f"{missing} files have no rows: workers were lost for good. Run the same command again."
        raise RuntimeError(msg)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m anomalib_mvfa.deploy.archive", description="Predict an archive of any size on Ray."
    )
    add = parser.add_argument
    add("source", help="folder, address such as s3://bucket/prefix, or CSV or Parquet file with a column 'path'")
    add("out", help="folder for parts/*.parquet and heatmaps; a second run goes on")
    add("--model", required=True, help="model.ckpt, model.xml or model.onnx, at the same path on every machine")
    add("--pretrained", help="weights of a checkpoint's backbone, if elsewhere than in training")
    add("--address", help="of a Ray cluster, such as auto or ray-head:6379; default: a local one")
    add("--workers", type=int, default=1, help="predictors, each with one model")
    add("--readers", type=int, help="processes that read; default: as many as workers")
    add("--threads", type=int, default=1, help="of each predictor")
    add("--gpus", type=float, default=0, help="of each predictor; 0.5 lets two share one")
    add("--batch", type=int, default=16, help="images in a forward pass")
    add("--heatmaps", type=float, metavar="SCORE", help="write heatmaps of images with higher scores")
    add("--intensity", help="as in MedicalFolder; default: the checkpoint's, otherwise auto")
    add("--axis", type=int, choices=(0, 1, 2), default=2, help="along which volumes are cut")
    add("--slices", type=int, nargs=2, help="range of slices or frames of each file")
    add("--volume", type=int, help="which volume of a file of four dimensions, from 0")
    add("--max_pixels", type=int, default=MAX_PIXELS, help="of a file that is read")
    add("--blackout", type=int, nargs=4, action="append", default=[], metavar=("LEFT", "TOP", "WIDTH", "HEIGHT"))
    add("--by_patient", action="store_true", help="group DICOM files by patient, not by series")
    add("--seconds", type=float, default=60, help="that reading one file or frame may take")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Predict an archive from the command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("anomalib").setLevel(logging.WARNING)
    options = vars(_arguments().parse_args(arguments))
    options["slices"] = options["slices"] and tuple(options["slices"])
    options["blackout"] = tuple(map(tuple, options["blackout"]))
    resources = Resources(**{name: options.pop(name) for name in Resources._fields})
    _end_on_sigterm()
    again = f"What is complete is in {options['out']}; the same command does the rest."
    try:
        counts = predict_archive(**options, resources=resources)
    except KeyboardInterrupt:
        msg = f"Stopped. {again}"
    except (ValueError, FileNotFoundError, ImportError) as error:
        msg = str(error)
    except Exception as error:  # those of Ray contain the traces of its workers
        msg = f"{str(error).strip().splitlines()[-1]} {again}"
    else:
        logger.info("%d images added, %d of them unreadable.", counts.images, counts.unreadable)
        return
    raise SystemExit(msg)


if __name__ == "__main__":
    main()
