# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Shapes, noise and settings from which the generated images are made.

Coordinates run from -1 to 1 over the image, ``x`` to the right and ``y`` downwards; grey values from 0 to 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Field = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]
Points = Sequence[tuple[float, float]]

VARIATION = 0.15
"""Share of a setting's range over which one scanner varies from image to image."""


@dataclass(frozen=True)
class Scene:
    """A noise-free anatomy."""

    channels: tuple[Field, ...]  # (H, W) each, which a lesion changes: one grey channel, or the two stains of histology
    organ: Mask  # where a lesion may spread
    seat: Mask  # where its centre may lie
    acquire: Callable[[Sequence[Field], np.random.Generator], Field]  # adds what the scanner does; 0 to 1
    variant: str  # for captions
    tone: tuple[float, ...] = (1.0,)  # sign and weight of "brighter" in each channel
    spread: Mask | None = None  # where a displacement may reach; the organ when None
    stretch: float = 1.0  # width over height of a lesion
    keep: tuple[float, float] = (0.1, 0.5)  # share of the tissue's own structure that shows inside a lesion


class Scanner:
    """Settings of the machine that acquires an image: contrast, field of view, noise and resolution.

    Args:
        rng: Source of what varies from image to image.
        seed: Seed of one scanner, whose settings lie in a narrow part of every range; None for a new one each image.
            The settings must then be drawn in the same order for every image.
    """

    def __init__(self, rng: np.random.Generator, seed: int | None = None) -> None:
        self.rng = rng
        self.settings = None if seed is None else np.random.default_rng(seed)

    def uniform(self, low: float, high: float) -> float:
        """Draw a setting from a range, or from the part of it that belongs to this scanner."""
        if self.settings is not None:
            width = VARIATION * (high - low)
            low = self.settings.uniform(low, high - width)
            high = low + width
        return self.rng.uniform(low, high)

    def choose(self, names: Sequence[str], p: Sequence[float], keep: int = 1) -> str:
        """Draw one of the names, whose probabilities are given; one scanner has the first `keep` of them alone."""
        if self.settings is not None:
            names, p = names[:keep], [share / sum(p[:keep]) for share in p[:keep]]
        return str(self.rng.choice(names, p=p))


