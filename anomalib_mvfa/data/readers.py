# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Readers that turn medical image files into the tensor anomalib expects.

PNG, JPEG, BMP, TIFF and WebP are read through Pillow, DICOM through pydicom, NIfTI through nibabel. Whatever the
format, :func:`read_image` returns a float32 tensor ``(3, H, W)`` in ``[0, 1]``; an :class:`IntensityRule` says how
stored values become grey levels. The last two formats need ``pip install "anomalib-mvfa[medical]"``.

Nothing of a DICOM header reaches a name, a message, a warning or a log record: errors carry the path and a reason
worded here, never the text of the library's exception.

Example:
    >>> from anomalib_mvfa.data.readers import list_images, read_image
    >>> for ref in list_images("scans"):  # doctest: +SKIP
    ...     save(ref.name, read_image(ref, rule="brain"))
"""

import hashlib
import importlib
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import to_dtype

from anomalib_mvfa.files import replacing

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = [
    "CT_WINDOWS",
    "IMAGE_SUFFIXES",
    "ImageRef",
    "IntensityRule",
    "UnreadableImageError",
    "is_dicom",
    "is_volume",
    "list_images",
    "patient_key",
    "read_image",
    "read_mask",
    "read_volume",
    "same_grid",
    "volume_slice",
    "write_volume",
]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".dcm", ".dicom", ".nii", ".nii.gz")
"""Suffixes that are read; DICOM files without one of them are known by their preamble."""

CT_WINDOWS: dict[str, tuple[float, float]] = {
    "brain": (40, 80),
    "subdural": (80, 200),
    "stroke": (40, 40),
    "bone": (400, 1800),
    "lung": (-600, 1500),
    "mediastinum": (50, 350),
    "abdomen": (50, 400),
    "liver": (30, 150),
    "soft_tissue": (40, 400),
}
"""Usual CT windows as ``(centre, width)`` in Hounsfield units."""

_PIL_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
_DICOM_SUFFIXES = (".dcm", ".dicom")
_NIFTI_SUFFIXES = (".nii.gz", ".nii")
_PERCENTILES = (0.5, 99.5)
_PERCENT = 100
_INSTALL = 'pip install "anomalib-mvfa[medical]"'

# A slice of a volume is empty when nothing in it rises above this fraction of the foreground level (99.5th percentile).
_EMPTY_FRACTION = 0.01
# Compression blurs the edge of a JPEG mask into many small values.
_JPEG_MASK_THRESHOLD = 127

RuleKind = Literal["auto", "window", "percentile", "dicom"]
FileKind = Literal["raster", "dicom", "nifti"]
_Pixels = NDArray[Any]


class UnreadableImageError(ValueError):
    """A file that exists but gives no image.

    Args:
        path: The file.
        reason: Why it cannot be read; free of header contents.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        """Keep both apart, so that the error survives pickling between processes."""
        super().__init__(path, reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        """Return the path and the reason."""
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class IntensityRule:
    """How stored values become grey levels in ``[0, 1]``.

    - ``auto``: 8-bit images and colour are divided by their full scale; a grey DICOM image takes its own VOI LUT or
      window, or else percentiles of the frame; 16-bit, 32-bit and float images take percentiles of the image, NIfTI
      slices those of the whole volume. The percentiles are 0.5 and 99.5.
    - ``window``: ``centre - width / 2`` becomes 0 and ``centre + width / 2`` becomes 1, clipped. Values are in the
      modality's unit (Hounsfield for CT). 8-bit images and colour have none: they are taken for windowed already and
      divided by their full scale.
    - ``percentile``: the low and high percentile of the image (of the volume for NIfTI) become 0 and 1, clipped. Where
      they coincide, minimum and maximum take their place; a constant image is black.
    - ``dicom``: the file's own VOI LUT or window (the first, where it has several), and an error where it has none.

    A MONOCHROME1 image is inverted afterwards, whatever the rule.

    Args:
        kind: One of the four.
        values: ``(centre, width)`` of a window, ``(low, high)`` in percent of a percentile rule, else empty.

    Raises:
        ValueError: If the numbers do not fit the kind.

    Example:
        >>> IntensityRule.parse("brain")
        IntensityRule(kind='window', values=(40.0, 80.0))
        >>> str(IntensityRule.parse({"percentile": [1, 99]}))
        '{"percentile": [1.0, 99.0]}'
    """

    kind: RuleKind = "auto"
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check the numbers and fill in the default percentiles."""
        if self.kind not in get_args(RuleKind):
            msg = f"Unknown intensity rule {self.kind!r}. Choose from {[*get_args(RuleKind), *CT_WINDOWS]}."
            raise ValueError(msg)
        values = tuple(float(value) for value in self.values) or (_PERCENTILES if self.kind == "percentile" else ())
        object.__setattr__(self, "values", values)
        match values:
            case ():
                valid = self.kind in {"auto", "dicom"}
            case (centre, width) if self.kind == "window":
                valid = math.isfinite(centre) and 0 < width < math.inf
            case (low, high) if self.kind == "percentile":
                valid = 0 <= low < high <= _PERCENT
            case _:
                valid = False
        if not valid:
            wanted = {"window": "[centre, width], width above 0", "percentile": "[low, high], 0 <= low < high <= 100"}
            msg = f"Intensity rule {self.kind!r} takes {wanted.get(self.kind, 'no numbers')}; got {list(values)}."
            raise ValueError(msg)

    @classmethod
    def parse(cls, rule: "IntensityRule | str | Mapping[str, Any] | Sequence[float]") -> "IntensityRule":
        """Read a rule from plain data.

        Args:
            rule: A kind (``"auto"``, ``"dicom"``, ``"percentile"``), the name of a CT window (``"brain"``), a window
                as ``[centre, width]`` or ``{"window": [centre, width]}``, percentiles as
                ``{"percentile": [low, high]}``, the JSON text of one of these (what ``str(rule)`` gives), or a rule.

        Raises:
            ValueError: If it is none of these.
        """
        if isinstance(rule, IntensityRule):
            return rule
        data: Any = rule
        if isinstance(data, str) and data.lstrip()[:1] in {"{", "["}:
            data = json.loads(data)
        if isinstance(data, str):
            data = {"window": CT_WINDOWS[data]} if data in CT_WINDOWS else {data: ()}
        elif not isinstance(data, Mapping):
            data = {"window": data}
        if len(data) != 1:
            msg = f'An intensity rule is one entry such as {{"window": [40, 80]}}, got {data!r}.'
            raise ValueError(msg)
        ((kind, values),) = data.items()
        return cls(kind, tuple(values or ()))

    def to_dict(self) -> dict[str, list[float]]:
        """Return plain data that :meth:`parse` reads back."""
        return {self.kind: list(self.values)}

    def __str__(self) -> str:
        """Return text that :meth:`parse` reads back: the name of a usual window, a kind, or JSON."""
        names = (name for name, values in CT_WINDOWS.items() if self.kind == "window" and values == self.values)
        return next(names, json.dumps(self.to_dict()) if self.values else self.kind)


@dataclass(frozen=True)
class ImageRef:
    """One 2-D image: a file, a frame of a multi-frame DICOM file, or a slice of a volume.

    Args:
        path: The file.
        frame: Frame or slice index from 0; ``None`` for a file that holds one image.
        axis: Axis of the canonical (RAS+) volume that ``frame`` counts along: 0 sagittal, 1 coronal, 2 axial. It
            means nothing for other formats.
        root: Folder that names are relative to. Defaults to the folder of the file.
    """

    path: Path
    frame: int | None = None
    axis: int = 2
    root: Path | None = field(default=None, compare=False)

    @property
    def key(self) -> str:
        """Relative path with its suffix, and the index; unique within a listing (``case/volume.nii.gz#12``)."""
        relative = self.path.relative_to(self.root or self.path.parent).as_posix()
        return relative if self.frame is None else f"{relative}#{self.frame}"

    @property
    def name(self) -> str:
        """Relative path without its suffix, and the index, to name outputs by (``case/volume_slice012``)."""
        relative = self.path.relative_to(self.root or self.path.parent).as_posix()
        suffix = next((suffix for suffix in IMAGE_SUFFIXES if relative.lower().endswith(suffix)), "")
        stem = relative[: len(relative) - len(suffix)]
        return stem if self.frame is None else f"{stem}_slice{self.frame:03d}"


def list_images(path: str | Path, *, axis: int = 2, slices: tuple[int, int] | None = None) -> list[ImageRef]:
    """List every image of a file or of a folder and its sub-folders.

    Files come sorted by path. DICOM files of one series in one folder stand together, ordered along the normal of the
    image plane (inferior to superior for axial slices), else by InstanceNumber, else by name. Hidden files and folders,
    DICOM objects that are no images (directories, reports, structure sets) and empty slices of volumes (constant, or
    nowhere above 1 % of the volume's foreground level) are left out. A file that cannot be read is listed, and so is a
    volume of empty slices alone, so that reading it tells why. DICOM files are opened for their headers alone; volumes
    are loaded to find the empty slices.

    Args:
        path: File or folder. Links to folders are followed, each folder once.
        axis: Axis along which volumes are cut: 0 sagittal, 1 coronal, 2 axial.
        slices: Range ``(start, stop)`` of frames or slices to keep of each multi-frame file and volume; negative
            numbers count from the end.

    Returns:
        One reference an image.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If it holds no image, or ``axis`` is none of 0, 1, 2.
        UnreadableImageError: If a folder cannot be listed.
        ImportError: If the reader of a format that is there is not installed.
    """
    path = Path(path)
    supported = f"Supported: {', '.join(IMAGE_SUFFIXES)}, and DICOM files without suffix."
    if axis not in {0, 1, 2}:
        msg = f"axis must be 0 (sagittal), 1 (coronal) or 2 (axial), got {axis}."
        raise ValueError(msg)
    if not path.exists():
        msg = f"No such file or folder: {path}. {supported}"
        raise FileNotFoundError(msg)
    root = path if path.is_dir() else path.parent

    groups: dict[object, list[tuple[Path, _Header]]] = {}
    for file in sorted(_walk(path)) if path.is_dir() else [path]:
        if is_dicom(file):
            header = _dicom_header(file)
            if header.is_image:
                groups.setdefault((file.parent, header.series or file), []).append((file, header))
        elif _has_suffix(file, IMAGE_SUFFIXES):
            groups[file] = [(file, _Header())]

    refs = [
        ImageRef(file, frame, axis, root)
        for group in groups.values()
        for file, header in _slice_order(group)
        for frame in _frames(file, header, axis, slices)
    ]
    if not refs:
        msg = f"No image in {path}. {supported}"
        raise ValueError(msg)
    return refs


def read_image(
    source: ImageRef | str | Path,
    rule: IntensityRule | str | Mapping[str, Any] | Sequence[float] = "auto",
) -> torch.Tensor:
    """Read one image.

    Ordinary 8-bit files come out as from anomalib's own ``read_image``: divided by 255, EXIF orientation not applied.
    Transparent pixels are laid on black. Of a file with several pages the first is read. Pixels that a DICOM file
    declares as padding are black and no part of percentiles; NaN and infinite values are set to the smallest finite
    one. Slices of volumes show anterior (axial) or superior (coronal, sagittal) up and the patient's right, or
    anterior for sagittal slices, on the left.

    Args:
        source: A reference from :func:`list_images`, or the path of a file that holds one image.
        rule: See :class:`IntensityRule`.

    Returns:
        Image ``(3, H, W)``, float32 in ``[0, 1]``; grey images have three equal channels.

    Raises:
        FileNotFoundError: If there is no such file.
        UnreadableImageError: If the file gives no image.
        ValueError: If the file holds several images and none was chosen, or not that many.
        ImportError: If the reader of the format is not installed.
    """
    ref = source if isinstance(source, ImageRef) else ImageRef(Path(source))
    rule = IntensityRule.parse(rule)
    readers = {"raster": _raster_image, "dicom": _dicom_image, "nifti": _nifti_image}
    pixels = torch.from_numpy(np.ascontiguousarray(readers[_file_kind(ref.path)](ref, rule)))
    pixels = pixels.expand(-1, -1, 3).permute(2, 0, 1).contiguous()
    image: torch.Tensor = to_dtype(tv_tensors.Image(pixels), torch.float32, scale=True)
    return image


def read_mask(source: ImageRef | str | Path) -> torch.Tensor:
    """Read one mask: every stored value above 0 is foreground (above 127 in JPEG files, whose edges are blurred).

    Args:
        source: A reference from :func:`list_images`, or the path of a file that holds one mask.

    Returns:
        Mask ``(H, W)``, bool.

    Raises:
        FileNotFoundError: If there is no such file.
        UnreadableImageError: If the file gives no image.
        ValueError: If the file holds several masks and none was chosen, or not that many.
        ImportError: If the reader of the format is not installed.
    """
    ref = source if isinstance(source, ImageRef) else ImageRef(Path(source))
    kind = _file_kind(ref.path)
    if kind == "nifti":
        pixels = _nifti_slice(ref)
    elif kind == "dicom":
        pixels = _dicom_frame(ref)[0]
    else:
        pixels = _raster_pixels(ref)
    mask = pixels > (_JPEG_MASK_THRESHOLD if _has_suffix(ref.path, (".jpg", ".jpeg")) else 0)
    return torch.from_numpy(mask.any(axis=-1))


def read_volume(path: str | Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Read a NIfTI volume in its closest canonical orientation (RAS+). The last two volumes are kept in memory.

    Of a series of volumes the first is read. NaN and infinite voxels are set to the smallest finite value.

    Args:
        path: A ``.nii`` or ``.nii.gz`` file.

    Returns:
        Voxels ``(X, Y, Z)``, float32, read-only, in the file's unit with its slope and intercept applied, X growing
        towards the patient's right, Y to anterior, Z to superior; and the matching affine ``(4, 4)`` to millimetres.

    Raises:
        FileNotFoundError: If there is no such file.
        UnreadableImageError: If the file gives no volume.
        ImportError: If nibabel is not installed.
    """
    path = Path(path)
    _file_kind(path)
    return _load_volume(path, _stamp(path))


def volume_slice(volume: _Pixels, index: int, axis: int = 2) -> _Pixels:
    """View one slice of a canonical volume the way it is displayed; writing to the view writes to the volume.

    Args:
        volume: Voxels ``(X, Y, Z)`` as from :func:`read_volume`.
        index: Slice index along ``axis``.
        axis: 0 sagittal, 1 coronal, 2 axial.

    Returns:
        View ``(H, W)``: rows run from anterior (axial) or superior (coronal, sagittal) down, columns from the patient's
        right, or from anterior for sagittal slices.

    Example:
        >>> scores = np.zeros((4, 5, 6), dtype=np.float32)
        >>> volume_slice(scores, 2)[...] = 1.0  # an anomaly map (H, W) = (5, 4)
        >>> float(scores[:, :, 2].mean())
        1.0
    """
    view: _Pixels = np.moveaxis(volume, axis, 0)[index][::-1, ::-1].T
    return view


def write_volume(path: str | Path, data: _Pixels, like: str | Path) -> None:
    """Write a canonical volume in the voxel grid of another file, so that it overlays that file.

    Orientation, affine and units are those of ``like``; its descriptive header fields and extensions, which may
    identify a patient, are not taken over.

    Args:
        path: A ``.nii`` or ``.nii.gz`` file to write; missing folders are made.
        data: Voxels ``(X, Y, Z)`` in the canonical orientation of ``like``, as from :func:`read_volume`.
        like: The file whose grid is taken.

    Raises:
        FileNotFoundError: If ``like`` does not exist.
        UnreadableImageError: If ``like`` is no volume.
        ValueError: If the shape of ``data`` is not that of ``like``, or ``path`` has another suffix.
        ImportError: If nibabel is not installed.
    """
    nibabel = _optional("nibabel")
    path, like = Path(path), Path(like)
    if not _has_suffix(path, _NIFTI_SUFFIXES):
        msg = f"Cannot write a volume to {path}: give it the suffix .nii or .nii.gz."
        raise ValueError(msg)
    shape = read_volume(like)[0].shape
    if np.shape(data) != shape:
        msg = f"The volume to write has shape {np.shape(data)}, but the canonical shape of {like} is {shape}."
        raise ValueError(msg)
    grid = nibabel.load(like)
    from_canonical = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"),
        nibabel.orientations.io_orientation(grid.affine),
    )
    volume = nibabel.orientations.apply_orientation(np.asarray(data, dtype=np.float32), from_canonical)
    image = nibabel.Nifti1Image(volume, grid.affine)
    image.set_sform(*grid.get_sform(coded=True))
    image.set_qform(*grid.get_qform(coded=True))
    image.header.set_xyzt_units(xyz=grid.header.get_xyzt_units()[0])
    with replacing(path) as partial:
        nibabel.save(image, partial)


def is_dicom(path: str | Path) -> bool:
    """Tell by its name, or by its preamble if the name tells nothing, whether a file is a DICOM file."""
    path = Path(path)
    return _has_suffix(path, _DICOM_SUFFIXES) or (not _has_suffix(path, IMAGE_SUFFIXES) and _has_preamble(path))


def is_volume(path: str | Path) -> bool:
    """Tell by its name whether a file is a NIfTI volume."""
    return _has_suffix(Path(path), _NIFTI_SUFFIXES)


def same_grid(first: str | Path, second: str | Path) -> bool:
    """Tell whether two NIfTI volumes have the same voxel grid once both are in the canonical orientation.

    Only the headers are read. Affines may differ by a tenth of a millimetre.

    Raises:
        FileNotFoundError: If a file does not exist.
        UnreadableImageError: If a file is no volume.
        ImportError: If nibabel is not installed.
    """
    (shape, affine), (other_shape, other_affine) = (_canonical_grid(Path(path)) for path in (first, second))
    return shape == other_shape and np.allclose(affine, other_affine, rtol=0, atol=0.1)


def _canonical_grid(path: Path) -> tuple[tuple[int, ...], NDArray[np.float64]]:
    """Return the shape ``(X, Y, Z)`` and the affine that :func:`read_volume` would give."""
    nibabel = _optional("nibabel")
    _file_kind(path)
    with _unreadable(path, "truncated or damaged NIfTI file, or one without an orientation"):
        image = nibabel.load(path)
        shape = (*image.shape[:3], *(1,) * (3 - len(image.shape)))
        orientation = nibabel.io_orientation(image.affine)
        affine = image.affine @ nibabel.orientations.inv_ornt_aff(orientation, shape)
        return tuple(shape[axis] for axis in np.argsort(orientation[:, 0])), affine


def patient_key(path: str | Path, salt: bytes) -> str | None:
    """Tell the patients of DICOM files apart without keeping their identifiers.

    Args:
        path: A DICOM file.
        salt: Random bytes, the same for all files that are compared. The key is a hash under it: it cannot be led back
            to the PatientID without the salt, and means nothing in another run.

    Returns:
        The key, or ``None`` for a file without PatientID.

    Raises:
        FileNotFoundError: If there is no such file.
        UnreadableImageError: If it is no DICOM file.
        ImportError: If pydicom is not installed.
    """
    path = Path(path)
    pydicom = _optional("pydicom")
    if _file_kind(path) != "dicom":
        raise UnreadableImageError(path, "not a DICOM file, so it has no PatientID")
    with _unreadable(path, "damaged DICOM header"):
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"])
        patient = str(header.get("PatientID") or "").strip()
    return hashlib.blake2b(patient.encode(), key=salt, digest_size=16).hexdigest() if patient else None


# Files


def _optional(module: str) -> Any:  # noqa: ANN401
    """Import a module of the optional extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        msg = f"Reading this file needs {module.partition('.')[0]}: {_INSTALL}"
        raise ImportError(msg) from error


@contextmanager
def _unreadable(path: Path, reason: str) -> Iterator[None]:
    """Turn a library's failures into our error, and mute its warnings and log records: they may quote header values."""
    logger = logging.getLogger("pydicom")
    level = logger.level
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
        logger.setLevel(level)


def _has_suffix(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(suffixes)


def _stamp(path: Path) -> tuple[int, int]:
    """Return what changes when a file is rewritten; keys the caches."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(132)


def _has_preamble(path: Path) -> bool:
    try:
        return _head(path)[128:] == b"DICM"
    except OSError:
        return False


def _file_kind(path: Path) -> FileKind:
    """Open a file once, so that what bars it is told the same way for every format, and tell its format."""
    try:
        head = _head(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnreadableImageError(path, (error.strerror or "cannot be opened").lower()) from None
    if not head:
        raise UnreadableImageError(path, "the file is empty")
    if _has_suffix(path, _NIFTI_SUFFIXES):
        return "nifti"
    return "dicom" if _has_suffix(path, _DICOM_SUFFIXES) or head[128:] == b"DICM" else "raster"


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder that are not hidden, entering every folder once."""

    def refuse(error: OSError) -> NoReturn:
        raise UnreadableImageError(error.filename, (error.strerror or "cannot be listed").lower()) from None

    seen = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        entered = []
        for name in sorted(folders, key=lambda name: (Path(parent, name).is_symlink(), name)):
            real = os.path.realpath(Path(parent, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                entered.append(name)
        folders[:] = entered
        yield from (Path(parent, name) for name in files if not name.startswith(".") and Path(parent, name).is_file())


def _frames(path: Path, header: "_Header", axis: int, slices: tuple[int, int] | None) -> Sequence[int | None]:
    """Return the indices of the images in a file, or ``[None]`` for a file that is one image or unreadable."""
    chosen = slice(*(slices or (None, None)))
    if _has_suffix(path, _NIFTI_SUFFIXES):
        try:
            _file_kind(path)
            filled = _filled_slices(path, _stamp(path), axis)
        except UnreadableImageError:
            return [None]
        return [index for index in range(len(filled))[chosen] if filled[index]] if filled.any() else [None]
    return range(header.frames)[chosen] if header.frames > 1 else [None]


def _frame_index(ref: ImageRef, count: int) -> int:
    if ref.frame is None and count > 1:
        msg = f"{ref.path} holds {count} images: choose one with ImageRef(path, frame), or list them with list_images."
        raise ValueError(msg)
    index = ref.frame or 0
    if not 0 <= index < count:
        msg = f"{ref.path} holds {count} images, numbered from 0; there is no number {index}."
        raise ValueError(msg)
    return index


# Intensities


def _limits(values: _Pixels, rule: IntensityRule) -> tuple[float, float]:
    """Return the values that become 0 and 1."""
    if rule.kind == "window":
        centre, width = rule.values
        return centre - width / 2, centre + width / 2
    low, high = np.percentile(values, rule.values or _PERCENTILES)
    return (float(low), float(high)) if low < high else (float(values.min()), float(values.max()))


def _scale(values: _Pixels, low: float, high: float) -> _Pixels:
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros(values.shape)


def _finite(values: _Pixels, path: Path) -> _Pixels:
    """Set NaN and infinite values to the smallest finite one."""
    finite = np.isfinite(values)
    if finite.all():
        return values
    if not finite.any():
        raise UnreadableImageError(path, "holds no finite value")
    return np.where(finite, values, values[finite].min())


def _refuse_dicom_rule(rule: IntensityRule, path: Path) -> None:
    if rule.kind == "dicom":
        reason = 'has no VOI LUT or window of its own; choose another intensity rule, for example "auto"'
        raise UnreadableImageError(path, reason)


# Images read through Pillow


def _raster_pixels(ref: ImageRef) -> _Pixels:
    """Return uint8 colours ``(H, W, 3)``, or stored values ``(H, W, 1)`` of an image of more than 8 bits."""
    _frame_index(ref, 1)
    path = ref.path
    with _unreadable(path, "truncated, damaged or of an unsupported pixel format"):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=_PIL_FORMATS) as image:
                if image.mode in {"I", "F"} or image.mode.startswith("I;"):
                    return np.array(image)[..., None]
                if image.has_transparency_data:
                    black = Image.new("RGBA", image.size, "black")
                    return np.array(Image.alpha_composite(black, image.convert("RGBA")).convert("RGB"))
                return np.array(image.convert("RGB"))
        except UnidentifiedImageError:
            reason = f"not an image of a supported format ({', '.join(IMAGE_SUFFIXES)})"
            raise UnreadableImageError(path, reason) from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            reason = f"more pixels than PIL.Image.MAX_IMAGE_PIXELS ({Image.MAX_IMAGE_PIXELS}) allows"
            raise UnreadableImageError(path, reason) from None


def _raster_image(ref: ImageRef, rule: IntensityRule) -> _Pixels:
    _refuse_dicom_rule(rule, ref.path)
    pixels = _raster_pixels(ref)
    if pixels.dtype == np.uint8 and rule.kind in {"auto", "window"}:
        return pixels  # read_image divides it by 255
    values = _finite(pixels.astype(np.float64), ref.path)
    return _scale(values, *_limits(values, rule))


# DICOM


class _Header(NamedTuple):
    """What a listing needs of a DICOM header; the defaults stand for other files and unreadable headers."""

    is_image: bool = True
    series: str = ""
    frames: int = 1
    place: float = math.nan  # along the normal of the image plane, mm
    number: float = math.nan


def _dicom_header(path: Path) -> _Header:
    pydicom = _optional("pydicom")
    tags = [
        "ImageOrientationPatient",
        "ImagePositionPatient",
        "InstanceNumber",
        "NumberOfFrames",
        "Rows",
        "SeriesInstanceUID",
    ]
    place = number = math.nan
    try:
        with _unreadable(path, "header"):
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
            storage = header.file_meta.get("MediaStorageSOPClassUID")
            # an image object that lost its size is damaged, not another kind of object: it is listed and refused later
            is_image = "Rows" in header or (storage is not None and "Image" in storage.name)
            series, frames = str(header.get("SeriesInstanceUID", "")), _frame_count(header)
    except UnreadableImageError:
        return _Header()
    with suppress(UnreadableImageError), _unreadable(path, "InstanceNumber"):
        number = float(header.InstanceNumber)
    with suppress(UnreadableImageError), _unreadable(path, "geometry"):
        row, column = np.array(header.ImageOrientationPatient, dtype=float).reshape(2, 3)
        place = round(float(np.cross(row, column) @ np.array(header.ImagePositionPatient, dtype=float)), 3)
    return _Header(is_image, series, frames, place, number)


def _frame_count(header: "Dataset") -> int:
    return int(header.get("NumberOfFrames") or 1)


def _slice_order(group: list[tuple[Path, _Header]]) -> list[tuple[Path, _Header]]:
    """Sort the files of one series by geometry, InstanceNumber and path; what one file lacks does not count."""
    use_place = not any(math.isnan(header.place) for _, header in group)
    use_number = not any(math.isnan(header.number) for _, header in group)

    def order(item: tuple[Path, _Header]) -> tuple[float, float, Path]:
        path, header = item
        return header.place if use_place else 0, header.number if use_number else 0, path

    return sorted(group, key=order)


@lru_cache(maxsize=2)
def _load_dicom(path: Path, _stamp: tuple[int, int]) -> "Dataset":
    pydicom = _optional("pydicom")
    with _unreadable(path, "truncated or damaged DICOM file"):
        try:
            dataset: Dataset = pydicom.dcmread(path)
        except pydicom.errors.InvalidDicomError:
            raise UnreadableImageError(path, "not a DICOM file (it lacks the preamble DICM)") from None
    return dataset


def _dicom_frame(ref: ImageRef) -> tuple[_Pixels, "Dataset", int]:
    """Return the stored values ``(H, W, 1)``, or the colours ``(H, W, 3)``, of a frame, the dataset and the frame."""
    pixels = _optional("pydicom.pixels")
    path = ref.path
    dataset = _load_dicom(path, _stamp(path))
    with _unreadable(path, "truncated or damaged DICOM file"):
        if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise UnreadableImageError(path, "holds no pixel data")
        count = _frame_count(dataset)
    index = _frame_index(ref, count)
    reason = "truncated or damaged pixel data"
    with _unreadable(path, reason):
        syntax = dataset.file_meta.TransferSyntaxUID
        if syntax.is_compressed:
            reason = f"its compressed pixel data are damaged, or need another decoder: {_INSTALL}"
    with _unreadable(path, reason):
        try:
            available = pixels.get_decoder(syntax).is_available
        except NotImplementedError:  # pydicom's answer to a transfer syntax that it does not know
            available = False
        if not available:
            raise UnreadableImageError(path, f"no decoder for its compressed pixel data is installed: {_INSTALL}")
        frame = pixels.pixel_array(dataset, index=index)
        return frame.reshape((*frame.shape[:2], -1)), dataset, index


def _dicom_image(ref: ImageRef, rule: IntensityRule) -> _Pixels:
    stored, dataset, index = _dicom_frame(ref)
    pixels = _optional("pydicom.pixels")
    with _unreadable(ref.path, "damaged or contradictory image attributes in the DICOM header"):
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            stored = pixels.apply_color_lut(stored[..., 0], dataset)[..., :3]
            full_scale = float(np.iinfo(stored.dtype).max)
        else:
            full_scale = 2.0 ** int(dataset.get("BitsStored", 8)) - 1
        if stored.shape[-1] > 1:
            _refuse_dicom_rule(rule, ref.path)
            limits = (0.0, full_scale) if rule.kind in {"auto", "window"} else _limits(stored, rule)
            return _scale(stored.astype(np.float64), *limits)

        modality = _functional_group(dataset, index, "PixelValueTransformationSequence")
        values = _finite(pixels.apply_modality_lut(stored, modality).astype(np.float64), ref.path)
        shown = ~_padding(stored, dataset)
        image = None
        if rule.kind in {"auto", "dicom"}:
            little_endian = bool(dataset.original_encoding[1])
            image = _own_voi(values, _functional_group(dataset, index, "FrameVOILUTSequence"), little_endian)
        if image is None:
            _refuse_dicom_rule(rule, ref.path)
            image = _scale(values, *_limits(values[shown] if shown.any() else values, rule))
        if dataset.PhotometricInterpretation == "MONOCHROME1":
            image = 1 - image
        return np.where(shown, image, 0)


def _functional_group(dataset: "Dataset", index: int, name: str) -> "Dataset":
    """Return where a frame's attributes stand: in the functional groups of an enhanced object, else at the top."""
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    for group in (*per_frame[index : index + 1], *shared[:1]):
        if group.get(name):
            item: Dataset = group.get(name)[0]
            return item
    return dataset


def _padding(stored: _Pixels, dataset: "Dataset") -> _Pixels:
    """Return where the stored values are padding, not image (DICOM PS3.3, C.7.5.1.1.2)."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, dtype=bool)
    limit = dataset.get("PixelPaddingRangeLimit", value)
    padding: _Pixels = (stored >= min(value, limit)) & (stored <= max(value, limit))
    return padding


def _own_voi(values: _Pixels, group: "Dataset", little_endian: bool) -> _Pixels | None:
    """Apply the VOI LUT or the first window of a header (DICOM PS3.3, C.11.2), or return ``None`` if it has none.

    A LINEAR window no wider than 1, which the standard does not define in full, is taken as LINEAR_EXACT.
    """
    if group.get("VOILUTSequence"):
        item = group.VOILUTSequence[0]
        entries, first, bits = item.LUTDescriptor
        lut = item.LUTData
        if isinstance(lut, bytes):
            wide = len(lut) >= 2 * (entries or 2**16)
            lut = np.frombuffer(lut, dtype=("<u2" if little_endian else ">u2") if wide else "u1")
        lut = np.array(lut, dtype=np.float64, ndmin=1)[: entries or 2**16]
        return _scale(lut[np.clip(values - first, 0, len(lut) - 1).astype(np.intp)], 0, 2**bits - 1)

    centre, width = (np.ravel(group.get(name, None)) for name in ("WindowCenter", "WindowWidth"))
    if centre[0] is None or width[0] is None or float(width[0]) <= 0:
        return None
    c, w = float(centre[0]), float(width[0])
    function = group.get("VOILUTFunction") or "LINEAR"
    if function == "SIGMOID":
        curve: _Pixels = 1 / (1 + np.exp(np.clip(-4 * (values - c) / w, -100, 100)))
        return curve
    if function == "LINEAR" and w > 1:
        c, w = c - 0.5, w - 1
    return _scale(values, c - w / 2, c + w / 2)


# NIfTI


@lru_cache(maxsize=2)
def _load_volume(path: Path, _stamp: tuple[int, int]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    nibabel = _optional("nibabel")
    with _unreadable(path, "truncated or damaged NIfTI file, or one without an orientation"):
        try:
            image = nibabel.load(path)
        except nibabel.filebasedimages.ImageFileError:
            raise UnreadableImageError(path, "not a NIfTI file") from None
        if image.get_data_dtype().kind not in "iuf":
            raise UnreadableImageError(path, "its voxels are not single real numbers")
        if image.shape[3:]:
            first = (..., *(0 for _ in image.shape[3:]))
            image = image.slicer[first]
        data = image.get_fdata(dtype=np.float32)
        data = data.reshape((*data.shape, *(1,) * (3 - data.ndim)))
        canonical = nibabel.as_closest_canonical(nibabel.Nifti1Image(data, image.affine))
        data = _finite(np.asarray(canonical.dataobj), path)
        data.flags.writeable = False
        return data, canonical.affine


@lru_cache(maxsize=8)
def _volume_limits(path: Path, stamp: tuple[int, int], rule: IntensityRule) -> tuple[float, float]:
    return _limits(_load_volume(path, stamp)[0], rule)


@lru_cache(maxsize=2)
def _filled_slices(path: Path, stamp: tuple[int, int], axis: int) -> _Pixels:
    """Tell which slices hold something."""
    data = _load_volume(path, stamp)[0]
    others = tuple(other for other in range(3) if other != axis)
    low, high = data.min(axis=others), data.max(axis=others)
    floor = float(low.min())
    foreground = _volume_limits(path, stamp, IntensityRule("percentile"))[1]
    filled: _Pixels = (high > low) & (high > floor + _EMPTY_FRACTION * (foreground - floor))
    return filled


def _nifti_slice(ref: ImageRef) -> _Pixels:
    """Return one slice ``(H, W, 1)`` as displayed."""
    data = _load_volume(ref.path, _stamp(ref.path))[0]
    count = data.shape[ref.axis]
    if ref.frame is None and count > 1 and not _filled_slices(ref.path, _stamp(ref.path), ref.axis).any():
        raise UnreadableImageError(ref.path, "all its slices are empty")
    return volume_slice(data, _frame_index(ref, count), ref.axis)[..., None]


def _nifti_image(ref: ImageRef, rule: IntensityRule) -> _Pixels:
    _refuse_dicom_rule(rule, ref.path)
    limits = _volume_limits(ref.path, _stamp(ref.path), rule)
    return _scale(_nifti_slice(ref).astype(np.float64), *limits)
