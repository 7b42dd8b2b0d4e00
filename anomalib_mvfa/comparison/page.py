# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The page: one HTML file that carries its style and pictures, and needs no script and no network.

Nothing here knows of a comparison: `page` is the skeleton, `gallery` shows images with their heatmaps, `Table` is
written as HTML or Markdown.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["GalleryRow", "Panel", "Section", "Table", "colour_bar", "gallery", "page", "picture", "thumbnail"]

THUMBNAIL = 160  # pixels of the longer side
_QUALITY = 82
_OUTLINE = (0, 255, 255)  # cyan, which no tissue has and every colour-blind eye tells from grey

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Args:
        name: Its anchor, of letters and digits.
        title: Its heading.
        body: HTML.
    """

    name: str
    title: str
    body: str


@dataclass(frozen=True)
class Table:
    """A table of text.

    Args:
        caption: Its title.
        header: A heading a column; a second line may follow after a line break.
        rows: As many texts a row as there are columns; the first is the row's heading.
        published: Numbers of the rows that others published, which are set in grey italics.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    published: frozenset[int] = field(default=frozenset())

    def to_html(self) -> str:
        """Write the table, in a box of its own that scrolls sideways."""
        head = []
        for text in self.header:
            first, _, second = text.partition("\n")
            head.append(f'<th scope="col">{escape(first)}{f"<small>{escape(second)}</small>" if second else ""}</th>')
        body = []
        for number, (first, *others) in enumerate(self.rows):
            style = ' class="published"' if number in self.published else ""
            cells = "".join(f"<td>{escape(text)}</td>" for text in others)
            body.append(f'<tr{style}><th scope="row">{escape(first)}</th>{cells}</tr>')
        return (
            f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(self.caption)}"><table>'
            f"<caption><span>{escape(self.caption)}</span></caption><thead><tr>{''.join(head)}</tr></thead>"
            f"<tbody>{''.join(body)}</tbody></table></div>"
        )

    def to_markdown(self) -> str:
        """Write the table for a Markdown file."""

        def line(texts: Sequence[str]) -> str:
            return f"| {' | '.join(text.replace('|', chr(92) + '|') for text in texts)} |"

        rows = [[f"*{text}*" for text in row] if n in self.published else row for n, row in enumerate(self.rows)]
        head = [text.replace("\n", ", ") for text in self.header]
        return "\n".join([f"**{self.caption}**", "", line(head), "|---" * len(head) + "|", *map(line, rows)])


def page(title: str, sections: Sequence[Section], intro: str = "", footer: str = "") -> str:
    """Write a page.

    Args:
        title: Its title.
        sections: Its parts, in order; those without a body are left out.
        intro: HTML between the title and the first part.
        footer: HTML at the end.

    Returns:
        A whole HTML document.
    """
    shown = [section for section in sections if section.body]
    links = "".join(f'<a href="#{section.name}">{escape(section.title)}</a>' for section in shown)
    parts = "".join(f'<section id="{s.name}"><h2>{escape(s.title)}</h2>{s.body}</section>\n' for s in shown)
    style = files("anomalib_mvfa.comparison").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{intro}</header>\n"
        f'<nav aria-label="Contents">{links}</nav>\n<main>\n{parts}</main>\n'
        f"<footer>{footer}</footer>\n</body>\n</html>\n"
    )


@cache
def _colours() -> Pixels:
    """Give the colours of the heatmaps, ``(256, 3)`` RGB: equal steps look equal, also to colour-blind eyes."""
    ramp = np.arange(256, dtype=np.uint8)[:, None]
    return np.asarray(cv2.applyColorMap(ramp, cv2.COLORMAP_INFERNO)[:, 0, ::-1])


def colour_bar(low: str = "low", high: str = "high") -> str:
    """Draw the colours of the heatmaps, with what their ends stand for."""
    stops = ", ".join(f"rgb({r}, {g}, {b})" for r, g, b in _colours()[::17].tolist())
    return (
        '<div class="bar"><div role="img" '
        'aria-label="Colours of the heatmaps, from black over purple and orange to pale yellow" '
        f'style="background: linear-gradient(to right, {stops})"></div>'
        f"<span><span>{escape(low)}</span><span>{escape(high)}</span></span></div>"
    )


