# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Generated anatomy of the large organs: brain MRI, chest X-ray, liver CT."""

from collections.abc import Sequence

import numpy as np

from .drawing import (
    Field,
    Scanner,
    Scene,
    as_field,
    blur,
    bump,
    ellipse,
    exposure,
    grain,
    grid,
    join,
    mix,
    noise,
    polar_noise,
    polyline,
    posed,
    step,
)


def brain_mri(rng: np.random.Generator, size: int, scanner: Scanner) -> Scene:
    """Axial head at one of three heights, in one of five weightings."""
    u, s = rng.uniform, scanner.uniform
    # Values of fluid, grey matter, white matter, scalp, skull, marrow.
    weightings = {
        "FLAIR": (0.07, 0.46, 0.36, 0.55, 0.05, 0.20),
        "T1-weighted": (0.10, 0.40, 0.60, 0.75, 0.06, 0.35),
        "contrast-enhanced T1-weighted": (0.08, 0.34, 0.44, 0.72, 0.05, 0.35),
        "T2-weighted": (0.88, 0.50, 0.32, 0.55, 0.05, 0.22),
        "proton density": (0.62, 0.60, 0.47, 0.60, 0.06, 0.25),
    }
    variant = scanner.choose(list(weightings), (0.2, 0.25, 0.2, 0.27, 0.08))
    fluid, grey, white, scalp, skull, marrow = (v * s(0.88, 1.12) for v in weightings[variant])
    gain, gamma, smear, sharpness = s(0.85, 1.1) * u(0.8, 1.2), s(-0.2, 0.2), s(0, 0.5), s(0.3, 0.7)
    sigma = 0.008 * float(np.exp(s(-0.5, 1.5)))
    x, y = posed(rng, size, u(0.8, 1.12), shift=0.06, angle=0.14, warp=0.014)
    height = scanner.choose(("ventricle", "basal", "vertex"), (0.36, 0.36, 0.28), keep=2)

    rho = np.sqrt(np.square(x / (u(0.70, 0.80) * (1 + u(-0.04, 0.12) * y))) + np.square(y / u(0.86, 0.95)))
    outer = 1 - u(0.03, 0.08)
    inner = outer - u(0.045, 0.075)
    depth = inner - u(0.005, 0.035) - rho
    midline = np.abs(x + u(-0.015, 0.015) * (1 - y * y))
    bridge = {"vertex": 0.0, "ventricle": 0.38, "basal": 0.42}[height]
    medial = midline + 0.8 * np.maximum(bridge - np.abs(y + 0.03), 0) - u(0.004, 0.02)
    surface = np.minimum(depth, medial)

    # Folds run in spokes from the core of each hemisphere; the sides read the table in opposite directions.
    angle = np.arctan2(0.75 * y, np.abs(x) - u(0.22, 0.32)) + 0.14 * noise(rng, size, 9)
    angle = np.where(x > 0, angle, -angle)
    folds = polar_noise(rng, as_field(angle), depth, u(26, 40), u(2.5, 5))
    folds = np.abs(folds + 0.35 * noise(rng, size, u(16, 24)))
    ribbon = np.minimum(surface / u(0.045, 0.065), 1.3 * folds + u(3.5, 5.5) * np.maximum(surface - 0.04, 0))
    whiteness = step(ribbon - 1, 0.7)
    sulci = step(u(0.3, 0.6) - 1.3 * folds - u(1.8, 3.6) * np.maximum(surface, 0), 0.3)
    sulci = np.maximum(sulci, u(0.3, 0.9) * step(-medial, 0.02))

    aside = x * u(0.9, 1.1) + np.abs(x) * u(-0.12, 0.12)
    side = np.abs(aside)
    swell = float(np.exp(u(-0.7, 0.7)))
    ventricles = np.full_like(x, -1)
    if height == "ventricle":
        r = 0.042 * swell
        path = ((0.13, -0.36), (0.07 + 0.3 * r, -0.18), (0.075 + 0.5 * r, 0.05), (0.17, 0.3), (0.21, 0.38))
        ventricles = polyline(side, y, path, (0.5 * r, 1.1 * r, r, 1.3 * r, 0.4 * r))
    elif height == "basal":
        r = 0.04 * swell
        horn = polyline(side, y, ((0.15, -0.36), (0.10, -0.26), (0.045, -0.10)), (0.6 * r, 1.2 * r, 0.4 * r))
        atrium = polyline(side, y, ((0.22, 0.22), (0.29, 0.34), (0.27, 0.47)), (0.5 * r, 1.2 * r, 0.3 * r))
        third = polyline(side, y, ((0.0, -0.04), (0.0, 0.16)), (0.5 * r, 0.35 * r))
        ventricles = np.maximum(np.maximum(horn, atrium), third)
        nuclei = np.maximum(
            ellipse(side, y, (0.17 + 0.3 * r, -0.20), (0.055, 0.11), 0.5),
            np.maximum(
                ellipse(side, y, (0.31, -0.05), (0.07, 0.19), -0.25),
                ellipse(side, y, (0.13, 0.11), (0.105, 0.14), -0.5),
            ),
        )
        whiteness = whiteness * (1 - u(0.6, 0.95) * step(nuclei, 0.04))
        path = ((0.68, -0.06), (0.55, -0.13), (0.47, -0.05), (0.46, 0.06), (0.50, 0.15))
        insula = polyline(side, y, path, (0.02, 0.018, 0.02, 0.014, 0.004))
        whiteness = whiteness * (1 - step(insula + 0.045, 0.05))
        sulci = np.maximum(sulci, step(insula - u(-0.005, 0.01), 0.025))

    tissue = grey + (white - grey) * whiteness + 0.012 * noise(rng, size, 30)
    cap = u(0, 0.1) * (1 if variant in {"FLAIR", "T2-weighted"} else -0.5)
    tissue = tissue + cap * bump(ventricles, 0.05)
    tissue = mix(tissue, fluid, sulci)
    ventricle = step(ventricles, 0.03)
    tissue = mix(tissue, fluid, ventricle)
    tissue = mix(tissue, fluid, step(-depth, 0.02))
    falx = bump(midline, 0.006) * step(medial - midline + 0.03, 0.05)
    tissue = tissue + falx * u(-0.15, 0.15)
    bone = skull + (marrow - skull) * bump(rho - 0.5 * (inner + outer), 0.25 * (outer - inner)) * u(0, 1)
    tissue = mix(tissue, bone, step(rho - inner, 0.025))
    skin = scalp * (1 + 0.12 * noise(rng, size, 9))
    tissue = mix(tissue, skin, step(rho - outer, 0.025))
    tissue = mix(tissue, u(0, 0.03), step(rho - 1, 0.03))
    brain = depth > 0.03

    def acquire(channels: Sequence[Field], rng: np.random.Generator) -> Field:
        image = exposure(rng, channels[0], 0.2, gain, gamma)
        if rng.uniform() < 0.15:
            strength = rng.uniform(0.03, 0.1)
            ghost = np.roll(image, round(size * rng.uniform(0.2, 0.5)), rng.integers(2))
            image = image + strength * ghost
        image = np.hypot(image + sigma * grain(rng, size, smear), sigma * grain(rng, size, smear))
        return blur(as_field(image), sharpness * size / 112)

    return Scene((as_field(tissue),), brain, brain & (ventricles < -0.02) & (depth > 0.08), acquire, variant)


