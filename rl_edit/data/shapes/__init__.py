"""The built-in world: 64x64 scenes of coloured shapes on textured ground, with exactly known edits.

A task is a pure function of ``(seed, split, index)``. A keyed hash seeds its generators, so any
process can draw any task without a file, and no two splits share a scene. Source and target are the
same drawing with one object changed, so they are equal, byte for byte, outside ``edit_mask``.

Every instruction has one answer. Objects are named by colour and shape, which no two objects of a
scene share, before or after the edit. The place and size of an added object follow from the words.
A replacement keeps centre and size. Only what lies behind a removed object has to be guessed.

``scenes.py`` places objects and words the instruction, ``drawing.py`` draws objects, ``grounds.py``
draws what is behind them. No file format is known here: ``compbench.py`` writes tasks to disk.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from numpy.typing import NDArray
from torch import Tensor

from rl_edit.data.shapes.drawing import (
    COLOURS,
    MASK_MARGIN,
    SHAPES,
    mark_change,
    paint,
    to_bytes,
)
from rl_edit.data.shapes.grounds import SIZE, draw_ground
from rl_edit.data.shapes.scenes import PHRASES, SIZE_WORDS, TASK_TYPES, compose, with_article
from rl_edit.errors import InputError
from rl_edit.types import PairedRegionsTask

__all__ = [
    "COLOURS",
    "MASK_MARGIN",
    "SHAPES",
    "SIZE",
    "SPLITS",
    "TASK_TYPES",
    "ShapesBatch",
    "batch",
    "task",
    "vocabulary",
]

SPLITS = ("pretrain", "train", "heldout", "validation")

# Every type is drawn in turn, so that any stretch of indices is balanced. Instructions with two
# regions come half as often as the others.
_CYCLE = (*TASK_TYPES[:4], *TASK_TYPES[:4], "two_regions")


@dataclass(frozen=True, kw_only=True)
class ShapesBatch:
    """Consecutive tasks of one split, stacked for pretraining."""

    source: UInt8[Tensor, "batch height width 3"]
    target: UInt8[Tensor, "batch height width 3"]
    mask: Bool[Tensor, "batch height width"]
    instructions: tuple[str, ...]
    task_types: tuple[str, ...]


def task(
    split: str, index: int, *, seed: int = 0, task_type: str | None = None
) -> PairedRegionsTask:
    """Draws task ``index`` of ``split``.

    The same arguments give the same bytes, in every process and on every machine.

    Args:
        task_type: one of ``TASK_TYPES``. None takes the type from the index: all types in turn.
    """
    drawn = _draw(split, index, seed=seed, task_type=task_type)
    return PairedRegionsTask(
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
    """Draws tasks ``start .. start + count - 1`` of ``split``, as :func:`task` does one by one."""
    if count < 1:
        raise InputError(
            f"shapes.batch got count({count}): a batch holds at least one task. Pass count >= 1."
        )
    # Filled in place: stacking the tasks would hold every image twice.
    source = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    target = np.empty_like(source)
    mask = np.empty((count, SIZE, SIZE), dtype=np.bool_)
    instructions, task_types = [], []
    for row in range(count):
        drawn = _draw(split, start + row, seed=seed, task_type=None)
        source[row], target[row] = drawn.source, drawn.target
        np.any(drawn.regions, axis=0, out=mask[row])  # the mask is the union of the regions
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
    """Every word an instruction can contain, sorted.

    Instructions are lower-case words between single spaces.
    """
    # Words in braces stand for a shape, a colour or a place, which are listed apart.
    words = {"a", "an", "the", "and", *SHAPES, *COLOURS, *SIZE_WORDS}
    for phrase in PHRASES:
        words.update(word for word in phrase.split() if not word.startswith("{"))
    return tuple(sorted(words))


@dataclass(frozen=True, slots=True)
class _DrawnTask:
    """A task as arrays."""

    source: NDArray[np.uint8]
    target: NDArray[np.uint8]
    regions: NDArray[np.bool_]
    instruction: str
    caption: str
    task_type: str


def _draw(split: str, index: int, *, seed: int, task_type: str | None) -> _DrawnTask:
    if task_type is None:
        task_type = _CYCLE[index % len(_CYCLE)]
    _require_drawable(split, index, task_type)
    rng, texture = _generators(split, index, seed)
    scene = compose(task_type, rng)
    source = draw_ground(rng, texture)
    for bystander in scene.bystanders:
        paint(source, bystander)
    # Both images share every pixel up to here, so they differ only where the edit is.
    target = source.copy()
    for change in scene.changes:
        if change.before is not None:
            paint(source, change.before)
        if change.after is not None:
            paint(target, change.after)
    source_pixels, target_pixels = to_bytes(source), to_bytes(target)
    regions = np.zeros((len(scene.changes), SIZE, SIZE), dtype=np.bool_)
    for region, change in zip(regions, scene.changes, strict=True):
        mark_change(region, source_pixels, target_pixels, around=change.place)
    return _DrawnTask(
        source=source_pixels,
        target=target_pixels,
        regions=regions,
        instruction=" and ".join(change.instruction for change in scene.changes),
        # One caption a region, joined as CompBench joins them.
        caption="|".join(
            with_article(change.after.name) if change.after else "an empty background"
            for change in scene.changes
        ),
        task_type=task_type,
    )


def _generators(split: str, index: int, seed: int) -> tuple[random.Random, np.random.Generator]:
    """The generators of a task: one for the scene, one for fields of noise."""
    # Keyed by the task alone, so any process draws any task without drawing those before it.
    digest = hashlib.blake2b(
        f"{seed}/{split}/{index}".encode(), key=b"shapes", digest_size=48
    ).digest()
    rng = random.Random(int.from_bytes(digest[:32], "little"))
    return rng, np.random.Generator(np.random.Philox(key=int.from_bytes(digest[32:], "little")))


def _require_drawable(split: str, index: int, task_type: str) -> None:
    if split not in SPLITS:
        raise InputError(
            f"shapes has no split {split!r}: splits keep held-out scenes unseen. "
            f"Use one of {', '.join(SPLITS)}."
        )
    if task_type not in TASK_TYPES:
        raise InputError(
            f"shapes has no task type {task_type!r}: it cannot be drawn. "
            f"Use one of {', '.join(TASK_TYPES)}."
        )
    if index < 0:
        raise InputError(f"shapes got index({index}): tasks are numbered from 0. Pass index >= 0.")
