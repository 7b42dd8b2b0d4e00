# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Draw docs/images/lesions.png: every kind of synthetic lesion on drawn normal images, its mask outlined.

python docs/draw_lesions.py
"""

from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from anomalib_mvfa.demo.phantoms import MODALITIES, draw_phantom
from anomalib_mvfa.training.lesions import LESION_KINDS, LesionSynthesizer

SIZE, MARGIN, HEADER, FONT = 128, 150, 26, 18


def main() -> None:
    """Draw one row a modality: a normal image, then each kind of lesion twice."""
    columns = ["normal", *(kind for kind in LESION_KINDS for _ in range(2))]
    synthesizer = LesionSynthesizer()
    sheet = Image.new("RGB", (MARGIN + SIZE * len(columns), HEADER + SIZE * len(MODALITIES)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.font = ImageFont.load_default(FONT)
    for row, modality in enumerate(MODALITIES):
        pen.text((4, HEADER + row * SIZE + SIZE // 2 - FONT // 2), modality.replace("_", " "), fill="black")
        image, donor = (
            torch.from_numpy(draw_phantom(modality, SIZE, None, np.random.default_rng((row, number))).image)
            for number in range(2)
        )
        image, donor = (picture.permute(2, 0, 1).float() / 255 for picture in (image, donor))
        for column, kind in enumerate(columns):
            pen.text((MARGIN + column * SIZE + 4, 1), kind, fill="black")
            picture, mask = image, torch.zeros(SIZE, SIZE, dtype=torch.bool)
            if kind != "normal":
                synthesizer.kinds = (kind,)
                picture, mask = synthesizer(image, torch.Generator().manual_seed(column), donor)
            pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy().copy()
            solid = mask.byte().numpy()
            pixels[cv2.dilate(solid, np.ones((3, 3), np.uint8)) > solid] = (255, 60, 40)
            sheet.paste(Image.fromarray(pixels), (MARGIN + column * SIZE, HEADER + row * SIZE))
    sheet.quantize(120, dither=Image.Dither.NONE).save(Path(__file__).parent / "images/lesions.png", optimize=True)


if __name__ == "__main__":
    main()