def chest_xray(rng: np.random.Generator, size: int, scanner: Scanner) -> Scene:
    """Frontal chest film."""
    u, s = rng.uniform, scanner.uniform
    flesh, lungs, outside = s(0.52, 0.66), s(0.16, 0.28), s(0.02, 0.12)
    rib_gains, hilum_gain, vessel_gain = (s(0.03, 0.11), s(0.01, 0.06)), s(0.1, 0.22), s(0.12, 0.28)
    gain, gamma, sharpening, smear, sharpness = s(0.85, 1.2), s(-0.25, 0.25), s(0, 0.9), s(0, 0.6), s(0.25, 0.6)
    sigma = 0.006 * float(np.exp(s(-0.5, 1.0)))
    x, y = posed(rng, size, u(0.93, 1.15), shift=0.06, angle=0.06, warp=0.025)
    side = np.abs(x)
    left = x > 0  # the patient's left lies on the right of the film
    top, width = u(-0.84, -0.7), u(0.74, 0.9)
    rise = np.clip((y - top) / (0.9 - top), 0, 1.5)
    wall = width * np.power(rise, u(0.30, 0.42)) * (1 - u(0.0, 0.12) * rise)
    dome = u(0.42, 0.62)
    floor = dome + u(1.0, 1.7) * np.square(side - u(0.3, 0.4)) + np.where(left, u(0.0, 0.08), 0)
    heart = ellipse(x, y, (u(0.06, 0.14), dome - u(0.14, 0.22)), (u(0.28, 0.42), u(0.20, 0.28)), u(0.35, 0.75))
    knob = ellipse(x, y, (u(0.09, 0.14), u(-0.32, -0.22)), (0.09, u(0.08, 0.12)))
    trunk = u(0.10, 0.15) + 0.03 * noise(rng, size, 6) + 0.12 * np.maximum(y, 0) - side
    middle = join(join(heart, as_field(trunk), 0.16), knob, 0.05)
    lung = np.minimum(np.minimum(wall - side, floor - y), np.minimum(-middle, (y - top) * 0.8))
    air = step(lung, u(0.03, 0.06))

    shoulder = y - (-0.95 + 0.75 * np.square(np.maximum(side - 0.16, 0)) - u(0.0, 0.15) * (side < 0.2))
    flank = u(0.92, 1.1) + 0.06 * np.cos(3 * y) - side
    body = step(np.minimum(shoulder, flank), 0.08)
    soft = flesh + 0.05 * noise(rng, size, 5)
    soft = soft + u(0.04, 0.16) * step(middle, 0.08)
    soft = soft + u(0.1, 0.25) * step(y - floor, 0.1) * step(wall - side, 0.15)
    tissue = mix(soft, lungs + 0.06 * y + 0.02 * noise(rng, size, 10), 0.95 * air)

    dx, dy = side - u(0.15, 0.2), y - u(-0.08, 0.04) + np.where(left, -0.04, 0)
    reach = np.hypot(dx, dy)
    spoke = np.arctan2(dy, dx) + 0.25 * noise(rng, size, 7) + np.where(left, 0.0, 2.6)
    branches = np.abs(polar_noise(rng, spoke, reach, u(22, 34), 5))
    hilum = bump(reach, u(0.07, 0.11))
    vessels = bump(branches, 0.16 + 0.1 * u()) * np.clip(1 - reach / u(0.5, 0.8), 0, 1)
    tissue = tissue + air * (vessel_gain * vessels + hilum_gain * hilum)
    tissue = tissue + air * u(0.01, 0.03) * noise(rng, size, 28)

    pitch = u(0.135, 0.17)
    cage = step(wall + 0.08 - side, 0.05) * step(side - 0.08, 0.1) * step(y - top + 0.02, 0.1) * step(0.75 - y, 0.3)
    arch = np.power(side + 1e-4, 1.6)
    back = np.mod((y - u(0.25, 0.5) * arch) / pitch + u(), 1) - 0.5
    front = np.mod((y - u(0.5, 0.8) * (0.75 - side) - u(0.0, 0.1) * arch) / (pitch * 1.1) + u(), 1) - 0.5
    uneven = noise(rng, size, 6)
    for ribs, rib_gain, half in ((back, rib_gains[0], 0.26), (front, rib_gains[1], 0.28)):
        band = step(half - np.abs(ribs), 0.2)
        edge = bump(np.abs(ribs) - half, 0.06) * (0.5 + 0.5 * uneven)
        fade = (1 + 0.4 * uneven) * cage * (1 - 0.6 * step(middle, 0.1))
        fade = fade * (1.0 if ribs is back else step(side - 0.22, 0.2))
        tissue = tissue + rib_gain * fade * (band + 0.5 * edge)
    spine = step(0.075 - side, 0.05) * (0.6 + 0.4 * np.cos(y * 2 * np.pi / 0.15))
    tissue = tissue + u(0.0, 0.08) * spine
    windpipe = polyline(x, y, ((u(-0.01, 0.02), -1.1), (0, -0.22)), (0.035, 0.035))
    bronchi = polyline(side, y, ((0, -0.22), (0.12, -0.06)), (0.025, 0.015))
    tissue = tissue - u(0.05, 0.16) * step(np.maximum(windpipe, bronchi), 0.05)
    tilt = u(-0.06, 0.1)
    clavicle = polyline(side, y, ((0.07, top + 0.17), (0.3, top + 0.12), (0.66, top - tilt)), (0.04, 0.026, 0.03))
    tissue = tissue + u(0.08, 0.18) * step(clavicle, 0.03) * body
    tissue = mix(as_field(tissue), outside, 1 - body)
    if u() < 0.6:  # the side marker
        corner = (u(-0.9, -0.8), u(-0.85, -0.65))
        gx, gy = (g - c for g, c in zip(grid(size), corner, strict=True))
        strokes = ((0, 0.12), (0, 0), (0.05, 0), (0.06, 0.03), (0.05, 0.06), (0.01, 0.06), (0.06, 0.12))
        tissue = mix(tissue, u(0.8, 1), step(polyline(gx, gy, strokes, (0.012,) * len(strokes)), 0.015))
    if u() < 0.25:  # a lead or a line on the skin
        lead = x - u(-0.5, 0.5) - u(0.05, 0.3) * np.sin(y * u(1, 3.5) + u(0, 6.3))
        tissue = tissue + u(0.1, 0.35) * bump(lead, 0.012) * step(y - u(-1.2, 0), 0.02)
    field = (lung > 0.0) & (np.maximum(grid(size)[0], grid(size)[1]) < 0.97)

    def acquire(channels: Sequence[Field], rng: np.random.Generator) -> Field:
        image = exposure(rng, channels[0], 0.12, gain, gamma)
        image = image + sharpening * (image - blur(image, size / 25)) + sigma * grain(rng, size, smear)
        return blur(as_field(image), sharpness * size / 112)

    chest = (wall - side > 0.03) & (y > top + 0.05) & (y < floor + 0.15) & (step(shoulder, 0.1) > 0.9)
    return Scene((as_field(tissue),), field, field & (lung > 0.05), acquire, "frontal view", spread=chest | field)


