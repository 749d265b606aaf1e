"""The built-in world: 64x64 scenes of coloured shapes on textured ground, with exactly known edits.

A task is a pure function of ``(seed, split, index)``: a keyed hash seeds its generators, so any process can draw any
task without a file, and no two splits share a scene. The source and the target are the same drawing with one object
changed, so they are equal, byte for byte, outside ``edit_mask``.

Every instruction has one answer. Objects are named by colour and shape, which no two objects of a scene share (before
or after the edit); an added object's place and size follow from the words alone; a replacement keeps centre and size.
Only what lies behind a removed object has to be guessed. The ground is muted but full of fine detail: an editor that
repaints what it should keep loses it, and that can be measured.

The file draws tasks and knows no file format (``compbench.py`` writes them to disk).
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from numpy.typing import NDArray
from torch import Tensor

from rl_edit.errors import InputError
from rl_edit.types import PairedTask

SIZE = 64
"""Height and width of every scene, in pixels."""

SPLITS = ("pretrain", "train", "heldout", "validation")
TASK_TYPES = ("add", "remove", "replace", "recolour", "two_regions")

# Every type is drawn in turn, so that any stretch of indices is balanced; instructions with two regions come half as
# often as the others.
_CYCLE = (*TASK_TYPES[:4], *TASK_TYPES[:4], "two_regions")

SHAPES = ("circle", "square", "triangle", "star", "diamond", "ring")
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
_COLOUR_NAMES = tuple(COLOURS)
T = TypeVar("T")
_RGB = {name: np.array(rgb, dtype=np.float32) for name, rgb in COLOURS.items()}

MASK_MARGIN = 2
"""Pixels by which the bounding box of the changed pixels is widened to give the edit mask."""

# Radii keep one region (bounding box plus margin) between 5 and 20 % of the picture; two regions share that budget.
_RADII = tuple(half / 2 for half in range(13, 23))
_RADII_TWO_REGIONS = tuple(half / 2 for half in range(12, 16))
_ADDED_RADIUS = {"small": 6.5, "": 8.0, "large": 10.0}
# Between the edges of two objects: both margins, both anti-aliased borders, and a pixel of ground.
_GAP = 2 * MASK_MARGIN + 3
_BORDER = 2.0
_CORNER_BORDER = 4.0
_SUPERSAMPLING = 8

_ADD = ("add {new} {where}", "draw {new} {where}", "put {new} {where}", "place {new} {where}")
_REMOVE = ("remove the {old}", "delete the {old}", "erase the {old}", "take away the {old}")
_REPLACE = (
    "replace the {old} with {new}",
    "swap the {old} for {new}",
    "turn the {old} into {new}",
    "change the {old} into {new}",
)
_RECOLOUR = (
    "make the {old} {colour}",
    "turn the {old} {colour}",
    "paint the {old} {colour}",
    "change the {old} to {colour}",
)
_CORNERS = {
    "in the top left corner": (-1, -1),
    "in the top right corner": (1, -1),
    "in the bottom left corner": (-1, 1),
    "in the bottom right corner": (1, 1),
    "in the middle": (0, 0),
}
_SIDES = {
    "to the left of the": (-1, 0),
    "to the right of the": (1, 0),
    "above the": (0, -1),
    "below the": (0, 1),
}


@dataclass(frozen=True, kw_only=True)
class ShapesTask(PairedTask):
    """A task whose regions are known one by one.

    Attributes:
        regions: one row per edited place; their union is ``edit_mask``. One row except for ``two_regions``.
    """

    regions: Bool[Tensor, "region height width"]


@dataclass(frozen=True, kw_only=True)
class ShapesBatch:
    """Consecutive tasks of one split, stacked for pretraining."""

    source: UInt8[Tensor, "batch height width 3"]
    target: UInt8[Tensor, "batch height width 3"]
    mask: Bool[Tensor, "batch height width"]
    instructions: tuple[str, ...]
    task_types: tuple[str, ...]


def task(split: str, index: int, *, seed: int = 0, task_type: str | None = None) -> ShapesTask:
    """Task ``index`` of ``split``: the same bytes for the same arguments, in every process and on every machine.

    ``task_type`` None takes the type from the index (all types in turn); otherwise it is one of ``TASK_TYPES``.
    """
    drawn = _draw(split, index, seed=seed, task_type=task_type)
    return ShapesTask(
        task_id=f"{split}-{index:06d}",
        task_type=drawn.task_type,
        source=torch.from_numpy(drawn.source),
        instruction=drawn.instruction,
        edit_mask=torch.from_numpy(drawn.regions.any(axis=0)),
        target=torch.from_numpy(drawn.target),
        caption=drawn.caption,
        regions=torch.from_numpy(drawn.regions),
    )


def batch(split: str, start: int, count: int, seed: int = 0) -> ShapesBatch:
    """Tasks ``start .. start + count - 1`` of ``split``, stacked. The same tasks as ``task`` gives one by one."""
    if count < 1:
        raise InputError(
            f"shapes.batch got count({count}): a batch holds at least one task. Pass count >= 1."
        )
    source = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    target = np.empty_like(source)
    mask = np.empty((count, SIZE, SIZE), dtype=np.bool_)
    instructions, task_types = [], []
    for row in range(count):
        drawn = _draw(split, start + row, seed=seed, task_type=None)
        source[row], target[row] = drawn.source, drawn.target
        np.any(drawn.regions, axis=0, out=mask[row])
        instructions.append(drawn.instruction)
        task_types.append(drawn.task_type)
    return ShapesBatch(
        source=torch.from_numpy(source),
        target=torch.from_numpy(target),
        mask=torch.from_numpy(mask),
        instructions=tuple(instructions),
        task_types=tuple(task_types),
    )


def vocabulary() -> tuple[str, ...]:
    """Every word an instruction can contain, sorted. Instructions are lower-case words between single spaces."""
    words = {"a", "an", "the", "and", *SHAPES, *_COLOUR_NAMES, *filter(None, _ADDED_RADIUS)}
    for phrase in (*_ADD, *_REMOVE, *_REPLACE, *_RECOLOUR, *_CORNERS, *_SIDES):
        words.update(word for word in phrase.split() if not word.startswith("{"))
    return tuple(sorted(words))


# ---------------------------------------------------------------------------------------------------------------------
# Scenes


@dataclass(frozen=True, slots=True)
class _Thing:
    """One object: centre and radius in pixels, all multiples of one half."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class _Change:
    """What happens at one place: ``before`` None is an addition, ``after`` None a removal."""

    before: _Thing | None
    after: _Thing | None
    instruction: str


