# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The files of an archive: listed, packed, and read in a process of its own, which a damaged file may end or keep busy.

The process is reused from file to file and replaced when it ends. A timer of the kernel inside the process enforces the
limit of seconds, so that it ends even where the process that waits for it does not exist any more.
"""

import hashlib
import json
import multiprocessing
import resource
import shutil
import signal
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import torch
from numpy.typing import NDArray

from anomalib_mvfa.data.readers import (
    ImageRef,
    UnreadableImageError,
    fill_slice,
    list_images,
    read_image,
    read_volume,
    write_volume,
)
from anomalib_mvfa.data.readers.dicom import dicom_header, patient_key
from anomalib_mvfa.data.readers.files import DICOM_SUFFIXES, IMAGE_SUFFIXES, MAX_PIXELS, has_suffix, is_dicom, walk
from anomalib_mvfa.files import replacing
from anomalib_mvfa.pre_processing import EightBitResize

__all__ = [
    "Isolated",
    "ReadOptions",
    "address",
    "digest_of",
    "list_files",
    "list_frames",
    "pack",
    "read_frame",
    "relative_name",
    "write_map",
]

T = TypeVar("T")
CHUNK = 64
"""Files that are handed on together: one for each bit of a number that marks what is to be done."""
LISTED = 2**13
"""Files that are compared with those that are done at once."""
GRACE = 10
"""Seconds beyond the limit after which a process that waits for a disk, and that nothing ends, is left alone."""
DETACHED_SUFFIXES = (".mhd", ".nhdr", ".hdr")
"""Of headers whose voxels are in a file beside them."""


@dataclass(frozen=True)
class ReadOptions:
    """How files are read; ``intensity`` to ``blackout`` are those of ``MedicalFolder``."""

    root: str  # folder, or address of an object-store prefix, that paths are relative to
    size: tuple[int, int]  # height and width in pixels that the model reads
    intensity: str
    axis: int = 2
    slices: tuple[int, int] | None = None
    volume: int | None = None
    max_pixels: int = MAX_PIXELS
    blackout: tuple[tuple[int, ...], ...] = ()
    by_patient: bool = False  # whether DICOM files of one PatientID are a group, not those of one series
    salt: bytes = b""  # random bytes under which groups are hashed
    seconds: float = 60.0  # that one file or frame may take
    memory: int = 8 * 2**30  # bytes of data that the process may hold


class Isolated:
    """Calls functions in another process, within limits of time and memory.

    Args:
        seconds: Time that a call may take.
        memory: Bytes of data that the process may hold.
    """

    def __init__(self, seconds: float, memory: int) -> None:
        self._limits = seconds, memory
        self._context = multiprocessing.get_context("forkserver")
        # Processes are forked from one that has imported everything, not from this one, which has threads.
        self._context.set_forkserver_preload([__name__, "ray"])
        self._process: Any = None
        self._connection: Any = None
        self._folder = tempfile.TemporaryDirectory(prefix="anomalib-mvfa-")

    def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Return what ``function(folder, *arguments)`` returns there; the folder is for temporary files.

        Raises:
            UnreadableImageError: If it takes too long or too much memory, ends its process, or raises one.
        """
        if self._process is None or not self._process.is_alive():
            self._connection, other = self._context.Pipe()
            self._process = self._context.Process(target=_serve, args=(other, *self._limits), daemon=True)
            self._process.start()
            other.close()
        try:
            self._connection.send((function, (Path(self._folder.name), *arguments)))
            if not self._connection.poll(self._limits[0] + GRACE):
                self._process.kill()
                raise TimeoutError
            succeeded, value = self._connection.recv()
        except (EOFError, OSError):
            raise _unreadable(self._ending()) from None
        if not succeeded:
            raise value
        result: T = value
        return result

    def _ending(self) -> str:
        """Return why the process has ended."""
        self._process.join(GRACE)
        code, self._process = self._process.exitcode, None
        if code is None or -code == signal.SIGALRM:
            return f"reading it took longer than {self._limits[0]:g} s"
        cause = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return f"reading it ended its process ({cause})"


def _unreadable(reason: str) -> UnreadableImageError:
    return UnreadableImageError("", reason)  # who calls knows the file


def _serve(connection: Any, seconds: float, memory: int) -> None:
    """Answer calls until the other side is gone."""
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    while True:
        try:
            function, arguments = connection.recv()
        except (EOFError, OSError):
            return
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            answer = True, function(*arguments)
        except (UnreadableImageError, ImportError) as error:
            answer = False, error
        except FileNotFoundError:
            answer = False, _unreadable("no such file")
        except MemoryError:
            answer = False, _unreadable(f"reading it needs more than {memory / 2**30:g} GiB of memory")
        except OSError as error:
            answer = False, _unreadable((error.strerror or "cannot be opened").lower())
        except Exception as error:  # its text may quote a header
            answer = False, _unreadable(f"reading it failed ({type(error).__name__})")
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(answer)


