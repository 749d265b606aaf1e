"""Known damages: what is done to a right edit, where, and how strongly, so that the order of the scores is known beforehand.

Nothing here scores. Everything follows from a seed: the same task under the same seed is damaged in the same way.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor

from rl_edit.measures.pixels import gaussian_mean, unit_range
from rl_edit.types import EditTask, PairedTask, RegionsTask

Side = Literal["inside", "outside"]
SIDES: tuple[Side, Side] = ("inside", "outside")
LEVELS = 4
"""Strengths of every graded damage, from hardly visible to gross; level 0 is the undamaged edit."""

_NOISE = (4, 10, 25, 60)
_BLUR = (0.5, 1.0, 2.0, 4.0)
_JPEG = (85, 50, 20, 5)
_SHIFT = (1, 2, 4, 8)
_TINT = (0.06, 0.15, 0.35, 0.7)
_UNDONE = (0.25, 0.5, 0.75, 1.0)
_DABS = (24, 48, 72, 96)
# Blur and shift are given for a picture of this size and grow with it.
_REFERENCE_SIZE = 64
_PALETTE = {
    "red": (224, 32, 32),
    "green": (32, 176, 64),
    "blue": (32, 64, 224),
    "yellow": (240, 208, 32),
}
_PLACES = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)
_PLACES_TRIED = 64

Picture = UInt8[Tensor, "height width 3"]


def generator(*key: object) -> torch.Generator:
    """Random numbers that follow from ``key`` alone."""
    digest = hashlib.blake2b(
        json.dumps([str(part) for part in key]).encode(), digest_size=8
    ).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A task and a right edit of it, from which every damage starts."""

    task: EditTask
    edit: Picture


def reference(task: EditTask) -> Reference:
    """The task's own target; without one, the region is painted and the instruction says so, since the true edit is not known."""
    if isinstance(task, PairedTask):
        return Reference(task=task, edit=task.target)
    name, colour = _contrasting(task.source, task.edit_mask)
    grey = unit_range(task.source).mean(dim=-1, keepdim=True).expand(*task.edit_mask.shape, 3)
    painted = _bytes(0.3 * grey + 0.7 * colour)
    instruction = f"paint the area in the {_place(task.edit_mask)} of the picture {name}"
    return Reference(
        task=dataclasses.replace(task, instruction=instruction),
        edit=_within(task.edit_mask, painted, task.source),
    )


def noise(
    picture: Picture, where: Bool[Tensor, "height width"], level: int, random: torch.Generator
) -> Picture:
    """White noise, the same pattern at every level."""
    return _bytes(
        unit_range(picture)
        + torch.randn(picture.shape, generator=random, dtype=torch.float64)
        * _NOISE[level - 1]
        / 255
    )


def blur(
    picture: Picture, where: Bool[Tensor, "height width"], level: int, random: torch.Generator
) -> Picture:
    sigma = _BLUR[level - 1] * _unit(picture)
    return _bytes(gaussian_mean(unit_range(picture), sigma=sigma, radius=max(1, round(3 * sigma))))


def jpeg(
    picture: Picture, where: Bool[Tensor, "height width"], level: int, random: torch.Generator
) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(picture.numpy()).save(buffer, format="JPEG", quality=_JPEG[level - 1])
    return torch.from_numpy(np.array(Image.open(buffer).convert("RGB"), dtype=np.uint8))


def shift(
    picture: Picture, where: Bool[Tensor, "height width"], level: int, random: torch.Generator
) -> Picture:
    """The content moved sideways under the region, which stays where it is."""
    step = round(_SHIFT[level - 1] * _unit(picture)) * (
        1 if torch.rand((), generator=random) < 0.5 else -1
    )
    return picture.roll(step, dims=1)


def recolour(
    picture: Picture, where: Bool[Tensor, "height width"], level: int, random: torch.Generator
) -> Picture:
    """A tint towards the colour that the region has least of."""
    _, colour = _contrasting(picture, where)
    share = _TINT[level - 1]
    return _bytes((1 - share) * unit_range(picture) + share * colour)


Damage = Callable[[Picture, Bool[Tensor, "height width"], int, torch.Generator], Picture]
GRADED: dict[str, Damage] = {
    "noise": noise,
    "blur": blur,
    "JPEG": jpeg,
    "shift": shift,
    "recolour": recolour,
}
UNDONE = "no edit"
"""The edit taken back, step by step; exists inside the mask only."""


@dataclass(frozen=True, kw_only=True)
class TestImages:
    """Every picture one task is audited with.

    Attributes:
        graded: by (damage, side), one picture a level.
        elsewhere: the edit is missing where it belongs and stands somewhere else; None where the picture has no room for it.
        blanks: pictures no judge may take for an edit.
        dabs: pairs of pictures with equally strong damage, in a place and outside that place. "inside" is the edit mask;
            "region.N" are its regions where a task has several.
    """

    task: EditTask
    clean: Picture
    graded: dict[tuple[str, Side], tuple[Picture, ...]]
    elsewhere: Picture | None
    blanks: dict[str, Picture]
    dabs: dict[str, tuple[tuple[Picture, Picture], ...]]


