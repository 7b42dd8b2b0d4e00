# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Uploaded files become checked images; whatever cannot be used gets a note with its reason and a remedy."""

import lzma
import shutil
import zipfile
import zlib
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from anomalib_mvfa.data.readers import ImageRef, UnreadableImageError, list_images, read_image
from anomalib_mvfa.data.readers.dicom import dicom_header

__all__ = ["Note", "Source", "list_sources", "read_source", "save_pixels", "unpack"]

MAX_BYTES = 256 * 2**20  # of a file, and of a zip once unpacked
MAX_IMAGES = 200  # that one upload may add
MIN_SIDE = 32
COMPANIONS = (".raw", ".zraw", ".img", ".img.gz")  # hold the voxels of .mhd, .nhdr and .hdr files
NO_LIMIT = "`anomalib predict` on the command line has no such limit."
UNKNOWN = "is no image of a format that is read."


class Note(NamedTuple):
    """A sentence about an uploaded file."""

    name: str
    text: str


class Source(NamedTuple):
    """One image that an upload holds: its name there, the volume or series that it belongs to, how it is read."""

    name: str
    study: str
    ref: ImageRef
    rule: str = "auto"  # how stored values become grey levels


def save_pixels(pixels: Tensor, path: Path) -> Path:
    """Save an image ``(3, H, W)`` in [0, 1], or a mask ``(H, W)``, as a PNG file of 8 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil_image((pixels.float() * 255).round().byte()).save(path)
    return path


def unpack(uploads: Iterable[str | Path], folder: Path) -> list[Note]:
    """Move uploaded files into a folder, unpack zips there, and return notes on what was not taken."""
    notes = []
    folder.mkdir(parents=True)
    for number, upload in enumerate(map(Path, uploads)):
        target = folder / upload.name
        if target.exists():  # a file of the same name from another folder
            target = folder / str(number) / upload.name
            target.parent.mkdir()
        problem, size = "", upload.stat().st_size
        if upload.suffix.lower() == ".zip":
            problem = _unzip(upload, target.with_suffix(""))
        elif size > MAX_BYTES:
            problem = f"is {size >> 20} MB, more than the {MAX_BYTES >> 20} MB taken. Crop or resample it; {NO_LIMIT}"
        else:
            shutil.move(upload, target)
        notes += [Note(upload.name, problem)] if problem else []
        upload.unlink(missing_ok=True)
    return notes


def _unzip(path: Path, folder: Path) -> str:
    """Unpack a zip, and return what is wrong with it. No member is longer than it declares, or it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(member.flag_bits & 1 for member in members):
                return "is protected by a password. Unpack it, and drop the images."
            sizes = [member.file_size for member in members]
            if sum(sizes) > MAX_BYTES or len(sizes) > 10 * MAX_IMAGES:
                most = f"{MAX_BYTES >> 20} MB or {10 * MAX_IMAGES} files"
                return f"unpacks to more than {most}. Pack fewer images; {NO_LIMIT}"
            archive.extractall(folder)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error, lzma.LZMAError):
        return (
            "is no zip file, or a damaged one, or packed in a way that is not read. Pack it again, or drop the images."
        )
    return "" if sizes else "is an empty zip file. Pack the images again."


def list_sources(folder: Path, slices: int, rule: str) -> tuple[list[Source], list[Note]]:
    """List the images of a folder, at most so many evenly spaced slices of a volume, with notes on what is left out."""
    files = {file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")}
    try:
        refs = list_images(folder)
    except (ValueError, FileNotFoundError, ImportError) as error:  # no image among the files
        return [], [Note(file.name, str(error) if isinstance(error, ImportError) else UNKNOWN) for file in files]
    others = sorted(files - {ref.path for ref in refs})
    notes = [Note(file.name, UNKNOWN) for file in others if not file.name.lower().endswith(COMPANIONS)]
    sources: list[Source] = []
    for study, group in groupby(refs, key=lambda ref: dicom_header(ref).series or str(ref.path)):
        found = list(group)
        step = max(1, len(found) / slices)
        chosen = [found[int((number + 0.5) * step)] for number in range(min(slices, len(found)))]
        if len(chosen) < len(found):
            notes.append(Note(found[0].path.name, f"has {len(found)} slices, of which {len(chosen)} are taken."))
        for ref in chosen:
            number = "" if ref.frame is None else f", slice {ref.frame + 1}"
            sources.append(Source(f"{ref.path.name}{number}", study, ref, rule))
    if len(sources) > MAX_IMAGES:
        text = f"are too many at once: the first {MAX_IMAGES} are taken. Drop the others after these; {NO_LIMIT}"
        notes.insert(0, Note(f"{len(sources)} images", text))
    return sources[:MAX_IMAGES], notes


def read_source(source: Source) -> Tensor:
    """Read an image ``(3, H, W)`` in [0, 1]; an UnreadableImageError if it is damaged, too small or of one colour."""
    image = read_image(source.ref, source.rule)
    height, width = image.shape[-2:]
    if min(height, width) < MIN_SIDE:
        raise UnreadableImageError(
            source.ref.path, f"{width} x {height} pixels are too few: {MIN_SIDE} a side at least"
        )
    if bool((image == image[:, :1, :1]).all()):
        raise UnreadableImageError(source.ref.path, "it shows a single colour")
    return image
