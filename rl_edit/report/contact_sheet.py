"""A contact sheet: small pictures in rows, each row an example with its words, masks as outlines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SIDE = 176
LINE = 14
GAP = 8
FOUND = (255, 128, 0)
TRUE = (0, 220, 255)
THICKNESS = 2
COLUMNS = 3
"""Examples side by side."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture [height, width, 3] and the masks [height, width] outlined on it, by colour, the last on top."""

    pixels: NDArray[np.uint8]
    outlined: Sequence[tuple[NDArray[np.bool_], tuple[int, int, int]]] = field(default=())


@dataclass(frozen=True, kw_only=True)
class Example:
    """Pictures of one size side by side, with lines of text under them."""

    pictures: Sequence[Picture]
    lines: Sequence[str]


def contact_sheet(title: str, examples: Sequence[Example]) -> Image.Image:
    """All examples, ``COLUMNS`` to a row, every one as large as the largest."""
    shown = [_shown(example) for example in examples]
    width, height = (max(picture.size[axis] for picture in shown) + 2 * GAP for axis in (0, 1))
    rows = -(-len(shown) // COLUMNS)
    sheet = Image.new(
        "RGB", (width * min(COLUMNS, len(shown)), height * rows + LINE + 2 * GAP), "white"
    )
    ImageDraw.Draw(sheet).text(
        (GAP, GAP), title, fill="black", font=ImageFont.load_default(LINE - 2)
    )
    for index, picture in enumerate(shown):
        sheet.paste(
            picture, (width * (index % COLUMNS) + GAP, height * (index // COLUMNS) + LINE + 2 * GAP)
        )
    return sheet


def _shown(example: Example) -> Image.Image:
    panels = [_panel(picture) for picture in example.pictures]
    width = sum(panel.width for panel in panels) + GAP // 2 * (len(panels) - 1)
    height = max(panel.height for panel in panels)
    shown = Image.new("RGB", (width, height + LINE * len(example.lines)), "white")
    left = 0
    for panel in panels:
        shown.paste(panel, (left, 0))
        left += panel.width + GAP // 2
    draw, font = ImageDraw.Draw(shown), ImageFont.load_default(LINE - 3)
    for number, line in enumerate(example.lines):
        draw.text((0, height + LINE * number), line, fill="black", font=font)
    return shown


def _panel(picture: Picture) -> Image.Image:
    """At most ``SIDE`` to a side; small pictures keep their pixels as squares."""
    height, width = picture.pixels.shape[:2]
    scale = SIDE / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    smooth = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    pixels = np.array(Image.fromarray(picture.pixels).resize(size, smooth))
    for mask, colour in picture.outlined:
        resized = (
            np.asarray(
                Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
            )
            > 0
        )
        inner = np.pad(resized, THICKNESS)
        for axis in (0, 1):
            inner = inner & np.roll(inner, THICKNESS, axis) & np.roll(inner, -THICKNESS, axis)
        pixels[resized & ~inner[THICKNESS:-THICKNESS, THICKNESS:-THICKNESS]] = colour
    return Image.fromarray(pixels)
