# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""References to images in files, and what the readers of all formats share."""

import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

__all__ = ["IMAGE_SUFFIXES", "MAX_PIXELS", "ImageRef", "UnreadableImageError", "is_dicom", "is_volume"]

MAX_PIXELS = 2**27
"""Pixels of a DICOM file over all its frames, or voxels of a volume, that are read by default: 512 x 512 x 512."""

INSTALL = 'pip install "anomalib-mvfa[medical]"'
DICOM_SUFFIXES = (".dcm", ".dicom")
NIFTI_SUFFIXES = (".nii.gz", ".nii")
ITK_SUFFIXES = (".mha", ".mhd", ".nrrd", ".nhdr")
VOLUME_SUFFIXES = (*NIFTI_SUFFIXES, ".hdr", *ITK_SUFFIXES)
JPEG_SUFFIXES = (".jpg", ".jpeg")
RASTER_SUFFIXES = (".png", *JPEG_SUFFIXES, ".bmp", ".tif", ".tiff", ".webp")
IMAGE_SUFFIXES = (*RASTER_SUFFIXES, *DICOM_SUFFIXES, *VOLUME_SUFFIXES)
"""Suffixes that are read; DICOM files without one of them are recognised by their preamble."""

FileKind = Literal["raster", "dicom", "volume"]
Pixels = NDArray[Any]


class UnreadableImageError(ValueError):
    """A file that exists but holds no usable image, and why; the reason is free of header contents."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)  # both, so that the error survives pickling between processes
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class ImageRef:
    """One 2-D image: a file, a frame of a multi-frame DICOM file, or a slice of a volume.

    Args:
        path: The file.
        frame: Frame or slice index from 0; ``None`` for a file that holds one image.
        axis: Axis of the canonical (RAS+) volume that ``frame`` counts along: 0 sagittal, 1 coronal, 2 axial. Not used
            for other formats.
        root: Folder that names are relative to. Defaults to the folder of the file.
        volume: Which volume of a file of four or more dimensions, from 0. Not used for other files.
        max_pixels: Largest number of pixels or voxels of a file that is read.
    """

    path: Path
    frame: int | None = None
    axis: int = 2
    root: Path | None = field(default=None, compare=False)
    volume: int | None = None
    max_pixels: int = field(default=MAX_PIXELS, compare=False)

    @property
    def name(self) -> str:
        """Relative path without its suffix, and the index, to name outputs by (``case/volume_slice012``)."""
        path, root = (Path(os.path.abspath(part)) for part in (self.path, self.root or self.path.parent))  # noqa: PTH100 - links stay
        # A file outside the root goes by its name alone, which never leads out of a folder.
        relative = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        suffix = next((suffix for suffix in IMAGE_SUFFIXES if relative.lower().endswith(suffix)), "")
        stem = relative[: len(relative) - len(suffix)]
        return stem if self.frame is None else f"{stem}_slice{self.frame:03d}"

    def check_size(self, count: int) -> None:
        """Refuse a file with more pixels over all frames, or voxels, than ``max_pixels``, before they are decoded."""
        if count > self.max_pixels:
            reason = f"holds {count} pixels, more than max_pixels={self.max_pixels}; raise max_pixels to read it"
            raise UnreadableImageError(self.path, reason)

    def index(self, count: int) -> int:
        """Return the frame to read of ``count``; a ValueError if none was chosen of several, or it does not exist."""
        if self.frame is None and count > 1:
            msg = f"{self.path} holds {count} images: choose one with ImageRef(path, frame), or use list_images."
            raise ValueError(msg)
        index = self.frame or 0
        if not 0 <= index < count:
            msg = f"{self.path} holds {count} images, numbered from 0; there is no number {index}."
            raise ValueError(msg)
        return index


def is_dicom(path: str | Path) -> bool:
    """Return whether a file is a DICOM file, by its suffix, or by its preamble if it has none of a known format."""
    path = Path(path)
    if has_suffix(path, IMAGE_SUFFIXES):
        return has_suffix(path, DICOM_SUFFIXES)
    with suppress(OSError):
        return head(path)[128:] == b"DICM"
    return False


def is_volume(path: str | Path) -> bool:
    """Return whether a file is a volume, by its suffix."""
    return has_suffix(Path(path), VOLUME_SUFFIXES)


def optional(module: str) -> Any:
    """Import a module of the optional extra, which an ImportError names."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        msg = f"Reading this file needs {module.partition('.')[0]}: {INSTALL}"
        raise ImportError(msg) from error


@contextmanager
def unreadable(path: Path, reason: str) -> Iterator[None]:
    """Turn a library's failures into our error, and mute its warnings and log records: they may quote header values."""
    loggers = {logger: logger.level for logger in map(logging.getLogger, ("pydicom", "nibabel.global"))}
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (UnreadableImageError, ImportError):
        raise
    except Exception:  # damaged files make the libraries raise nearly everything
        raise UnreadableImageError(path, reason) from None
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)


def has_suffix(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Return whether a name ends in one of some suffixes, in any letter case."""
    return path.name.lower().endswith(suffixes)


def stamp(path: Path) -> tuple[int, int]:
    """Return what changes when a file is rewritten; keys the caches."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def head(path: Path, size: int = 132) -> bytes:
    """Return the first bytes of a file."""
    with path.open("rb") as file:
        return file.read(size)


def file_kind(path: Path) -> FileKind:
    """Return the format of a file, which is opened once so that every format reports access errors alike."""
    try:
        start = head(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnreadableImageError(path, (error.strerror or "cannot be opened").lower()) from None
    if not start:
        raise UnreadableImageError(path, "the file is empty")
    if is_volume(path):
        return "volume"
    return "dicom" if has_suffix(path, DICOM_SUFFIXES) or start[128:] == b"DICM" else "raster"


def walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder that are not hidden, entering every folder once."""

    def refuse(error: OSError) -> NoReturn:
        raise UnreadableImageError(error.filename, (error.strerror or "cannot be listed").lower()) from None

    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        folders.sort(key=lambda name: (Path(parent, name).is_symlink(), name))
        seen.add(os.path.realpath(parent))
        for name in list(folders):
            real = os.path.realpath(Path(parent, name))
            if name.startswith(".") or real in seen:
                folders.remove(name)
            seen.add(real)
        yield from (Path(parent, name) for name in files if not name.startswith(".") and Path(parent, name).is_file())


def finite(values: Pixels, path: Path) -> Pixels:
    """Set NaN and -inf to the smallest finite value and +inf to the largest."""
    usable = values[np.isfinite(values)]
    if not usable.size:
        raise UnreadableImageError(path, "holds no finite value")
    low, high = usable.min(), usable.max()
    return values if usable.size == values.size else np.nan_to_num(values, nan=low, posinf=high, neginf=low)
