"""Collects a term's scores of all test images.

It measures only; the checks give verdicts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from jaxtyping import UInt8
from torch import Tensor

from rl_edit.audit.corruptions import RGB, SIDES, Side
from rl_edit.audit.images import TestImages, enlarged
from rl_edit.measures.pixels import psnr
from rl_edit.rewards import Reward, score_candidates
from rl_edit.types import Candidates, EditTask

REPEATS = 4
"""Scores of one image in the check of repeats, the last of them without company."""
BATCH = 8
"""Images in one call, as many as a usual training group.

A term may fail on a call as a whole, or compare the images in it.
"""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A score and the same by region; NaN where there is no valid one.

    Attributes:
        regions: by the names of the test images: "region.0", ..., "background". Empty where the
            term scores no regions.
    """

    value: float
    regions: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class PatchResponse:
    """Changes of a score under two equal patches.

    The changes are absolute: the direction does not matter here.

    Attributes:
        home: with the patch inside the place that the score is about.
        away: with the patch outside that place.
    """

    home: float
    away: float


@dataclass(frozen=True, kw_only=True)
class Responses:
    """A term's scores of one task.

    A score is NaN where there was no valid one. Without a score of the correct edit there is
    nothing to compare with. Then nothing else is measured, and all other fields are empty.

    Attributes:
        clean: of the correct edit.
        graded: by (corruption, side), one score per level, the mildest first.
        decibel: background PSNR, in dB, of the images corrupted outside, by corruption and level.
        single: by name, an image or a question that deserves less than ``clean``. A name is absent
            where the case does not exist for the term or the task.
        blanks: scores of images that show no edit at all.
        patches: by what is measured. "" is the score itself, at home inside the mask; the others
            are its parts.
        repeats: scores of one and the same image, a tuple per image.
        growth: the fall of the score under one corruption, and under the same with every pixel
            doubled.
    """

    task_id: str
    clean: float
    graded: dict[tuple[str, Side], tuple[float, ...]] = field(default_factory=dict)
    decibel: dict[str, tuple[float, ...]] = field(default_factory=dict)
    single: dict[str, float] = field(default_factory=dict)
    blanks: dict[str, float] = field(default_factory=dict)
    patches: dict[str, tuple[PatchResponse, ...]] = field(default_factory=dict)
    repeats: tuple[tuple[float, ...], ...] = ()
    growth: tuple[float, float] = (math.nan, math.nan)