def liver_ct(rng: np.random.Generator, size: int, scanner: Scanner) -> Scene:
    """Axial upper abdomen in a soft-tissue window, the liver on the left of the image."""
    u, s = rng.uniform, scanner.uniform
    phases = {
        # Liver, its vessels, spleen, blood, kidney.
        "portal venous phase": (0.62, 0.76, 0.68, 0.76, 0.78),
        "unenhanced": (0.53, 0.46, 0.50, 0.46, 0.44),
        "arterial phase": (0.55, 0.60, 0.66, 0.92, 0.80),
    }
    variant = scanner.choose(list(phases), (0.5, 0.25, 0.25))
    liver_value, vessel_value, spleen_value, blood, kidney_value = (v * s(0.92, 1.08) for v in phases[variant])
    fat, muscle, window, level = s(0.14, 0.24), s(0.44, 0.52), s(0.85, 1.35), s(-0.08, 0.1)
    smear, sharpness, sigma = s(0.3, 0.9), s(0.3, 0.6), 0.012 * float(np.exp(s(-0.6, 1.1)))
    alone = scanner.choose(("", ", liver alone"), (0.88, 0.12))
    x, y = posed(rng, size, u(0.92, 1.1), shift=0.04, angle=0.06, warp=0.03)
    high = u() < 0.55

    a, b = u(0.84, 0.94), u(0.60, 0.72)
    rho = np.power(np.power(np.abs(x / a), 2.4) + np.power(np.abs(y / b) + 1e-6, 2.4), 1 / 2.4)
    layer = u(0.04, 0.16)
    inside = 1 - layer - 0.05 * noise(rng, size, 4) * layer / 0.1 - rho
    cavity = inside - u(0.07, 0.11)
    tissue = np.where(rho < 1, fat, 0.0)
    tissue = mix(tissue, 0.5, bump(rho - 0.985, 0.012))
    tissue = mix(tissue, muscle, step(inside, 0.03))
    angle = np.arctan2(y, x)
    ribs = np.cos(angle * rng.integers(9, 14) + u(0, 6.3) + 0.5 * noise(rng, size, 5))
    rib = step(ribs - 0.35, 0.3) * bump(cavity + u(0.035, 0.05), 0.018) * step(y + 0.45, 0.2)
    tissue = mix(tissue, u(0.85, 1), np.minimum(rib * 1.6, 1))
    loops = noise(rng, size, 9)
    gut = muscle * step(loops + 0.1, 0.5) + fat * (1 - step(loops + 0.1, 0.5))
    tissue = mix(tissue, mix(as_field(gut), fat, np.full_like(x, 0.3 if high else 0.0)), step(cavity, 0.03))

    girth = a / 0.9
    spine_y = 0.55 * b
    psoas = ellipse(np.abs(x), y, (0.2, spine_y + 0.08), (0.11, 0.13), 0.4)
    tissue = mix(tissue, muscle, step(psoas, 0.04))
    if high:
        base = np.minimum(cavity, np.minimum(np.abs(x) - 0.14, y - u(0.12, 0.3)))
        tissue = mix(tissue, 0.0, step(base, 0.03))
    stomach = ellipse(x, y, (u(0.32, 0.42) * girth, u(-0.24, -0.1)), (u(0.16, 0.28), u(0.14, 0.22)), u(-0.6, 0.2))
    stomach = np.minimum(stomach, cavity - 0.01)
    content = np.where(y < u(-0.3, -0.15), 0.02, u(0.4, 0.9)) if u() < 0.6 else u(0.38, 0.5)
    tissue = mix(tissue, muscle, step(stomach + 0.02, 0.02))
    tissue = mix(tissue, as_field(content), step(stomach - 0.02, 0.02))
    spleen = ellipse(x, y, (u(0.60, 0.68) * girth, u(0.08, 0.2)), (u(0.15, 0.2), u(0.22, 0.3)), 0.3)
    spleen = np.minimum(spleen, cavity - 0.02)
    spleen = np.minimum(spleen, -ellipse(x, y, (0.4 * girth, 0.1), (0.17, 0.22)))
    tissue = mix(tissue, spleen_value, step(spleen, 0.03))

    right = ellipse(x, y, (-u(0.38, 0.46) * girth, u(-0.06, 0.04)), (u(0.42, 0.5), u(0.38, 0.48)), u(-0.3, 0.3))
    lobe = ellipse(x, y, (u(-0.08, 0.1), -u(0.2, 0.28)), (u(0.28, 0.45), u(0.14, 0.22)), u(-0.3, 0.1))
    liver = np.minimum(np.maximum(right, lobe), cavity - 0.015)
    liver = np.minimum(liver, -ellipse(x, y, (0.0, spine_y - 0.12), (0.2, 0.26)))
    kidney = ellipse(np.abs(x), y, (u(0.36, 0.42), spine_y - 0.05), (u(0.11, 0.14), u(0.14, 0.17)), 0.4)
    if not high:
        liver = np.minimum(liver, -kidney - 0.03)
    parenchyma = liver_value + 0.012 * noise(rng, size, 24) + 0.02 * noise(rng, size, 5)
    dx, dy = x + u(0.12, 0.24), y - u(-0.02, 0.1)
    reach = np.hypot(dx, dy)
    tree = np.abs(polar_noise(rng, np.arctan2(dy, dx) + 0.3 * noise(rng, size, 6), reach, u(12, 20), 4))
    veins = bump(tree, u(0.08, 0.16)) * np.clip(1.25 - reach / u(0.45, 0.7), 0, 1) * u(0.4, 1)
    dots = step(noise(rng, size, 16) - u(1.7, 2.2), 0.5) * u(0.3, 1)
    parenchyma = mix(parenchyma, vessel_value, np.minimum(veins + dots, 1))
    tissue = mix(tissue, parenchyma, step(liver, 0.025))
    if u() < 0.4:
        bladder = ellipse(x, y, (-u(0.16, 0.26), u(0.0, 0.1)), (u(0.05, 0.08), u(0.08, 0.12)), u(-0.5, 0.5))
        tissue = mix(tissue, u(0.36, 0.42), step(bladder, 0.03))
        liver = np.minimum(liver, -bladder - 0.03)
    if not high:
        tissue = mix(tissue, kidney_value, step(kidney, 0.03))
        pelvis = ellipse(np.abs(x), y, (0.33, spine_y - 0.05), (0.05, 0.07))
        tissue = mix(tissue, kidney_value * u(0.6, 0.85), step(pelvis, 0.04))
    aorta = ((u(0.02, 0.08), spine_y - 0.2), u(0.045, 0.07))
    vena_cava = ((-u(0.08, 0.14), spine_y - 0.22), u(0.05, 0.08))
    for centre, radius in (aorta, vena_cava):
        value = blood * u(0.94, 1.04)
        tissue = mix(tissue, value, step(ellipse(x, y, centre, (radius, radius * u(0.8, 1))), 0.02))
    vertebra = ellipse(x, y, (0, spine_y), (u(0.12, 0.15), u(0.10, 0.12)))
    path = ((0.1, spine_y + 0.08), (0.07, spine_y + 0.2), (0, spine_y + 0.26))
    arch = polyline(np.abs(x), y, path, (0.035, 0.03, 0.03))
    spinous = polyline(np.abs(x), y, ((0, spine_y + 0.24), (0, spine_y + 0.34)), (0.03, 0.02))
    process = polyline(np.abs(x), y, ((0.1, spine_y + 0.12), (0.22, spine_y + 0.17)), (0.03, 0.02))
    bone = np.maximum(np.maximum(vertebra, arch), np.maximum(process, spinous))
    canal = ellipse(x, y, (0, spine_y + 0.15), (0.06, 0.05))
    tissue = mix(tissue, u(0.7, 0.85) + 0.2 * bump(bone, 0.02) + 0.04 * noise(rng, size, 40), step(bone, 0.02))
    tissue = mix(tissue, muscle, step(canal, 0.03))
    organ = liver > 0.015
    if alone:
        tissue = tissue * step(liver, 0.02)

    def acquire(channels: Sequence[Field], rng: np.random.Generator) -> Field:
        image = (channels[0] - 0.5) * window + 0.5 + level + sigma * grain(rng, size, smear)
        return blur(as_field(image) * as_field(np.minimum(channels[0] * 12, 1)), sharpness * size / 112)

    spread = organ | (cavity > 0.02)
    return Scene((as_field(tissue),), organ, organ & (liver > 0.04), acquire, variant + alone, spread=spread)
