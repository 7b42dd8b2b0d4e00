# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Generated anatomy of layered and fine tissue: retinal OCT, histology, breast ultrasound."""

from collections.abc import Sequence

import numpy as np

from .drawing import Field, Scanner, Scene, as_field, blur, bump, cells, exposure, grain, grid, mix, noise, step

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


def retinal_oct(rng: np.random.Generator, size: int, scanner: Scanner) -> Scene:
    """Macular B-scan: vitreous, layered retina with or without the fovea, choroid."""
    u, s = rng.uniform, scanner.uniform
    x, y = grid(size)
    x = x * s(0.8, 1.1)
    knots, values = np.array(_RETINA).T
    values = values * [1 + s(-0.17, 0.17) for _ in values]
    vitreous, glow, reach = s(0.02, 0.10), s(0.35, 0.6), s(0.15, 0.45)
    gain, gamma, strength = s(0.75, 1.15), s(-0.15, 0.15), s(0.12, 0.34)
    floor_noise, sharpness = s(0.02, 0.07), s(0.2, 0.7)
    speckles = s(0.45, 0.8), s(0.3, 0.6)
    thick = u(0.38, 0.6)
    floor = u(0.05, 0.45) + u(-0.2, 0.2) * x + u(-0.12, 0.18) * np.square(x) + 0.012 * noise(rng, size, 2, 7)[:1]
    pit = np.exp(-np.square((x[:1] - u(-0.35, 0.35)) / u(0.16, 0.32))) * (u(0.35, 0.65) if u() < 0.8 else 0.0)
    shoulder = 0.12 * np.exp(-np.square((np.abs(x[:1]) - 0.5) / 0.3))
    height = thick * (1 + shoulder - pit)
    t = (y - floor + height) / height  # 0 at the inner limiting membrane, 1 at the pigment epithelium
    level = 1 - (1 - t) * (1 - 0.75 * pit)
    nerve = 0.05 + 0.09 * np.clip(0.5 + u(-1, 1) * x[:1], 0, 1)
    values[0] = 0.0
    shifted = level + (0.1 - nerve) * np.clip(1 - level * 3, 0, 1) * (level > 0.02)
    table = np.interp(np.linspace(-0.2, 1.2, 561), knots, values, left=0.0).astype(np.float32)
    index = np.clip((shifted + 0.2) * 400, 0, 560).astype(np.intp)
    layers = table[index] * (1 + 0.06 * noise(rng, size, 30, 12))
    below = y - floor
    caves = step(noise(rng, size, 18, 16) + noise(rng, size, 9, 8) - u(-0.2, 0.8), 0.8)
    choroid = glow * np.exp(-np.maximum(below, 0) / reach) * (1 - u(0.3, 0.6) * caves)
    tissue = mix(layers, choroid + 0.06, step(below - 0.03, 0.03))
    tissue = mix(tissue, vitreous, step(-t, 0.05))
    if u() < 0.3:
        film = y - floor + height + u(0.04, 0.15) + u(-0.1, 0.1) * x
        tissue = tissue + u(0.15, 0.4) * bump(film, 0.008) * (t < 0)
    shade = np.ones((1, size), dtype=np.float32)
    for _ in range(rng.integers(0, 6)):
        place, wide = u(-1, 1), u(0.012, 0.04)
        vessel = bump(x[:1] - place, wide)
        shade = shade - u(0.15, 0.5) * vessel
        tissue = tissue + u(0.0, 0.3) * bump(np.hypot(x - place, y - floor + 0.88 * height), wide)
    tissue = mix(tissue, tissue * np.maximum(shade, 0.3), step(t - 0.15, 0.2))
    tissue = tissue * (1 + 0.15 * noise(rng, size, 2, 5)[:1])
    organ = (t > 0.06) & (below < 0.02)
    spread = (t > -0.5) & (below < 0.35)

    def acquire(channels: Sequence[Field], rng: np.random.Generator) -> Field:
        image = exposure(rng, channels[0], 0.1, gain, gamma) * (1 + strength * grain(rng, size, *speckles))
        image = blur(as_field(image + floor_noise * np.abs(grain(rng, size, 0.4))), sharpness * size / 112)
        if rng.uniform() < 0.12:
            gx, gy = grid(size)
            edge = rng.uniform(-0.15, 0.15) * gx + gy * (1 if rng.uniform() < 0.5 else -1)
            image = np.where(edge > rng.uniform(0.85, 0.95), 1, image)
        return as_field(image)

    centre = organ & (t > 0.2) & (np.abs(grid(size)[0]) < 0.85)
    shape = {"tone": (1.2,), "spread": spread, "stretch": u(1.2, 2.2)}
    return Scene((as_field(tissue),), organ, centre, acquire, "macular B-scan", **shape)


