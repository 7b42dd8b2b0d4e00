# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""DICOM files, read through pydicom. Section numbers are those of DICOM PS3.3.

Nothing of a header reaches a name, a message, a warning or a log record.
"""

import hashlib
import math
import zlib
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .files import (
    INSTALL,
    ImageRef,
    Pixels,
    UnreadableImageError,
    finite,
    head,
    is_dicom,
    optional,
    stamp,
    unreadable,
)
from .intensity import IntensityRule, limits, refuse_dicom_rule, scale

if TYPE_CHECKING:
    from pydicom import Dataset

_DEFLATED = b"1.2.840.10008.1.2.1.99"
_META_START = 144  # preamble, prefix and the element that holds the length of the file meta information
_MAX_SAMPLE = 2**24  # pixels of a series from which percentiles are computed
_PIXEL_DATA = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


class Header(NamedTuple):
    """What a listing needs of a DICOM header; the defaults stand for other files and unreadable headers."""

    is_image: bool = True
    series: str = ""
    frames: tuple[int, ...] = (0,)  # in the order of their geometry
    place: float = math.nan  # along the normal of the image plane, mm
    number: float = math.nan
    burned_in: bool = False  # text may be in the pixels: BurnedInAnnotation, else ultrasound and secondary captures


def dicom_header(ref: ImageRef) -> Header:
    """Read what a listing needs of a header; the defaults for other files and if the header is damaged."""
    return Header() if not is_dicom(ref.path) else _header(ref.path, ref.max_pixels, stamp(ref.path))


@lru_cache(maxsize=2**17)
def _header(path: Path, max_pixels: int, *_: object) -> Header:
    pydicom = optional("pydicom")
    place = number = math.nan
    try:
        with unreadable(path, "header"):
            _refuse_deflated_bomb(ImageRef(path, max_pixels=max_pixels))
            header = pydicom.dcmread(path, stop_before_pixels=True)
            storage = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
            name = storage.name if storage is not None else ""
            # Doses, segmentations and maps have rows and pixels, but are no images.
            no_image = any(kind in name for kind in ("Dose", "Segmentation", "Map"))
            is_image = "Image Storage" in name or ("Rows" in header and not no_image)
            series, count = str(header.get("SeriesInstanceUID", "")), _frame_count(header)
            flag = str(header.get("BurnedInAnnotation") or "").strip().upper()
            captured = header.get("Modality") in {"US", "IVUS"} or "Secondary Capture" in name or "Ultrasound" in name
            burned_in = flag == "YES" or (not flag and captured)
    except UnreadableImageError:
        return Header()
    with suppress(UnreadableImageError), unreadable(path, "InstanceNumber"):
        number = float(header.InstanceNumber)
    with suppress(UnreadableImageError), unreadable(path, "geometry"):
        place = _place(header, header)
    frames = tuple(range(count))
    with suppress(UnreadableImageError), unreadable(path, "geometry"):
        orientations = [_group(header, frame, "PlaneOrientationSequence") for frame in frames]
        positions = [_group(header, frame, "PlanePositionSequence") for frame in frames]
        places = [_place(*plane) for plane in zip(orientations, positions, strict=True)]
        if len({tuple(np.round(np.array(item.ImageOrientationPatient, float), 3)) for item in orientations}) == 1:
            frames = tuple(sorted(frames, key=places.__getitem__))
    return Header(is_image, series, frames, place, number, burned_in)


def _place(orientation: "Dataset", position: "Dataset") -> float:
    """Return the position along the normal of the image plane in mm."""
    row, column = np.array(orientation.ImageOrientationPatient, dtype=float).reshape(2, 3)
    return round(float(np.cross(row, column) @ np.array(position.ImagePositionPatient, dtype=float)), 3)


def _frame_count(header: "Dataset") -> int:
    return max(1, int(header.get("NumberOfFrames") or 1))


def slice_order(group: list[tuple[Path, Header]]) -> list[tuple[Path, Header]]:
    """Sort the files of one series by geometry, InstanceNumber and path, using only what all files have."""
    keys = [name for name in ("place", "number") if not any(math.isnan(getattr(header, name)) for _, header in group)]
    return sorted(group, key=lambda file: (*(getattr(file[1], name) for name in keys), file[0]))


def patient_key(path: str | Path, salt: bytes) -> str | None:
    """Return a key that distinguishes the patients of DICOM files, or ``None`` for a file without PatientID.

    The key is a hash under random bytes, the same for all files that are compared: without this salt it cannot be
    traced to the PatientID, and it means nothing in another run.
    """
    path = Path(path)
    if not is_dicom(path):
        return None
    pydicom = optional("pydicom")
    with suppress(UnreadableImageError), unreadable(path, "header"):
        _refuse_deflated_bomb(ImageRef(path))
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"])
        if patient := str(header.get("PatientID") or "").strip():
            return hashlib.blake2b(patient.encode(), key=salt, digest_size=16).hexdigest()
    return None


def _refuse_deflated_bomb(ref: ImageRef) -> None:
    """Refuse a deflated file, which pydicom inflates whole, if it exceeds two bytes for each pixel that may be read."""
    path = ref.path
    if _DEFLATED not in head(path, 2048):
        return
    with path.open("rb") as file:
        start = file.read(_META_START)
        file.seek(_META_START + int.from_bytes(start[-4:], "little"))
        inflater, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while chunk := inflater.unconsumed_tail or file.read(2**16):
            size += len(inflater.decompress(chunk, 2**20))
            ref.check_size(size // 2)


@lru_cache(maxsize=2)
def _load(path: Path, *_: object) -> "Dataset":
    pydicom = optional("pydicom")
    with unreadable(path, "truncated or damaged DICOM file"):
        try:
            dataset: Dataset = pydicom.dcmread(path)
        except pydicom.errors.InvalidDicomError:
            raise UnreadableImageError(path, "not a DICOM file (it lacks the preamble DICM)") from None
    return dataset


def dicom_frame(ref: ImageRef) -> tuple[Pixels, "Dataset", int]:
    """Return the stored values ``(H, W, 1)``, or the colours ``(H, W, 3)``, of a frame, the dataset and the frame."""
    pixels = optional("pydicom.pixels")
    path = ref.path
    with unreadable(path, "truncated or damaged DICOM file"):
        _refuse_deflated_bomb(ref)
        dataset = _load(path, stamp(path))
        if not any(name in dataset for name in _PIXEL_DATA):
            raise UnreadableImageError(path, "holds no pixel data")
        count = _frame_count(dataset)
        ref.check_size(int(dataset.get("Rows") or 0) * int(dataset.get("Columns") or 0) * count)
    index = ref.index(count)
    with unreadable(path, "truncated or damaged pixel data"):
        syntax = dataset.file_meta.TransferSyntaxUID
        compressed = syntax.is_compressed
    reason = f"its compressed pixel data are damaged, or need another decoder: {INSTALL}"
    with unreadable(path, reason if compressed else "truncated or damaged pixel data"):
        try:
            available = pixels.get_decoder(syntax).is_available
        except NotImplementedError:  # pydicom's answer to a transfer syntax that it does not know
            available = False
        if not available:
            raise UnreadableImageError(path, f"no decoder for its compressed pixel data is installed: {INSTALL}")
        frame = pixels.pixel_array(dataset, index=index)
        return frame.reshape((*frame.shape[:2], -1)), dataset, index


def dicom_image(ref: ImageRef, rule: IntensityRule) -> Pixels:
    """Return grey levels ``(H, W, 1)`` or colours ``(H, W, 3)`` in [0, 1]."""
    stored, dataset, index = dicom_frame(ref)
    pixels = optional("pydicom.pixels")
    with unreadable(ref.path, "damaged or contradictory image attributes in the DICOM header"):
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            stored = pixels.apply_color_lut(stored[..., 0], dataset)[..., :3]
            full_scale = float(np.iinfo(stored.dtype).max)
        else:
            full_scale = 2.0 ** int(dataset.get("BitsStored", 8)) - 1
        if stored.shape[-1] > 1:
            refuse_dicom_rule(rule, ref.path)
            colours = (0.0, full_scale) if rule.kind in {"auto", "window"} else limits(stored, rule)
            return scale(stored.astype(np.float64), *colours)

        values, shown, windowed = _modality_values(stored, dataset, index, ref.path)
        image = _own_voi(values, dataset, index) if rule.kind in {"auto", "dicom"} else None
        if image is None:
            refuse_dicom_rule(rule, ref.path)
            if windowed and rule.kind != "percentile":
                image = scale(values, 0, full_scale)
            else:
                image = scale(values, *(_series_limits(ref, rule) or limits(values, rule)))
        if dataset.PhotometricInterpretation == "MONOCHROME1":
            image = 1 - image
        return np.where(shown, image, 0)


def _modality_values(stored: Pixels, dataset: "Dataset", index: int, path: Path) -> tuple[Pixels, Pixels, bool]:
    """Return values in the modality's unit, where they are no padding, and whether they are 8-bit grey levels."""
    modality = _group(dataset, index, "PixelValueTransformationSequence")
    values = finite(optional("pydicom.pixels").apply_modality_lut(stored, modality).astype(np.float64), path)
    unit = modality.get("ModalityLUTSequence") or _rescale(modality) != (1.0, 0.0)
    return values, ~_padding(stored, dataset), not unit and stored.dtype == np.uint8


