# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Draw docs/images/overview.png from the results of `make demo`: test images, MVFA's heatmaps and WinCLIP's.

The images lie at even distances in the list of test files; none was chosen.

python -m docs.draw_overview
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw

from tools.demo.page import summarise

SIZE, MARGIN, HEADER = 112, 62, 14


def main(root: Path, target: Path) -> None:
    """Put one example a column: the image with its lesion outlined, then a heatmap a method."""
    summaries = {folder.parent.name: summarise(folder.parent) for folder in sorted(root.glob("*/cells"))}
    columns = [(name, example) for name, summary in summaries.items() for example in summary.examples]
    rows = ("image", *columns[0][1].heatmaps)
    sheet = Image.new("RGB", (MARGIN + SIZE * len(columns), HEADER + SIZE * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(rows):
        pen.text((4, HEADER + row * SIZE + SIZE // 2 - 6), name, fill="black")
    for column, (name, example) in enumerate(columns):
        left = MARGIN + column * SIZE
        if column == 0 or columns[column - 1][0] != name:
            pen.text((left + 4, 1), name, fill="black")
        for row, picture in enumerate((example.image, *(heat for heat, _ in example.heatmaps.values()))):
            sheet.paste(picture.resize((SIZE, SIZE)), (left, HEADER + row * SIZE))
    sheet.quantize(200, dither=Image.Dither.NONE).save(target, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results/demo"), Path(__file__).parent / "images/overview.png")