def histology(rng: np.random.Generator, size: int, scanner: Scanner) -> Scene:
    """Haematoxylin and eosin: glands in stroma, lymphoid tissue, or fibrous tissue; fat here and there."""
    u, s = rng.uniform, scanner.uniform
    zoom = float(np.exp(s(-0.35, 0.35)))
    # Optical density of the two stains in red, green, blue.
    stains = np.array([[0.62, 0.72, 0.32], [0.10, 0.70, 0.28]], dtype=np.float32)
    stains = (stains * [[s(0.85, 1.15) for _ in range(3)] for _ in range(2)]).astype(np.float32)
    strength = [s(0.75, 1.25) * s(1.1, 1.5) for _ in range(2)]
    sharpness, light = s(0.3, 0.8), np.array([s(0.9, 1.0) for _ in range(3)], dtype=np.float32)
    variant = scanner.choose(("glandular tissue", "lymphoid tissue", "fibrous tissue"), (0.45, 0.3, 0.25))
    gx, gy = grid(size)
    turn = u(0, 2 * np.pi)
    x = as_field((np.cos(turn) * gx + np.sin(turn) * gy) + 0.03 * noise(rng, size, 7))
    y = as_field((np.cos(turn) * gy - np.sin(turn) * gx) + 0.03 * noise(rng, size, 7))
    # Nuclei: a dense lattice of points, thinned by a density that depends on the tissue.
    pitch = u(0.075, 0.095) * zoom * (0.85 if variant == "lymphoid tissue" else 1.0)
    dx, dy, _, chance, character = cells(rng, x, y, pitch, 0.75)
    mottle = noise(rng, size, 14)
    eosin = u(0.45, 0.65) + 0.08 * mottle + 0.06 * noise(rng, size, 40)
    long, radius = 1.0, 0.36
    empty: Field = np.zeros_like(x)
    crowd: Field | float
    if variant == "glandular tissue":
        spacing = u(0.55, 0.95) * zoom
        gland_x, gland_y, gap, kind, _ = cells(rng, x, y, spacing, 0.45)
        distance = np.hypot(gland_x * u(0.85, 1.25), gland_y) + 0.05 * noise(rng, size, 8)
        gland = np.minimum(0.46 + 0.1 * (kind - 0.5) - distance, 0.5 * gap - 0.03) * spacing
        wall = step(gland, 0.02)
        basal = bump(gland - 0.45 * pitch, 0.4 * pitch)
        empty = step(gland - (u(1.6, 2.6) + 1.2 * (kind - 0.5)) * pitch, 0.03)
        goblet = step(noise(rng, size, 26 / zoom) - u(-0.2, 0.9), 0.5) * bump(gland - 1.5 * pitch, 0.6 * pitch)
        density = u(0.2, 0.45) * (1 - wall) + 1.2 * basal
        eosin = mix(eosin, u(0.4, 0.6) + 0.04 * mottle, wall)
        empty = np.maximum(empty, u(0.3, 0.8) * goblet)
        crowd = u(0.1, 0.25) * wall * (1 - goblet)
    elif variant == "lymphoid tissue":
        follicle = step(noise(rng, size, 4) - u(0.2, 1.0), 0.8)
        density = u(0.72, 0.95) - 0.25 * follicle
        eosin = eosin * u(0.6, 0.8)
        sinus = bump(noise(rng, size, 5), u(0.05, 0.2))
        density = density * (1 - 0.7 * sinus)
        empty = 0.5 * sinus * step(mottle - 0.3, 0.8)
        crowd = 0.12 + 0.08 * follicle
        radius = 0.42
    else:
        fibre = np.sin(y * u(38, 60) / zoom + 2.2 * noise(rng, size, 5) + 1.2 * noise(rng, size, 12))
        eosin = eosin + 0.14 * fibre + u(0, 0.12)
        density = u(0.2, 0.4) + np.zeros_like(x)
        empty = 0.7 * step(-fibre - u(0.75, 0.95), 0.2) * step(mottle, 1.0)
        crowd = np.zeros_like(x)
        long, radius = u(2.0, 3.2), 0.36
        x_along = u(0.8, 1.0)
        dx, dy = dx * x_along / long, dy * long**0.5
    if u() < 0.35:
        _, _, membrane, _, _ = cells(rng, x, y, u(0.25, 0.4) * zoom, 0.7)
        fat = step(noise(rng, size, 3) - u(0.9, 1.6), 0.12)
        eosin = mix(eosin, 0.6, fat)
        density = density * (1 - fat) + 0.15 * fat * bump(membrane, 0.1)
        empty = np.maximum(empty * (1 - fat), fat * step(membrane - 0.12, 0.08))
        crowd = crowd * (1 - fat)
    body = radius * (0.75 + 0.5 * character) - np.hypot(dx * (1 + 0.5 * (chance - 0.5)), dy)
    present = step(density - chance, 0.05)
    nuclei = present * step(body, 0.16)
    chromatin = 1 + 0.22 * noise(rng, size, 60)
    haematoxylin = 0.10 + 0.04 * mottle + crowd + nuclei * (u(0.75, 1.0) + 0.5 * (character - 0.5)) * chromatin
    channels = (as_field(haematoxylin * (1 - empty)), as_field(eosin * (1 - 0.97 * empty)))
    everywhere = (np.abs(gx) < 0.97) & (np.abs(gy) < 0.97)

    def acquire(channels: Sequence[Field], rng: np.random.Generator) -> Field:
        pixels = sharpness * size / 112
        h, e = (blur(np.maximum(c, 0), pixels) * power for c, power in zip(channels, strength, strict=True))
        image = light * np.exp(-(h[..., None] * stains[0] + e[..., None] * stains[1]))
        image = image * (1 + 0.05 * rng.uniform() * noise(rng, size, 2))[..., None]
        return as_field(image + 0.012 * grain(rng, size, 0.5)[..., None])

    seat = (np.abs(gx) < 0.8) & (np.abs(gy) < 0.8) & (blur(as_field(empty), 0.04 * size) < 0.3)
    return Scene(channels, everywhere, seat, acquire, variant, tone=(-1.6, -0.5), keep=(0.35, 0.9))


