# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""What the tiny CLIP is trained on: generated images in several views, with captions."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from anomalib_mvfa.backbones.tiny import TINY_CONFIG
from anomalib_mvfa.demo.drawing import grain, noise
from anomalib_mvfa.demo.phantoms import MODALITIES, TYPICAL, draw_phantom
from anomalib_mvfa.training.lesions import LesionSynthesizer

from .textures import draw_texture

__all__ = ["CONFIG", "GRID", "NAMES", "PATCH", "SUBJECTS", "Batch", "View", "ViewDataset", "collate"]

Field = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]

CONFIG = TINY_CONFIG
"""open_clip configuration of what is trained; `train` writes it beside the weights."""

SIZE: int = CONFIG["vision_cfg"]["image_size"]
PATCH: int = CONFIG["vision_cfg"]["patch_size"]
GRID = SIZE // PATCH

NAMES: dict[str, tuple[str, ...]] = {
    "brain_mri": ("Brain", "brain MRI", "MRI of the head", "brain"),
    "chest_xray": ("Chest X-ray film", "chest X-ray", "radiograph of the chest", "chest"),
    "liver_ct": ("Liver", "liver CT", "CT of the abdomen", "liver"),
    "retinal_oct": ("retinal OCT", "OCT of the retina", "retina"),
    "histology": ("histopathological image", "histology", "stained tissue"),
    "breast_ultrasound": ("breast ultrasound", "ultrasound of the breast", "breast"),
    "texture": ("object", "surface", "texture", "pattern"),
}
SUBJECTS = tuple(NAMES)
"""The modalities, and textures that show nothing in particular."""
KINDS = {"bright": "bright", "dark": "dark", "ring": "ring-shaped", "texture": "textural", "displaced": "displacing"}
SHARES = (0.21, 0.13, 0.13, 0.13, 0.1, 0.18, 0.12)
"""Share of each of `SUBJECTS`."""
ONE_SCANNER_SHARE = 0.8
"""How many phantoms have the clear lesions of a set from one scanner; two of three have the modality's typical one."""
UNMOVED_SHARE, UNEXPOSED_SHARE = 0.3, 0.3
"""How many views keep the phantom's pose, and how many its grey values."""
ABNORMAL_SHARE = 0.55
SYNTHETIC_SHARE = 0.4
"""How many of the normal phantoms receive a synthetic lesion."""
LESION_WINDOW_SHARE = 0.7


class View(NamedTuple):
    """Part of a phantom as the tower sees it.

    Args:
        image: ``(3, n, n)`` in [0, 1], ``n`` pixels.
        target: ``(g * g,)``, the share of lesion in each patch.
        origin: Row and column of the first patch in the grid of the whole image.
        modality: Index into `SUBJECTS`.
        caption: A sentence.
    """

    image: Tensor
    target: Tensor
    origin: tuple[int, int]
    modality: int
    caption: str


