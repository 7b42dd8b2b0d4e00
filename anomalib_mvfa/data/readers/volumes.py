# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Volumes in canonical orientation (RAS+): NIfTI and Analyze through nibabel, MetaImage and NRRD through SimpleITK."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from anomalib_mvfa.files import replacing

from .files import (
    ITK_SUFFIXES,
    MAX_PIXELS,
    NIFTI_SUFFIXES,
    ImageRef,
    Pixels,
    UnreadableImageError,
    file_kind,
    finite,
    has_suffix,
    optional,
    stamp,
    unreadable,
)
from .intensity import IntensityRule, limits, refuse_dicom_rule, scale

# A slice of a volume is empty when nothing in it rises above this fraction of the foreground level (99.5th percentile).
_EMPTY_FRACTION = 0.01
_GRID_TOLERANCE = 0.25  # of the smallest edge of a voxel

Affine = NDArray[np.float64]


def read_volume(
    path: str | Path, volume: int | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[NDArray[np.float32], Affine]:
    """Read a volume in its closest canonical orientation (RAS+). The last two volumes are kept in memory.

    NaN and -inf voxels are set to the smallest finite value, +inf to the largest. ``volume`` and ``max_pixels`` are
    those of :class:`~anomalib_mvfa.data.readers.ImageRef`.

    Returns:
        Voxels ``(X, Y, Z)``, float32, read-only, in the file's unit with its slope and intercept applied, X increasing
        towards the patient's right, Y to anterior, Z to superior; and the matching affine ``(4, 4)`` to millimetres.

    Raises:
        FileNotFoundError: If there is no such file.
        UnreadableImageError: If the file holds no volume, too large a one, or several of which none was chosen.
        ImportError: If the reader of the format is not installed.
    """
    return _read(ImageRef(Path(path), volume=volume, max_pixels=max_pixels))


def _read(ref: ImageRef) -> tuple[NDArray[np.float32], Affine]:
    file_kind(ref.path)  # refuses what cannot be opened
    return _load(ref.path, ref.volume, ref.max_pixels, stamp(ref.path))


@lru_cache(maxsize=2)
def _load(path: Path, volume: int | None, max_pixels: int, *_: object) -> tuple[NDArray[np.float32], Affine]:
    with unreadable(path, "truncated or damaged volume, or one without an orientation"):
        shape, affine, load = _open(path)
        count = math.prod(shape[3:])
        if count != 1 and volume is None:
            raise UnreadableImageError(path, f"holds {count} volumes; choose one with the option volume, from 0")
        number = 0 if count == 1 or volume is None else volume
        if not 0 <= number < count:
            raise UnreadableImageError(path, f"holds {count} volumes, numbered from 0; there is no number {volume}")
        ImageRef(path, max_pixels=max_pixels).check_size(math.prod(shape[:3]))
        data = np.asarray(load(number), dtype=np.float32).reshape(shape[:3])
        data, affine = _canonical(data, affine)
        data = finite(data, path)
        data.flags.writeable = False
        return data, affine


def _canonical(data: Pixels, affine: Affine) -> tuple[Pixels, Affine]:
    canonical = optional("nibabel").as_closest_canonical(optional("nibabel").Nifti1Image(data, affine))
    return np.asarray(canonical.dataobj), canonical.affine


def _open(path: Path) -> tuple[tuple[int, ...], Affine, Callable[[int], Pixels]]:
    """Read a header: the shape of three dimensions or more, the affine to RAS+ in mm, a loader of the n-th volume."""
    if has_suffix(path, ITK_SUFFIXES):
        return _open_itk(path)
    nibabel = optional("nibabel")
    try:
        image = nibabel.load(path)
    except nibabel.filebasedimages.ImageFileError:
        raise UnreadableImageError(path, "not a NIfTI or Analyze file") from None
    if image.get_data_dtype().kind not in "iuf":
        raise UnreadableImageError(path, "its voxels are not single real numbers")

    def load(number: int) -> Pixels:
        inner = np.unravel_index(number, image.shape[3:], order="F") if image.shape[3:] else ()
        index = (..., *(int(place) for place in inner))
        data: Pixels = (image.slicer[index] if inner else image).get_fdata(dtype=np.float32)
        return data

    return (*image.shape[:3], *(1,) * (3 - image.ndim), *image.shape[3:]), image.affine, load


def _open_itk(path: Path) -> tuple[tuple[int, ...], Affine, Callable[[int], Pixels]]:
    itk = optional("SimpleITK")
    itk.ProcessObject.SetGlobalWarningDisplay(False)  # warnings may quote the header
    reader = itk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    if reader.GetNumberOfComponents() != 1 or "complex" in itk.GetPixelIDValueAsString(reader.GetPixelID()):
        raise UnreadableImageError(path, "its voxels are not single real numbers")
    dimensions = reader.GetDimension()
    spatial = min(3, dimensions)
    axes = np.array(reader.GetDirection()).reshape(dimensions, dimensions) * reader.GetSpacing()
    affine = np.eye(4)
    affine[:spatial, :spatial] = axes[:spatial, :spatial]
    affine[:spatial, 3] = reader.GetOrigin()[:spatial]

    def load(number: int) -> Pixels:
        voxels = itk.GetArrayFromImage(reader.Execute()).T  # SimpleITK's arrays have the first axis last
        volumes: Pixels = voxels.reshape(*voxels.shape[:3], -1, order="F")[..., number]
        return volumes

    shape = (*reader.GetSize(), *(1,) * (3 - dimensions))
    return shape, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, load  # ITK counts to the left and posterior


@lru_cache(maxsize=8)
def _limits(ref: ImageRef, rule: IntensityRule, *_: object) -> tuple[float, float]:
    return limits(_read(ref)[0], rule)


def filled_slices(ref: ImageRef) -> Pixels:
    """Return for each slice along the axis of a reference whether it holds anything."""
    return _filled(replace(ref, frame=None), stamp(ref.path))


@lru_cache(maxsize=8)
def _filled(ref: ImageRef, stamp: tuple[int, int]) -> Pixels:
    data = _read(ref)[0]
    others = tuple(other for other in range(3) if other != ref.axis)
    low, high = data.min(axis=others), data.max(axis=others)
    floor = float(low.min())
    foreground = _limits(ref, IntensityRule("percentile"), stamp)[1]
    filled: Pixels = (high > low) & (high > floor + _EMPTY_FRACTION * (foreground - floor))
    return filled


def slice_pixels(ref: ImageRef) -> Pixels:
    """Return one slice ``(H, W, 1)`` as displayed."""
    data = _read(ref)[0]
    count = data.shape[ref.axis]
    if ref.frame is None and count > 1 and not filled_slices(ref).any():
        raise UnreadableImageError(ref.path, "all its slices are empty")
    return volume_slice(data, ref.index(count), ref.axis)[..., None]


def slice_image(ref: ImageRef, rule: IntensityRule) -> Pixels:
    """Return the grey levels of one slice in [0, 1], under limits of the whole volume."""
    refuse_dicom_rule(rule, ref.path)
    whole = replace(ref, frame=None, axis=0)
    return scale(slice_pixels(ref).astype(np.float64), *_limits(whole, rule, stamp(ref.path)))


def volume_slice(volume: Pixels, index: int, axis: int = 2) -> Pixels:
    """View one slice ``(H, W)`` of a canonical volume ``(X, Y, Z)`` as displayed; writing to it writes to the volume.

    Rows run from anterior (axial, 2) or superior (coronal, 1, and sagittal, 0) down, columns from the patient's right,
    or from anterior for sagittal slices.

    Example:
        >>> scores = np.zeros((4, 5, 6), dtype=np.float32)
        >>> volume_slice(scores, 2)[...] = 1.0  # an anomaly map (H, W) = (5, 4)
        >>> float(scores[:, :, 2].mean())
        1.0
    """
    view: Pixels = np.moveaxis(volume, axis, 0)[index][::-1, ::-1].T
    return view


def fill_slice(volume: Pixels, index: int, axis: int, anomaly_map: Tensor) -> None:
    """Write a map ``(h, w)`` of any size into one slice of a canonical volume ``(X, Y, Z)``, bilinearly."""
    view = volume_slice(volume, index, axis)
    size = (view.shape[0], view.shape[1])
    resized = functional.interpolate(anomaly_map[None, None], size, mode="bilinear", align_corners=False)
    view[...] = resized[0, 0].numpy()


def write_volume(path: str | Path, data: Pixels, like: str | Path) -> None:
    """Write a canonical volume ``(X, Y, Z)``, as from :func:`read_volume`, in the voxel grid of another file.

    Orientation, affine and units are those of ``like``; its descriptive header fields and extensions, which may
    identify a patient, are not copied. Missing folders are created.

    Raises:
        ValueError: If the shape of ``data`` is not that of ``like``, or ``path`` has another suffix.
    """
    nibabel = optional("nibabel")
    path, like = Path(path), Path(like)
    if not has_suffix(path, NIFTI_SUFFIXES):
        msg = f"Cannot write a volume to {path}: give it the suffix .nii or .nii.gz."
        raise ValueError(msg)
    shape = _grid(like)[0]
    if np.shape(data) != shape:
        msg = f"The volume to write has shape {np.shape(data)}, but the canonical shape of {like} is {shape}."
        raise ValueError(msg)
    affine = _open(like)[1]
    orientations = nibabel.orientations
    from_canonical = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), nibabel.io_orientation(affine))
    image = nibabel.Nifti1Image(orientations.apply_orientation(np.asarray(data, np.float32), from_canonical), affine)
    if has_suffix(like, NIFTI_SUFFIXES):
        grid = nibabel.load(like)
        image.set_sform(*grid.get_sform(coded=True))
        image.set_qform(*grid.get_qform(coded=True))
        image.header.set_xyzt_units(xyz=grid.header.get_xyzt_units()[0])
    else:
        image.header.set_xyzt_units(xyz="mm")
    with replacing(path) as partial:
        nibabel.save(image, partial)


def same_grid(first: str | Path, second: str | Path) -> bool:
    """Return whether two volumes have the same voxel grid once both are in the canonical orientation.

    Only the headers are read. The corners of both must lie within a quarter of the smallest voxel edge of each other.
    """
    (shape, affine), (other_shape, other_affine) = (_grid(Path(path)) for path in (first, second))
    if shape != other_shape:
        return False
    corners = np.array([(*corner, 1) for corner in product(*((-0.5, size - 0.5) for size in shape))])
    distances = np.linalg.norm(((affine - other_affine) @ corners.T)[:3], axis=0)
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    return bool(distances.max() <= _GRID_TOLERANCE * edges.min())


def _grid(path: Path) -> tuple[tuple[int, ...], Affine]:
    """Return the shape ``(X, Y, Z)`` and the affine that :func:`read_volume` would return."""
    file_kind(path)
    with unreadable(path, "truncated or damaged volume, or one without an orientation"):
        shape, affine, _ = _open(path)
        empty, affine = _canonical(np.broadcast_to(np.float32(0), shape[:3]), affine)
        return empty.shape, affine
