# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Procedural medical images: six modalities, five kinds of lesion, exact masks.

A phantom is drawn in three steps, each with random numbers of its own: the anatomy (a noise-free scene), the lesion
(which changes the scene inside its mask), and the acquisition (blur, noise, bias, artefacts). The same generator
state with and without a lesion therefore shows the same patient twice, and the two images differ only at the lesion.

Coordinates run from -1 to 1 over the image, ``x`` to the right and ``y`` downwards; grey values from 0 to 1.

Example:
    >>> import numpy as np
    >>> phantom = draw_phantom("brain_mri", lesion="ring", rng=np.random.default_rng(0))
    >>> phantom.image.shape, phantom.image.dtype, phantom.mask.shape
    ((112, 112, 3), dtype('uint8'), (112, 112))

From a shell, a data set in the layout of BMAD::

    python -m anomalib_mvfa.demo.phantoms --root phantoms --modalities brain_mri liver_ct
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from rich.progress import track

__all__ = [
    "LESIONS",
    "MODALITIES",
    "Phantom",
    "contact_sheet",
    "describe_extent",
    "describe_place",
    "draw_phantom",
    "write_phantoms",
]

MODALITIES: tuple[str, ...] = ("brain_mri", "chest_xray", "liver_ct", "retinal_oct", "histology", "breast_ultrasound")
LESIONS: tuple[str, ...] = ("bright", "dark", "ring", "texture", "displaced")

Field = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]
Points = Sequence[tuple[float, float]]

SET_NAMES = dict(
    zip(MODALITIES, ("BrainMRI", "ChestXray", "LiverCT", "RetinalOCT", "Histology", "BreastUltrasound"), strict=True),
)
SPLITS = ("train", "valid", "test")
DEFAULT_COUNTS = {"train": 32, "valid": 16, "test": 40}


@dataclass(frozen=True)
class Phantom:
    """One procedural image and everything that is known about it.

    Args:
        image: ``(H, W, 3)`` RGB, 0 to 255.
        mask: ``(H, W)``, true where the lesion visibly changes the tissue; all false in a normal image.
        modality: One of `MODALITIES`.
        variant: How the image was made, for captions: ``"T2-weighted"``, ``"portal venous phase"``.
        lesion: One of `LESIONS`, None in a normal image.
        place: Where in the image the lesion lies (``"upper left"``, ``"centre"``), None in a normal image.
        extent: ``"small"``, ``"medium"`` or ``"large"``, None in a normal image.
    """

    image: npt.NDArray[np.uint8]
    mask: Mask
    modality: str
    variant: str
    lesion: str | None = None
    place: str | None = None
    extent: str | None = None


@dataclass(frozen=True)
class _Scene:
    """A noise-free anatomy.

    Args:
        channels: Fields ``(H, W)`` that a lesion changes: one grey channel, or the two stains of histology.
        organ: Where a lesion may spread.
        seat: Where its centre may lie.
        acquire: ``(channels, rng) -> image`` adds what the scanner does; ``(H, W)`` or ``(H, W, 3)``, 0 to 1.
        variant: Name for captions.
        tone: Sign and weight of "brighter" in each channel.
        spread: Where a displacement may reach; the organ when None.
        stretch: Width over height of a lesion (1 = none).
        keep: Range of the share of the tissue's own structure that shows inside a lesion.
    """

    channels: tuple[Field, ...]
    organ: Mask
    seat: Mask
    acquire: Callable[[Sequence[Field], np.random.Generator], Field]
    variant: str
    tone: tuple[float, ...] = (1.0,)
    spread: Mask | None = None
    stretch: float = 1.0
    keep: tuple[float, float] = (0.1, 0.5)


