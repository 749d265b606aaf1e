"""What one reward term answers to everything it is shown. It asks and writes down; it judges nothing."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from jaxtyping import UInt8
from torch import Tensor

from rl_edit.audit.corruptions import SIDES, Picture, Side, TestImages, enlarged
from rl_edit.measures.pixels import psnr
from rl_edit.rewards import Reward, score_candidates
from rl_edit.types import Candidates, EditTask

REPEATS = 4
GROUP = 8
"""Pictures scored in one call, as many as a usual training group: a term may fail, or compare, a call as a whole."""
_REGION = re.compile(r"region\.\d+")

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A score and its named parts; NaN where there is no valid one."""

    value: float
    parts: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Dab:
    """How far a score moved when its place was dabbed, and when as much was dabbed elsewhere; the direction is not asked here."""

    home: float
    away: float


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A term's scores of one task. NaN wherever there was no valid score.

    Without a score of the right edit there is nothing to compare with: the rest is not asked and empty.

    Attributes:
        clean: of the right edit.
        graded: by (damage, side), one score a level, the mildest first.
        decibel: background PSNR of the pictures damaged outside, by damage.
        single: by name, a picture or question that deserves less than ``clean``; absent where it could not be asked.
        blanks: scores of pictures that show no edit at all.
        dabs: by what they are dabs of: "" is the score itself, home being inside the mask; the others are its parts.
        repeats: one and the same picture scored several times over; a tuple a picture.
        growth: how much the score fell under one damage, and under the same with every pixel doubled.
    """

    task_id: str
    clean: float
    graded: dict[tuple[str, Side], tuple[float, ...]] = field(default_factory=dict)
    decibel: dict[str, tuple[float, ...]] = field(default_factory=dict)
    single: dict[str, float] = field(default_factory=dict)
    blanks: dict[str, float] = field(default_factory=dict)
    dabs: dict[str, tuple[Dab, ...]] = field(default_factory=dict)
    repeats: tuple[tuple[float, ...], ...] = ()
    growth: tuple[float, float] = (math.nan, math.nan)


@dataclass(kw_only=True)
class AuditSession:
    """Asks one term and counts what comes back.

    Attributes:
        scored, invalid: pictures that deserve a score, and how many of them got none. Blank pictures are not counted: a judge
            may refuse them.
        broken: calls in which the term returned what its declaration rules out.
        reasons: why scores were invalid, and in how many calls.
    """

    term: Reward
    scored: int = 0
    invalid: int = 0
    broken: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        # A cached answer repeats itself, and the repeats that a run asks for are no part of an audit.
        self.term = self.term.model_copy(update={"cache": None, "repeat_every": 0})

    def ask(
        self,
        task: EditTask,
        pictures: Mapping[Key, Picture],
        *,
        repeat: int = 0,
        refusable: bool = False,
    ) -> dict[Key, Reading]:
        """One reading per picture. Every ``repeat`` gives a term that draws random numbers others."""
        term = self.term
        for _ in range(repeat):
            term = term.reseeded()
        keys = list(pictures)
        found: dict[Key, Reading] = {}
        for start in range(0, len(keys), GROUP):
            group = keys[start : start + GROUP]
            table = score_candidates(
                (term,),
                candidates(task, torch.stack([pictures[key] for key in group])),
                group_id=task.task_id,
            )
            self.broken += table.contract_broken
            self.reasons.update(table.reasons)
            for row, key in enumerate(group):
                parts = {
                    name.removeprefix(f"{term.name}."): values[row]
                    for name, values in table.components.items()
                }
                found[key] = Reading(value=float(table.values[row, 0]), parts=parts)
            if not refusable:
                self.scored += len(group)
                self.invalid += int((~table.valid).sum())
        return found

    def answers(self, shown: TestImages, *, other_instruction: str | None) -> Answers:
        """Everything one task can tell. ``other_instruction`` is another task's, None when no task has another."""
        task, clean = shown.task, shown.clean
        if math.isnan(alone := self._alone(task, clean)):
            return Answers(task_id=task.task_id, clean=alone)
        graded = {
            (damage, side, level): picture
            for (damage, side), row in shown.graded.items()
            for level, picture in enumerate(row)
        }
        read = self.ask(
            task,
            {
                "": clean,
                **graded,
                **({} if shown.elsewhere is None else {"elsewhere": shown.elsewhere}),
            },
        )
        whole = read[""]
        single = {name: read[name].value for name in ("elsewhere",) if name in read}
        if not self.term.requires & {"target", "caption"}:
            # Where these say what is right, other words or an exchanged pair would be a task that contradicts itself.
            if other_instruction is not None:
                single["other instruction"] = self._alone(
                    replace(task, instruction=other_instruction), clean
                )
            single["swapped"] = self._alone(replace(task, source=clean), task.source)
        keep = ~task.edit_mask
        return Answers(
            task_id=task.task_id,
            clean=whole.value,
            graded={
                key: tuple(read[(*key, level)].value for level in range(len(row)))
                for key, row in shown.graded.items()
            },
            decibel={
                damage: tuple(psnr(torch.stack(row), task.source, keep, "masked").tolist())
                for (damage, side), row in shown.graded.items()
                if side == "outside"
            },
            single=single,
            blanks={
                name: reading.value
                for name, reading in self.ask(task, shown.blanks, refusable=True).items()
            },
            dabs=self._dabs(shown, whole),
            repeats=self._repeats(shown),
            growth=self._growth(shown, whole.value),
        )

    def _alone(self, task: EditTask, picture: Picture) -> float:
        return self.ask(task, {"": picture})[""].value

    def _dabs(self, shown: TestImages, whole: Reading) -> dict[str, tuple[Dab, ...]]:
        found: dict[str, tuple[Dab, ...]] = {}
        for place, pairs in shown.dabs.items():
            read = self.ask(
                shown.task,
                {(side, row): pair[side] for row, pair in enumerate(pairs) for side in (0, 1)},
            )
            here = [(read[0, row], read[1, row]) for row in range(len(pairs))]
            if place == "inside":
                found[""] = tuple(
                    Dab(home=abs(whole.value - home.value), away=abs(whole.value - away.value))
                    for home, away in here
                )
            for part in _parts_of(place, whole, several="region.0" in shown.dabs):
                # Home of the background is where the inside's dabs are not.
                ways = [
                    (away, home) if part == "background" else (home, away) for home, away in here
                ]
                found[part] = tuple(
                    Dab(home=_moved(whole, near, part), away=_moved(whole, far, part))
                    for near, far in ways
                )
        return found

    def _repeats(self, shown: TestImages) -> tuple[tuple[float, ...], ...]:
        """A right and a half-damaged picture, in one company and alone."""
        pictures = {"clean": shown.clean, "damaged": _everywhere(shown, "noise", 1)}
        together = [self.ask(shown.task, pictures, repeat=number) for number in range(REPEATS - 1)]
        alone = {
            name: self.ask(shown.task, {name: picture}, repeat=REPEATS - 1)[name]
            for name, picture in pictures.items()
        }
        return tuple(tuple(read[name].value for read in (*together, alone)) for name in pictures)

    def _growth(self, shown: TestImages, clean: float) -> tuple[float, float]:
        """Under a tint: it has no fine detail that doubling could change."""
        tinted = _everywhere(shown, "recolour", 2)
        task, large = enlarged(shown.task, shown.clean)
        big = self.ask(task, {"clean": large, "tinted": enlarged(shown.task, tinted)[1]})
        return clean - self._alone(shown.task, tinted), big["clean"].value - big["tinted"].value


def _everywhere(shown: TestImages, damage: str, level: int) -> Picture:
    inside, outside = (shown.graded[damage, side][level] for side in SIDES)
    return torch.where(shown.task.edit_mask[:, :, None], inside, outside)


def _moved(clean: Reading, damaged: Reading, part: str) -> float:
    return abs(clean.parts[part] - damaged.parts.get(part, math.nan))


def _parts_of(place: str, whole: Reading, *, several: bool) -> list[str]:
    """The term's parts whose home ``place`` decides. With one region it is the mask."""
    if place != "inside":
        return [place] if place in whole.parts else []
    alone = [part for part in whole.parts if _REGION.fullmatch(part)] if not several else []
    return [
        *(part for part in alone if len(alone) == 1),
        *(["background"] if "background" in whole.parts else []),
    ]


def candidates(task: EditTask, images: UInt8[Tensor, "group height width 3"]) -> Candidates:
    """Pictures as a reward sees them. No editor looked while making them, so all attention lies on a single token."""
    return Candidates(
        task=task,
        images=images,
        attention=torch.ones(len(images), 1),
        token_mask=torch.ones(1, dtype=torch.bool),
    )
