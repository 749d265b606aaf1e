"""Makes the test images of a task from a correct edit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl_edit.audit.corruptions import (
    RGB,
    Place,
    Side,
    contrasting,
    generator,
    graded,
    to_bytes,
    within,
)
from rl_edit.measures.pixels import unit_range
from rl_edit.types import EditTask, PairedTask, RegionsTask

# Amounts, of 255, by which the pixels of a patch move.
_PATCH_AMOUNTS = (24, 48, 72, 96)
_PLACES_TRIED = 64
_PLACE_NAMES = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A task and a correct edit of it."""

    task: EditTask
    edit: RGB


@dataclass(frozen=True, kw_only=True)
class TestImages:
    """Every image one task is audited with.

    Attributes:
        graded: by (corruption, side), one image per level.
        elsewhere: the edit is missing where it belongs and stands somewhere else. None where the
            image has no room for it.
        blanks: images no judge may take for an edit.
        patches: pairs of images with equally strong corruption, first inside a place and then
            outside it. "inside" is the edit mask; "region.N" are its regions where a task has
            several.
    """

    task: EditTask
    clean: RGB
    graded: dict[tuple[str, Side], tuple[RGB, ...]]
    elsewhere: RGB | None
    blanks: dict[str, RGB]
    patches: dict[str, tuple[tuple[RGB, RGB], ...]]


def reference(task: EditTask) -> Reference:
    """Takes the task's target, or paints the mask.

    The true edit of a task without a target is not known. Its region is painted in one colour, and
    the instruction is replaced by one that asks for that.
    """
    if isinstance(task, PairedTask):
        return Reference(task=task, edit=task.target)
    name, colour = contrasting(task.source, task.edit_mask)
    # Shading survives under the paint, so that the region still looks like a thing.
    grey = unit_range(task.source).mean(dim=-1, keepdim=True).expand(*task.edit_mask.shape, 3)
    painted = to_bytes(0.3 * grey + 0.7 * colour)
    instruction = f"paint the area in the {_place_name(task.edit_mask)} of the image {name}"
    return Reference(
        task=dataclasses.replace(task, instruction=instruction),
        edit=within(task.edit_mask, painted, task.source),
    )


def make_test_images(correct: Reference, *, seed: int) -> TestImages:
    """Corrupts a correct edit in every known way."""
    task, clean = correct.task, correct.edit
    key = (seed, task.task_id)
    places = {"inside": task.edit_mask}
    # A single region is the mask itself and is covered by "inside".
    if isinstance(task, RegionsTask) and len(task.regions) > 1:
        places |= {f"region.{number}": region for number, region in enumerate(task.regions)}
    return TestImages(
        task=task,
        clean=clean,
        graded=graded(clean, task.source, task.edit_mask, key=key),
        elsewhere=_moved_elsewhere(correct, generator(*key, "elsewhere")),
        blanks=blank_images(clean, seed=seed, task_id=task.task_id),
        patches={
            name: _patch_pairs(clean, where, generator(*key, "patches", name))
            for name, where in places.items()
        },
    )


def enlarged(task: EditTask, image: RGB) -> tuple[EditTask, RGB]:
    """Doubles every pixel of a task and an image.

    The content stays the same, so a mean over pixels must not change.
    """
    changes: dict[str, Any] = {
        # Masks end in (height, width), after a dimension of regions if any. Images begin with them.
        field.name: _doubled(value, first=value.ndim - 2 if value.dtype == torch.bool else 0)
        for field in dataclasses.fields(task)
        if isinstance(value := getattr(task, field.name), Tensor)
    }
    return dataclasses.replace(task, **changes), _doubled(image, first=0)


def _doubled(tensor: Tensor, *, first: int) -> Tensor:
    return tensor.repeat_interleave(2, dim=first).repeat_interleave(2, dim=first + 1)


def blank_images(clean: RGB, *, seed: int, task_id: str) -> dict[str, RGB]:
    """Makes images that show no edit at all, of the size of ``clean``."""
    random = generator(seed, task_id, "static")
    # No content, or content that follows no instruction. A judge that likes one of them does not
    # look at the image.
    return {
        "grey": torch.full_like(clean, 128),
        "black": torch.zeros_like(clean),
        "white": torch.full_like(clean, 255),
        "negative": 255 - clean,
        "static": torch.randint(0, 256, clean.shape, generator=random, dtype=torch.uint8),
    }


def _patch_pairs(clean: RGB, home: Place, random: torch.Generator) -> tuple[tuple[RGB, RGB], ...]:
    """Makes pairs of patches, inside and outside ``home``.

    Both have the same number of pixels, moved by the same amount.

    A score of the whole image therefore responds to both alike.
    """
    # Half of the smaller side: both sides then have room for the patch.
    # At least one pixel, since a mask may have a single one.
    count = max(1, min(int(home.sum()), int((~home).sum())) // 2)
    return tuple(
        (
            _patched(clean, home, count, amount, random),
            _patched(clean, ~home, count, amount, random),
        )
        for amount in _PATCH_AMOUNTS
    )


def _patched(clean: RGB, where: Place, count: int, amount: int, random: torch.Generator) -> RGB:
    places = where.nonzero()
    rows, columns = places[torch.randperm(len(places), generator=random)[:count]].unbind(dim=1)
    patched = clean.to(torch.int64)
    values = patched[rows, columns]
    # Away from the nearer end of the range: nothing is clipped, so both images of a pair carry
    # exactly the same squared error.
    patched[rows, columns] = values + torch.where(values < 128, amount, -amount)
    return patched.to(torch.uint8)


def _moved_elsewhere(correct: Reference, random: torch.Generator) -> RGB | None:
    """Moves the edit to the place that overlaps the mask least.

    The box around it is moved, among some random places.

    None if even that place covers more than half of the mask.
    """
    mask = correct.task.edit_mask
    (rows, columns), (height, width) = mask.nonzero().unbind(dim=1), mask.shape
    top, left = int(rows.min()), int(columns.min())
    box_height, box_width = int(rows.max()) - top + 1, int(columns.max()) - left + 1
    tops = torch.randint(0, height - box_height + 1, (_PLACES_TRIED,), generator=random).tolist()
    lefts = torch.randint(0, width - box_width + 1, (_PLACES_TRIED,), generator=random).tolist()

    # Pixels of the mask that the moved box would cover.
    def overlap(place: tuple[int, int]) -> int:
        return int(mask[place[0] : place[0] + box_height, place[1] : place[1] + box_width].sum())

    y, x = min(zip(tops, lefts, strict=True), key=overlap)
    if overlap((y, x)) > int(mask.sum()) // 2:
        return None
    moved = correct.task.source.clone()
    moved[y : y + box_height, x : x + box_width] = correct.edit[
        top : top + box_height, left : left + box_width
    ]
    return moved


def _place_name(mask: Place) -> str:
    """Names the third of the image with the mask's centre."""
    rows, columns = mask.nonzero().double().mean(dim=0).tolist()
    row, column = (
        min(int(3 * position / size), 2)
        for position, size in zip((rows, columns), mask.shape, strict=True)
    )
    return _PLACE_NAMES[row][column]
