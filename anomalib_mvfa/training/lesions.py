# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Synthetic lesions, for training on supports that are all normal.

A lesion is an irregular, soft-edged outline placed inside the body, and a change of the image within it. There are four
kinds of change: ``intensity`` (a brighter or darker blob, sometimes a ring), ``cutpaste`` (a piece of another normal
image), ``texture`` (added grain, blur or sharpening) and ``deformation`` (tissue pushed outwards or pulled inwards).
The mask covers the visible change, not the whole outline.

Sources: training on such lesions, MediCLIP (arXiv 2405.11315); local warps, foreign patch interpolation and its
successors; pasted patches, CutPaste (arXiv 2104.04015).
"""

import math
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.nn import functional as nnf
from torchvision.transforms.v2 import functional as tvf

__all__ = ["LESION_KINDS", "LesionSynthesizer", "estimate_body"]

GREY_LEVEL = 1 / 255
MIN_BODY = 0.05  # of the image
MIN_DIAMETER = 6.0  # pixels
MIN_AREA = 9  # pixels
MIN_CHANGED = 0.5  # of the mask
TRIES = 5
RING_PROBABILITY = 0.3


class Outline(NamedTuple):
    """Location and shape of a lesion inside a ``(h, w)`` box around it."""

    box: tuple[slice, slice]  # rows and columns in the image
    alpha: Tensor  # weight of the lesion ``(h, w)`` in [0, 1]
    rho: Tensor  # distance ``(h, w)`` from the centre in lesion radii, made irregular by noise (1 at the edge)
    centre: tuple[int, int]  # row and column in the box
    radius: float  # in pixels


def estimate_body(image: Tensor) -> Tensor:
    """Separate the body (or tissue) from a flat background and from padding.

    Otsu's threshold on the square root of the smoothed brightness, which keeps dark tissue; the side with the image's
    corners is the background. Small components are dropped and holes filled. Evenly black or white areas at the
    border, as a straightened retinal scan has them, are padding. The body ``(H, W)`` of an image ``(3, H, W)`` in
    [0, 1] is true everywhere if there is no flat background, or if it would cover less than 5 % of the image.
    """
    foreground, content = _foreground(image), ~_padding(image)
    for body in (foreground & content, content):  # the foreground may be the padding
        if float(body.float().mean()) >= MIN_BODY:
            return body
    return foreground


def _padding(image: Tensor) -> Tensor:
    """Find evenly black or white areas at the border of at least 1 % of the image; boolean ``(H, W)``."""
    levels = (image.mean(0).float().clamp(0, 1) * 255).round().byte().numpy()
    window = np.ones((5, 5), np.uint8)
    low, high = cv2.erode(levels, window), cv2.dilate(levels, window)
    even = (high - low <= 3) & ((low <= 5) | (high >= 250))
    _, parts, facts, _ = cv2.connectedComponentsWithStats(even.astype(np.uint8), connectivity=4)
    border = np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]])
    kept = [part for part in np.unique(border) if part and facts[part, cv2.CC_STAT_AREA] >= even.size / 100]
    return torch.from_numpy(cv2.dilate(np.isin(parts, kept).astype(np.uint8), window)).bool()


def _foreground(image: Tensor) -> Tensor:
    """Separate bright from dark and return the side without the corners; boolean ``(H, W)``."""
    brightness = image.mean(0).float().clamp(0, 1).sqrt().numpy()
    height, width = brightness.shape
    everywhere = torch.ones(height, width, dtype=torch.bool)
    smooth = cv2.GaussianBlur(brightness, (0, 0), max(min(height, width) / 120, 0.5))
    _, high = cv2.threshold((smooth * 255).astype(np.uint8), 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)

    corner = max(min(height, width) // 10, 1)
    ends = slice(None, corner), slice(-corner, None)
    corners = np.concatenate([high[rows, columns].ravel() for rows in ends for columns in ends])
    foreground = 1 - high if round(corners.mean()) else high
    if not foreground.any():
        return everywhere
    solid = _solid(foreground, 0.25)
    inside, outside = smooth[foreground == 1], smooth[solid == 0]
    if not outside.size or solid.mean() < MIN_BODY:
        return everywhere
    background = np.median(outside)
    if np.median(np.abs(outside - background)) > np.abs(np.median(inside) - background) / 5:  # 1/4 if unimodal
        return everywhere
    return torch.from_numpy(solid).bool()


class LesionSynthesizer:
    """Adds a synthetic lesion to a normal image and returns its mask.

    Attributes:
        kinds: The kinds to choose from, each equally likely.
        size_range: Lesion diameter as a fraction of the body's size (the square root of its area).
        contrast_range: Brightness change in standard deviations of the brightness inside the body.
        softness_range: Width of the soft edge in lesion radii.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> image = torch.rand(3, 56, 56, generator=generator)
        >>> lesioned, mask = LesionSynthesizer()(image, generator)
        >>> lesioned.shape, mask.shape, bool(mask.any())
        (torch.Size([3, 56, 56]), torch.Size([56, 56]), True)
    """

    kinds: Sequence[str] = ("intensity", "cutpaste", "texture", "deformation")
    size_range = (0.1, 0.4)
    contrast_range = (0.5, 2.0)
    softness_range = (0.2, 0.8)

    def __call__(self, image: Tensor, generator: Generator, donor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add a lesion of a random kind.

        A lesion too faint or too small to be visible is replaced by a larger and stronger one. Where a kind is never
        visible (a warp of a flat image), an intensity lesion takes its place after a few tries.

        Args:
            image: ``(3, H, W)`` in [0, 1], on the CPU. It is not changed.
            generator: Source of all randomness, on the CPU.
            donor: Another normal image, ``(3, H', W')``, from which ``cutpaste`` takes its piece; the image if none.

        Returns:
            The image with the lesion, float32 ``(3, H, W)`` in [0, 1], and its boolean mask ``(H, W)``, never empty.
            Outside the mask the image is unchanged. A grey image stays grey.

        Raises:
            ValueError: If the image or the donor is not ``(3, H, W)`` floating point in [0, 1].
        """
        image = _checked(image, "image")
        donor = image if donor is None else _checked(donor, "donor")
        body = estimate_body(image)
        depth = _depth(body)
        body_size = math.sqrt(float(body.sum()))
        spread = max(float(image.mean(0)[body].std(correction=0)), 0.05)
        kind = self.kinds[_integer(len(self.kinds), generator)]
        attempt = 0
        while True:
            diameter = max(_uniform(*self.size_range, generator) * body_size, MIN_DIAMETER) * 1.1**attempt
            softness = _uniform(*self.softness_range, generator)
            contrast = _uniform(*self.contrast_range, generator) * spread * 1.5**attempt
            # A warp has to fade from the centre on, or it would tear the tissue at its edge.
            outline = _outline(depth, diameter / 2, 1.0 if kind == "deformation" else softness, generator)
            patch = image[:, outline.box[0], outline.box[1]]
            changed = LESION_KINDS[kind](patch, outline, contrast, donor, generator).clamp(0, 1)
            altered, seen = _keep_visible(patch, changed, outline)
            change = (altered - patch).abs().amax(0)[seen]
            if (
                len(change) >= min(MIN_AREA, int(body.sum()))
                and (change > GREY_LEVEL).float().mean() >= MIN_CHANGED
                and change.mean() >= min(spread / 4, 10 * GREY_LEVEL)
            ):
                lesioned, mask = image.clone(), torch.zeros_like(body)
                lesioned[:, outline.box[0], outline.box[1]] = altered
                mask[outline.box] = seen
                return lesioned, mask
            attempt += 1
            if attempt == TRIES and kind != "intensity":
                kind, attempt = "intensity", 0

    def draw_on_half(self, images: Tensor, epoch: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Add a lesion to every second normal image of a batch, and in the next epoch to the others.

        The lesion of an image depends on the global seed (``seed_everything``), the epoch and the image alone, so that
        it is the same after resuming and in any process. The piece for ``cutpaste`` comes from a neighbour in the batch
        that has no lesion.

        Returns:
            New images ``(B, 3, H, W)``, masks ``(B, H, W)`` and labels ``(B,)``, on the device of the images.
        """
        lesioned = torch.as_tensor(images).as_subclass(Tensor).cpu().clone()
        masks = torch.zeros(len(lesioned), *lesioned.shape[-2:], dtype=torch.bool)
        labels = torch.zeros(len(lesioned), dtype=torch.bool)
        for index in range((epoch + number) % 2, len(lesioned), 2):
            neighbour = index + 1 if index + 1 < len(lesioned) else index - 1
            donor = lesioned[neighbour] if neighbour >= 0 else None
            lesioned[index], masks[index] = self(lesioned[index], _generator(lesioned[index], epoch), donor)
            labels[index] = True
        return lesioned.to(images.device), masks.to(images.device), labels.to(images.device)


def _generator(image: Tensor, epoch: int) -> Generator:
    digest = blake2b(f"{torch.initial_seed()} {epoch}".encode(), digest_size=8)
    digest.update(image.float().contiguous().numpy().data)
    return Generator().manual_seed(int.from_bytes(digest.digest(), "little", signed=True))


def _intensity(image: Tensor, outline: Outline, contrast: float, _: Tensor, generator: Generator) -> Tensor:
    """Make the tissue brighter or darker, unevenly and with some of its texture lost; sometimes as a ring."""
    profile = outline.alpha * (1 + 0.25 * _noise(image, outline.radius / 2, generator))
    if _uniform(0, 1, generator) < RING_PROBABILITY:
        core = _smoothstep((_uniform(0.4, 0.7, generator) - outline.rho) / 0.35)
        profile = profile * (1 - _uniform(0.7, 1.5, generator) * core)
    shift = _shift(image, outline, contrast, generator)
    lost = _uniform(0, 0.7, generator) * outline.alpha
    return image + profile * shift - lost * (image - _blurred(image, outline.radius / 3))


def _cutpaste(image: Tensor, outline: Outline, contrast: float, donor: Tensor, generator: Generator) -> Tensor:
    """Replace the tissue by a turned and scaled piece of the donor at another brightness."""
    if _is_grey(image):
        donor = donor.mean(0, keepdim=True).expand(3, -1, -1)
    source = _centre(_depth(estimate_body(donor)), outline.radius, generator)
    angle = _uniform(0, 2 * math.pi, generator)
    scale = _uniform(0.6, 1.4, generator)
    mirror = 1 if _integer(2, generator) else -1
    rows, columns = _offsets(image, outline.centre)
    piece = _sample(
        donor,
        source[0] + scale * (math.cos(angle) * rows - math.sin(angle) * columns * mirror),
        source[1] + scale * (math.sin(angle) * rows + math.cos(angle) * columns * mirror),
    )
    weight = outline.alpha / outline.alpha.sum()
    difference = ((image - piece) * weight).sum((1, 2), keepdim=True)
    return image + outline.alpha * (piece + difference + _shift(image, outline, contrast / 2, generator) - image)


def _texture(image: Tensor, outline: Outline, contrast: float, _: Tensor, generator: Generator) -> Tensor:
    """Add grain of another scale, or remove or exaggerate fine detail."""
    detail = image - _blurred(image, outline.radius / 2)
    variant = _integer(3, generator)
    if variant == 0:
        change = contrast / 3 * _noise(image, _uniform(1.5, max(outline.radius / 4, 2), generator), generator)
    elif variant == 1:
        change = -detail
    else:
        change = contrast / (2 * detail.std().clamp_min(0.05)) * detail
    return image + outline.alpha * change


def _deformation(image: Tensor, outline: Outline, _: float, __: Tensor, generator: Generator) -> Tensor:
    """Push the tissue away from the centre or pull it towards it."""
    strength = _uniform(0.5, 0.9, generator) * (1 if _integer(2, generator) else -1)
    rows, columns = _offsets(image, outline.centre)
    pull = 1 - strength * outline.alpha
    warped = _sample(image, outline.centre[0] + pull * rows, outline.centre[1] + pull * columns)
    return torch.where(outline.alpha > 0, warped, image)


LESION_KINDS: dict[str, Callable[[Tensor, Outline, float, Tensor, Generator], Tensor]] = {
    "intensity": _intensity,
    "cutpaste": _cutpaste,
    "texture": _texture,
    "deformation": _deformation,
}


def _checked(image: Tensor, name: str) -> Tensor:
    if image.shape[:-2] != (3,) or not image.is_floating_point():
        msg = f"{name} must be floating point of shape (3, H, W); got {image.dtype} of shape {tuple(image.shape)}."
        raise ValueError(msg)
    low, high = image.aminmax()
    if not (low >= -GREY_LEVEL and high <= 1 + GREY_LEVEL):
        msg = f"{name} must lie in [0, 1] without NaN; scale it before lesions are added."
        raise ValueError(msg)
    return image.float().clamp(0, 1)  # interpolation may have overshot by less than a grey level


def _outline(depth: Tensor, radius: float, softness: float, generator: Generator) -> Outline:
    """Place an irregular ellipse in the body, faded out towards the body's border."""
    row, column = _centre(depth, radius, generator)
    reach = math.ceil(2.3 * radius)  # stretch and noise carry the edge out to 2.27 radii
    box = (slice(max(row - reach, 0), row + reach + 1), slice(max(column - reach, 0), column + reach + 1))
    depth = depth[box]
    centre = (row - box[0].start, column - box[1].start)
    rows, columns = _offsets(depth, centre)
    angle = _uniform(0, math.pi, generator)
    stretch = math.sqrt(_uniform(1, 2, generator))
    along = (math.cos(angle) * rows + math.sin(angle) * columns) / stretch
    across = (math.cos(angle) * columns - math.sin(angle) * rows) * stretch
    noise = _noise(depth, radius * _uniform(0.5, 1, generator), generator).clamp(-2, 2)
    rho = torch.hypot(along, across) / radius + 0.3 * noise
    border = (depth / max(radius / 6, 1)).clamp(max=1)
    return Outline(box, _smoothstep((1 - rho) / softness) * border, rho, centre, radius)


def _keep_visible(image: Tensor, changed: Tensor, outline: Outline) -> tuple[Tensor, Tensor]:
    """Fade faint changes to nothing and mark the others: the image ``(3, h, w)`` and its mask ``(h, w)``."""
    change = changed - image
    size = change.abs().amax(0)
    faint = 0.05 * size.max()
    change = change * (1 - faint / size.clamp_min(1e-6)).clamp_min(0)
    visible = size - faint > GREY_LEVEL
    reach = 2 * max(round(outline.radius / 6), 1) + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach))
    closed = cv2.morphologyEx(visible.byte().numpy(), cv2.MORPH_CLOSE, disc)
    mask = torch.from_numpy(_solid(closed, 0.1)).bool() & (outline.alpha > 0)
    return torch.where(mask, (image + change).clamp(0, 1), image), mask


