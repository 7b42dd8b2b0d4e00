# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Draw docs/images/overview.png: a test image of each modality, its mask outlined, and the model's heatmap.

One small model a modality, 4 + 4 drawn supports, six epochs each. The pictures are the first
abnormal test image of each modality; none was chosen.

python docs/draw_overview.py
"""

import logging
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch
from anomalib.data.utils import read_image, read_mask
from anomalib.engine import Engine
from PIL import Image, ImageDraw

from anomalib_mvfa import MVFA
from anomalib_mvfa.data import FewShot, MedicalBMAD
from anomalib_mvfa.demo.phantoms import MODALITIES, SET_NAMES, write_phantoms

SIZE, MARGIN, HEADER, EPOCHS = 112, 62, 14, 6
ROWS = ("image", "heatmap")


def main() -> None:
    """Train on each modality and draw one column of it."""
    logging.disable(logging.WARNING)
    sheet = Image.new("RGB", (MARGIN + SIZE * len(MODALITIES), HEADER + SIZE * len(ROWS)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(ROWS):
        pen.text((4, HEADER + row * SIZE + SIZE // 2 - 6), name, fill="black")
    with tempfile.TemporaryDirectory() as folder:
        for column, modality in enumerate(MODALITIES):
            root = write_phantoms(folder, [modality], {"train": 16, "valid": 12, "test": 8})
            heatmap, image, mask = _predict(root, SET_NAMES[modality])
            image[cv2.dilate(mask, np.ones((3, 3), np.uint8)) > mask] = (255, 220, 0)
            colours = cv2.cvtColor(cv2.applyColorMap(heatmap, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
            left = MARGIN + column * SIZE
            pen.text((left + 4, 1), modality.replace("_", " "), fill="black")
            for row, pixels in enumerate((image, colours)):
                sheet.paste(Image.fromarray(pixels), (left, HEADER + row * SIZE))
    sheet.quantize(200, dither=Image.Dither.NONE).save(Path(__file__).parent / "images/overview.png", optimize=True)


def _predict(root: Path, category: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Train on a set and give heatmap ``(H, W)``, image ``(H, W, 3)`` and mask ``(H, W)`` of a test image, uint8."""
    data = FewShot(MedicalBMAD(root, category, num_workers=0, eval_batch_size=8), k_shot=4, train_batch_size=4)
    torch.manual_seed(0)
    model = MVFA(backbone="tiny")
    engine = Engine(max_epochs=EPOCHS, check_val_every_n_epoch=EPOCHS, default_root_dir=root, enable_progress_bar=False)
    engine.fit(model, datamodule=data)
    folder = root / category / "test/Ungood"
    image = read_image(folder / "img/0000.png", as_tensor=True)
    with torch.inference_mode():
        heatmap = model.eval()(image[None].to(model.device)).anomaly_map.squeeze().cpu().clamp(0, 1)
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy().copy()
    mask = np.asarray(read_mask(folder / "label/0000.png") > 0, dtype=np.uint8)
    return (heatmap * 255).round().byte().numpy(), pixels, mask.squeeze()


if __name__ == "__main__":
    main()