def thumbnail(image: Pixels) -> Pixels:
    """Shrink an image ``(H, W, 3)`` to at most 160 pixels a side."""
    height, width = image.shape[:2]
    scale = min(1.0, THUMBNAIL / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


@dataclass(frozen=True)
class Panel:
    """One heatmap of an image.

    Args:
        name: Whose it is: a method.
        heat: ``(h, w)``, uint8, or ``None`` where there is none.
        score: What the method says, short.
        detail: A second line.
    """

    name: str
    heat: Pixels | None
    score: str
    detail: str = ""


@dataclass(frozen=True)
class GalleryRow:
    """One image with everything that is shown of it.

    Args:
        name: What it is called; never a file name of patient data unless that was asked for.
        label: ``"normal"``, ``"abnormal"`` or empty.
        image: ``(H, W, 3)``, uint8, or ``None`` if it cannot be shown.
        mask: ``(h, w)``, true inside lesions, of any size; ``None`` where none is known.
        panels: Its heatmaps, stretched to the image.
        remark: Why it is shown.
    """

    name: str
    label: str
    image: Pixels | None
    mask: NDArray[np.bool_] | None
    panels: Sequence[Panel]
    remark: str = ""


def gallery(rows: Sequence[GalleryRow]) -> str:
    """Show images: the image, the outline of its mask, and its heatmaps, side by side as far as there is room.

    Args:
        rows: One an image. All heatmaps are coloured alike, 0 darkest and 255 brightest.

    Returns:
        HTML.
    """
    return f'<div class="images">{"".join(map(_gallery_row, rows))}</div>'


def _gallery_row(row: GalleryRow) -> str:
    about = f"{row.name}, {row.label}" if row.label else row.name
    figures = []
    shape: tuple[int, ...] = (1, 1)
    if row.image is None:
        figures.append('<figure><div class="none">image not found</div><figcaption>input</figcaption></figure>')
    else:
        small = thumbnail(row.image)
        shape = small.shape[:2]
        figures.append(picture(small, f"Input: {about}", "input"))
        if row.mask is not None and row.mask.any():
            figures.append(picture(_outlined(small, row.mask), f"Outline of the mask: {about}", "mask outline"))
    for panel in row.panels:
        lines = "<br>".join(escape(line) for line in (panel.score, panel.detail) if line)
        said = f"{escape(panel.name)}<small>{lines}</small>"
        if panel.heat is None:
            figures.append(f'<figure><div class="none">gives no map</div><figcaption>{said}</figcaption></figure>')
        else:
            alt = f"Heatmap of {panel.name}: {about}, {panel.score}"
            figures.append(picture(_colours()[panel.heat], alt, said, shape))
    remark = f" <span>{escape(row.remark)}</span>" if row.remark else ""
    return (
        f'<article class="image"><h4>{escape(about)}{remark}</h4><div class="strip">{"".join(figures)}</div></article>'
    )


def picture(pixels: Pixels, alt: str, caption: str, shape: tuple[int, ...] | None = None) -> str:
    """Embed a picture with its caption.

    Args:
        pixels: ``(H, W, 3)``, uint8.
        alt: What it shows, for those who cannot see it.
        caption: HTML.
        shape: Height and width that it is stretched to; ``None`` takes its own.

    Returns:
        HTML.
    """
    height, width = (shape or pixels.shape)[:2]
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" alt="{escape(alt)}" '
        f'style="aspect-ratio: {width} / {height}"><figcaption>{caption}</figcaption></figure>'
    )


def _outlined(image: Pixels, mask: NDArray[np.bool_]) -> Pixels:
    size: Any = (image.shape[1], image.shape[0])
    inside = cv2.resize(mask.astype(np.uint8) * 255, size, interpolation=cv2.INTER_LINEAR) > 127
    if not inside.any():  # a lesion smaller than a pixel
        inside = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
    grown = cv2.dilate(inside.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    drawn = image.copy()
    drawn[grown & ~inside] = _OUTLINE
    return drawn
