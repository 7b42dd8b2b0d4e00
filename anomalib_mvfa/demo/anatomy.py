# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Generated anatomy: brain MRI, chest X-ray, liver CT, retinal OCT, histology, breast ultrasound."""

from collections.abc import Sequence

import numpy as np

from .drawing import (
    Field,
    Scanner,
    Scene,
    as_field,
    blur,
    bump,
    cells,
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
        caudate = ellipse(side, y, (0.17 + 0.3 * r, -0.20), (0.055, 0.11), 0.5)
        lentiform = ellipse(side, y, (0.31, -0.05), (0.07, 0.19), -0.25)
        thalamus = ellipse(side, y, (0.13, 0.11), (0.105, 0.14), -0.5)
        nuclei = np.maximum(caudate, np.maximum(lentiform, thalamus))
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