def address(root: str, path: str) -> str:
    """Return the full path or address of a file, without the options that an address may end in.

    Example:
        >>> address("s3://bucket/scans?region=eu-central-1", "a/1.png"), address("scans", "a/1.png")
        ('s3://bucket/scans/a/1.png', 'scans/a/1.png')
    """
    if "://" in path or "://" not in root:
        return path if "://" in path else str(Path(root, path))
    return f"{root.partition('?')[0].rstrip('/')}/{path}"


def relative_name(root: str, path: str, frame: int | None = None) -> str:
    """Return a name for the results of an image that never leads out of a folder, and that no other image has.

    Example:
        >>> relative_name("/scans", "a/1.nii", 7), relative_name("/scans", "../b/1.png")
        ('a/1.nii_slice007', 'b/1.png')
    """
    full = PurePosixPath(urlsplit(path).path if "://" in path else path)
    parts = full.relative_to(root).parts if "://" not in root and full.is_relative_to(root) else full.parts
    name = "/".join(part for part in parts if part not in {"/", "..", "."})
    return name if frame is None else f"{name}_slice{frame:03d}"


def list_frames(folder: Path, options: ReadOptions, path: str, given: str | None) -> tuple[list[int | None], int]:
    """List the images in a file, and return them with the number of their group.

    Groups are those of ``MedicalFolder``, or given; their numbers are hashes under the salt.
    """
    file = _fetch(folder, options.root, path)
    try:
        refs = list_images(
            file, axis=options.axis, slices=options.slices, volume=options.volume, max_pixels=options.max_pixels
        )
    except UnreadableImageError:
        raise
    except ValueError:
        raise UnreadableImageError(file, "holds no image") from None
    key = given or (patient_key(file, options.salt) if options.by_patient else None)
    if key is None:
        full, series = address(options.root, path), dicom_header(ImageRef(file)).series
        key = f"{full.rpartition('/')[0]}\0{series}" if series else full
    digest = hashlib.blake2b(key.encode(), key=options.salt, digest_size=8).digest()
    return [ref.frame for ref in refs], int.from_bytes(digest, "big") >> 1


def read_frame(folder: Path, options: ReadOptions, path: str, frame: int | None) -> NDArray[np.float32]:
    """Read an image ``(3, H, W)`` in [0, 1], at the size that the model reads."""
    image = read_image(_ref(folder, options, path, frame), options.intensity)
    for left, top, width, height in options.blackout:
        image[:, top : top + height, left : left + width] = 0
    resized: torch.Tensor = EightBitResize(options.size)(image)
    return np.asarray(resized.numpy(), np.float32)


def write_map(
    folder: Path, options: ReadOptions, path: str, maps: dict[int, NDArray[np.float32]], target: Path
) -> None:
    """Write the anomaly maps ``(h, w)`` of some slices of a volume in its voxel grid; the other slices are 0."""
    ref = _ref(folder, options, path, None)
    scores = np.zeros_like(read_volume(ref.path, ref.volume, ref.max_pixels)[0])
    for frame, anomaly_map in maps.items():
        fill_slice(scores, frame, ref.axis, torch.from_numpy(anomaly_map.copy()))
    write_volume(target, scores, like=ref.path)


def _ref(folder: Path, options: ReadOptions, path: str, frame: int | None) -> ImageRef:
    file = _fetch(folder, options.root, path)
    return ImageRef(file, frame, options.axis, None, options.volume, options.max_pixels)


def _fetch(folder: Path, root: str, path: str) -> Path:
    """Return a local file, or a copy of that of an object store.

    Beside DICOM files and headers without voxels the files of their folder or name are copied, too: the grey levels may
    follow from the whole series. Copies are kept until those of another folder or file are needed.
    """
    if "://" not in root and "://" not in path:
        return Path(root, path)
    from pyarrow import fs

    remote: str
    store, remote = fs.FileSystem.from_uri(path if "://" in path else root)
    if "://" not in path:
        remote = f"{remote.rstrip('/')}/{path}"
    place, _, name = remote.rpartition("/")
    file, wanted = Path(name), [remote]
    detached = has_suffix(file, DETACHED_SUFFIXES)
    if detached or has_suffix(file, DICOM_SUFFIXES) or not has_suffix(file, IMAGE_SUFFIXES):
        stem = f"{file.stem}." if detached else ""
        beside = store.get_file_info(fs.FileSelector(place))
        wanted += [info.path for info in beside if info.is_file and info.base_name.startswith(stem)]
    own = folder / hashlib.blake2b((place if len(wanted) > 1 else remote).encode(), digest_size=8).hexdigest()
    if not own.is_dir():
        for old in folder.iterdir():
            shutil.rmtree(old)
    for each in wanted:
        copy = own / each.rpartition("/")[2]
        if not copy.exists():
            with replacing(copy) as partial:
                fs.copy_files(each, str(partial), source_filesystem=store, destination_filesystem=fs.LocalFileSystem())
    return own / name