@dataclass(kw_only=True)
class AuditSession:
    """Scores images with one term and counts failures.

    Attributes:
        scored, invalid: images that deserve a score, and those among them without one. Blank
            images are not counted: a judge may refuse them.
        out_of_contract: calls in which the term returned something its declaration rules out.
        reasons: of invalid scores, with the number of calls each was given in.
    """

    term: Reward
    scored: int = 0
    invalid: int = 0
    out_of_contract: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        # A cached score always repeats itself, and a run's own repeats are not part of an audit.
        self.term = self.term.model_copy(update={"cache": None, "repeat_every": 0})

    def measure(
        self,
        task: EditTask,
        images: Mapping[Key, RGB],
        *,
        repeat: int = 0,
        refusable: bool = False,
    ) -> dict[Key, Measurement]:
        """Scores images, at most ``BATCH`` per call.

        Args:
            repeat: a term that draws random numbers gets others for every number.
            refusable: a missing score is no fault and is not counted.
        """
        term = self.term
        for _ in range(repeat):
            term = term.reseeded()
        # A list, since batches are cut from it; a mapping keeps its order.
        keys = list(images)
        measurements: dict[Key, Measurement] = {}
        # Every call is one group to the term, as in training.
        for start in range(0, len(keys), BATCH):
            batch = keys[start : start + BATCH]
            table = score_candidates(
                (term,),
                candidates(task, torch.stack([images[key] for key in batch])),
                group_id=task.task_id,
            )
            self.out_of_contract += table.out_of_contract
            self.reasons.update(table.reasons)
            by_region = table.regions[term.name].columns() if table.regions else {}
            for row, key in enumerate(batch):
                regions = {name: column[row] for name, column in by_region.items()}
                measurements[key] = Measurement(value=float(table.values[row, 0]), regions=regions)
            # A judge may refuse a blank image, so those do not count as missing scores.
            if not refusable:
                self.scored += len(batch)
                self.invalid += int((~table.valid).sum())
        return measurements

    def score(self, task: EditTask, image: RGB) -> float:
        """Scores one image in a separate call."""
        return self.measure(task, {"": image})[""].value

    def responses(self, images: TestImages, *, other_instruction: str | None) -> Responses:
        """Scores everything that is made from one task.

        Args:
            other_instruction: another task's. None when no task has a different one.
        """
        task, clean = images.task, images.clean
        # Without this score nothing can be compared, and the other calls would be wasted.
        if math.isnan(score := self.score(task, clean)):
            return Responses(task_id=task.task_id, clean=score)
        # One batch order for all terms: the clean edit first, then all corruptions, then the edit
        # pasted elsewhere. Terms that compare within a call see the same company in every audit.
        stack: dict[object, RGB] = {"": clean}
        stack |= {
            (*key, level): image
            for key, row in images.graded.items()
            for level, image in enumerate(row)
        }
        if images.elsewhere is not None:
            stack["elsewhere"] = images.elsewhere
        measured = self.measure(task, stack)
        single = {name: measured[name].value for name in ("elsewhere",) if name in measured}
        return Responses(
            task_id=task.task_id,
            clean=measured[""].value,
            graded={
                key: tuple(measured[(*key, level)].value for level in range(len(row)))
                for key, row in images.graded.items()
            },
            decibel=_background_psnr(images),
            single=single | self._contradicted(images, other_instruction),
            blanks={
                name: blank.value
                for name, blank in self.measure(task, images.blanks, refusable=True).items()
            },
            patches=self._patches(images, measured[""]),
            repeats=self._repeats(images),
            growth=self._growth(images, measured[""].value),
        )

    def _contradicted(self, images: TestImages, other_instruction: str | None) -> dict[str, float]:
        """Scores the correct edit with contradicting inputs.

        These are another task's instruction, and source and result swapped.
        """
        task, clean = images.task, images.clean
        # A target or a caption says what is correct. With other words, or with the pair swapped,
        # such a task would contradict itself.
        if self.term.requires & {"target", "caption"}:
            return {}
        single: dict[str, float] = {}
        if other_instruction is not None:
            other = replace(task, instruction=other_instruction)
            single["other instruction"] = self.score(other, clean)
        single["swapped"] = self.score(replace(task, source=clean), task.source)
        return single

    def _patches(
        self, images: TestImages, clean: Measurement
    ) -> dict[str, tuple[PatchResponse, ...]]:
        responses: dict[str, tuple[PatchResponse, ...]] = {}
        for place, pairs in images.patches.items():
            measured = self.measure(
                images.task,
                {(side, row): pair[side] for row, pair in enumerate(pairs) for side in (0, 1)},
            )
            here = [(measured[0, row], measured[1, row]) for row in range(len(pairs))]
            if place == "inside":
                responses[""] = tuple(
                    PatchResponse(
                        home=abs(clean.value - home.value), away=abs(clean.value - away.value)
                    )
                    for home, away in here
                )
            for part in _parts_of(place, clean, several="region.0" in images.patches):
                responses[part] = _part_responses(part, clean, here)
        return responses

    def _repeats(self, images: TestImages) -> tuple[tuple[float, ...], ...]:
        """Scores a correct and a half-corrupted image repeatedly.

        All but the last time both are in one call; the last time each has a call of its own.
        """
        # Level 2 of 4: a score in the middle of its range can move both ways.
        pair = {"clean": images.clean, "corrupted": _everywhere(images, "noise", 1)}
        batched = [self.measure(images.task, pair, repeat=number) for number in range(REPEATS - 1)]
        isolated = {
            name: self.measure(images.task, {name: image}, repeat=REPEATS - 1)[name]
            for name, image in pair.items()
        }
        return tuple(
            tuple(measured[name].value for measured in (*batched, isolated)) for name in pair
        )

    def _growth(self, images: TestImages, clean: float) -> tuple[float, float]:
        # A tint has no fine detail that doubling the pixels could change.
        tinted = _everywhere(images, "recolour", 2)
        task, large = enlarged(images.task, images.clean)
        doubled = self.measure(task, {"clean": large, "tinted": enlarged(images.task, tinted)[1]})
        return (
            clean - self.score(images.task, tinted),
            doubled["clean"].value - doubled["tinted"].value,
        )


def candidates(task: EditTask, images: UInt8[Tensor, "group height width 3"]) -> Candidates:
    """Packs images as a reward receives them.

    No editor attended to anything while making them, so all attention lies on a single token.
    """
    return Candidates(
        task=task,
        images=images,
        attention=torch.ones(len(images), 1),
        token_mask=torch.ones(1, dtype=torch.bool),
    )


def _background_psnr(images: TestImages) -> dict[str, tuple[float, ...]]:
    """Measures PSNR outside the mask against the source."""
    background = ~images.task.edit_mask
    return {
        corruption: tuple(psnr(torch.stack(row), images.task.source, background, "masked").tolist())
        for (corruption, side), row in images.graded.items()
        if side == "outside"
    }


def _everywhere(images: TestImages, corruption: str, level: int) -> RGB:
    # Either side has a pattern of its own; together they cover the image.
    inside, outside = (images.graded[corruption, side][level] for side in SIDES)
    return torch.where(images.task.edit_mask[:, :, None], inside, outside)


def _part_responses(
    part: str, clean: Measurement, pairs: list[tuple[Measurement, Measurement]]
) -> tuple[PatchResponse, ...]:
    # The background is at home where the patches inside the mask are not.
    oriented = [(away, home) if part == "background" else (home, away) for home, away in pairs]
    return tuple(
        PatchResponse(home=_moved(clean, near, part), away=_moved(clean, far, part))
        for near, far in oriented
    )


def _moved(clean: Measurement, corrupted: Measurement, part: str) -> float:
    return abs(clean.regions[part] - corrupted.regions.get(part, math.nan))


def _parts_of(place: str, clean: Measurement, *, several: bool) -> list[str]:
    """Lists the term's parts that are about ``place``.

    A single region is the mask itself, so its part belongs to "inside".
    """
    if place != "inside":
        return [place] if place in clean.regions else []
    regions = [name for name in clean.regions if name != "background"] if not several else []
    return [
        *(regions if len(regions) == 1 else ()),
        *(["background"] if "background" in clean.regions else []),
    ]