def _solid(mask: NDArray[Any], share: float) -> NDArray[np.uint8]:
    """Keep components of at least ``share`` of the largest one's area, without holes; ``(H, W)`` uint8 in and out."""
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    areas = [cv2.contourArea(contour) for contour in contours]
    kept = [contour for contour, area in zip(contours, areas, strict=True) if area >= share * max(areas)]
    return np.asarray(cv2.drawContours(np.zeros_like(mask), kept, -1, 1, cv2.FILLED))


def _depth(body: Tensor) -> Tensor:  # distance of each pixel from the background, 0 outside the body
    return torch.from_numpy(cv2.distanceTransform(body.byte().numpy(), cv2.DIST_L2, 5))


def _centre(depth: Tensor, radius: float, generator: Generator) -> tuple[int, int]:
    """Choose a pixel about a lesion radius inside the body, or as deep as the body allows."""
    deepest = float(depth.max())
    candidates = (depth >= min(radius + 0.1 * deepest, 0.7 * deepest)).nonzero()
    row, column = candidates[_integer(len(candidates), generator)].tolist()
    return row, column


def _shift(image: Tensor, outline: Outline, contrast: float, generator: Generator) -> Tensor:
    """Compute a brightness change ``(3, 1, 1)`` of random sign unless that would clip; tint colour images slightly."""
    sign = 1 if _integer(2, generator) else -1
    tint = 0.1 * torch.randn(3, 1, 1, generator=generator)
    mean = float((image.mean(0) * outline.alpha).sum() / outline.alpha.sum())
    if (1 - mean if sign > 0 else mean) < min(contrast, 0.5):
        sign = -sign
    size = min(contrast, 0.8 * (1 - mean if sign > 0 else mean))
    return sign * size * (torch.ones(3, 1, 1) if _is_grey(image) else 1 + tint)