# Building blocks


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[Field, Field]:
    """Pixel centres as ``x`` and ``y``, each ``(size, size)`` in [-1, 1]."""
    axis = ((np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    x.flags.writeable = y.flags.writeable = False
    return x, y


def _noise(rng: np.random.Generator, size: int, rows: float, columns: float | None = None) -> Field:
    """Smooth noise ``(size, size)`` of about unit deviation with `rows` x `columns` control points."""
    shape = (min(max(2, round(rows)), size), min(max(2, round(columns or rows)), size))
    coarse = rng.standard_normal(shape, dtype=np.float32)
    return _float(cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)) * 1.25


def _grain(rng: np.random.Generator, size: int, blur: float = 0.0, blur_y: float | None = None) -> Field:
    """Pixel noise ``(size, size)`` of unit deviation, correlated over `blur` pixels."""
    noise = rng.standard_normal((size, size), dtype=np.float32)
    if blur <= 0:
        return noise
    noise = _blur(noise, blur, blur_y)
    return noise / float(noise.std())


def _float(array: object) -> Field:
    return np.asarray(array, dtype=np.float32)


def _blur(field: Field, sigma: float, sigma_y: float | None = None) -> Field:
    return _float(cv2.GaussianBlur(field, (0, 0), sigma, sigmaY=sigma if sigma_y is None else sigma_y))


def _step(distance: Field, width: float) -> Field:
    """0 to 1 across `distance` = 0, smooth over `width`."""
    t = np.clip(distance / width + 0.5, 0, 1)
    return _float(t * t * (3 - 2 * t))


def _bump(field: Field, width: float) -> Field:
    """1 where `field` is 0, falling off over `width`; smooth and of finite reach."""
    t = np.maximum(1 - np.square(field * (0.5 / width)), 0)
    return _float(t * t)


def _mix(base: Field, value: Field | float, weight: Field) -> Field:
    return base + (value - base) * weight


def _join(a: Field, b: Field, blend: float) -> Field:
    """Union of two shapes given by signed distances, the corner between them filled over `blend`."""
    t = np.clip(0.5 + (a - b) * (0.5 / blend), 0, 1)
    return b + (a - b) * t + blend * t * (1 - t)


def _ellipse(x: Field, y: Field, centre: tuple[float, float], radii: tuple[float, float], angle: float = 0.0) -> Field:
    """Approximate signed distance to an ellipse, positive inside."""
    dx, dy = x - centre[0], y - centre[1]
    if angle:
        cos, sin = float(np.cos(angle)), float(np.sin(angle))
        dx, dy = cos * dx + sin * dy, cos * dy - sin * dx
    return _float((1 - np.sqrt(np.square(dx / radii[0]) + np.square(dy / radii[1]))) * min(radii))


def _polyline(x: Field, y: Field, points: Points, radii: Sequence[float]) -> Field:
    """Signed distance to a thick polyline whose radius varies from point to point, positive inside."""
    best: Field | None = None
    for (ax, ay), (bx, by), ra, rb in zip(points, points[1:], radii, radii[1:], strict=False):
        ex, ey = bx - ax, by - ay
        dx, dy = x - ax, y - ay
        t = np.clip((dx * ex + dy * ey) * (1 / (ex * ex + ey * ey + 1e-9)), 0, 1)
        inside = (ra + (rb - ra) * t) - np.sqrt(np.square(dx - ex * t) + np.square(dy - ey * t))
        best = inside if best is None else np.maximum(best, inside)
    return _float(best)


def _posed(
    rng: np.random.Generator,
    size: int,
    scale: tuple[float, float],
    shift: float = 0.05,
    angle: float = 0.1,
    warp: float = 0.03,
) -> tuple[Field, Field]:
    """The grid seen in body coordinates: shifted, rotated, scaled and gently bent."""
    x, y = _grid(size)
    x, y = x - rng.uniform(-shift, shift), y - rng.uniform(-shift, shift)
    turn = rng.uniform(-angle, angle)
    factor = 1 / rng.uniform(*scale)
    cos, sin = float(np.cos(turn) * factor), float(np.sin(turn) * factor)
    bend_x, bend_y = _noise(rng, size, 4), _noise(rng, size, 4)
    return _float(cos * x + sin * y + warp * bend_x), _float(cos * y - sin * x + warp * bend_y)


def _polar_noise(
    rng: np.random.Generator,
    angle: Field,
    radius: Field,
    spokes: float,
    rings: float,
) -> Field:
    """Noise that runs in spokes: `spokes` control points a turn, `rings` a unit of `radius`."""
    columns = max(4, round(spokes))
    table = rng.standard_normal((max(3, round(rings)) + 2, columns), dtype=np.float32)
    table = np.concatenate([table[:, -2:], table, table[:, :3]], axis=1)
    column = angle * (columns / (2 * np.pi)) + (columns / 2 + 2)
    row = radius * rings + 1
    warped = cv2.remap(table, _float(column), _float(row), cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    return _float(warped) * 1.25


def _cells(rng: np.random.Generator, x: Field, y: Field, pitch: float, jitter: float = 0.8) -> tuple[Field, ...]:
    """Cellular noise: the scattered point nearest to each pixel.

    Args:
        rng: Generator.
        x: ``(H, W)``.
        y: ``(H, W)``.
        pitch: Mean distance of the points.
        jitter: 0 for a regular lattice, 1 for a loose one.

    Returns:
        Offset to the nearest point ``(dx, dy)`` in units of `pitch`, the gap to the second nearest, and two random
        numbers in [0, 1) of the nearest point, each ``(H, W)``.
    """
    count = int(np.ceil(3 / pitch)) + 4
    table = rng.random((4, count, count), dtype=np.float32)
    table[:2] = 0.5 + (table[:2] - 0.5) * jitter
    column, row = x / pitch + count / 2, y / pitch + count / 2
    i, j = np.clip(row.astype(np.intp), 1, count - 2), np.clip(column.astype(np.intp), 1, count - 2)
    flat = i * count + j
    u, v = column - j, row - i
    px, py = table[0].ravel(), table[1].ravel()
    best = np.full(x.shape, 9, dtype=np.float32)
    second = best.copy()
    nearest = flat
    for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
            index = flat + (di * count + dj)
            distance = np.square(px[index] + (dj - u)) + np.square(py[index] + (di - v))
            closer = distance < best
            second = np.minimum(second, np.where(closer, best, distance))
            nearest = np.where(closer, index, nearest)
            best = np.minimum(best, distance)
    dx = column - (nearest % count) - px[nearest]
    dy = row - (nearest // count) - py[nearest]
    gap = np.sqrt(second) - np.sqrt(best)
    return _float(dx), _float(dy), _float(gap), table[2].ravel()[nearest], table[3].ravel()[nearest]


def _exposure(rng: np.random.Generator, image: Field, bias: float, gain: tuple[float, float], gamma: float) -> Field:
    """Bias field, gain and gamma."""
    field = _noise(rng, image.shape[0], 3) * (bias * rng.uniform())
    image = np.maximum(image * (1 + field) * rng.uniform(*gain), 0)
    return _float(np.power(image, float(np.exp(rng.uniform(-gamma, gamma)))))


# Anatomy


def _brain_mri(rng: np.random.Generator, size: int) -> _Scene:
    """Axial head at one of four heights, in one of five weightings."""
    u = rng.uniform
    x, y = _posed(rng, size, (0.8, 1.12), shift=0.06, angle=0.14, warp=0.014)
    height = rng.choice(("vertex", "ventricle", "basal", "fossa"), p=(0.25, 0.32, 0.33, 0.10))
    # Values of fluid, grey matter, white matter, scalp, skull, marrow.
    weightings = {
        "T1-weighted": (0.10, 0.40, 0.60, 0.75, 0.06, 0.35),
        "contrast-enhanced T1-weighted": (0.08, 0.34, 0.44, 0.72, 0.05, 0.35),
        "T2-weighted": (0.88, 0.50, 0.32, 0.55, 0.05, 0.22),
        "FLAIR": (0.07, 0.46, 0.36, 0.55, 0.05, 0.20),
        "proton density": (0.62, 0.60, 0.47, 0.60, 0.06, 0.25),
    }
    variant = str(rng.choice(list(weightings), p=(0.25, 0.2, 0.27, 0.2, 0.08)))
    fluid, grey, white, scalp, skull, marrow = (v * u(0.88, 1.12) for v in weightings[variant])

    rho = np.sqrt(np.square(x / (u(0.70, 0.80) * (1 + u(-0.04, 0.12) * y))) + np.square(y / u(0.86, 0.95)))
    outer = 1 - u(0.03, 0.08)
    inner = outer - u(0.045, 0.075)
    depth = inner - u(0.005, 0.035) - rho
    midline = np.abs(x + u(-0.015, 0.015) * (1 - y * y))
    bridge = {"vertex": 0.0, "ventricle": 0.38, "basal": 0.42, "fossa": 0.36}[str(height)]
    medial = midline + 0.8 * np.maximum(bridge - np.abs(y + 0.03), 0) - u(0.004, 0.02)
    surface = np.minimum(depth, medial)

    # Folds run in spokes from the core of each hemisphere; the sides read the table in opposite directions.
    angle = np.arctan2(0.75 * y, np.abs(x) - u(0.22, 0.32)) + 0.14 * _noise(rng, size, 9)
    angle = np.where(x > 0, angle, -angle)
    folds = _polar_noise(rng, _float(angle), depth, u(26, 40), u(2.5, 5))
    folds = np.abs(folds + 0.35 * _noise(rng, size, u(16, 24)))
    ribbon = np.minimum(surface / u(0.045, 0.065), 1.3 * folds + u(3.5, 5.5) * np.maximum(surface - 0.04, 0))
    whiteness = _step(ribbon - 1, 0.7)
    sulci = _step(u(0.3, 0.6) - 1.3 * folds - u(1.8, 3.6) * np.maximum(surface, 0), 0.3)
    sulci = np.maximum(sulci, u(0.3, 0.9) * _step(-medial, 0.02))

    aside = x * u(0.9, 1.1) + np.abs(x) * u(-0.12, 0.12)
    side = np.abs(aside)
    swell = float(np.exp(u(-0.7, 0.7)))
    ventricles = np.full_like(x, -1)
    if height == "ventricle":
        r = 0.042 * swell
        path = ((0.13, -0.36), (0.07 + 0.3 * r, -0.18), (0.075 + 0.5 * r, 0.05), (0.17, 0.3), (0.21, 0.38))
        ventricles = _polyline(side, y, path, (0.5 * r, 1.1 * r, r, 1.3 * r, 0.4 * r))
    elif height == "basal":
        r = 0.04 * swell
        horn = _polyline(side, y, ((0.15, -0.36), (0.10, -0.26), (0.045, -0.10)), (0.6 * r, 1.2 * r, 0.4 * r))
        atrium = _polyline(side, y, ((0.22, 0.22), (0.29, 0.34), (0.27, 0.47)), (0.5 * r, 1.2 * r, 0.3 * r))
        third = _polyline(side, y, ((0.0, -0.04), (0.0, 0.16)), (0.5 * r, 0.35 * r))
        ventricles = np.maximum(np.maximum(horn, atrium), third)
        nuclei = np.maximum(
            _ellipse(side, y, (0.17 + 0.3 * r, -0.20), (0.055, 0.11), 0.5),
            np.maximum(
                _ellipse(side, y, (0.31, -0.05), (0.07, 0.19), -0.25),
                _ellipse(side, y, (0.13, 0.11), (0.105, 0.14), -0.5),
            ),
        )
        whiteness = whiteness * (1 - u(0.6, 0.95) * _step(nuclei, 0.04))
        path = ((0.68, -0.06), (0.55, -0.13), (0.47, -0.05), (0.46, 0.06), (0.50, 0.15))
        insula = _polyline(side, y, path, (0.02, 0.018, 0.02, 0.014, 0.004))
        whiteness = whiteness * (1 - _step(insula + 0.045, 0.05))
        sulci = np.maximum(sulci, _step(insula - u(-0.005, 0.01), 0.025))
    elif height == "fossa":
        tent = 0.12 + 0.35 * side
        below = _step(y - tent, 0.04)
        folia = np.sin((0.7 * rho - 0.4 * side) * u(70, 95) + 2.2 * _noise(rng, size, 8))
        core = _ellipse(side, y, (0.24, 0.40), (0.24, 0.16), 0.4)
        cerebellum = np.clip(0.3 * folia + 0.15 + 5 * core, 0, 1)
        whiteness = _mix(whiteness, cerebellum, below)
        sulci = _mix(sulci, u(0.2, 0.6) * _step(-folia - 0.6, 0.5) * _step(-core - 0.02, 0.1), below)
        sulci = np.maximum(sulci, 0.8 * _step(0.012 - np.abs(y - tent), 0.02))
        cistern = np.maximum(_ellipse(side, y, (0.0, 0.06), (0.21, 0.17)), _ellipse(side, y, (0, -0.1), (0.2, 0.09)))
        sylvian = _polyline(side, y, ((0.16, -0.12), (0.4, -0.18), (0.62, -0.1)), (0.035, 0.02, 0.02))
        peduncle = _ellipse(side, y, (0.09, 0.04), (0.10, 0.08), -0.6)
        stem = _join(_ellipse(side, y, (0.0, 0.16), (0.15, 0.12)), peduncle, 0.04)
        sulci = np.maximum(sulci, _step(np.maximum(cistern, sylvian), 0.03)) * (1 - _step(stem, 0.03))
        whiteness = _mix(whiteness, 0.75, _step(stem, 0.03))
        ventricles = _ellipse(side, y, (0.0, 0.28), (0.075 * swell**0.5, 0.045 * swell**0.5))

    tissue = grey + (white - grey) * whiteness + 0.012 * _noise(rng, size, 30)
    cap = u(0, 0.1) * (1 if variant in {"FLAIR", "T2-weighted"} else -0.5)
    tissue = tissue + cap * _bump(ventricles, 0.05)
    tissue = _mix(tissue, fluid, sulci)
    ventricle = _step(ventricles, 0.03)
    tissue = _mix(tissue, fluid, ventricle)
    if height in {"ventricle", "basal"}:
        plexus = _ellipse(side, y, (0.22 if height == "ventricle" else 0.27, 0.33), (0.025, 0.05), -0.3)
        bright = (0.7 if "contrast" in variant else grey) * u(0.8, 1.1)
        tissue = _mix(tissue, bright, 0.8 * ventricle * _step(plexus, 0.03))
    tissue = _mix(tissue, fluid, _step(-depth, 0.02))
    falx = _bump(midline, 0.006) * _step(medial - midline + 0.03, 0.05)
    tissue = tissue + falx * u(-0.15, 0.15)
    if "contrast" in variant or u() < 0.25:
        vein = u(0.15, 0.45)
        spots = _noise(rng, size, 40)
        tissue = tissue + vein * _step(spots - 2.1, 0.6) * _step(0.14 - np.abs(surface - 0.02), 0.05)
        sinus = _ellipse(x, y, (0, 0.95 * inner), (0.05, 0.04))
        sinus = np.maximum(sinus, _ellipse(x, y, (0, -0.9 * inner), (0.03, 0.03)))
        tissue = _mix(tissue, 0.75, _step(sinus, 0.03))
    bone = skull + (marrow - skull) * _bump(rho - 0.5 * (inner + outer), 0.25 * (outer - inner)) * u(0, 1)
    tissue = _mix(tissue, bone, _step(rho - inner, 0.025))
    skin = scalp * (1 + 0.12 * _noise(rng, size, 9))
    tissue = _mix(tissue, skin, _step(rho - outer, 0.025))
    tissue = _mix(tissue, u(0, 0.03), _step(rho - 1, 0.03))
    brain = depth > 0.03

    def acquire(channels: Sequence[Field], rng: np.random.Generator) -> Field:
        image = _exposure(rng, channels[0], 0.2, (0.75, 1.25), 0.2)
        if rng.uniform() < 0.15:
            strength = rng.uniform(0.03, 0.1)
            ghost = np.roll(image, round(size * rng.uniform(0.2, 0.5)), rng.integers(2))
            image = image + strength * ghost
        sigma = 0.008 * float(np.exp(rng.uniform(-0.5, 1.5)))
        blur = rng.uniform(0, 0.5)
        image = np.hypot(image + sigma * _grain(rng, size, blur), sigma * _grain(rng, size, blur))
        return _blur(_float(image), rng.uniform(0.3, 0.7) * size / 112)

    return _Scene((_float(tissue),), brain, brain & (ventricles < -0.02) & (depth > 0.08), acquire, variant)


def _chest_xray(rng: np.random.Generator, size: int) -> _Scene:
    """Frontal chest film."""
    u = rng.uniform
    x, y = _posed(rng, size, (0.93, 1.15), shift=0.06, angle=0.06, warp=0.025)
    side = np.abs(x)
    left = x > 0  # the patient's left lies on the right of the film
    top, width = u(-0.84, -0.7), u(0.74, 0.9)
    rise = np.clip((y - top) / (0.9 - top), 0, 1.5)
    wall = width * np.power(rise, u(0.30, 0.42)) * (1 - u(0.0, 0.12) * rise)
    dome = u(0.42, 0.62)
    floor = dome + u(1.0, 1.7) * np.square(side - u(0.3, 0.4)) + np.where(left, u(0.0, 0.08), 0)
    heart = _ellipse(x, y, (u(0.06, 0.14), dome - u(0.14, 0.22)), (u(0.28, 0.42), u(0.20, 0.28)), u(0.35, 0.75))
    knob = _ellipse(x, y, (u(0.09, 0.14), u(-0.32, -0.22)), (0.09, u(0.08, 0.12)))
    trunk = u(0.10, 0.15) + 0.03 * _noise(rng, size, 6) + 0.12 * np.maximum(y, 0) - side
    middle = _join(_join(heart, _float(trunk), 0.16), knob, 0.05)
    lung = np.minimum(np.minimum(wall - side, floor - y), np.minimum(-middle, (y - top) * 0.8))
    air = _step(lung, u(0.03, 0.06))

    shoulder = y - (-0.95 + 0.75 * np.square(np.maximum(side - 0.16, 0)) - u(0.0, 0.15) * (side < 0.2))
    flank = u(0.92, 1.1) + 0.06 * np.cos(3 * y) - side
    body = _step(np.minimum(shoulder, flank), 0.08)
    flesh = u(0.52, 0.66) + 0.05 * _noise(rng, size, 5)
    flesh = flesh + u(0.04, 0.16) * _step(middle, 0.08)
    flesh = flesh + u(0.1, 0.25) * _step(y - floor, 0.1) * _step(wall - side, 0.15)
    tissue = _mix(flesh, u(0.16, 0.28) + 0.06 * y + 0.02 * _noise(rng, size, 10), 0.95 * air)

    dx, dy = side - u(0.15, 0.2), y - u(-0.08, 0.04) + np.where(left, -0.04, 0)
    reach = np.hypot(dx, dy)
    spoke = np.arctan2(dy, dx) + 0.25 * _noise(rng, size, 7) + np.where(left, 0.0, 2.6)
    branches = np.abs(_polar_noise(rng, spoke, reach, u(22, 34), 5))
    hilum = _bump(reach, u(0.07, 0.11))
    vessels = _bump(branches, 0.16 + 0.1 * u()) * np.clip(1 - reach / u(0.5, 0.8), 0, 1)
    tissue = tissue + air * (u(0.12, 0.28) * vessels + u(0.1, 0.22) * hilum)
    tissue = tissue + air * u(0.01, 0.03) * _noise(rng, size, 28)

    pitch = u(0.135, 0.17)
    cage = _step(wall + 0.08 - side, 0.05) * _step(side - 0.08, 0.1) * _step(y - top + 0.02, 0.1) * _step(0.75 - y, 0.3)
    arch = np.power(side + 1e-4, 1.6)
    back = np.mod((y - u(0.25, 0.5) * arch) / pitch + u(), 1) - 0.5
    front = np.mod((y - u(0.5, 0.8) * (0.75 - side) - u(0.0, 0.1) * arch) / (pitch * 1.1) + u(), 1) - 0.5
    uneven = _noise(rng, size, 6)
    for ribs, gain, half in ((back, u(0.03, 0.11), 0.26), (front, u(0.01, 0.06), 0.28)):
        band = _step(half - np.abs(ribs), 0.2)
        edge = _bump(np.abs(ribs) - half, 0.06) * (0.5 + 0.5 * uneven)
        fade = (1 + 0.4 * uneven) * cage * (1 - 0.6 * _step(middle, 0.1))
        fade = fade * (1.0 if ribs is back else _step(side - 0.22, 0.2))
        tissue = tissue + gain * fade * (band + 0.5 * edge)
    spine = _step(0.075 - side, 0.05) * (0.6 + 0.4 * np.cos(y * 2 * np.pi / 0.15))
    tissue = tissue + u(0.0, 0.08) * spine
    windpipe = _polyline(x, y, ((u(-0.01, 0.02), -1.1), (0, -0.22)), (0.035, 0.035))
    bronchi = _polyline(side, y, ((0, -0.22), (0.12, -0.06)), (0.025, 0.015))
    tissue = tissue - u(0.05, 0.16) * _step(np.maximum(windpipe, bronchi), 0.05)
    tilt = u(-0.06, 0.1)
    clavicle = _polyline(side, y, ((0.07, top + 0.17), (0.3, top + 0.12), (0.66, top - tilt)), (0.04, 0.026, 0.03))
    tissue = tissue + u(0.08, 0.18) * _step(clavicle, 0.03) * body
    scapula = _polyline(side, y, ((0.62, top + 0.12), (width - u(0.0, 0.12), 0.0)), (0.03, 0.02))
    tissue = tissue + u(0, 0.08) * _step(scapula, 0.03)
    breast = _ellipse(side, y, (u(0.4, 0.5), u(0.3, 0.45)), (0.3, 0.25))
    tissue = tissue + u(0, 0.1) * (u() < 0.5) * _step(breast, 0.12)
    bubble = _ellipse(x, y, (u(0.3, 0.45), dome + u(0.2, 0.27)), (u(0.05, 0.13), u(0.04, 0.08)))
    tissue = tissue - u(0, 0.3) * _step(bubble, u(0.03, 0.1))
    tissue = _mix(_float(tissue), u(0.02, 0.12), 1 - body)
    if u() < 0.6:  # the side marker
        corner = (u(-0.9, -0.8), u(-0.85, -0.65))
        gx, gy = (g - c for g, c in zip(_grid(size), corner, strict=True))
        strokes = ((0, 0.12), (0, 0), (0.05, 0), (0.06, 0.03), (0.05, 0.06), (0.01, 0.06), (0.06, 0.12))
        tissue = _mix(tissue, u(0.8, 1), _step(_polyline(gx, gy, strokes, (0.012,) * len(strokes)), 0.015))
    if u() < 0.25:  # a lead or a line on the skin
        lead = x - u(-0.5, 0.5) - u(0.05, 0.3) * np.sin(y * u(1, 3.5) + u(0, 6.3))
        tissue = tissue + u(0.1, 0.35) * _bump(lead, 0.012) * _step(y - u(-1.2, 0), 0.02)
    field = (lung > 0.0) & (np.maximum(_grid(size)[0], _grid(size)[1]) < 0.97)

    def acquire(channels: Sequence[Field], rng: np.random.Generator) -> Field:
        image = _exposure(rng, channels[0], 0.12, (0.85, 1.2), 0.25)
        image = image + rng.uniform(0, 0.9) * (image - _blur(image, size / 25))
        image = image + 0.006 * float(np.exp(rng.uniform(-0.5, 1.0))) * _grain(rng, size, rng.uniform(0, 0.6))
        return _blur(_float(image), rng.uniform(0.25, 0.6) * size / 112)

    chest = (wall - side > 0.03) & (y > top + 0.05) & (y < floor + 0.15) & (_step(shoulder, 0.1) > 0.9)
    return _Scene((_float(tissue),), field, field & (lung > 0.05), acquire, "frontal view", spread=chest | field)


def _liver_ct(rng: np.random.Generator, size: int) -> _Scene:
    """Axial upper abdomen in a soft-tissue window, the liver on the left of the image."""
    u = rng.uniform
    x, y = _posed(rng, size, (0.92, 1.1), shift=0.04, angle=0.06, warp=0.03)
    phases = {
        # Liver, its vessels, spleen, blood, kidney.
        "unenhanced": (0.53, 0.46, 0.50, 0.46, 0.44),
        "arterial phase": (0.55, 0.60, 0.66, 0.92, 0.80),
        "portal venous phase": (0.62, 0.76, 0.68, 0.76, 0.78),
    }
    variant = str(rng.choice(list(phases), p=(0.25, 0.25, 0.5)))
    liver_value, vessel_value, spleen_value, blood, kidney_value = (v * u(0.92, 1.08) for v in phases[variant])
    fat, muscle = u(0.14, 0.24), u(0.44, 0.52)
    high = u() < 0.55

    a, b = u(0.84, 0.94), u(0.60, 0.72)
    rho = np.power(np.power(np.abs(x / a), 2.4) + np.power(np.abs(y / b) + 1e-6, 2.4), 1 / 2.4)
    layer = u(0.04, 0.16)
    inside = 1 - layer - 0.05 * _noise(rng, size, 4) * layer / 0.1 - rho
    cavity = inside - u(0.07, 0.11)
    tissue = np.where(rho < 1, fat, 0.0)
    tissue = _mix(tissue, 0.5, _bump(rho - 0.985, 0.012))
    tissue = _mix(tissue, muscle, _step(inside, 0.03))
    angle = np.arctan2(y, x)
    ribs = np.cos(angle * rng.integers(9, 14) + u(0, 6.3) + 0.5 * _noise(rng, size, 5))
    rib = _step(ribs - 0.35, 0.3) * _bump(cavity + u(0.035, 0.05), 0.018) * _step(y + 0.45, 0.2)
    tissue = _mix(tissue, u(0.85, 1), np.minimum(rib * 1.6, 1))
    loops = _noise(rng, size, 9)
    gut = muscle * _step(loops + 0.1, 0.5) + fat * (1 - _step(loops + 0.1, 0.5))
    tissue = _mix(tissue, _mix(_float(gut), fat, np.full_like(x, 0.3 if high else 0.0)), _step(cavity, 0.03))

    s = a / 0.9
    spine_y = 0.55 * b
    psoas = _ellipse(np.abs(x), y, (0.2, spine_y + 0.08), (0.11, 0.13), 0.4)
    tissue = _mix(tissue, muscle, _step(psoas, 0.04))
    if high:
        base = np.minimum(cavity, np.minimum(np.abs(x) - 0.14, y - u(0.12, 0.3)))
        tissue = _mix(tissue, 0.0, _step(base, 0.03))
    stomach = _ellipse(x, y, (u(0.32, 0.42) * s, u(-0.24, -0.1)), (u(0.16, 0.28), u(0.14, 0.22)), u(-0.6, 0.2))
    stomach = np.minimum(stomach, cavity - 0.01)
    content = np.where(y < u(-0.3, -0.15), 0.02, u(0.4, 0.9)) if u() < 0.6 else u(0.38, 0.5)
    tissue = _mix(tissue, muscle, _step(stomach + 0.02, 0.02))
    tissue = _mix(tissue, _float(content), _step(stomach - 0.02, 0.02))
    spleen = _ellipse(x, y, (u(0.60, 0.68) * s, u(0.08, 0.2)), (u(0.15, 0.2), u(0.22, 0.3)), 0.3)
    spleen = np.minimum(spleen, cavity - 0.02)
    spleen = np.minimum(spleen, -_ellipse(x, y, (0.4 * s, 0.1), (0.17, 0.22)))
    tissue = _mix(tissue, spleen_value, _step(spleen, 0.03))

    right = _ellipse(x, y, (-u(0.38, 0.46) * s, u(-0.06, 0.04)), (u(0.42, 0.5), u(0.38, 0.48)), u(-0.3, 0.3))
    lobe = _ellipse(x, y, (u(-0.08, 0.1), -u(0.2, 0.28)), (u(0.28, 0.45), u(0.14, 0.22)), u(-0.3, 0.1))
    liver = np.minimum(np.maximum(right, lobe), cavity - 0.015)
    liver = np.minimum(liver, -_ellipse(x, y, (0.0, spine_y - 0.12), (0.2, 0.26)))
    kidney = _ellipse(np.abs(x), y, (u(0.36, 0.42), spine_y - 0.05), (u(0.11, 0.14), u(0.14, 0.17)), 0.4)
    if not high:
        liver = np.minimum(liver, -kidney - 0.03)
    parenchyma = liver_value + 0.012 * _noise(rng, size, 24) + 0.02 * _noise(rng, size, 5)
    dx, dy = x + u(0.12, 0.24), y - u(-0.02, 0.1)
    reach = np.hypot(dx, dy)
    tree = np.abs(_polar_noise(rng, np.arctan2(dy, dx) + 0.3 * _noise(rng, size, 6), reach, u(12, 20), 4))
    veins = _bump(tree, u(0.08, 0.16)) * np.clip(1.25 - reach / u(0.45, 0.7), 0, 1) * u(0.4, 1)
    dots = _step(_noise(rng, size, 16) - u(1.7, 2.2), 0.5) * u(0.3, 1)
    parenchyma = _mix(parenchyma, vessel_value, np.minimum(veins + dots, 1))
    tissue = _mix(tissue, parenchyma, _step(liver, 0.025))
    if u() < 0.4:
        bladder = _ellipse(x, y, (-u(0.16, 0.26), u(0.0, 0.1)), (u(0.05, 0.08), u(0.08, 0.12)), u(-0.5, 0.5))
        tissue = _mix(tissue, u(0.36, 0.42), _step(bladder, 0.03))
        liver = np.minimum(liver, -bladder - 0.03)
    if not high:
        tissue = _mix(tissue, kidney_value, _step(kidney, 0.03))
        pelvis = _ellipse(np.abs(x), y, (0.33, spine_y - 0.05), (0.05, 0.07))
        tissue = _mix(tissue, kidney_value * u(0.6, 0.85), _step(pelvis, 0.04))
    aorta = ((u(0.02, 0.08), spine_y - 0.2), u(0.045, 0.07))
    vena_cava = ((-u(0.08, 0.14), spine_y - 0.22), u(0.05, 0.08))
    for centre, radius in (aorta, vena_cava):
        value = blood * u(0.94, 1.04)
        tissue = _mix(tissue, value, _step(_ellipse(x, y, centre, (radius, radius * u(0.8, 1))), 0.02))
    vertebra = _ellipse(x, y, (0, spine_y), (u(0.12, 0.15), u(0.10, 0.12)))
    path = ((0.1, spine_y + 0.08), (0.07, spine_y + 0.2), (0, spine_y + 0.26))
    arch = _polyline(np.abs(x), y, path, (0.035, 0.03, 0.03))
    spinous = _polyline(np.abs(x), y, ((0, spine_y + 0.24), (0, spine_y + 0.34)), (0.03, 0.02))
    process = _polyline(np.abs(x), y, ((0.1, spine_y + 0.12), (0.22, spine_y + 0.17)), (0.03, 0.02))
    bone = np.maximum(np.maximum(vertebra, arch), np.maximum(process, spinous))
    canal = _ellipse(x, y, (0, spine_y + 0.15), (0.06, 0.05))
    tissue = _mix(tissue, u(0.7, 0.85) + 0.2 * _bump(bone, 0.02) + 0.04 * _noise(rng, size, 40), _step(bone, 0.02))
    tissue = _mix(tissue, muscle, _step(canal, 0.03))
    organ = liver > 0.015
    if u() < 0.12:
        tissue = tissue * _step(liver, 0.02)
        variant += ", liver alone"
    elif u() < 0.6:
        table = _bump(y - (b + u(0.04, 0.08)) + 0.12 * np.square(x), 0.01)
        tissue = np.maximum(tissue, u(0.15, 0.5) * table)

    def acquire(channels: Sequence[Field], rng: np.random.Generator) -> Field:
        image = (channels[0] - 0.5) * rng.uniform(0.85, 1.35) + 0.5 + rng.uniform(-0.08, 0.1)
        image = image + 0.012 * float(np.exp(rng.uniform(-0.6, 1.1))) * _grain(rng, size, rng.uniform(0.3, 0.9))
        if rng.uniform() < 0.15:
            gx, gy = _grid(size)
            streak = np.sin((gx * np.cos(turn := rng.uniform(0, 3.1)) + gy * np.sin(turn)) * rng.uniform(40, 90))
            image = image + rng.uniform(0.004, 0.015) * streak * (channels[0] > 0.05)
        return _blur(_float(image) * _float(np.minimum(channels[0] * 12, 1)), rng.uniform(0.3, 0.6) * size / 112)

    return _Scene((_float(tissue),), organ, organ & (liver > 0.04), acquire, variant, spread=organ | (cavity > 0.02))


# The layers of the retina: place (0 at its inner, 1 at its outer surface) and brightness.
_RETINA = (
    (-0.01, 0.0),
    *((0.0, 0.8), (0.1, 0.8)),  # nerve fibres
    *((0.13, 0.5), (0.2, 0.48)),  # ganglion cells
    *((0.24, 0.58), (0.34, 0.56)),  # inner plexiform
    *((0.37, 0.34), (0.46, 0.33)),  # inner nuclear
    *((0.49, 0.6), (0.55, 0.58)),  # outer plexiform
    *((0.58, 0.27), (0.8, 0.25)),  # outer nuclear
    *((0.815, 0.45), (0.83, 0.3), (0.87, 0.35)),  # limiting membrane
    *((0.89, 0.85), (0.93, 0.8), (0.95, 0.55)),  # photoreceptors
    *((1.0, 0.95), (1.03, 0.5)),  # pigment epithelium
)


def _retinal_oct(rng: np.random.Generator, size: int) -> _Scene:
    """Macular B-scan: vitreous, layered retina with or without the fovea, choroid."""
    u = rng.uniform
    x, y = _grid(size)
    x = x * u(0.8, 1.1)
    thick = u(0.38, 0.6)
    floor = u(0.05, 0.45) + u(-0.2, 0.2) * x + u(-0.12, 0.18) * np.square(x) + 0.012 * _noise(rng, size, 2, 7)[:1]
    pit = np.exp(-np.square((x[:1] - u(-0.35, 0.35)) / u(0.16, 0.32))) * (u(0.35, 0.65) if u() < 0.8 else 0.0)
    shoulder = 0.12 * np.exp(-np.square((np.abs(x[:1]) - 0.5) / 0.3))
    height = thick * (1 + shoulder - pit)
    t = (y - floor + height) / height  # 0 at the inner limiting membrane, 1 at the pigment epithelium
    level = 1 - (1 - t) * (1 - 0.75 * pit)
    nerve = 0.05 + 0.09 * np.clip(0.5 + u(-1, 1) * x[:1], 0, 1)
    knots, values = np.array(_RETINA).T
    values = values * (1 + 0.1 * rng.standard_normal(values.size))
    values[0] = 0.0
    shifted = level + (0.1 - nerve) * np.clip(1 - level * 3, 0, 1) * (level > 0.02)
    table = np.interp(np.linspace(-0.2, 1.2, 561), knots, values, left=0.0).astype(np.float32)
    index = np.clip((shifted + 0.2) * 400, 0, 560).astype(np.intp)
    layers = table[index] * (1 + 0.06 * _noise(rng, size, 30, 12))
    vitreous = u(0.02, 0.10)
    below = y - floor
    caves = _step(_noise(rng, size, 18, 16) + _noise(rng, size, 9, 8) - u(-0.2, 0.8), 0.8)
    choroid = u(0.35, 0.6) * np.exp(-np.maximum(below, 0) / u(0.15, 0.45)) * (1 - u(0.3, 0.6) * caves)
    tissue = _mix(layers, choroid + 0.06, _step(below - 0.03, 0.03))
    tissue = _mix(tissue, vitreous, _step(-t, 0.05))
    if u() < 0.3:
        film = y - floor + height + u(0.04, 0.15) + u(-0.1, 0.1) * x
        tissue = tissue + u(0.15, 0.4) * _bump(film, 0.008) * (t < 0)
    shade = np.ones((1, size), dtype=np.float32)
    for _ in range(rng.integers(0, 6)):
        place, wide = u(-1, 1), u(0.012, 0.04)
        vessel = _bump(x[:1] - place, wide)
        shade = shade - u(0.15, 0.5) * vessel
        tissue = tissue + u(0.0, 0.3) * _bump(np.hypot(x - place, y - floor + 0.88 * height), wide)
    tissue = _mix(tissue, tissue * np.maximum(shade, 0.3), _step(t - 0.15, 0.2))
    tissue = tissue * (1 + 0.15 * _noise(rng, size, 2, 5)[:1])
    organ = (t > 0.06) & (below < 0.02)
    spread = (t > -0.5) & (below < 0.35)

    def acquire(channels: Sequence[Field], rng: np.random.Generator) -> Field:
        image = _exposure(rng, channels[0], 0.1, (0.75, 1.15), 0.15)
        speckle = _grain(rng, size, rng.uniform(0.45, 0.8), rng.uniform(0.3, 0.6))
        strength = rng.uniform(0.12, 0.34)
        image = image * (1 + strength * speckle) + rng.uniform(0.02, 0.07) * np.abs(_grain(rng, size, 0.4))
        image = _blur(_float(image), rng.uniform(0.2, 0.7) * size / 112)
        if rng.uniform() < 0.12:
            gx, gy = _grid(size)
            edge = rng.uniform(-0.15, 0.15) * gx + gy * (1 if rng.uniform() < 0.5 else -1)
            image = np.where(edge > rng.uniform(0.85, 0.95), 1, image)
        return _float(image)

    centre = organ & (t > 0.2) & (np.abs(_grid(size)[0]) < 0.85)
    return _Scene(
        (_float(tissue),),
        organ,
        centre,
        acquire,
        "macular B-scan",
        tone=(1.2,),
        spread=spread,
        stretch=u(1.2, 2.2),
    )


def _histology(rng: np.random.Generator, size: int) -> _Scene:
    """Haematoxylin and eosin: glands in stroma, lymphoid tissue, or fibrous tissue; fat here and there."""
    u = rng.uniform
    zoom = float(np.exp(u(-0.35, 0.35)))
    gx, gy = _grid(size)
    turn = u(0, 2 * np.pi)
    x = _float((np.cos(turn) * gx + np.sin(turn) * gy) + 0.03 * _noise(rng, size, 7))
    y = _float((np.cos(turn) * gy - np.sin(turn) * gx) + 0.03 * _noise(rng, size, 7))
    variant = str(rng.choice(("glandular tissue", "lymphoid tissue", "fibrous tissue"), p=(0.45, 0.3, 0.25)))
    # Nuclei: a dense lattice of points, thinned by a density that depends on the tissue.
    pitch = u(0.075, 0.095) * zoom * (0.85 if variant == "lymphoid tissue" else 1.0)
    dx, dy, _, chance, character = _cells(rng, x, y, pitch, 0.75)
    grain = _noise(rng, size, 14)
    eosin = u(0.45, 0.65) + 0.08 * grain + 0.06 * _noise(rng, size, 40)
    long, radius = 1.0, 0.36
    empty: Field = np.zeros_like(x)
    crowd: Field | float
    if variant == "glandular tissue":
        spacing = u(0.55, 0.95) * zoom
        gland_x, gland_y, gap, kind, _ = _cells(rng, x, y, spacing, 0.45)
        distance = np.hypot(gland_x * u(0.85, 1.25), gland_y) + 0.05 * _noise(rng, size, 8)
        gland = np.minimum(0.46 + 0.1 * (kind - 0.5) - distance, 0.5 * gap - 0.03) * spacing
        wall = _step(gland, 0.02)
        basal = _bump(gland - 0.45 * pitch, 0.4 * pitch)
        empty = _step(gland - (u(1.6, 2.6) + 1.2 * (kind - 0.5)) * pitch, 0.03)
        goblet = _step(_noise(rng, size, 26 / zoom) - u(-0.2, 0.9), 0.5) * _bump(gland - 1.5 * pitch, 0.6 * pitch)
        density = u(0.2, 0.45) * (1 - wall) + 1.2 * basal
        eosin = _mix(eosin, u(0.4, 0.6) + 0.04 * grain, wall)
        empty = np.maximum(empty, u(0.3, 0.8) * goblet)
        crowd = u(0.1, 0.25) * wall * (1 - goblet)
    elif variant == "lymphoid tissue":
        follicle = _step(_noise(rng, size, 4) - u(0.2, 1.0), 0.8)
        density = u(0.72, 0.95) - 0.25 * follicle
        eosin = eosin * u(0.6, 0.8)
        sinus = _bump(_noise(rng, size, 5), u(0.05, 0.2))
        density = density * (1 - 0.7 * sinus)
        empty = 0.5 * sinus * _step(grain - 0.3, 0.8)
        crowd = 0.12 + 0.08 * follicle
        radius = 0.42
    else:
        fibre = np.sin(y * u(38, 60) / zoom + 2.2 * _noise(rng, size, 5) + 1.2 * _noise(rng, size, 12))
        eosin = eosin + 0.14 * fibre + u(0, 0.12)
        density = u(0.2, 0.4) + np.zeros_like(x)
        empty = 0.7 * _step(-fibre - u(0.75, 0.95), 0.2) * _step(grain, 1.0)
        crowd = np.zeros_like(x)
        long, radius = u(2.0, 3.2), 0.36
        x_along = u(0.8, 1.0)
        dx, dy = dx * x_along / long, dy * long**0.5
    if u() < 0.35:
        _, _, membrane, _, _ = _cells(rng, x, y, u(0.25, 0.4) * zoom, 0.7)
        fat = _step(_noise(rng, size, 3) - u(0.9, 1.6), 0.12)
        eosin = _mix(eosin, 0.6, fat)
        density = density * (1 - fat) + 0.15 * fat * _bump(membrane, 0.1)
        empty = np.maximum(empty * (1 - fat), fat * _step(membrane - 0.12, 0.08))
        crowd = crowd * (1 - fat)
    if u() < 0.3:
        tear = _bump(_noise(rng, size, 3), u(0.02, 0.06))
        empty = np.maximum(empty, tear * _step(_noise(rng, size, 4) - 0.2, 0.3))
    body = radius * (0.75 + 0.5 * character) - np.hypot(dx * (1 + 0.5 * (chance - 0.5)), dy)
    present = _step(density - chance, 0.05)
    nuclei = present * _step(body, 0.16)
    chromatin = 1 + 0.22 * _noise(rng, size, 60)
    haematoxylin = 0.10 + 0.04 * grain + crowd + nuclei * (u(0.75, 1.0) + 0.5 * (character - 0.5)) * chromatin
    if u() < 0.3:
        cells = present * _bump(body + 0.15, 0.1) * (character > 0.93)
        eosin = eosin + 0.6 * cells
    channels = (_float(haematoxylin * (1 - empty)), _float(eosin * (1 - 0.97 * empty)))
    everywhere = (np.abs(gx) < 0.97) & (np.abs(gy) < 0.97)

    def acquire(channels: Sequence[Field], rng: np.random.Generator) -> Field:
        # Optical density of the two stains in red, green, blue.
        stains = np.array([[0.62, 0.72, 0.32], [0.10, 0.70, 0.28]], dtype=np.float32)
        stains = (stains * rng.uniform(0.85, 1.15, stains.shape)).astype(np.float32)
        strength = rng.uniform(0.75, 1.25, 2) * rng.uniform(1.1, 1.5)
        blur = rng.uniform(0.3, 0.8) * size / 112
        h, e = (_blur(np.maximum(c, 0), blur) * float(s) for c, s in zip(channels, strength, strict=True))
        light = rng.uniform(0.9, 1.0, 3).astype(np.float32)
        image = light * np.exp(-(h[..., None] * stains[0] + e[..., None] * stains[1]))
        image = image * (1 + 0.05 * rng.uniform() * _noise(rng, size, 2))[..., None]
        return _float(image + 0.012 * _grain(rng, size, 0.5)[..., None])

    seat = (np.abs(gx) < 0.8) & (np.abs(gy) < 0.8) & (_blur(_float(empty), 0.04 * size) < 0.3)
    return _Scene(channels, everywhere, seat, acquire, variant, tone=(-1.6, -0.5), keep=(0.35, 0.9))


def _breast_ultrasound(rng: np.random.Generator, size: int) -> _Scene:
    """B-mode breast: skin, fat lobules, glandular tissue, pectoral muscle, ribs."""
    u = rng.uniform
    x, y = _grid(size)
    convex = u() < 0.3
    fan: Field | float = 1.0
    if convex:
        far = u(1.2, 2.2)
        radius = np.hypot(x, y + 1 + far)
        fan = _step(u(0.85, 1.05) / (2 + far) - np.abs(np.arctan2(x, y + 1 + far)), 0.02)
        y = _float(radius - far - 1)
        fan = fan * _step(y + 0.97, 0.03) * _step(0.97 - y, 0.03)
    wave = 0.08 * _noise(rng, size, 2, 5)[:1] + u(-0.1, 0.1) * x[:1]
    bend = 0.05 * _noise(rng, size, 6)
    skin = -0.93 + u(0.02, 0.08)
    fat_end = u(-0.65, -0.2) + wave + bend
    gland_end = u(0.15, 0.5) + 0.6 * wave + 0.5 * bend
    lobes = np.abs(_noise(rng, size, u(7, 10), u(4, 6)) + 0.3 * _noise(rng, size, 16))
    fat = u(0.16, 0.32) + u(0.2, 0.4) * _bump(lobes, 0.12) + 0.03 * _noise(rng, size, 20)
    ducts = _noise(rng, size, u(14, 22), u(6, 10))
    patches = _noise(rng, size, 6)
    gland = u(0.48, 0.66) - u(0.08, 0.22) * _step(ducts - 0.6, 0.8) + u(0.03, 0.09) * patches
    gland = gland + u(0.0, 0.2) * _bump(np.abs(_noise(rng, size, 12, 7)), 0.08)
    stripes = np.sin(y * u(45, 70) + 1.5 * _noise(rng, size, 4))
    muscle = u(0.24, 0.36) + u(0.04, 0.1) * stripes + 0.04 * _noise(rng, size, 20, 6)
    tissue = _mix(fat, gland, _step(y - fat_end, 0.05))
    tissue = _mix(tissue, muscle, _step(y - gland_end, 0.04))
    tissue = tissue + u(0.1, 0.35) * _bump(y - gland_end, 0.02) * _step(_noise(rng, size, 3, 6) + 1, 1.0)
    tissue = _mix(tissue, u(0.7, 0.9), _step(skin - y, 0.03))
    wall = u(0.55, 0.85) + 0.5 * wave
    if u() < 0.6:
        tissue = _mix(tissue, 0.75, _bump(y - wall, 0.025) * u(0.5, 1))
        tissue = tissue * (1 - u(0.3, 0.7) * _step(y - wall - 0.04, 0.06))
        if u() < 0.6:
            rib = _bump(x - u(-0.8, 0.8), u(0.12, 0.25))
            tissue = tissue * (1 - 0.8 * np.minimum(rib * 2, 1) * _step(y - wall + 0.12, 0.05))
    for _ in range(rng.integers(0, 4)):
        tissue = tissue * (1 - u(0.1, 0.45) * _bump(x - u(-1, 1), u(0.04, 0.15)) * _step(y - u(-0.7, 0.2), 0.3))
    organ = (y > skin + 0.06) & (y < gland_end - 0.0) & (fan > 0.9) & (np.abs(_grid(size)[0]) < 0.95)
    depth_gain = np.exp(-(y + 1) * u(0.0, 0.35))
    tissue = np.maximum(tissue, 0.02) * depth_gain

    def acquire(channels: Sequence[Field], rng: np.random.Generator) -> Field:
        image = _exposure(rng, channels[0], 0.15, (0.75, 1.25), 0.2)
        lateral, axial = rng.uniform(0.7, 1.5) * size / 112, rng.uniform(0.4, 0.7) * size / 112
        envelope = np.hypot(_grain(rng, size, lateral, axial), _grain(rng, size, lateral, axial))
        envelope = np.power(envelope * 0.8, rng.uniform(0.35, 0.75))
        image = image * _float(envelope) * fan
        return _blur(_float(image), rng.uniform(0.2, 0.5) * size / 112)

    seat = organ & (y > fat_end - 0.1)
    variant = "convex probe" if convex else "linear probe"
    return _Scene((_float(tissue),), organ, seat, acquire, variant, tone=(1.4,), stretch=u(1.0, 1.5))


_ANATOMY: dict[str, Callable[[np.random.Generator, int], _Scene]] = {
    "brain_mri": _brain_mri,
    "chest_xray": _chest_xray,
    "liver_ct": _liver_ct,
    "retinal_oct": _retinal_oct,
    "histology": _histology,
    "breast_ultrasound": _breast_ultrasound,
}


# Lesions


@dataclass(frozen=True)
class _Outline:
    """A lesion's shape: `reach` is 0 at the centre and 1 on the outline, `radius` its half-width."""

    reach: Field
    radius: float
    centre: tuple[float, float]


def _outline(rng: np.random.Generator, scene: _Scene, kind: str) -> _Outline:
    """Choose place, size and shape so that the lesion fits into the organ."""
    size = scene.organ.shape[0]
    x, y = _grid(size)
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
    rough = np.clip(_noise(rng, size, min(2.5 / radius, size / 3)), -1.5, 1.5)
    return _Outline(_float(reach + roughness * rough), radius, centre)


def _displace(rng: np.random.Generator, scene: _Scene, outline: _Outline) -> tuple[list[Field], Mask]:
    """Push the tissue away from the lesion's centre, pull it there, or shift it sideways."""
    size = scene.organ.shape[0]
    x, y = _grid(size)
    reach = np.clip(outline.reach, 1e-3, 1)
    dx, dy = x - outline.centre[0], y - outline.centre[1]
    manner = rng.choice(("push", "pull", "shift"), p=(0.6, 0.2, 0.2))
    core, factor, slide = np.zeros_like(x), np.ones_like(x), np.zeros_like(x)
    if manner == "push":
        hollow = rng.uniform(0.35, 0.55)
        factor = np.maximum(reach - hollow, 0) / (1 - hollow) / reach
        core = _step(hollow - reach, 0.15)
    elif manner == "pull":
        factor = np.power(reach, rng.uniform(-0.6, -0.4))
    else:
        slide = np.square(1 - np.square(reach)) * (rng.uniform(0.35, 0.55) * outline.radius)
    turn = rng.uniform(0, 2 * np.pi)
    source_x = outline.centre[0] + factor * dx + float(np.cos(turn)) * slide
    source_y = outline.centre[1] + factor * dy + float(np.sin(turn)) * slide
    shift = np.hypot(source_x - x, source_y - y)
    moved = (outline.reach < 1) & ((shift > 0.02) | (core > 0.5))
    columns, rows = _float((source_x + 1) * (size / 2) - 0.5), _float((source_y + 1) * (size / 2) - 0.5)
    channels = []
    change = np.zeros_like(x)
    tint = rng.choice((-1, 1)) * rng.uniform(0.05, 0.12)
    for channel, tone in zip(scene.channels, scene.tone, strict=True):
        warped = _float(cv2.remap(channel, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT))
        level = float(np.mean(channel[moved & scene.organ])) + tone * tint
        warped = _mix(warped, level, core)
        warped = _float(np.where(outline.reach < 1, warped, channel))
        change = change + np.abs(warped - channel)
        channels.append(warped)
    visible = moved & (_blur(_float(change), 0.02 * size) > 0.02)
    return channels, visible if visible.mean() > 0.003 else moved


def _grow(rng: np.random.Generator, scene: _Scene, outline: _Outline, kind: str) -> tuple[list[Field], Mask]:
    """Replace the tissue inside the outline by lesion; the mask ends where half of it is replaced."""
    size = scene.organ.shape[0]
    reach = outline.reach
    cover = _step(1 - reach, rng.uniform(0.6, 0.9) if kind != "ring" and rng.uniform() < 0.3 else rng.uniform(0.1, 0.4))
    cover = cover * scene.organ
    mask = cover > 0.5
    contrast = float(np.exp(rng.uniform(np.log(0.13), np.log(0.4))))
    sign = {"bright": 1.0, "dark": -1.0}.get(kind, float(rng.choice((-1.0, 1.0))))
    fine = _noise(rng, size, rng.uniform(14, 40))
    coarse = _noise(rng, size, rng.uniform(0.8, 2.0) / outline.radius * 2)
    mottle = rng.uniform(0, 0.3) * coarse
    rim = _bump(reach - rng.uniform(0.74, 0.84), rng.uniform(0.10, 0.16))
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
            texture = (fine, coarse, 2 * _bump(fine, 0.2) - 1)[pattern]
            inner = level + tone * contrast * 0.7 * texture
        lesion = np.maximum(inner + keep * (channel - level), 0)
        channels.append(_float(_mix(channel, lesion, cover)))
    return channels, mask


def describe_place(mask: Mask) -> str:
    """Say in words where in the image the centre of a mask ``(H, W)``, not empty, lies: ``"upper left"``."""
    rows, columns = np.nonzero(mask)
    row = ("upper", "", "lower")[int(rows.mean() * 3 / mask.shape[0])]
    column = ("left", "", "right")[int(columns.mean() * 3 / mask.shape[1])]
    return f"{row} {column}".strip() or "centre"


def describe_extent(mask: Mask) -> str:
    """Say in words how much of the image a mask ``(H, W)`` covers: ``"small"``, ``"medium"`` or ``"large"``."""
    share = float(mask.mean())
    return "small" if share < 0.012 else "medium" if share < 0.035 else "large"


# Public functions


def draw_phantom(
    modality: str,
    size: int = 112,
    lesion: str | None = None,
    rng: np.random.Generator | None = None,
) -> Phantom:
    """Draw one image.

    Args:
        modality: One of `MODALITIES`.
        size: Width and height in pixels, at least 32.
        lesion: None for a normal image, one of `LESIONS`, or ``"random"``.
        rng: Source of all randomness; equal states give equal images, and the same anatomy and noise whatever the
            lesion. None takes a fresh one.

    Returns:
        The image with its mask and the facts for a caption.

    Raises:
        ValueError: If the modality, the lesion or the size is not one of the above.
    """
    if modality not in _ANATOMY:
        msg = f"Unknown modality {modality!r}: choose one of {', '.join(MODALITIES)}."
        raise ValueError(msg)
    if lesion not in {None, "random", *LESIONS}:
        msg = f"Unknown lesion {lesion!r}: choose None, 'random' or one of {', '.join(LESIONS)}."
        raise ValueError(msg)
    if size < 32:
        msg = f"Phantoms of {size} pixels show nothing: choose a size of 32 or more."
        raise ValueError(msg)
    rng = np.random.default_rng() if rng is None else rng
    anatomy, disease, scanner = (np.random.default_rng(int(s)) for s in rng.integers(2**62, size=3))
    scene = _ANATOMY[modality](anatomy, size)
    channels: Sequence[Field] = scene.channels
    mask: npt.NDArray[np.bool_] = np.zeros((size, size), dtype=np.bool_)
    if lesion is not None:
        kind = LESIONS[disease.integers(len(LESIONS))] if lesion == "random" else lesion
        outline = _outline(disease, scene, kind)
        if kind == "displaced":
            channels, mask = _displace(disease, scene, outline)
        else:
            channels, mask = _grow(disease, scene, outline, kind)
    image = np.clip(scene.acquire(channels, scanner) * 255 + 0.5, 0, 255).astype(np.uint8)
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if lesion is None:
        return Phantom(image, mask, modality, scene.variant)
    return Phantom(image, mask, modality, scene.variant, kind, describe_place(mask), describe_extent(mask))


def write_phantoms(
    root: str | Path,
    modalities: Sequence[str] = MODALITIES,
    counts: Mapping[str, int] | None = None,
    size: int = 112,
    seed: int = 0,
    lesions: Sequence[str] = LESIONS,
) -> Path:
    """Write data sets in the layout of BMAD, one folder a modality (``BrainMRI``, ``ChestXray``, ...).

    Normal images go to ``train/good``, ``valid/good/img`` and ``test/good/img``, abnormal ones to ``valid/Ungood/img``
    and ``test/Ungood/img`` with masks (0 and 255) of the same name in ``label``. The kinds of lesion take turns. An
    image depends on the seed, its modality, split, class and number alone, not on how many are written.

    Args:
        root: Folder that receives the sets; existing images of the same name are overwritten.
        modalities: Some of `MODALITIES`.
        counts: Images of each class in ``train``, ``valid`` and ``test``; a missing split gets 32, 16 or 40.
        size: Width and height in pixels.
        seed: Not negative.
        lesions: Some of `LESIONS`; they take turns.

    Returns:
        The root.

    Raises:
        ValueError: If a modality, a split or a lesion is unknown.
    """
    counts = {**DEFAULT_COUNTS, **(counts or {})}
    named = [(m, MODALITIES) for m in modalities] + [(c, SPLITS) for c in counts] + [(x, LESIONS) for x in lesions]
    for name, known in named:
        if name not in known:
            msg = f"Unknown name {name!r}: choose among {', '.join(known)}."
            raise ValueError(msg)
    jobs = [
        (modality, split, abnormal, index)
        for modality in modalities
        for split in SPLITS
        for abnormal in ((False,) if split == "train" else (False, True))
        for index in range(counts[split])
    ]
    root = Path(root)
    for modality, split, abnormal, index in track(jobs, "Drawing phantoms", disable=not sys.stdout.isatty()):
        key = (seed, MODALITIES.index(modality), SPLITS.index(split), int(abnormal), index)
        lesion = lesions[index % len(lesions)] if abnormal else None
        phantom = draw_phantom(modality, size, lesion, np.random.default_rng(key))
        folder = root / SET_NAMES[modality] / split / ("Ungood" if abnormal else "good")
        name = f"{index:04d}.png"
        _save(phantom.image, folder / name if split == "train" else folder / "img" / name)
        if abnormal:
            _save(phantom.mask.astype(np.uint8) * 255, folder / "label" / name)
    return root


def _save(image: npt.NDArray[np.uint8], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, compress_level=1)


def contact_sheet(path: str | Path, size: int = 112, seed: int = 0) -> Path:
    """Draw one row a modality: four normal images, then each kind of lesion with its mask outlined.

    Args:
        path: PNG file to write.
        size: Width and height of each image in pixels.
        seed: Not negative.

    Returns:
        The path.
    """
    columns = (None,) * 4 + LESIONS
    margin, header = 104, 14
    sheet = Image.new("RGB", (margin + size * len(columns), header + size * len(MODALITIES)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, lesion in enumerate(columns):
        pen.text((margin + column * size + 4, 1), lesion or "normal", fill="black")
    for row, modality in enumerate(MODALITIES):
        pen.text((4, header + row * size + size // 2 - 6), modality.replace("_", " "), fill="black")
        for column, lesion in enumerate(columns):
            phantom = draw_phantom(modality, size, lesion, np.random.default_rng((seed, row, column)))
            image = phantom.image.copy()
            grown = cv2.dilate(phantom.mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(np.bool_)
            image[grown & ~phantom.mask] = (255, 220, 0)
            sheet.paste(Image.fromarray(image), (margin + column * size, header + row * size))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(120, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Write data sets from the command line."""
    parser = argparse.ArgumentParser(description="Write procedural medical images in the layout of BMAD.")
    parser.add_argument("--root", type=Path, required=True, help="folder that receives the sets")
    parser.add_argument("--modalities", nargs="+", choices=MODALITIES, default=MODALITIES, help="default: all")
    parser.add_argument("--lesions", nargs="+", choices=LESIONS, default=LESIONS, help="kinds in turn; default: all")
    parser.add_argument("--size", type=int, default=112, help="pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    for split, count in DEFAULT_COUNTS.items():
        parser.add_argument(f"--{split}", type=int, default=count, help="images of each class (default: %(default)s)")
    options = parser.parse_args(arguments)
    counts = {split: getattr(options, split) for split in SPLITS}
    root = write_phantoms(options.root, options.modalities, counts, options.size, options.seed, options.lesions)
    print(f"Wrote {', '.join(SET_NAMES[m] for m in options.modalities)} to {root}")  # noqa: T201


if __name__ == "__main__":
    main()
