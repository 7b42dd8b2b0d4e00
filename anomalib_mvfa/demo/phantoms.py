# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Generated medical images: six modalities, five kinds of lesion, exact masks.

A phantom is drawn in three steps, each with random numbers of its own: the anatomy (a noise-free scene), the lesion
(which changes the scene inside its mask), and the acquisition (blur, noise, bias, artefacts). The same generator
state with and without a lesion therefore shows the same patient twice, and the two images differ only at the lesion.

A set has one scanner, as a clinic's images do, unless it is asked to be mixed.

Example:
    >>> import numpy as np
    >>> phantom = draw_phantom("brain_mri", lesion="ring", rng=np.random.default_rng(0))
    >>> phantom.image.shape, phantom.image.dtype, phantom.mask.shape
    ((112, 112, 3), dtype('uint8'), (112, 112))

From a shell, a data set in the layout of BMAD::

    python -m anomalib_mvfa.demo.phantoms --root phantoms --modalities '[brain_mri, liver_ct]'
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from jsonargparse import auto_cli
from PIL import Image
from rich.progress import track

from .anatomy import brain_mri, breast_ultrasound, chest_xray, histology, liver_ct, retinal_oct
from .drawing import Field, Mask, Scanner, Scene, as_field, blur, bump, grid, mix, noise, step

__all__ = ["LESIONS", "MODALITIES", "SET_NAMES", "TYPICAL", "Phantom", "draw_phantom", "write_phantoms"]

_DRAW = {draw.__name__: draw for draw in (brain_mri, chest_xray, liver_ct, retinal_oct, histology, breast_ultrasound)}
MODALITIES = tuple(_DRAW)
LESIONS: tuple[str, ...] = ("bright", "dark", "ring", "texture", "displaced")
TYPICAL: dict[str, str] = dict(zip(MODALITIES, ("bright", "bright", "dark", "dark", "dark", "dark"), strict=True))
"""The lesion of each set from one scanner: tumour on FLAIR, opacity, metastasis, fluid, dense nuclei, mass."""
CONTRASTS = {"one scanner": (0.25, 0.5), "mixed": (0.13, 0.4)}

SET_NAMES = dict(
    zip(MODALITIES, ("BrainMRI", "ChestXray", "LiverCT", "RetinalOCT", "Histology", "BreastUltrasound"), strict=True),
)
DEFAULT_COUNTS = {"train": 32, "valid": 16, "test": 40}
SPLITS = tuple(DEFAULT_COUNTS)
Outline = tuple[Field, float, tuple[float, float]]  # of a lesion: 0 at its centre, 1 on the outline; half-width; centre


@dataclass(frozen=True)
class Phantom:
    """A generated image and everything that is known about it."""

    image: npt.NDArray[np.uint8]  # (H, W, 3), RGB
    mask: Mask  # (H, W), true where the lesion visibly changes the tissue; all false in a normal image
    modality: str
    variant: str  # how the image was made, for captions: "T2-weighted", "portal venous phase"
    lesion: str | None = None  # one of `LESIONS`, None in a normal image


def _outline(rng: np.random.Generator, scene: Scene, kind: str) -> Outline:
    """Choose place, size and shape so that the lesion fits into the organ."""
    size = scene.organ.shape[0]
    x, y = grid(size)
    displaced = kind == "displaced"
    room = scene.spread if displaced and scene.spread is not None else scene.organ
    clearance = cv2.distanceTransform(room.astype(np.uint8), cv2.DIST_L2, 3) * (2 / size)
    free = np.where(scene.seat, clearance, 0)
    low, high = (0.2, 0.4) if displaced else (0.09, 0.32)
    radius = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    radius = min(radius, 0.85 * float(free.max()))
    roughness = rng.uniform(0.01, 0.2)
    seats = np.flatnonzero(free >= radius * min(1 + 1.5 * roughness, 1.17))
    picks = rng.choice(seats, 3)
    pick = picks[0]
    if displaced:  # a displacement shows where there is something to displace
        tissue = scene.channels[0]
        window = (max(3, round(radius * size / 2)),) * 2
        spread = cv2.boxFilter(tissue * tissue, -1, window) - np.square(cv2.boxFilter(tissue, -1, window))
        pick = picks[int(np.argmax(spread.ravel()[picks]))]
    centre = (float(x.ravel()[pick]), float(y.ravel()[pick]))
    dx, dy = (x - centre[0]) / scene.stretch, y - centre[1]
    turn, aspect = rng.uniform(0, np.pi), rng.uniform(1, 1.6)
    cos, sin = float(np.cos(turn)), float(np.sin(turn))
    reach = np.hypot(cos * dx + sin * dy, (cos * dy - sin * dx) * aspect) / radius
    rough = np.clip(noise(rng, size, min(2.5 / radius, size / 3)), -1.5, 1.5)
    return as_field(reach + roughness * rough), radius, centre


