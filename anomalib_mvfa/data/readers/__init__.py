# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Readers that turn medical image files into the tensor anomalib expects.

PNG, JPEG, BMP, TIFF and WebP are read through Pillow, DICOM through pydicom, NIfTI and Analyze through nibabel,
MetaImage and NRRD through SimpleITK. Whatever the format, :func:`read_image` returns a float32 tensor ``(3, H, W)`` in
``[0, 1]``; an :class:`IntensityRule` says how stored values become grey levels. All but the first group need
``pip install "anomalib-mvfa[medical]"``.

Errors carry the path and a reason of this package, never the text of a library's exception, which may quote a header.

Example:
    >>> from anomalib_mvfa.data.readers import list_images, read_image
    >>> for ref in list_images("scans"):  # doctest: +SKIP
    ...     save(ref.name, read_image(ref, rule="brain"))
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import to_dtype

from .dicom import Header, dicom_frame, dicom_header, dicom_image, slice_order
from .files import (
    IMAGE_SUFFIXES,
    JPEG_SUFFIXES,
    MAX_PIXELS,
    ImageRef,
    Pixels,
    UnreadableImageError,
    file_kind,
    has_suffix,
    is_dicom,
    is_volume,
    walk,
)
from .intensity import IntensityRule
from .raster import raster_image, raster_pixels
from .volumes import fill_slice, filled_slices, read_volume, slice_image, slice_pixels, volume_slice, write_volume

__all__ = [
    "ImageRef",
    "IntensityRule",
    "UnreadableImageError",
    "fill_slice",
    "list_images",
    "read_image",
    "read_mask",
    "read_pixels",
    "read_volume",
    "volume_slice",
    "write_volume",
]

_JPEG_MASK_THRESHOLD = 127  # compression blurs the edge of a mask into many small values
_SUPPORTED = f"Supported: {', '.join(IMAGE_SUFFIXES)}, and DICOM files without suffix."


def list_images(
    path: str | Path,
    *,
    axis: int = 2,
    slices: tuple[int, int] | None = None,
    volume: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> list[ImageRef]:
    """List every image of a file or of a folder and its sub-folders, each folder once.

    Files come sorted by path. DICOM files of one series in one folder stand together, ordered along the normal of the
    image plane (inferior to superior for axial slices), else by InstanceNumber, else by name; frames of an enhanced
    multi-frame file likewise by their geometry. Hidden files and folders, DICOM objects that are no images
    (directories, reports, structure sets, doses, segmentations) and empty slices of volumes (constant, or nowhere above
    1 % of the volume's foreground level) are left out. A file that cannot be read is listed, and so is a volume of
    empty slices alone, so that reading it reports the reason.

    ``axis``, ``volume`` and ``max_pixels`` are those of :class:`ImageRef`; ``slices`` is a range ``(start, stop)`` of
    frames or slices to keep of each multi-frame file and volume, whose negative numbers count from the end.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If it holds no image, or ``axis`` is none of 0, 1, 2.
        UnreadableImageError: If a folder cannot be listed.
        ImportError: If the reader of a format that is there is not installed.
    """
    path = Path(path)
    if axis not in {0, 1, 2}:
        msg = f"axis must be 0 (sagittal), 1 (coronal) or 2 (axial), got {axis}."
        raise ValueError(msg)
    if not path.exists():
        msg = f"No such file or folder: {path}. {_SUPPORTED}"
        raise FileNotFoundError(msg)
    whole = ImageRef(path, None, axis, path if path.is_dir() else path.parent, volume, max_pixels)
    groups: dict[object, list[tuple[Path, Header]]] = {}
    for file in sorted(walk(path)) if path.is_dir() else [path]:
        header = dicom_header(replace(whole, path=file))
        if header.is_image and (is_dicom(file) or has_suffix(file, IMAGE_SUFFIXES)):
            groups.setdefault((file.parent, header.series or file), []).append((file, header))
    refs = [
        replace(whole, path=file, frame=frame)
        for group in groups.values()
        for file, header in slice_order(group)
        for frame in _frames(replace(whole, path=file), header, slices)
    ]
    if not refs:
        msg = f"No image in {path}. {_SUPPORTED}"
        raise ValueError(msg)
    return refs


def _frames(ref: ImageRef, header: Header, slices: tuple[int, int] | None) -> Sequence[int | None]:
    """Return the indices of the images in a file, or ``[None]`` for a file that is one image or unreadable."""
    chosen = slice(*(slices or (None, None)))
    if is_volume(ref.path):
        try:
            filled = filled_slices(ref)
        except UnreadableImageError:
            return [None]
        return [index for index in range(len(filled))[chosen] if filled[index]] if filled.any() else [None]
    return header.frames[chosen] if len(header.frames) > 1 else [None]


def read_image(
    source: ImageRef | str | Path,
    rule: IntensityRule | str | Mapping[str, Any] | Sequence[float] = "auto",
) -> torch.Tensor:
    """Read one image ``(3, H, W)``, float32 in ``[0, 1]``, grey ones with three equal channels.

    Ordinary 8-bit files equal those of anomalib's own ``read_image``: divided by 255, EXIF orientation not applied.
    Transparent pixels are laid on black. Of a TIFF file with previews the first page is read. Pixels that a DICOM file
    declares as padding are black and excluded from percentiles; NaN and -inf are set to the smallest finite value,
    +inf to the largest. Slices of volumes show anterior (axial) or superior (coronal, sagittal) up and the patient's
    right, or anterior for sagittal slices, on the left.

    ``source`` is a reference from :func:`list_images`, or the path of a file that holds one image.

    Raises:
        FileNotFoundError: If there is no such file.
        UnreadableImageError: If the file holds no usable image.
        ValueError: If the file holds several images and none was chosen, or not that many.
        ImportError: If the reader of the format is not installed.
    """
    ref = source if isinstance(source, ImageRef) else ImageRef(Path(source))
    readers = {"raster": raster_image, "dicom": dicom_image, "volume": slice_image}
    pixels = readers[file_kind(ref.path)](ref, IntensityRule.parse(rule))
    channels = torch.from_numpy(np.ascontiguousarray(pixels)).expand(-1, -1, 3).permute(2, 0, 1).contiguous()
    image: torch.Tensor = to_dtype(tv_tensors.Image(channels), torch.float32, scale=True)
    return image


def read_pixels(source: ImageRef | str | Path) -> Pixels:
    """Read the stored values of one image: ``(H, W, 1)``, or colours ``(H, W, 3)``; errors as :func:`read_image`."""
    ref = source if isinstance(source, ImageRef) else ImageRef(Path(source))
    kind = file_kind(ref.path)
    if kind == "volume":
        return slice_pixels(ref)
    return dicom_frame(ref)[0] if kind == "dicom" else raster_pixels(ref, exact=True)


def read_mask(source: ImageRef | str | Path) -> torch.Tensor:
    """Read one mask ``(H, W)``, bool: every stored value above 0 is foreground, in JPEG files every one above 127.

    Errors are those of :func:`read_image`.
    """
    pixels = read_pixels(source)
    path = source.path if isinstance(source, ImageRef) else Path(source)
    threshold = _JPEG_MASK_THRESHOLD if has_suffix(path, JPEG_SUFFIXES) else 0
    return torch.from_numpy((pixels > threshold).any(axis=-1))