@dataclass(frozen=True, slots=True)
class _Drawn:
    source: NDArray[np.uint8]
    target: NDArray[np.uint8]
    regions: NDArray[np.bool_]
    instruction: str
    caption: str
    task_type: str


def _draw(split: str, index: int, *, seed: int, task_type: str | None) -> _Drawn:
    if split not in SPLITS:
        raise InputError(
            f"shapes has no split {split!r}: splits are what keeps held-out scenes unseen. Use one of {', '.join(SPLITS)}."
        )
    if task_type is None:
        task_type = _CYCLE[index % len(_CYCLE)]
    if task_type not in TASK_TYPES:
        raise InputError(
            f"shapes has no task type {task_type!r}: it cannot be drawn. Use one of {', '.join(TASK_TYPES)}."
        )
    if index < 0:
        raise InputError(f"shapes got index({index}): tasks are numbered from 0. Pass index >= 0.")
    digest = hashlib.blake2b(
        f"{seed}/{split}/{index}".encode(), key=b"shapes", digest_size=48
    ).digest()
    rng = random.Random(int.from_bytes(digest[:32], "little"))
    texture = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[32:], "little")))

    changes, kept = _scene(task_type, rng)
    source = _ground(rng, texture)
    for thing in kept:
        _paint(source, thing)
    target = source.copy()
    for change in changes:
        if change.before is not None:
            _paint(source, change.before)
        if change.after is not None:
            _paint(target, change.after)
    source_pixels, target_pixels = _quantise(source), _quantise(target)
    regions = np.zeros((len(changes), SIZE, SIZE), dtype=np.bool_)
    for region, change in zip(regions, changes, strict=True):
        _mark(region, source_pixels, target_pixels, change)
    return _Drawn(
        source=source_pixels,
        target=target_pixels,
        regions=regions,
        instruction=" and ".join(change.instruction for change in changes),
        # One caption a region, joined as CompBench joins them.
        caption="|".join(
            _article(change.after.name) if change.after else "an empty background"
            for change in changes
        ),
        task_type=task_type,
    )