def _displace(rng: np.random.Generator, scene: Scene, outline: Outline) -> tuple[list[Field], Mask]:
    """Push the tissue away from the lesion's centre, or shift it sideways."""
    size = scene.organ.shape[0]
    x, y = grid(size)
    outer, radius, centre = outline
    reach = np.clip(outer, 1e-3, 1)
    dx, dy = x - centre[0], y - centre[1]
    core, factor, slide = np.zeros_like(x), np.ones_like(x), np.zeros_like(x)
    if rng.uniform() < 0.7:
        hollow = rng.uniform(0.35, 0.55)
        factor = np.maximum(reach - hollow, 0) / (1 - hollow) / reach
        core = step(hollow - reach, 0.15)
    else:
        slide = np.square(1 - np.square(reach)) * (rng.uniform(0.35, 0.55) * radius)
    turn = rng.uniform(0, 2 * np.pi)
    source_x = centre[0] + factor * dx + float(np.cos(turn)) * slide
    source_y = centre[1] + factor * dy + float(np.sin(turn)) * slide
    shift = np.hypot(source_x - x, source_y - y)
    moved = (outer < 1) & ((shift > 0.02) | (core > 0.5))
    columns, rows = as_field((source_x + 1) * (size / 2) - 0.5), as_field((source_y + 1) * (size / 2) - 0.5)
    channels = []
    change = np.zeros_like(x)
    tint = rng.choice((-1, 1)) * rng.uniform(0.05, 0.12)
    for channel, tone in zip(scene.channels, scene.tone, strict=True):
        warped = as_field(cv2.remap(channel, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT))
        level = float(np.mean(channel[moved & scene.organ])) + tone * tint
        warped = mix(warped, level, core)
        warped = as_field(np.where(outer < 1, warped, channel))
        change = change + np.abs(warped - channel)
        channels.append(warped)
    visible = moved & (blur(as_field(change), 0.02 * size) > 0.02)
    return channels, visible if visible.mean() > 0.003 else moved


def _grow(
    rng: np.random.Generator, scene: Scene, outline: Outline, kind: str, contrasts: tuple[float, float]
) -> tuple[list[Field], Mask]:
    """Replace the tissue inside the outline by lesion; the mask ends where half of it is replaced."""
    size = scene.organ.shape[0]
    reach, radius, _ = outline
    cover = step(1 - reach, rng.uniform(0.6, 0.9) if kind != "ring" and rng.uniform() < 0.3 else rng.uniform(0.1, 0.4))
    cover = cover * scene.organ
    mask = cover > 0.5
    contrast = float(np.exp(rng.uniform(*np.log(contrasts))))
    sign = {"bright": 1.0, "dark": -1.0}.get(kind, float(rng.choice((-1.0, 1.0))))
    fine = noise(rng, size, rng.uniform(14, 40))
    coarse = noise(rng, size, rng.uniform(0.8, 2.0) / radius * 2)
    mottle = rng.uniform(0, 0.3) * coarse
    rim = bump(reach - rng.uniform(0.74, 0.84), rng.uniform(0.10, 0.16))
    keep = rng.uniform(*scene.keep)
    pattern = rng.integers(3)
    channels = []
    for channel, tone in zip(scene.channels, scene.tone, strict=True):
        level = float(np.mean(channel[mask]))
        change = tone * sign * contrast
        if change < 0:
            change = max(change, -0.75 * level)
        if kind in {"bright", "dark"}:
            inner = level + change * (1 + mottle)
        elif kind == "ring":
            inner = level + change * (1.3 * rim - 0.5)
        else:
            texture = (fine, coarse, 2 * bump(fine, 0.2) - 1)[pattern]
            inner = level + tone * contrast * 0.7 * texture
        lesion = np.maximum(inner + keep * (channel - level), 0)
        channels.append(as_field(mix(channel, lesion, cover)))
    return channels, mask


def _check_names(names: Iterable[str | None], known: Sequence[str | None]) -> None:
    for name in names:
        if name not in known:
            msg = f"Unknown name {name!r}: choose among {', '.join(map(str, known))}."
            raise ValueError(msg)