@lru_cache(maxsize=8)
def grid(size: int) -> tuple[Field, Field]:
    """Pixel centres as ``x`` and ``y``, each ``(size, size)`` in [-1, 1]."""
    axis = ((np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    x.flags.writeable = y.flags.writeable = False
    return x, y


def noise(rng: np.random.Generator, size: int, rows: float, columns: float | None = None) -> Field:
    """Smooth noise ``(size, size)`` of about unit deviation with `rows` x `columns` control points."""
    shape = (min(max(2, round(rows)), size), min(max(2, round(columns or rows)), size))
    coarse = rng.standard_normal(shape, dtype=np.float32)
    return as_field(cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)) * 1.25


def grain(rng: np.random.Generator, size: int, sigma: float = 0.0, sigma_y: float | None = None) -> Field:
    """Return pixel noise ``(size, size)`` of unit deviation, correlated over `sigma` pixels."""
    field = rng.standard_normal((size, size), dtype=np.float32)
    if sigma <= 0:
        return field
    field = blur(field, sigma, sigma_y)
    return field / float(field.std())


def as_field(array: object) -> Field:
    """Convert to float32."""
    return np.asarray(array, dtype=np.float32)


def blur(field: Field, sigma: float, sigma_y: float | None = None) -> Field:
    """Blur by a Gaussian of `sigma` pixels."""
    return as_field(cv2.GaussianBlur(field, (0, 0), sigma, sigmaY=sigma if sigma_y is None else sigma_y))


def step(distance: Field, width: float) -> Field:
    """0 to 1 across `distance` = 0, smooth over `width`."""
    t = np.clip(distance / width + 0.5, 0, 1)
    return as_field(t * t * (3 - 2 * t))


def bump(field: Field, width: float) -> Field:
    """1 where `field` is 0, falling off over `width`; smooth and of finite reach."""
    t = np.maximum(1 - np.square(field * (0.5 / width)), 0)
    return as_field(t * t)


def mix(base: Field, value: Field | float, weight: Field) -> Field:
    """Blend from `base` (weight 0) to `value` (weight 1)."""
    return base + (value - base) * weight


def join(a: Field, b: Field, blend: float) -> Field:
    """Union of two shapes given by signed distances, the corner between them filled over `blend`."""
    t = np.clip(0.5 + (a - b) * (0.5 / blend), 0, 1)
    return b + (a - b) * t + blend * t * (1 - t)


def ellipse(x: Field, y: Field, centre: tuple[float, float], radii: tuple[float, float], angle: float = 0.0) -> Field:
    """Approximate signed distance to an ellipse, positive inside."""
    dx, dy = x - centre[0], y - centre[1]
    if angle:
        cos, sin = float(np.cos(angle)), float(np.sin(angle))
        dx, dy = cos * dx + sin * dy, cos * dy - sin * dx
    return as_field((1 - np.sqrt(np.square(dx / radii[0]) + np.square(dy / radii[1]))) * min(radii))


def polyline(x: Field, y: Field, points: Points, radii: Sequence[float]) -> Field:
    """Signed distance to a thick polyline whose radius varies from point to point, positive inside."""
    best: Field | None = None
    for (ax, ay), (bx, by), ra, rb in zip(points, points[1:], radii, radii[1:], strict=False):
        ex, ey = bx - ax, by - ay
        dx, dy = x - ax, y - ay
        t = np.clip((dx * ex + dy * ey) * (1 / (ex * ex + ey * ey + 1e-9)), 0, 1)
        inside = (ra + (rb - ra) * t) - np.sqrt(np.square(dx - ex * t) + np.square(dy - ey * t))
        best = inside if best is None else np.maximum(best, inside)
    return as_field(best)


def posed(
    rng: np.random.Generator, size: int, scale: float, shift: float, angle: float, warp: float
) -> tuple[Field, Field]:
    """The grid seen in body coordinates: shifted, rotated, scaled and gently bent."""
    x, y = grid(size)
    x, y = x - rng.uniform(-shift, shift), y - rng.uniform(-shift, shift)
    turn = rng.uniform(-angle, angle)
    cos, sin = float(np.cos(turn) / scale), float(np.sin(turn) / scale)
    bend_x, bend_y = noise(rng, size, 4), noise(rng, size, 4)
    return as_field(cos * x + sin * y + warp * bend_x), as_field(cos * y - sin * x + warp * bend_y)


def polar_noise(rng: np.random.Generator, angle: Field, radius: Field, spokes: float, rings: float) -> Field:
    """Noise that runs in spokes: `spokes` control points a turn, `rings` a unit of `radius`."""
    columns = max(4, round(spokes))
    table = rng.standard_normal((max(3, round(rings)) + 2, columns), dtype=np.float32)
    table = np.concatenate([table[:, -2:], table, table[:, :3]], axis=1)
    column = angle * (columns / (2 * np.pi)) + (columns / 2 + 2)
    row = radius * rings + 1
    warped = cv2.remap(table, as_field(column), as_field(row), cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    return as_field(warped) * 1.25


def cells(rng: np.random.Generator, x: Field, y: Field, pitch: float, jitter: float = 0.8) -> tuple[Field, ...]:
    """Cellular noise: the scattered point nearest to each pixel.

    Args:
        rng: Source of the points.
        x: ``(H, W)``, like ``y``.
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
    return as_field(dx), as_field(dy), as_field(gap), table[2].ravel()[nearest], table[3].ravel()[nearest]


def exposure(rng: np.random.Generator, image: Field, bias: float, gain: float, gamma: float) -> Field:
    """Apply a random bias field of at most `bias`, a gain, and an exponent given by its logarithm."""
    field = noise(rng, image.shape[0], 3) * (bias * rng.uniform())
    return as_field(np.power(np.maximum(image * (1 + field) * gain, 0), float(np.exp(gamma))))
