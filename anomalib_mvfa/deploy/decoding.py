# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Reading of images in a process of its own, which a damaged file may end or keep busy.

The process is reused from file to file and replaced when it ends. A limit of seconds is enforced by a timer of the
kernel inside the process, so that it also ends where the process that waits for it does not exist any more.
"""

import hashlib
import multiprocessing
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from anomalib_mvfa.data.readers import (
    MAX_PIXELS,
    ImageRef,
    UnreadableImageError,
    list_images,
    patient_key,
    read_image,
    read_volume,
    series_key,
    volume_slice,
    write_volume,
)
from anomalib_mvfa.data.readers.files import DICOM_SUFFIXES, IMAGE_SUFFIXES, has_suffix
from anomalib_mvfa.files import replacing
from anomalib_mvfa.pre_processing import EightBitResize

__all__ = ["Isolated", "ReadOptions", "address", "list_frames", "read_frame", "relative_name", "write_map"]

T = TypeVar("T")
GRACE = 10
"""Seconds beyond the limit after which a process that not even its timer ends, such as one that waits for a disk, is
left alone."""
DETACHED_SUFFIXES = (".mhd", ".nhdr", ".hdr")
"""Headers whose voxels are in a file beside them."""


@dataclass(frozen=True)
class ReadOptions:
    """How the files of an archive are read; the first nine as in ``MedicalFolder``.

    Args:
        root: Folder, or address of an object-store prefix, that relative paths begin at.
        size: Height and width in pixels that the model reads.
        intensity: Intensity rule as text.
        axis: Axis along which volumes are cut.
        slices: Range of slices or frames to use of each file.
        volume: Which volume of a file of four or more dimensions.
        max_pixels: Largest number of pixels or voxels of a file that is read.
        blackout: Rectangles ``(left, top, width, height)`` in pixels that are set to black.
        by_patient: Whether DICOM files of one PatientID are one group, not those of one series.
        salt: Random bytes under which groups are hashed.
        seconds: Time that a file may take.
        memory: Bytes that reading may take.
    """

    root: str
    size: tuple[int, int]
    intensity: str = "auto"
    axis: int = 2
    slices: tuple[int, int] | None = None
    volume: int | None = None
    max_pixels: int = MAX_PIXELS
    blackout: tuple[tuple[int, int, int, int], ...] = ()
    by_patient: bool = False
    salt: bytes = b""
    seconds: float = 60
    memory: int = 8 * 2**30


class Isolated:
    """Calls functions in another process, within limits of time and memory.

    Args:
        seconds: Time that a call may take.
        memory: Bytes of data that the process may hold.
    """

    def __init__(self, seconds: float, memory: int) -> None:
        self._limits = seconds, memory
        self._context = multiprocessing.get_context("forkserver")
        # New processes are forked from one that has imported everything, not from this one, which has threads.
        self._context.set_forkserver_preload([__name__, "ray"])
        self._process: Any = None
        self._connection: Any = None
        self._folder = tempfile.TemporaryDirectory(prefix="anomalib-mvfa-")

    def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Return what ``function(folder, *arguments)`` returns there; the folder is for temporary files.

        Raises:
            UnreadableImageError: If it takes too long, too much memory, ends its process, or raises one.
        """
        if self._process is None or not self._process.is_alive():
            self._start()
        try:
            self._connection.send((function, (Path(self._folder.name), *arguments)))
            if not self._connection.poll(self._limits[0] + GRACE):
                self._process.kill()
                raise TimeoutError
            succeeded, value = self._connection.recv()
        except (EOFError, OSError):
            raise UnreadableImageError("", self._ending()) from None
        if not succeeded:
            raise value
        result: T = value
        return result

    def close(self) -> None:
        """End the process and remove its files."""
        if self._process is not None:
            self._process.kill()
        self._folder.cleanup()

    def _start(self) -> None:
        self._connection, other = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(other, *self._limits), daemon=True)
        self._process.start()
        other.close()

    def _ending(self) -> str:
        """Return why the process has ended."""
        self._process.join(GRACE)
        code, self._process = self._process.exitcode, None
        if code is None or -code in {signal.SIGALRM, signal.SIGKILL}:
            return f"reading it took longer than {self._limits[0]:g} s, or its process was ended from outside"
        cause = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return f"reading it ended its process ({cause})"


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
            answer = False, UnreadableImageError("", "no such file")
        except MemoryError:
            answer = False, UnreadableImageError("", f"reading it needs more than {memory / 2**30:g} GiB of memory")
        except OSError as error:
            answer = False, UnreadableImageError("", (error.strerror or "cannot be opened").lower())
        except Exception as error:  # its text may quote a header
            answer = False, UnreadableImageError("", f"reading it failed ({type(error).__name__})")
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
    """Return a relative path for the results of an image that never leads out of a folder, and is unique.

    Example:
        >>> relative_name("/scans", "a/1.nii", 7), relative_name("/scans", "../b/1.png")
        ('a/1.nii_slice007', 'b/1.png')
    """
    full = PurePosixPath(urlsplit(path).path) if "://" in path else PurePosixPath(path)
    parts = full.relative_to(root).parts if "://" not in root and full.is_relative_to(root) else full.parts
    name = "/".join(part for part in parts if part not in {"/", "..", "."})
    return name if frame is None else f"{name}_slice{frame:03d}"