def draw_phantom(
    modality: str,
    size: int = 112,
    lesion: str | None = None,
    rng: np.random.Generator | None = None,
    scanner: int | None = None,
) -> Phantom:
    """Draw one image.

    Args:
        modality: One of `MODALITIES`.
        size: Width and height in pixels, at least 32.
        lesion: None for a normal image, one of `LESIONS`, or ``"random"``.
        rng: Source of all randomness; equal states give equal images, and the same anatomy and noise whatever the
            lesion. None takes a fresh one.
        scanner: Seed of the scanner, whose images share contrast, field of view, noise and resolution and show lesions
            of clear contrast. None draws another protocol for each image and fainter lesions, which is the hard case.

    Raises:
        ValueError: If the modality, the lesion or the size is not one of the above.
    """
    _check_names((modality,), MODALITIES)
    _check_names((lesion,), (None, "random", *LESIONS))
    if size < 32:
        msg = f"Phantoms of {size} pixels show nothing: choose a size of 32 or more."
        raise ValueError(msg)
    rng = np.random.default_rng() if rng is None else rng
    anatomy, disease, acquisition = (np.random.default_rng(int(s)) for s in rng.integers(2**62, size=3))
    scene = _DRAW[modality](anatomy, size, Scanner(anatomy, scanner))
    channels: Sequence[Field] = scene.channels
    mask: npt.NDArray[np.bool_] = np.zeros((size, size), dtype=np.bool_)
    if lesion is not None:
        if lesion == "random":
            lesion = LESIONS[disease.integers(len(LESIONS))]
        outline = _outline(disease, scene, lesion)
        if lesion == "displaced":
            channels, mask = _displace(disease, scene, outline)
        else:
            contrasts = CONTRASTS["mixed" if scanner is None else "one scanner"]
            channels, mask = _grow(disease, scene, outline, lesion, contrasts)
    image = np.clip(scene.acquire(channels, acquisition) * 255 + 0.5, 0, 255).astype(np.uint8)
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    return Phantom(image, mask, modality, scene.variant, lesion)


def write_phantoms(
    root: str | Path,
    modalities: Sequence[str] = MODALITIES,
    counts: Mapping[str, int] | None = None,
    size: int = 112,
    seed: int = 0,
    mixed: bool = False,
) -> Path:
    """Write data sets in the layout of BMAD, one folder a modality (``BrainMRI``, ``ChestXray``, ...).

    Normal images go to ``train/good``, ``valid/good/img`` and ``test/good/img``, abnormal ones to ``valid/Ungood/img``
    and ``test/Ungood/img`` with masks (0 and 255) of the same name in ``label``. An image depends on the seed, its
    modality, split, class and number alone, not on how many are written.

    Args:
        root: Folder that receives the sets, which is returned; existing images of the same name are overwritten.
        modalities: Some of `MODALITIES`.
        counts: Images of each class in ``train``, ``valid`` and ``test``; a missing split gets 32, 16 or 40.
        size: Width and height in pixels.
        seed: Not negative.
        mixed: Whether each image has another protocol and fainter lesions of all kinds in turn, which is much harder,
            instead of one scanner a set with the lesion that is typical of the modality.

    Raises:
        ValueError: If a modality or a split is unknown.
    """
    counts = {**DEFAULT_COUNTS, **(counts or {})}
    _check_names(modalities, MODALITIES)
    _check_names(counts, SPLITS)
    jobs = [
        (modality, split, abnormal, index)
        for modality in modalities
        for split in SPLITS
        for abnormal in ((False,) if split == "train" else (False, True))
        for index in range(counts[split])
    ]
    root = Path(root)
    for modality, split, abnormal, index in track(jobs, "Generating images", disable=not sys.stdout.isatty()):
        key = (seed, MODALITIES.index(modality), SPLITS.index(split), int(abnormal), index)
        kinds = LESIONS if mixed else (TYPICAL[modality],)
        lesion = kinds[index % len(kinds)] if abnormal else None
        phantom = draw_phantom(modality, size, lesion, np.random.default_rng(key), None if mixed else seed)
        folder = root / SET_NAMES[modality] / split / ("Ungood" if abnormal else "good")
        name = f"{index:04d}.png"
        _save(phantom.image, folder / name if split == "train" else folder / "img" / name)
        if abnormal:
            _save(phantom.mask.astype(np.uint8) * 255, folder / "label" / name)
    return root


def _save(image: npt.NDArray[np.uint8], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, compress_level=1)


if __name__ == "__main__":
    auto_cli(write_phantoms, as_positional=False)
