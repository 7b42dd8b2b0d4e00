# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Generated images of nothing in particular, so that the tower learns more textures than those of six organs.

Three kinds: fields with a power-law spectrum, overlapping shapes that hide each other (dead leaves), and repeated or
oriented patterns. Such images are known to train general features without real data (Baradad et al. 2021,
arXiv 2106.05963).
"""

import cv2
import numpy as np

from anomalib_mvfa.demo.drawing import Field, as_field, blur, bump, cells, grain, grid, mix, noise, step

__all__ = ["draw_texture"]


def draw_texture(size: int, rng: np.random.Generator) -> Field:
    """Draw an image ``(size, size, 3)`` in [0, 1]: one texture, or several that meet at smooth borders."""
    image = _plain(size, rng)
    for _ in range(rng.integers(0, 4)):
        border = step(noise(rng, size, rng.uniform(2, 7)) - rng.uniform(-0.8, 0.8), rng.uniform(0.05, 0.6))
        image = mix(image, _plain(size, rng), border)
    if rng.uniform() < 0.4:  # a body in front of a flat background
        x, y = grid(size)
        reach = np.hypot(x * rng.uniform(1.0, 1.6), y * rng.uniform(1.0, 1.4)) + 0.06 * noise(rng, size, 5)
        image = mix(as_field(np.full_like(image, rng.uniform(0, 0.15))), image, step(1 - reach, 0.04))
    if rng.uniform() < 0.4:
        image = image * (1 + rng.uniform(0.05, 0.4) * grain(rng, size, rng.uniform(0, 1.2), rng.uniform(0.3, 1.2)))
    tint = 1 + (rng.uniform() < 0.3) * rng.uniform(-0.4, 0.1, 3)
    return as_field(np.clip(image[..., None] * tint, 0, 1))


def _plain(size: int, rng: np.random.Generator) -> Field:
    kind = rng.integers(4)
    if kind == 0:
        field = _spectrum(size, rng)
    elif kind == 1:
        field = _leaves(size, rng)
    elif kind == 2:
        field = _waves(size, rng)
    else:
        x, y = grid(size)
        stretch = rng.uniform(0.4, 1.0)
        _, _, gap, tone, _ = cells(rng, as_field(x * stretch), y, rng.uniform(0.08, 0.5), rng.uniform(0.3, 1))
        field = tone * rng.uniform(0, 1) + bump(gap, rng.uniform(0.05, 0.4)) * rng.uniform(-1, 1)
    spread = float(field.std()) + 1e-3
    return as_field(rng.uniform(0.15, 0.7) + rng.uniform(0.03, 0.2) * (field - float(field.mean())) / spread)


def _spectrum(size: int, rng: np.random.Generator) -> Field:
    """Random phases with an amplitude that falls with a power of the frequency, in one direction faster."""
    rows, columns = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)
    turn, stretch = rng.uniform(0, np.pi), np.exp(rng.uniform(0, 1.5))
    along, across = (np.cos(turn) * columns + np.sin(turn) * rows), (np.cos(turn) * rows - np.sin(turn) * columns)
    amplitude = 1 / np.power(np.hypot(along, across * stretch) + 1 / size, rng.uniform(0.8, 2.2))
    return as_field(np.fft.irfft2(amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape)), (size, size)))


def _leaves(size: int, rng: np.random.Generator) -> Field:
    """Ellipses and polygons that cover each other."""
    canvas = np.full((size, size), 0.5, dtype=np.float32)
    largest = rng.uniform(0.05, 0.3) * size
    for _ in range(int(rng.integers(40, 200))):
        radius = largest * rng.uniform(0.15, 1)
        centre = rng.uniform(-0.1, 1.1, 2) * size
        if rng.uniform() < 0.6:
            axes = (int(radius) + 1, int(radius * rng.uniform(0.3, 1)) + 1)
            middle = (int(centre[0]), int(centre[1]))
            cv2.ellipse(canvas, middle, axes, rng.uniform(0, 180), 0, 360, rng.uniform(), -1, cv2.LINE_AA)
        else:
            angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
            points = centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
            cv2.fillPoly(canvas, [points.astype(np.int32)], rng.uniform(), cv2.LINE_AA)
    return blur(canvas, rng.uniform(0.3, 1.5))


def _waves(size: int, rng: np.random.Generator) -> Field:
    """Bent stripes, or two sets of them crossing."""
    x, y = grid(size)
    field = np.zeros_like(x)
    for _ in range(rng.integers(1, 3)):
        turn, pitch = rng.uniform(0, np.pi), rng.uniform(8, 70)
        phase = (np.cos(turn) * x + np.sin(turn) * y) * pitch
        field = field + np.sin(phase + rng.uniform(0, 3) * noise(rng, size, rng.uniform(2, 9)))
    return as_field(field)