def _rescale(modality: "Dataset") -> tuple[float, float]:
    slope, intercept = modality.get("RescaleSlope"), modality.get("RescaleIntercept")
    return 1.0 if slope is None else float(slope), float(intercept or 0)


def _series_limits(ref: ImageRef, rule: IntensityRule) -> tuple[float, float] | None:
    """Return the limits of a frame's series, so that all its slices share them; ``None`` if it has none."""
    if rule.kind == "window":
        return limits(np.empty(0), rule)
    folder = ref.path.parent
    series = dicom_header(ref).series
    files = _series_files(folder, ref.max_pixels, stamp(folder)).get(series, ()) if series else ()
    files = files if ref.path in files else (ref.path,)
    return _limits_of_files(tuple((path, stamp(path)) for path in files), rule, ref.max_pixels)


@lru_cache(maxsize=16)
def _series_files(folder: Path, max_pixels: int, *_: object) -> dict[str, tuple[Path, ...]]:
    """Return the DICOM images of a folder by their series."""
    series: dict[str, tuple[Path, ...]] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file() and is_dicom(path)):
        header = dicom_header(ImageRef(path, max_pixels=max_pixels))
        if header.is_image:
            series[header.series] = (*series.get(header.series, ()), path)
    return series


@lru_cache(maxsize=256)
def _limits_of_files(
    files: tuple[tuple[Path, tuple[int, int]], ...], rule: IntensityRule, max_pixels: int
) -> tuple[float, float] | None:
    """Return the percentiles over the grey frames of some files; of many pixels an even sample is used."""
    paths = [ImageRef(path, max_pixels=max_pixels) for path, _ in files]
    refs = [replace(ref, frame=frame) for ref in paths for frame in dicom_header(ref).frames]
    sample = []
    for ref in refs:
        with suppress(UnreadableImageError, ValueError), unreadable(ref.path, "image attributes"):
            stored, dataset, index = dicom_frame(ref)
            if stored.shape[-1] == 1:
                values, shown, _ = _modality_values(stored, dataset, index, ref.path)
                step = -(-stored.size * len(refs) // _MAX_SAMPLE)
                sample.append(values[shown][::step].astype(np.float32))
    values = np.concatenate([*sample, np.empty(0, np.float32)])
    return limits(values, rule) if len(values) else None


def _group(dataset: "Dataset", index: int, name: str) -> "Dataset":
    """Return where a frame's attributes stand: in the functional groups of an enhanced object, else at the top."""
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    for group in (*per_frame[index : index + 1], *shared[:1]):
        if group.get(name):
            item: Dataset = group.get(name)[0]
            return item
    return dataset


def _signed(value: int, signed: bool) -> int:
    """Read a 16-bit number again: without explicit value representations its sign depends on other attributes."""
    return (int(value) + 2**15) % 2**16 - 2**15 if signed else int(value) % 2**16


def _padding(stored: Pixels, dataset: "Dataset") -> Pixels:
    """Return where the stored values are padding, not image (C.7.5.1.1.2)."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, dtype=bool)
    ends = [_signed(end, stored.dtype.kind == "i") for end in (value, dataset.get("PixelPaddingRangeLimit", value))]
    padding: Pixels = (stored >= min(ends)) & (stored <= max(ends))
    return padding


def _own_voi(values: Pixels, dataset: "Dataset", index: int) -> Pixels | None:
    """Apply the VOI LUT or the first window of a header (C.11.2), or return ``None`` if it has none.

    A LINEAR window no wider than 1, which the standard does not define in full, is taken as LINEAR_EXACT.
    """
    group = _group(dataset, index, "FrameVOILUTSequence")
    if group.get("VOILUTSequence"):
        item = group.VOILUTSequence[0]
        count, first, bits = item.LUTDescriptor
        intercept = _rescale(_group(dataset, index, "PixelValueTransformationSequence"))[1]
        first = _signed(first, bool(dataset.get("PixelRepresentation")) or intercept < 0)  # C.11.2.1.1
        count = _signed(count, signed=False) or 2**16
        lut = item.LUTData
        if isinstance(lut, bytes):
            wide = len(lut) >= 2 * count
            order = "<" if dataset.original_encoding[1] else ">"
            lut = np.frombuffer(lut, dtype=f"{order}u2" if wide else "u1")
        lut = np.array(lut, dtype=np.float64, ndmin=1)[:count]
        return scale(lut[np.clip(values - first, 0, len(lut) - 1).astype(np.intp)], 0, 2**bits - 1)

    centre, width = (np.ravel(group.get(name, None)) for name in ("WindowCenter", "WindowWidth"))
    if centre[0] is None or width[0] is None or float(width[0]) <= 0:
        return None
    c, w = float(centre[0]), float(width[0])
    function = group.get("VOILUTFunction") or "LINEAR"
    if function == "SIGMOID":
        curve: Pixels = 1 / (1 + np.exp(np.clip(-4 * (values - c) / w, -100, 100)))
        return curve
    if function == "LINEAR" and w > 1:
        c, w = c - 0.5, w - 1
    return scale(values, c - w / 2, c + w / 2)