def _scene(task_type: str, rng: random.Random) -> tuple[list[_Change], list[_Thing]]:
    """The changes, and the objects that stay. Drawn again, in the rare case that the objects do not fit."""
    while True:
        scene = _try_scene(task_type, rng)
        if scene is not None:
            return scene


def _try_scene(task_type: str, rng: random.Random) -> tuple[list[_Change], list[_Thing]] | None:
    names = _Names(rng)
    placed: list[_Thing] = []  # whatever takes up room, before or after the edit
    kept: list[_Thing] = []
    changes: list[_Change] = []
    num_kept = _pick(rng, (1, 2, 3))
    if task_type == "add":
        size = _pick(rng, tuple(_ADDED_RADIUS))
        radius = _ADDED_RADIUS[size]
        if rng.random() < 0.5:
            where = _pick(rng, tuple(_CORNERS))
            right, down = _CORNERS[where]
            reach = SIZE / 2 - _CORNER_BORDER - radius
            x, y = SIZE / 2 + right * reach, SIZE / 2 + down * reach
        else:
            side = _pick(rng, tuple(_SIDES))
            right, down = _SIDES[side]
            anchor_radius = _pick(rng, _RADII)
            step = anchor_radius + radius + _GAP
            room = max(anchor_radius, radius)
            anchor_x = _place(rng, anchor_radius if right else room, toward=right * (step + radius))
            anchor_y = _place(rng, anchor_radius if down else room, toward=down * (step + radius))
            anchor = _Thing(*names.fresh(), anchor_x, anchor_y, anchor_radius)
            kept.append(anchor)
            placed.append(anchor)
            num_kept -= 1
            where = f"{side} {anchor.name}"
            x, y = anchor_x + right * step, anchor_y + down * step
        added = _Thing(*names.fresh(), x, y, radius)
        placed.append(added)
        new = _article(f"{size} {added.name}".strip())
        changes.append(_Change(None, added, _pick(rng, _ADD).format(new=new, where=where)))
    else:
        kinds = (task_type,) if task_type != "two_regions" else _pick(rng, _PAIRS)
        radii = _RADII if task_type != "two_regions" else _RADII_TWO_REGIONS
        num_kept = min(num_kept, 4 - len(kinds))
        for kind in kinds:
            before = _fit_in(rng, placed, names.fresh(), _pick(rng, radii))
            if before is None:
                return None
            placed.append(before)
            changes.append(_change(kind, before, names, rng))
    for _ in range(num_kept):
        thing = _fit_in(rng, placed, names.fresh(), _pick(rng, _RADII))
        if thing is None:
            return None
        placed.append(thing)
        kept.append(thing)
    return changes, kept


_PAIRS = (
    ("recolour", "remove"),
    ("remove", "recolour"),
    ("remove", "remove"),
    ("recolour", "recolour"),
    ("replace", "remove"),
    ("recolour", "replace"),
)


def _change(kind: str, before: _Thing, names: _Names, rng: random.Random) -> _Change:
    if kind == "remove":
        return _Change(before, None, _pick(rng, _REMOVE).format(old=before.name))
    if kind == "recolour":
        _, colour = names.fresh(shape=before.shape)
        after = _Thing(before.shape, colour, before.x, before.y, before.radius)
        return _Change(before, after, _pick(rng, _RECOLOUR).format(old=before.name, colour=colour))
    shape, colour = names.fresh(unlike=before)
    after = _Thing(shape, colour, before.x, before.y, before.radius)
    return _Change(
        before, after, _pick(rng, _REPLACE).format(old=before.name, new=_article(after.name))
    )


