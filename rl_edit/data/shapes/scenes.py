"""Composes a scene: the objects, their places, and the instruction that changes them."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from rl_edit.data.shapes.drawing import COLOURS, MASK_MARGIN, SHAPES, Thing
from rl_edit.data.shapes.grounds import SIZE, pick

TASK_TYPES = ("add", "remove", "replace", "recolour", "two_regions")

# Radii keep one region (bounding box plus margin) between 5 and 20 % of the image. Two regions
# share that budget.
_RADII = tuple(half / 2 for half in range(13, 23))
_RADII_TWO_REGIONS = tuple(half / 2 for half in range(12, 16))
_ADDED_RADIUS = {"small": 6.5, "": 8.0, "large": 10.0}
SIZE_WORDS = tuple(filter(None, _ADDED_RADIUS))

# Between the edges of two objects: both margins, both anti-aliased borders, and a pixel of ground.
_GAP = 2 * MASK_MARGIN + 3
_BORDER = 2.0
_CORNER_BORDER = 4.0  # an object in a corner keeps a visible distance from the border
_DARTS = 40
"""Random places tried for an object before the scene is given up."""

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
# Directions are (right, down), in image coordinates.
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
PHRASES = (*_ADD, *_REMOVE, *_REPLACE, *_RECOLOUR, *_CORNERS, *_SIDES)
"""Every phrase of which instructions are made; words in braces are filled in."""

_PAIRS = (
    ("recolour", "remove"),
    ("remove", "recolour"),
    ("remove", "remove"),
    ("recolour", "recolour"),
    ("replace", "remove"),
    ("recolour", "replace"),
)
"""The two edits of a task with two regions."""


@dataclass(frozen=True, slots=True)
class Change:
    """The edit at one place: ``before`` None is an addition, ``after`` None a removal."""

    before: Thing | None
    after: Thing | None
    instruction: str

    @property
    def place(self) -> Thing:
        """An object at the changed place."""
        thing = self.before or self.after
        assert thing is not None
        return thing


@dataclass(frozen=True, slots=True)
class Scene:
    """The changes, and the objects that stay as they are."""

    changes: tuple[Change, ...]
    bystanders: tuple[Thing, ...]


def compose(task_type: str, rng: random.Random) -> Scene:
    """Composes a scene. It is composed again in the rare case that the objects do not fit."""
    while True:
        scene = _try_compose(task_type, rng)
        if scene is not None:
            return scene


def with_article(name: str) -> str:
    """The name after "a" or "an"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


# The order of the draws below is part of the world: another order gives other scenes.


def _try_compose(task_type: str, rng: random.Random) -> Scene | None:
    names = _Names(rng)
    occupied: list[Thing] = []  # whatever takes up room, before or after the edit
    bystanders: list[Thing] = []
    changes: list[Change] = []
    num_bystanders = pick(rng, (1, 2, 3))
    if task_type == "add":
        change, neighbour = _addition(names, rng)
        changes.append(change)
        bystanders += [] if neighbour is None else [neighbour]
        occupied += [*bystanders, change.place]
    else:
        kinds = (task_type,) if task_type != "two_regions" else pick(rng, _PAIRS)
        radii = _RADII if task_type != "two_regions" else _RADII_TWO_REGIONS
        num_bystanders = min(num_bystanders, 4 - len(kinds))
        for kind in kinds:
            before = _fit_in(rng, occupied, names.fresh(), pick(rng, radii))
            if before is None:
                return None
            occupied.append(before)
            changes.append(_change(kind, before, names, rng))
    for _ in range(num_bystanders - len(bystanders)):
        thing = _fit_in(rng, occupied, names.fresh(), pick(rng, _RADII))
        if thing is None:
            return None
        occupied.append(thing)
        bystanders.append(thing)
    return Scene(tuple(changes), tuple(bystanders))


