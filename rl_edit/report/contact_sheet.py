"""A contact sheet: small images in rows, each row an example with its words and mask outlines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from rl_edit.report.outlines import outline, resized

# Pixels: the longest side of an image, the height of a line of text, and the gaps.
SIDE = 176
LINE = 14
GAP = 8
# Outlines of a mask that was found and of the true one: far apart also for colour-blind readers.
FOUND = (255, 128, 0)
TRUE = (0, 220, 255)
THICKNESS = 2
# Examples side by side.
COLUMNS = 3


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One image ``[height, width, 3]`` with masks ``[height, width]`` outlined on it.

    Attributes:
        outlined: (mask, colour) pairs, the last on top.
    """

    pixels: NDArray[np.uint8]
    outlined: Sequence[tuple[NDArray[np.bool_], tuple[int, int, int]]] = field(default=())


@dataclass(frozen=True, kw_only=True)
class Example:
    """Images of one size side by side, with lines of text under them."""

    panels: Sequence[Panel]
    lines: Sequence[str]


def contact_sheet(title: str, examples: Sequence[Example]) -> Image.Image:
    """Draws all examples, ``COLUMNS`` to a row, with cells as large as the largest."""
    cells = [_cell(example) for example in examples]
    width, height = (max(cell.size[axis] for cell in cells) + 2 * GAP for axis in (0, 1))
    # Rounded up: the last row may be shorter.
    rows = -(-len(cells) // COLUMNS)
    sheet = Image.new(
        "RGB", (width * min(COLUMNS, len(cells)), height * rows + LINE + 2 * GAP), "white"
    )
    ImageDraw.Draw(sheet).text(
        (GAP, GAP), title, fill="black", font=ImageFont.load_default(LINE - 2)
    )
    for index, cell in enumerate(cells):
        row, column = divmod(index, COLUMNS)
        sheet.paste(cell, (width * column + GAP, height * row + LINE + 2 * GAP))
    return sheet


def _cell(example: Example) -> Image.Image:
    panels = [_drawn(panel) for panel in example.panels]
    width = sum(panel.width for panel in panels) + GAP // 2 * (len(panels) - 1)
    height = max(panel.height for panel in panels)
    cell = Image.new("RGB", (width, height + LINE * len(example.lines)), "white")
    left = 0
    for panel in panels:
        cell.paste(panel, (left, 0))
        left += panel.width + GAP // 2
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default(LINE - 3)
    for number, line in enumerate(example.lines):
        draw.text((0, height + LINE * number), line, fill="black", font=font)
    return cell


def _drawn(panel: Panel) -> Image.Image:
    """Draws a panel, ``SIDE`` pixels on its longest side."""
    height, width = panel.pixels.shape[:2]
    scale = SIDE / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    pixels = resized(panel.pixels, size)
    for mask, colour in panel.outlined:
        pixels[outline(mask, size, thickness=THICKNESS)] = colour
    return Image.fromarray(pixels)
