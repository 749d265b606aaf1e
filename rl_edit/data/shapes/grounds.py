"""Draws the ground of a scene: muted, but full of fine detail.

An editor that repaints what it should keep loses that detail, and the loss can be measured. A
ground is ``[64, 64, 3]`` float32 in 0..255. Patterns are fields in -1..1 that mix two muted
colours.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

SIZE = 64
"""Height and width of every scene, in pixels."""

T = TypeVar("T")

# Fields are float64 and only the last, elementwise step is float32. Sines and matrix products
# differ between processors in their last bit, and in float64 that bit is too small to reach a
# pixel.
_ROW = np.arange(SIZE, dtype=np.float64)[:, None] + 0.5
_COLUMN = np.arange(SIZE, dtype=np.float64)[None, :] + 0.5


def pick(rng: random.Random, choices: Sequence[T]) -> T:
    """One of the choices, each as likely as the others."""
    # Not rng.choice: only random() is promised to give the same numbers in every Python version.
    return choices[int(rng.random() * len(choices))]


def draw_ground(rng: random.Random, texture: np.random.Generator) -> NDArray[np.float32]:
    """Draws a shaded pattern with grain in every pixel.

    Some grounds mix two patterns by a smooth field.
    """
    pattern = pick(rng, _PATTERNS)(rng, texture)
    if rng.random() < 0.35:
        other = pick(rng, _PATTERNS)(rng, texture)
        share = np.clip(0.5 + 1.5 * _value_noise(texture, 2, 2), 0, 1)
        pattern = pattern + share * (other - pattern)
    first = _muted(rng)
    # The second colour stays near the first: contrast enough to see the pattern, not enough to hide
    # an object.
    contrast = pick(rng, (-1, 1)) * (10 + 14 * rng.random())
    second = first + np.array(
        [contrast + 10 * rng.random() - 5 for _ in range(3)], dtype=np.float32
    )
    shade = (9 * _value_noise(texture, 3, 3)).astype(np.float32)
    shade += np.float32(0.8 + 1.4 * rng.random()) * texture.standard_normal(
        (SIZE, SIZE), dtype=np.float32
    )
    ground = pattern.astype(np.float32)[:, :, None] * ((second - first) / 2) + (
        (first + second) / 2
    )
    ground += shade[:, :, None]
    return np.asarray(ground.clip(0, 255), dtype=np.float32)


def _muted(rng: random.Random) -> NDArray[np.float32]:
    """A greyish colour of middle brightness: far from every object colour."""
    brightness = 70 + 110 * rng.random()
    tint = 2 * math.pi * rng.random()
    chroma = 26 * rng.random()
    # The shifts put red, green and blue a third of a turn (2 pi / 3, about 2.1) apart.
    return np.array(
        [brightness + chroma * math.cos(tint + shift) for shift in (0.0, 2.1, 4.2)],
        dtype=np.float32,
    )


@functools.cache
def _upsampling(cells: int) -> NDArray[np.float64]:
    """Smoothstep interpolation from grid points to pixels, a matrix ``[64, cells + 1]``."""
    position = (np.arange(SIZE) + 0.5) / SIZE * cells
    cell = np.minimum(position.astype(np.int64), cells - 1)
    fraction = position - cell
    weight = fraction * fraction * (3 - 2 * fraction)
    matrix = np.zeros((SIZE, cells + 1), dtype=np.float64)
    matrix[np.arange(SIZE), cell] = 1 - weight
    matrix[np.arange(SIZE), cell + 1] = weight
    return matrix


def _value_noise(texture: np.random.Generator, rows: int, columns: int) -> NDArray[np.float64]:
    """A smooth field in -1..1 through random values on a grid."""
    grid = texture.random((rows + 1, columns + 1), dtype=np.float64) * 2 - 1
    field: NDArray[np.float64] = _upsampling(rows) @ grid @ _upsampling(columns).T
    return field


def _gradient(rng: random.Random, texture: np.random.Generator) -> NDArray[np.float64]:
    return 1.2 * _value_noise(texture, 2 + int(3 * rng.random()), 2 + int(3 * rng.random()))


def _stripes(rng: random.Random, texture: np.random.Generator) -> NDArray[np.float64]:
    angle, period, phase = math.pi * rng.random(), 5 + 8 * rng.random(), 2 * math.pi * rng.random()
    turn = 2 * math.pi / period
    wave = np.sin(turn * math.cos(angle) * _COLUMN + turn * math.sin(angle) * _ROW + phase)
    return np.asarray(np.clip(wave * (1 + 2 * rng.random()), -1, 1))


def _checker(rng: random.Random, texture: np.random.Generator) -> NDArray[np.float64]:
    cell = 4 + 6 * rng.random()
    rows = np.floor((_ROW + cell * rng.random()) / cell)
    columns = np.floor((_COLUMN + cell * rng.random()) / cell)
    return np.asarray(((rows + columns) % 2) * 2 - 1)


def _bricks(rng: random.Random, texture: np.random.Generator) -> NDArray[np.float64]:
    height, width = 6 + 4 * rng.random(), 10 + 8 * rng.random()
    down = (_ROW + height * rng.random()) / height
    course = np.floor(down)
    # Every other course is shifted by half a brick.
    along = (_COLUMN + width * rng.random()) / width + 0.5 * (course % 2)
    mortar = ((down - course) * height < 1.5) | ((along - np.floor(along)) * width < 1.5)
    return np.where(mortar, -1.0, 0.6)


def _speckle(rng: random.Random, texture: np.random.Generator) -> NDArray[np.float64]:
    cells = pick(rng, (16, 20, 24))
    return np.clip(1.5 * _value_noise(texture, cells, cells), -1, 1)


_PATTERNS = (_gradient, _stripes, _checker, _bricks, _speckle)