def _addition(names: _Names, rng: random.Random) -> tuple[Change, Thing | None]:
    """An added object, and the neighbour that its instruction names, if any."""
    size = pick(rng, tuple(_ADDED_RADIUS))
    radius = _ADDED_RADIUS[size]
    neighbour = None
    if rng.random() < 0.5:
        where = pick(rng, tuple(_CORNERS))
        right, down = _CORNERS[where]
        reach = SIZE / 2 - _CORNER_BORDER - radius
        x, y = SIZE / 2 + right * reach, SIZE / 2 + down * reach
    else:
        side = pick(rng, tuple(_SIDES))
        right, down = _SIDES[side]
        neighbour_radius = pick(rng, _RADII)
        step = neighbour_radius + radius + _GAP
        # Along the step both objects need room, across it the wider one does.
        widest = max(neighbour_radius, radius)
        neighbour_x = _coordinate(
            rng, neighbour_radius if right else widest, toward=right * (step + radius)
        )
        neighbour_y = _coordinate(
            rng, neighbour_radius if down else widest, toward=down * (step + radius)
        )
        neighbour = Thing(*names.fresh(), neighbour_x, neighbour_y, neighbour_radius)
        where = f"{side} {neighbour.name}"
        x, y = neighbour_x + right * step, neighbour_y + down * step
    added = Thing(*names.fresh(), x, y, radius)
    new = with_article(f"{size} {added.name}".strip())
    return Change(None, added, pick(rng, _ADD).format(new=new, where=where)), neighbour


def _change(kind: str, before: Thing, names: _Names, rng: random.Random) -> Change:
    """An edit of an existing object."""
    if kind == "remove":
        return Change(before, None, pick(rng, _REMOVE).format(old=before.name))
    if kind == "recolour":
        _, colour = names.fresh(shape=before.shape)
        after = Thing(before.shape, colour, before.x, before.y, before.radius)
        return Change(before, after, pick(rng, _RECOLOUR).format(old=before.name, colour=colour))
    shape, colour = names.fresh(unlike=before)
    after = Thing(shape, colour, before.x, before.y, before.radius)
    return Change(
        before, after, pick(rng, _REPLACE).format(old=before.name, new=with_article(after.name))
    )


class _Names:
    """Hands out (shape, colour) pairs of one scene, each only once."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._used: list[tuple[str, str]] = []

    def fresh(self, *, shape: str | None = None, unlike: Thing | None = None) -> tuple[str, str]:
        """Returns a pair not used before.

        Args:
            shape: the shape of the pair. None draws one.
            unlike: an object to differ from in both shape and colour. A red ring for a red circle
                would change nothing but the hole.
        """
        while True:
            pair = (shape or pick(self._rng, SHAPES), pick(self._rng, tuple(COLOURS)))
            # Distractors that share the colour or the shape make the words of an instruction
            # necessary.
            if self._used and shape is None and unlike is None and self._rng.random() < 0.4:
                like = pick(self._rng, self._used)
                pair = (like[0], pair[1]) if self._rng.random() < 0.5 else (pair[0], like[1])
            differs = unlike is None or (pair[0] != unlike.shape and pair[1] != unlike.colour)
            if pair not in self._used and differs:
                self._used.append(pair)
                return pair


def _fit_in(
    rng: random.Random, occupied: list[Thing], name: tuple[str, str], radius: float
) -> Thing | None:
    """An object in a free place. None when no dart hits one."""
    for _ in range(_DARTS):
        x, y = _coordinate(rng, radius), _coordinate(rng, radius)
        if all(
            max(abs(x - other.x), abs(y - other.y)) >= radius + other.radius + _GAP
            for other in occupied
        ):
            return Thing(*name, x, y, radius)
    return None


def _coordinate(rng: random.Random, radius: float, *, toward: float = 0.0) -> float:
    """A coordinate that leaves room for an object, a multiple of one half.

    Args:
        radius: room on both sides.
        toward: room on one side, whose direction is its sign.
    """
    low = max(radius, -toward) + _BORDER
    high = SIZE - _BORDER - max(radius, toward)
    return math.floor(2 * (low + (high - low) * rng.random())) / 2