def exhibits(right: Reference, *, seed: int) -> TestImages:
    """Everything ``right`` is damaged to."""
    task, clean = right.task, right.edit
    graded: dict[tuple[str, Side], tuple[Picture, ...]] = {}
    for name, damage in GRADED.items():
        for side, where in zip(SIDES, (task.edit_mask, ~task.edit_mask), strict=True):
            graded[name, side] = tuple(
                _within(
                    where,
                    damage(clean, where, level, generator(seed, task.task_id, name, side)),
                    clean,
                )
                for level in range(1, LEVELS + 1)
            )
    graded[UNDONE, "inside"] = tuple(
        _within(
            task.edit_mask,
            _bytes((1 - share) * unit_range(clean) + share * unit_range(task.source)),
            clean,
        )
        for share in _UNDONE
    )
    places = {"inside": task.edit_mask}
    if isinstance(task, RegionsTask) and len(task.regions) > 1:
        places |= {f"region.{number}": region for number, region in enumerate(task.regions)}
    return TestImages(
        task=task,
        clean=clean,
        graded=graded,
        elsewhere=_elsewhere(right, generator(seed, task.task_id, "elsewhere")),
        blanks={
            "grey": torch.full_like(clean, 128),
            "black": torch.zeros_like(clean),
            "white": torch.full_like(clean, 255),
            "negative": 255 - clean,
            "static": torch.randint(
                0,
                256,
                clean.shape,
                generator=generator(seed, task.task_id, "static"),
                dtype=torch.uint8,
            ),
        },
        dabs={
            name: _dabs(clean, where, generator(seed, task.task_id, "dabs", name))
            for name, where in places.items()
        },
    )


def enlarged(task: EditTask, picture: Picture) -> tuple[EditTask, Picture]:
    """The same task and picture with every pixel doubled: nothing to see has changed."""
    changes: dict[str, Any] = {
        name: _doubled(value, first=value.ndim - 2 if value.dtype == torch.bool else 0)
        for name in ("source", "target", "edit_mask", "regions")
        if isinstance(value := getattr(task, name, None), Tensor)
    }
    return dataclasses.replace(task, **changes), _doubled(picture, first=0)


def _doubled(tensor: Tensor, *, first: int) -> Tensor:
    return tensor.repeat_interleave(2, dim=first).repeat_interleave(2, dim=first + 1)


def _dabs(
    clean: Picture, home: Bool[Tensor, "height width"], random: torch.Generator
) -> tuple[tuple[Picture, Picture], ...]:
    """As many pixels inside ``home`` as elsewhere, moved by the same amount: a score of the whole picture cannot tell the two apart."""
    count = max(1, min(int(home.sum()), int((~home).sum())) // 2)
    return tuple(
        (_dabbed(clean, home, count, amount, random), _dabbed(clean, ~home, count, amount, random))
        for amount in _DABS
    )


def _dabbed(
    clean: Picture,
    where: Bool[Tensor, "height width"],
    count: int,
    amount: int,
    random: torch.Generator,
) -> Picture:
    places = where.nonzero()
    rows, columns = places[torch.randperm(len(places), generator=random)[:count]].unbind(dim=1)
    dabbed = clean.to(torch.int64)
    values = dabbed[rows, columns]
    # Away from the nearer end of the range, so that nothing is clipped and both pictures carry the same squared error.
    dabbed[rows, columns] = values + torch.where(values < 128, amount, -amount)
    return dabbed.to(torch.uint8)


def _elsewhere(right: Reference, random: torch.Generator) -> Picture | None:
    """The box around the edit, moved to where it overlaps the mask least; None if that is still most of the mask."""
    mask = right.task.edit_mask
    (rows, columns), (height, width) = mask.nonzero().unbind(dim=1), mask.shape
    top, left = int(rows.min()), int(columns.min())
    box_height, box_width = int(rows.max()) - top + 1, int(columns.max()) - left + 1
    tops = torch.randint(0, height - box_height + 1, (_PLACES_TRIED,), generator=random).tolist()
    lefts = torch.randint(0, width - box_width + 1, (_PLACES_TRIED,), generator=random).tolist()

    def overlap(place: tuple[int, int]) -> int:
        return int(mask[place[0] : place[0] + box_height, place[1] : place[1] + box_width].sum())

    y, x = min(zip(tops, lefts, strict=True), key=overlap)
    if overlap((y, x)) > int(mask.sum()) // 2:
        return None
    moved = right.task.source.clone()
    moved[y : y + box_height, x : x + box_width] = right.edit[
        top : top + box_height, left : left + box_width
    ]
    return moved


def _contrasting(picture: Picture, where: Bool[Tensor, "height width"]) -> tuple[str, Tensor]:
    """Of the palette, the colour farthest from the region's mean."""
    mean = unit_range(picture)[where].mean(dim=0)
    colours = {name: torch.tensor(rgb, dtype=torch.float64) / 255 for name, rgb in _PALETTE.items()}
    name = max(colours, key=lambda name: float((colours[name] - mean).square().sum()))
    return name, colours[name]


def _place(mask: Bool[Tensor, "height width"]) -> str:
    rows, columns = mask.nonzero().double().mean(dim=0).tolist()
    return _PLACES[min(int(3 * rows / mask.shape[0]), 2)][min(int(3 * columns / mask.shape[1]), 2)]


def _within(where: Bool[Tensor, "height width"], damaged: Picture, clean: Picture) -> Picture:
    return torch.where(where[:, :, None], damaged, clean)


def _bytes(picture: Tensor) -> Picture:
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8)


def _unit(picture: Picture) -> float:
    return max(min(picture.shape[:2]) / _REFERENCE_SIZE, 1.0)