class _Names:
    """Hands out (shape, colour) pairs of one scene, each only once."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._used: list[tuple[str, str]] = []

    def fresh(self, *, shape: str | None = None, unlike: _Thing | None = None) -> tuple[str, str]:
        """A pair not used before: of the given ``shape``, or differing from ``unlike`` in both shape and colour.

        (A red ring for a red circle would change nothing but the hole.)
        """
        while True:
            pair = (shape or _pick(self._rng, SHAPES), _pick(self._rng, _COLOUR_NAMES))
            # Distractors that share the colour or the shape make the words of an instruction necessary.
            if self._used and shape is None and unlike is None and self._rng.random() < 0.4:
                like = _pick(self._rng, self._used)
                pair = (like[0], pair[1]) if self._rng.random() < 0.5 else (pair[0], like[1])
            differs = unlike is None or (pair[0] != unlike.shape and pair[1] != unlike.colour)
            if pair not in self._used and differs:
                self._used.append(pair)
                return pair


def _fit_in(
    rng: random.Random, placed: list[_Thing], name: tuple[str, str], radius: float
) -> _Thing | None:
    """An object in a free place, or None when a few dozen darts find none."""
    for _ in range(40):
        x, y = _place(rng, radius), _place(rng, radius)
        if all(
            max(abs(x - other.x), abs(y - other.y)) >= radius + other.radius + _GAP
            for other in placed
        ):
            return _Thing(*name, x, y, radius)
    return None


def _place(rng: random.Random, radius: float, *, toward: float = 0.0) -> float:
    """A coordinate with room for ``radius`` on both sides, and for ``toward`` (signed) on one; a multiple of one half."""
    low = max(radius, -toward) + _BORDER
    high = SIZE - _BORDER - max(radius, toward)
    return math.floor(2 * (low + (high - low) * rng.random())) / 2


def _pick(rng: random.Random, choices: Sequence[T]) -> T:
    # Not rng.choice: only random() is promised to give the same numbers in every Python version.
    return choices[int(rng.random() * len(choices))]


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def _star(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Five points: outer radius 1, inner radius 0.5. Each tenth of the plane is bounded by one straight edge."""
    angle = np.abs((np.arctan2(u, -v) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
    radius = np.hypot(u, v)
    inner_x, inner_y = 0.5 * math.cos(math.pi / 5), 0.5 * math.sin(math.pi / 5)
    along, off = radius * np.cos(angle), radius * np.sin(angle)
    return np.asarray(inner_y * (along - 1) + (1 - inner_x) * off <= 0)


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
    """Coverage 0..1 of each pixel by a shape, [side, side, 1], averaged over 8x8 samples a pixel.

    Positions and radii are multiples of one half, so a few hundred sprites draw every scene.
    """
    half = math.ceil(radius) + 1
    samples = (np.arange((2 * half + 1) * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING - half
    u, v = (samples[None, :] - fraction_x) / radius, (samples[:, None] - fraction_y) / radius
    inside = _INSIDE[shape](u, v).astype(np.float32)
    side = 2 * half + 1
    coverage = inside.reshape(side, _SUPERSAMPLING, side, _SUPERSAMPLING).mean(
        axis=(1, 3), dtype=np.float32
    )
    return np.asarray(coverage[:, :, None], dtype=np.float32)


def _paint(image: NDArray[np.float32], thing: _Thing) -> None:
    """Blend an object into a float image, in place. Objects never overlap, so their order does not matter."""
    column, row = int(thing.x), int(thing.y)
    sprite = _sprite(thing.shape, thing.radius, thing.x - column, thing.y - row)
    half = sprite.shape[0] // 2
    top, left = row - half, column - half
    rows = slice(max(top, 0), min(row + half + 1, SIZE))
    columns = slice(max(left, 0), min(column + half + 1, SIZE))
    coverage = sprite[
        rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
    ]
    window = image[rows, columns]
    window += coverage * (_RGB[thing.colour] - window)


def _mark(
    region: NDArray[np.bool_], source: NDArray[np.uint8], target: NDArray[np.uint8], change: _Change
) -> None:
    """Set the bounding box of the pixels that ``change`` changed, widened by the margin."""
    thing = change.before or change.after
    assert thing is not None
    reach = thing.radius + 2
    top, left = max(int(thing.y - reach), 0), max(int(thing.x - reach), 0)
    window = slice(top, int(thing.y + reach) + 1), slice(left, int(thing.x + reach) + 1)
    changed = (source[window] != target[window]).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    region[
        max(top + rows[0] - MASK_MARGIN, 0) : top + rows[-1] + 1 + MASK_MARGIN,
        max(left + columns[0] - MASK_MARGIN, 0) : left + columns[-1] + 1 + MASK_MARGIN,
    ] = True


def _quantise(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    return (image + np.float32(0.5)).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Grounds: [64, 64, 3] float32 in 0..255. Patterns are fields in -1..1 that mix two muted colours.
#
# Fields are float64 and only the last, elementwise step is float32: sines and matrix products differ between processors
# in their last bit, and in float64 that bit is too small to reach a pixel.

_ROW = np.arange(SIZE, dtype=np.float64)[:, None] + 0.5
_COLUMN = np.arange(SIZE, dtype=np.float64)[None, :] + 0.5


@functools.cache
def _upsampling(cells: int) -> NDArray[np.float64]:
    """[64, cells + 1]: smoothstep interpolation from grid points to pixels, as a matrix."""
    position = (np.arange(SIZE) + 0.5) / SIZE * cells
    cell = np.minimum(position.astype(np.int64), cells - 1)
    fraction = position - cell
    weight = fraction * fraction * (3 - 2 * fraction)
    matrix = np.zeros((SIZE, cells + 1), dtype=np.float64)
    matrix[np.arange(SIZE), cell] = 1 - weight
    matrix[np.arange(SIZE), cell + 1] = weight
    return matrix


def _value_noise(texture: np.random.Generator, rows: int, columns: int) -> NDArray[np.float64]:
    grid = texture.random((rows + 1, columns + 1), dtype=np.float64) * 2 - 1
    return _upsampling(rows) @ grid @ _upsampling(columns).T


def _gradient(rng: random.Random, texture: np.random.Generator) -> NDArray[np.float64]:
    return 1.2 * _value_noise(texture, 2 + int(3 * rng.random()), 2 + int(3 * rng.random()))


def _stripes(rng: random.Random, texture: np.random.Generator) -> NDArray[np.float64]:
    angle, period, phase = math.pi * rng.random(), 5 + 8 * rng.random(), 2 * math.pi * rng.random()
    turn = 2 * math.pi / period
    wave = np.sin(turn * math.cos(angle) * _COLUMN + turn * math.sin(angle) * _ROW + phase)
    return np.clip(wave * (1 + 2 * rng.random()), -1, 1)


def _checker(rng: random.Random, texture: np.random.Generator) -> NDArray[np.float64]:
    cell = 4 + 6 * rng.random()
    rows = np.floor((_ROW + cell * rng.random()) / cell)
    columns = np.floor((_COLUMN + cell * rng.random()) / cell)
    return ((rows + columns) % 2) * 2 - 1


def _bricks(rng: random.Random, texture: np.random.Generator) -> NDArray[np.float64]:
    height, width = 6 + 4 * rng.random(), 10 + 8 * rng.random()
    down = (_ROW + height * rng.random()) / height
    course = np.floor(down)
    along = (_COLUMN + width * rng.random()) / width + 0.5 * (course % 2)
    mortar = ((down - course) * height < 1.5) | ((along - np.floor(along)) * width < 1.5)
    return np.where(mortar, -1.0, 0.6)


def _speckle(rng: random.Random, texture: np.random.Generator) -> NDArray[np.float64]:
    cells = _pick(rng, (16, 20, 24))
    return np.clip(1.5 * _value_noise(texture, cells, cells), -1, 1)


_PATTERNS = (_gradient, _stripes, _checker, _bricks, _speckle)


def _muted(rng: random.Random) -> NDArray[np.float32]:
    """A greyish colour of middle brightness: far from every object colour."""
    brightness = 70 + 110 * rng.random()
    tint = 2 * math.pi * rng.random()
    chroma = 26 * rng.random()
    return np.array(
        [brightness + chroma * math.cos(tint + shift) for shift in (0.0, 2.1, 4.2)],
        dtype=np.float32,
    )


def _ground(rng: random.Random, texture: np.random.Generator) -> NDArray[np.float32]:
    """A pattern (or two, mixed by a smooth field), shaded, with a little grain in every pixel."""
    pattern = _pick(rng, _PATTERNS)(rng, texture)
    if rng.random() < 0.35:
        other = _pick(rng, _PATTERNS)(rng, texture)
        share = np.clip(0.5 + 1.5 * _value_noise(texture, 2, 2), 0, 1)
        pattern = pattern + share * (other - pattern)
    first = _muted(rng)
    # The second colour stays near the first: contrast enough to see the pattern, not enough to hide an object.
    contrast = _pick(rng, (-1, 1)) * (10 + 14 * rng.random())
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