class ViewDataset(Dataset[list[View]]):
    """Generated images by number, each in several views. A view depends on the seed and the number alone.

    Args:
        seed: Not negative.
        views: Views a phantom.
        window: Side of a view in patches; `GRID` gives whole images.
    """

    def __init__(self, seed: int, views: int, window: int = GRID) -> None:
        self.seed = seed
        self.views = views
        self.window = window
        self.synthesizer = LesionSynthesizer()

    def __getitem__(self, index: int) -> list[View]:
        """Generate an image and return several views of it."""
        cv2.setNumThreads(0)
        rng = np.random.default_rng((self.seed, index))
        modality = int(rng.choice(len(SUBJECTS), p=SHARES))
        abnormal = rng.uniform() < ABNORMAL_SHARE
        if modality == len(MODALITIES):
            image, variant, kind = draw_texture(SIZE, rng), "", ""
            mask: Mask = np.zeros((SIZE, SIZE), dtype=np.bool_)
            synthetic = abnormal
        else:
            name = MODALITIES[modality]
            scanner = int(rng.integers(2**31)) if rng.uniform() < ONE_SCANNER_SHARE else None
            lesion = TYPICAL[name] if scanner is not None and rng.uniform() < 0.67 else "random"
            phantom = draw_phantom(name, SIZE, lesion if abnormal else None, rng, scanner)
            image, variant = phantom.image.astype(np.float32) / 255, phantom.variant
            mask, kind = phantom.mask, KINDS.get(phantom.lesion or "", "")
            synthetic = not abnormal and rng.uniform() < SYNTHETIC_SHARE
        if synthetic:
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            changed, seen = self.synthesizer(torch.from_numpy(image).permute(2, 0, 1).contiguous(), generator)
            image, mask = changed.permute(1, 2, 0).numpy(), seen.numpy()
        return [self._view(image, mask, modality, variant, kind, rng) for _ in range(self.views)]

    def _view(
        self,
        image: Field,
        mask: Mask,
        modality: int,
        variant: str,
        kind: str,
        rng: np.random.Generator,
    ) -> View:
        weight: Field = mask.astype(np.float32)
        if rng.uniform() > UNMOVED_SHARE:
            image, weight = _move(image, weight, rng)
        row, column = self._origin(weight, rng)
        rows = slice(row * PATCH, (row + self.window) * PATCH)
        columns = slice(column * PATCH, (column + self.window) * PATCH)
        seen = np.zeros_like(mask)
        seen[rows, columns] = weight[rows, columns] > 0.5
        pixels = np.ascontiguousarray(image[rows, columns])
        if rng.uniform() > UNEXPOSED_SHARE:
            pixels = _expose(pixels, rng)
        target = weight[rows, columns].reshape(self.window, PATCH, self.window, PATCH).mean((1, 3)).ravel()
        return View(
            torch.from_numpy(pixels).permute(2, 0, 1).contiguous(),
            torch.from_numpy(target),
            (row, column),
            modality,
            _caption(modality, variant, kind, seen, rng),
        )

    def _origin(self, weight: Field, rng: np.random.Generator) -> tuple[int, int]:
        """Choose a window, most often one that holds the lesion's centre."""
        free = GRID - self.window
        rows, columns = np.nonzero(weight > 0.5)
        if not len(rows) or rng.uniform() > LESION_WINDOW_SHARE:
            return int(rng.integers(free + 1)), int(rng.integers(free + 1))
        pick = int(rng.integers(len(rows)))
        centre = (int(rows[pick]) // PATCH, int(columns[pick]) // PATCH)
        row, column = (int(np.clip(c - rng.integers(self.window), 0, free)) for c in centre)
        return row, column


def _move(
    image: Field,
    weight: Field,
    rng: np.random.Generator,
) -> tuple[Field, Field]:
    """Turn, stretch, shift and mirror an image and its mask alike."""
    angle = rng.uniform(-np.pi, np.pi) if rng.uniform() < 0.2 else rng.uniform(-0.3, 0.3)
    scale = float(np.exp(rng.uniform(-0.7 if rng.uniform() < 0.4 else -0.25, 0.25)))  # many real lesions are large
    stretch = float(np.exp(rng.uniform(-0.15, 0.15)))
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    mirror = rng.choice((-1, 1))
    upside = -1 if rng.uniform() < 0.15 else 1
    matrix = np.array([[cos, -sin], [sin, cos]]) @ np.diag([scale * stretch * mirror, scale / stretch * upside])
    centre = np.full(2, (SIZE - 1) / 2)
    offset = centre - matrix @ centre + rng.uniform(-8, 8, 2)
    affine = np.concatenate([matrix, offset[:, None]], axis=1)
    border = cv2.BORDER_REFLECT if rng.uniform() < 0.5 else cv2.BORDER_CONSTANT
    moved, weights = (
        np.asarray(cv2.warpAffine(field, affine, (SIZE, SIZE), borderMode=border), dtype=np.float32)
        for field in (image, weight)
    )
    return moved, weights


def _expose(image: Field, rng: np.random.Generator) -> Field:
    """Change grey values, sharpness and noise as scanners, screens and files do."""
    if rng.uniform() < 0.3:
        image = np.repeat(image.mean(2, keepdims=True), 3, axis=2)
    elif rng.uniform() < 0.3:
        image = image[..., rng.permutation(3)]
    if rng.uniform() < 0.3:
        sigma = rng.uniform(0.3, 1.2)
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), dtype=np.float32)
    if rng.uniform() < 0.5:
        image = np.power(np.clip(image, 0, 1), float(np.exp(rng.uniform(-0.7, 0.7))))
    if rng.uniform() < 0.3:
        knots = np.sort(rng.uniform(0, 1, 5))
        knots = 0.5 * knots + 0.5 * np.linspace(0, 1, 5)
        image = np.interp(image, np.linspace(0, 1, 5), knots).astype(np.float32)
    if rng.uniform() < 0.1:
        image = 1 - image
    if rng.uniform() < 0.7:
        image = image * rng.uniform(0.5, 1.4) + rng.uniform(-0.1, 0.15)
    image = _add_noise(image, rng)
    image = np.clip(image, 0, 1).astype(np.float32)
    if rng.uniform() < 0.15:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(25, 90))]
        encoded = cv2.imencode(".jpg", (image * 255).astype(np.uint8), quality)[1]
        image = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR), dtype=np.float32) / 255
    return image


