"""Draws objects: sprites, painting, and the mask of what a change touched."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rl_edit.data.shapes.grounds import SIZE

SHAPES = ("circle", "square", "triangle", "star", "diamond", "ring")
# Far from each other and from the muted grounds, so that a colour word has one meaning.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 28, 36),
    "orange": (255, 138, 0),
    "yellow": (252, 228, 24),
    "green": (20, 166, 52),
    "cyan": (24, 212, 226),
    "blue": (28, 62, 226),
    "purple": (128, 30, 184),
    "pink": (255, 104, 196),
}
_RGB = {name: np.array(rgb, dtype=np.float32) for name, rgb in COLOURS.items()}

MASK_MARGIN = 2
"""Pixels by which the bounding box of the changed pixels is widened to give the edit mask."""

_SUPERSAMPLING = 8
"""Samples of a pixel's coverage along each axis."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: centre and radius in pixels, all multiples of one half."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        """The words that name it, such as "red circle"."""
        return f"{self.colour} {self.shape}"


def paint(image: NDArray[np.float32], thing: Thing) -> None:
    """Blends an object into an image, in place.

    Objects never overlap, so their order does not matter.
    """
    column, row = int(thing.x), int(thing.y)
    sprite = _sprite(thing.shape, thing.radius, thing.x - column, thing.y - row)
    half = sprite.shape[0] // 2
    top, left = row - half, column - half
    rows = slice(max(top, 0), min(row + half + 1, SIZE))
    columns = slice(max(left, 0), min(column + half + 1, SIZE))
    coverage = sprite[
        rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
    ]
    # Near a border the sprite hangs over it, and the parts outside are cut off.
    window = image[rows, columns]
    window += coverage * (_RGB[thing.colour] - window)


def mark_change(
    region: NDArray[np.bool_],
    source: NDArray[np.uint8],
    target: NDArray[np.uint8],
    *,
    around: Thing,
) -> None:
    """Sets the bounding box of changed pixels, widened by the margin."""
    # The anti-aliased border reaches a pixel beyond the radius.
    reach = around.radius + 2
    top, left = max(int(around.y - reach), 0), max(int(around.x - reach), 0)
    window = slice(top, int(around.y + reach) + 1), slice(left, int(around.x + reach) + 1)
    changed = (source[window] != target[window]).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    region[
        max(top + rows[0] - MASK_MARGIN, 0) : top + rows[-1] + 1 + MASK_MARGIN,
        max(left + columns[0] - MASK_MARGIN, 0) : left + columns[-1] + 1 + MASK_MARGIN,
    ] = True


def to_bytes(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The image in whole levels, rounded half up."""
    return (image + np.float32(0.5)).astype(np.uint8)


def _star(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Five points: outer radius 1, inner radius 0.5."""
    # Each tenth of the plane is folded onto one, which a single straight edge bounds.
    angle = np.abs((np.arctan2(u, -v) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
    radius = np.hypot(u, v)
    inner_x, inner_y = 0.5 * math.cos(math.pi / 5), 0.5 * math.sin(math.pi / 5)
    along, off = radius * np.cos(angle), radius * np.sin(angle)
    return np.asarray(inner_y * (along - 1) + (1 - inner_x) * off <= 0)


# Shapes of radius 1 around the origin; v points down.
_INSIDE: dict[str, Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.bool_]]] = {
    "circle": lambda u, v: u * u + v * v <= 1,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) <= 0.9,
    "triangle": lambda u, v: (v <= 0.85) & (np.abs(u) <= (v + 0.95) / 1.8),
    "star": _star,
    "diamond": lambda u, v: np.abs(u) + np.abs(v) <= 1,
    "ring": lambda u, v: (u * u + v * v <= 1) & (u * u + v * v >= 0.25),
}


@functools.cache
def _sprite(shape: str, radius: float, fraction_x: float, fraction_y: float) -> NDArray[np.float32]:
    """Coverage 0..1 of each pixel by a shape, ``[side, side, 1]``.

    Averaged over 8x8 samples a pixel. Positions and radii are multiples of one half, so a few
    hundred sprites draw every scene.
    """
    half = math.ceil(radius) + 1
    side = 2 * half + 1
    samples = (np.arange(side * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING - half
    u, v = (samples[None, :] - fraction_x) / radius, (samples[:, None] - fraction_y) / radius
    # Coverage is the mean over samples, which anti-aliases the border.
    inside = _INSIDE[shape](u, v).astype(np.float32)
    coverage = inside.reshape(side, _SUPERSAMPLING, side, _SUPERSAMPLING).mean(
        axis=(1, 3), dtype=np.float32
    )
    return np.asarray(coverage[:, :, None], dtype=np.float32)