def breast_ultrasound(rng: np.random.Generator, size: int, scanner: Scanner) -> Scene:
    """B-mode breast: skin, fat lobules, glandular tissue, pectoral muscle, ribs."""
    u, s = rng.uniform, scanner.uniform
    x, y = grid(size)
    variant = scanner.choose(("linear probe", "convex probe"), (0.7, 0.3))
    fat_level, gland_level, muscle_level, fade = s(0.16, 0.32), s(0.48, 0.66), s(0.24, 0.36), s(0.0, 0.35)
    gain, gamma, contrast, sharpness = s(0.75, 1.25), s(-0.2, 0.2), s(0.35, 0.75), s(0.2, 0.5) * size / 112
    speckles = s(0.7, 1.5) * size / 112, s(0.4, 0.7) * size / 112
    fan: Field | float = 1.0
    if variant == "convex probe":
        far = u(1.2, 2.2)
        radius = np.hypot(x, y + 1 + far)
        fan = step(u(0.85, 1.05) / (2 + far) - np.abs(np.arctan2(x, y + 1 + far)), 0.02)
        y = as_field(radius - far - 1)
        fan = fan * step(y + 0.97, 0.03) * step(0.97 - y, 0.03)
    wave = 0.08 * noise(rng, size, 2, 5)[:1] + u(-0.1, 0.1) * x[:1]
    bend = 0.05 * noise(rng, size, 6)
    skin = -0.93 + u(0.02, 0.08)
    fat_end = u(-0.65, -0.2) + wave + bend
    gland_end = u(0.15, 0.5) + 0.6 * wave + 0.5 * bend
    lobes = np.abs(noise(rng, size, u(7, 10), u(4, 6)) + 0.3 * noise(rng, size, 16))
    fat = fat_level + u(0.2, 0.4) * bump(lobes, 0.12) + 0.03 * noise(rng, size, 20)
    ducts = noise(rng, size, u(14, 22), u(6, 10))
    patches = noise(rng, size, 6)
    gland = gland_level - u(0.08, 0.22) * step(ducts - 0.6, 0.8) + u(0.03, 0.09) * patches
    gland = gland + u(0.0, 0.2) * bump(np.abs(noise(rng, size, 12, 7)), 0.08)
    stripes = np.sin(y * u(45, 70) + 1.5 * noise(rng, size, 4))
    muscle = muscle_level + u(0.04, 0.1) * stripes + 0.04 * noise(rng, size, 20, 6)
    tissue = mix(fat, gland, step(y - fat_end, 0.05))
    tissue = mix(tissue, muscle, step(y - gland_end, 0.04))
    tissue = tissue + u(0.1, 0.35) * bump(y - gland_end, 0.02) * step(noise(rng, size, 3, 6) + 1, 1.0)
    tissue = mix(tissue, u(0.7, 0.9), step(skin - y, 0.03))
    wall = u(0.55, 0.85) + 0.5 * wave
    if u() < 0.6:
        tissue = mix(tissue, 0.75, bump(y - wall, 0.025) * u(0.5, 1))
        tissue = tissue * (1 - u(0.3, 0.7) * step(y - wall - 0.04, 0.06))
        if u() < 0.6:
            rib = bump(x - u(-0.8, 0.8), u(0.12, 0.25))
            tissue = tissue * (1 - 0.8 * np.minimum(rib * 2, 1) * step(y - wall + 0.12, 0.05))
    for _ in range(rng.integers(0, 4)):
        tissue = tissue * (1 - u(0.1, 0.45) * bump(x - u(-1, 1), u(0.04, 0.15)) * step(y - u(-0.7, 0.2), 0.3))
    organ = (y > skin + 0.06) & (y < gland_end - 0.0) & (fan > 0.9) & (np.abs(grid(size)[0]) < 0.95)
    tissue = np.maximum(tissue, 0.02) * np.exp(-(y + 1) * fade)

    def acquire(channels: Sequence[Field], rng: np.random.Generator) -> Field:
        envelope = np.hypot(grain(rng, size, *speckles), grain(rng, size, *speckles))
        image = exposure(rng, channels[0], 0.15, gain, gamma) * np.power(envelope * 0.8, contrast) * fan
        return blur(as_field(image), sharpness)

    seat = organ & (y > fat_end - 0.1)
    return Scene((as_field(tissue),), organ, seat, acquire, variant, tone=(1.4,), stretch=u(1.0, 1.5))