def list_frames(folder: Path, options: ReadOptions, path: str, given: str | None) -> tuple[list[int | None], int]:
    """List the images in a file, and return them with the number of their group.

    Groups are those of ``MedicalFolder``; their numbers are hashes under the salt, from which nothing can be read.
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
    key = given
    with suppress(UnreadableImageError):
        if key is None and options.by_patient:
            key = patient_key(file, options.salt)
    full = address(options.root, path)
    if key is None:
        series = series_key(file)
        key = f"{full.rpartition('/')[0]}\0{series}" if series else full
    digest = hashlib.blake2b(key.encode(), key=options.salt, digest_size=8).digest()
    return [ref.frame for ref in refs], int.from_bytes(digest, "big") >> 1


def read_frame(folder: Path, options: ReadOptions, path: str, frame: int | None) -> NDArray[np.float32]:
    """Read an image ``(3, H, W)`` in [0, 1], at the size that the model reads."""
    image = read_image(_ref(folder, options, path, frame), options.intensity)
    for left, top, width, height in options.blackout:
        image[:, top : top + height, left : left + width] = 0
    resized: torch.Tensor = EightBitResize(options.size)(image)
    array: NDArray[np.float32] = resized.numpy()
    return array


def write_map(
    folder: Path, options: ReadOptions, path: str, maps: dict[int, NDArray[np.float32]], target: Path
) -> None:
    """Write the anomaly maps ``(h, w)`` of some slices of a volume in its voxel grid; the other slices are 0."""
    ref = _ref(folder, options, path, None)
    scores = np.zeros_like(read_volume(ref.path, ref.volume, ref.max_pixels)[0])
    for frame, anomaly_map in maps.items():
        view = volume_slice(scores, frame, ref.axis)
        values = torch.from_numpy(anomaly_map.copy())[None, None]
        size = (view.shape[0], view.shape[1])
        view[...] = functional.interpolate(values, size, mode="bilinear", align_corners=False)[0, 0].numpy()
    write_volume(target, scores, like=ref.path)


def _ref(folder: Path, options: ReadOptions, path: str, frame: int | None) -> ImageRef:
    file = _fetch(folder, options.root, path)
    return ImageRef(file, frame, options.axis, None, options.volume, options.max_pixels)


def _fetch(folder: Path, root: str, path: str) -> Path:
    """Return a local file, a copy of that of an object store.

    Of DICOM files and of headers without voxels the files beside them are copied, too: grey levels follow from the
    whole series, and voxels are elsewhere. The copies are kept until those of another folder or file are needed.
    """
    if "://" not in root and "://" not in path:
        return Path(root, path)
    from pyarrow import fs

    if "://" in path:
        store, remote = fs.FileSystem.from_uri(path)
    else:
        store, remote = fs.FileSystem.from_uri(root)
        remote = f"{remote.rstrip('/')}/{path}"
    place, _, name = remote.rpartition("/")
    stem = name.partition(".")[0] + "."
    wanted = [remote]
    if has_suffix(Path(name), (*DICOM_SUFFIXES, *DETACHED_SUFFIXES)) or not has_suffix(Path(name), IMAGE_SUFFIXES):
        beside = store.get_file_info(fs.FileSelector(place))
        alike = stem if has_suffix(Path(name), DETACHED_SUFFIXES) else ""
        wanted += [info.path for info in beside if info.is_file and info.base_name.startswith(alike)]
    own = folder / hashlib.blake2b((place if len(wanted) > 1 else remote).encode(), digest_size=8).hexdigest()
    if not own.is_dir():
        for old in folder.iterdir():
            shutil.rmtree(old)
        own.mkdir()
    for each in wanted:
        copy = own / each.rpartition("/")[2]
        if not copy.exists():
            with replacing(copy) as partial:
                fs.copy_files(each, str(partial), source_filesystem=store, destination_filesystem=fs.LocalFileSystem())
    return own / name