def list_files(source: str) -> tuple[str, Iterator[tuple[str, str | None]]]:
    """Return the root of a source and its files, relative to it, each with its group where a list has one."""
    if "://" in source:
        return source, _stored(source)
    path = Path(source).absolute()
    if not path.exists():
        msg = f"No such file or folder: {source}. Give a folder, an address such as s3://bucket/prefix, or a list."
        raise FileNotFoundError(msg)
    if has_suffix(path, (".csv", ".parquet")):
        return str(path.parent), _listed(path)
    if path.is_file():
        return str(path.parent), iter([(path.name, None)])
    files = (file for file in walk(path) if has_suffix(file, IMAGE_SUFFIXES) or is_dicom(file))
    return str(path), ((file.relative_to(path).as_posix(), None) for file in files)


def _listed(source: Path) -> Iterator[tuple[str, str | None]]:
    """Yield the rows of a CSV or Parquet file."""
    import pyarrow as pa
    from pyarrow import csv, dataset

    kind: Any = "parquet"
    columns = dict.fromkeys(("path", "group"), pa.string())
    if has_suffix(source, (".csv",)):
        kind = dataset.CsvFileFormat(convert_options=csv.ConvertOptions(column_types=columns, strings_can_be_null=True))
    table = dataset.dataset(source, format=kind)
    if "path" not in table.schema.names:
        msg = f"{source} needs a column 'path'; it has {', '.join(table.schema.names)}."
        raise ValueError(msg)
    for batch in table.to_batches(columns=[name for name in columns if name in table.schema.names]):
        yield from ((row["path"], row.get("group")) for row in batch.to_pylist())


def _stored(source: str) -> Iterator[tuple[str, str | None]]:
    """Yield the files below an object-store prefix, folder by folder."""
    from pyarrow import fs

    store, root = fs.FileSystem.from_uri(source)
    folders = [root.rstrip("/")]
    while folders:
        for info in store.get_file_info(fs.FileSelector(folders.pop())):
            if info.type == fs.FileType.Directory and not info.base_name.startswith("."):
                folders.append(info.path)
            elif info.is_file and not info.base_name.startswith("."):
                known = has_suffix(Path(info.base_name), IMAGE_SUFFIXES)
                if known or store.open_input_stream(info.path).read(132)[128:] == b"DICM":
                    yield info.path.removeprefix(f"{root.rstrip('/')}/"), None


def digest_of(path: str) -> int:
    """Return a number for a path; two of ten million share one with a chance of 3e-6."""
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big")


def pack(
    files: Iterator[tuple[str, str | None]], root: str, done: NDArray[np.uint64]
) -> tuple[list[dict[str, Any]], NDArray[np.uint64]]:
    """Pack the files that are not done, about ten bytes for each.

    Returns:
        The chunks, and for each a mark for every file, the first where a list has it twice.
    """
    chunks: list[dict[str, Any]] = []
    keys: list[NDArray[np.uint64]] = [np.zeros(0, np.uint64)]
    marks = []
    while batch := list(islice(files, LISTED)):
        found = np.array([digest_of(address(root, path)) for path, _ in batch], np.uint64)
        places = np.searchsorted(done, found).clip(max=max(len(done) - 1, 0))
        new = np.flatnonzero(done[places] != found) if len(done) else np.arange(len(found))
        keys.append(found[new])
        for start in range(0, len(new), CHUNK):
            rows = [batch[index] for index in new[start : start + CHUNK]]
            marks += [(len(chunks), place) for place in range(len(rows))]
            chunks.append({"chunk": len(chunks), "files": zlib.compress(json.dumps(rows).encode())})
    todo = np.zeros(len(chunks), np.uint64)
    owners = np.array(marks, np.uint32).reshape(-1, 2)[np.unique(np.concatenate(keys), return_index=True)[1]]
    np.bitwise_or.at(todo, owners[:, 0], np.uint64(1) << owners[:, 1].astype(np.uint64))
    return chunks, todo