def _is_grey(image: Tensor) -> bool:
    return bool((image.amax(0) - image.amin(0)).max() <= 2 * GREY_LEVEL)


def _noise(like: Tensor, cell: float, generator: Generator) -> Tensor:
    """Generate smooth standard normal noise ``(H, W)`` whose grains are about ``cell`` pixels wide."""
    height, width = like.shape[-2:]
    grid = [1, max(round(height / cell), 2), max(round(width / cell), 2)]
    noise: Tensor = tvf.resize(torch.randn(grid, generator=generator), [height, width], antialias=False)
    return noise[0]


def _blurred(image: Tensor, cell: float) -> Tensor:
    height, width = image.shape[-2:]
    small = tvf.resize(image, [max(round(height / max(cell, 2)), 1), max(round(width / max(cell, 2)), 1)])
    blurred: Tensor = tvf.resize(small, [height, width])
    return blurred


def _offsets(image: Tensor, centre: tuple[int, int]) -> tuple[Tensor, Tensor]:
    height, width = image.shape[-2:]
    return torch.arange(height)[:, None] - float(centre[0]), torch.arange(width)[None] - float(centre[1])


def _sample(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Read ``(3, H, W)`` bilinearly at pixel coordinates ``(H', W')``, mirrored at the borders."""
    height, width = image.shape[-2:]
    grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], -1)
    return nnf.grid_sample(image[None], grid[None], padding_mode="reflection", align_corners=False)[0]


def _smoothstep(x: Tensor) -> Tensor:
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


def _uniform(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _integer(end: int, generator: Generator) -> int:
    return int(torch.randint(end, (), generator=generator))