def _add_noise(image: Field, rng: np.random.Generator) -> Field:
    """Add speckle, a gain that changes over the image, and pixel noise, each to some images."""
    if rng.uniform() < 0.15:  # speckle
        across, along = rng.uniform(0.3, 1.5, 2)
        envelope = np.hypot(*(grain(rng, image.shape[0], across, along) for _ in range(2)))
        image = image * np.power(0.8 * envelope, rng.uniform(0.2, 0.8))[..., None]
    if rng.uniform() < 0.15:  # a gain that changes over the image
        image = image * np.exp(0.25 * noise(rng, image.shape[0], 3))[..., None]
    if rng.uniform() < 0.4:
        pixel_noise = rng.standard_normal((*image.shape[:2], 1), dtype=np.float32)
        image = image + pixel_noise * rng.uniform(0, 0.05)
    return image


def _caption(
    modality: int,
    variant: str,
    kind: str,
    seen: Mask,
    rng: np.random.Generator,
) -> str:
    """Name modality and state, and for a lesion its kind, size and place."""
    name = str(rng.choice(NAMES[SUBJECTS[modality]]))
    if variant and rng.uniform() < 0.3:
        name = f"{name}, {variant}"
    if seen.sum() < PATCH * PATCH / 4:
        return str(rng.choice((f"a healthy {name}", f"a normal {name}", f"a {name} without lesion")))
    finding = " ".join(word for word in ("a", _extent(seen), kind, "lesion") if word)
    return f"a {name} with {finding} in the {_place(seen)}"


def _place(mask: Mask) -> str:
    """Return where in the image the centre of a mask ``(H, W)``, not empty, lies: ``"upper left"``."""
    rows, columns = np.nonzero(mask)
    row = ("upper", "", "lower")[int(rows.mean() * 3 / mask.shape[0])]
    column = ("left", "", "right")[int(columns.mean() * 3 / mask.shape[1])]
    return f"{row} {column}".strip() or "centre"


def _extent(mask: Mask) -> str:
    """Return how much of the image a mask ``(H, W)`` covers: ``"small"``, ``"medium"`` or ``"large"``."""
    share = float(mask.mean())
    return "small" if share < 0.012 else "medium" if share < 0.035 else "large"


class Batch(NamedTuple):
    """Views side by side: images ``(B, 3, n, n)``, targets ``(B, P)``, grid positions ``(B, P)`` and the texts."""

    images: Tensor
    targets: Tensor
    positions: Tensor
    modalities: Tensor
    captions: list[str]


def collate(groups: Sequence[list[View]]) -> Batch:
    """Put the views of several phantoms into one batch."""
    views = [view for group in groups for view in group]
    side = math.isqrt(len(views[0].target))
    cells = torch.arange(side)
    positions = [
        ((row + cells[:, None]) * GRID + column + cells).flatten() for row, column in (v.origin for v in views)
    ]
    return Batch(
        torch.stack([view.image for view in views]),
        torch.stack([view.target for view in views]),
        torch.stack(positions),
        torch.tensor([view.modality for view in views]),
        [view.caption for view in views],
    )
