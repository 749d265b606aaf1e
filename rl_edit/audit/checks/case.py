"""Collects the evidence for the checks of one term."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from rl_edit.audit.checks.ranks import finite, mean
from rl_edit.audit.corruptions import SIDES, Side
from rl_edit.audit.responses import AuditSession, Responses
from rl_edit.errors import InputError
from rl_edit.measures.intervals import bootstrap
from rl_edit.rewards import Reward
from rl_edit.rewards.term import Sides

# Enough for the two digits that the sentences show, and fast for a hundred intervals a term.
_RESAMPLES = 500


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """The declared purpose of a term.

    Attributes:
        sides: where corruption must lower its score.
        reads_instruction: whether the same image must score lower under another instruction.
    """

    sides: tuple[Side, ...]
    reads_instruction: bool

    @property
    def one_side(self) -> Side | None:
        """The only side; None if there are two."""
        return self.sides[0] if len(self.sides) == 1 else None


def expected_of(
    term: Reward, declared: str | None, *, reads_instruction: bool | None = None
) -> Expectation:
    """Determines the expectation of a term.

    ``declared`` goes first, then what the term's class declares. A term that responds inside the
    mask must know the edit that was requested: from the instruction, unless it reads a target or a
    caption.

    Raises:
        InputError: nothing declares what the term responds to, or not in these words.
    """
    if declared is not None and declared not in get_args(Sides):
        raise InputError(
            f"--expects {declared} is no side of the mask. Use inside, outside or both."
        )
    expects = declared or term.responds_to
    if expects not in get_args(Sides):
        problem = (
            f"declares that it responds to {expects!r}"
            if expects
            else "does not declare what it responds to"
        )
        raise InputError(
            f"Reward {term.name!r} {problem}, so the audit cannot know which scores are correct. "
            "Give --expects inside, outside or both, with --term NAME when the rewards differ."
        )
    sides = SIDES if expects == "both" else tuple(side for side in SIDES if side == expects)
    if reads_instruction is None:
        # A target or a caption already determines the edit; the instruction adds nothing.
        names_edit = term.requires & {"target", "caption"}
        default = "inside" in sides and not names_edit
        reads_instruction = default if term.reads_instruction is None else term.reads_instruction
    return Expectation(sides=sides, reads_instruction=reads_instruction)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One term with its responses on all tasks.

    Attributes:
        seed: of the intervals.
    """

    session: AuditSession
    expected: Expectation
    responses: tuple[Responses, ...]
    seed: int

    @property
    def scored(self) -> tuple[Responses, ...]:
        """Tasks whose correct edit has a score; nothing can be compared in the others."""
        return tuple(response for response in self.responses if math.isfinite(response.clean))

    def corruptions(self, side: Side) -> list[str]:
        """Lists the corruptions that exist on ``side``."""
        return list(
            dict.fromkeys(
                corruption
                for response in self.scored
                for corruption, where in response.graded
                if where == side
            )
        )

    @property
    def fall(self) -> float:
        """Full scale of the term's response.

        The mean over tasks of the correct edit's score minus that of its worst expected corruption.
        """
        return self.fall_on(self.expected.sides)

    def fall_on(self, sides: Sequence[Side]) -> float:
        """Computes the fall from corruptions of some sides.

        NaN without a valid score.
        """
        # One fall per task, so that tasks with many corruptions weigh no more than others.
        falls = []
        for response in self.scored:
            scores = finite(
                score
                for (_, side), row in response.graded.items()
                if side in sides
                for score in row
            )
            # The worst score, at any level: a term need not be lowest at the highest level.
            if scores:
                falls.append(response.clean - min(scores))
        return mean(falls)

    def rows(self, response: Responses) -> list[tuple[float, ...]]:
        """Lists scores by level of the corruptions that should lower them."""
        return [row for (_, side), row in response.graded.items() if side in self.expected.sides]

    def complete_rows(self) -> list[tuple[Responses, tuple[float, ...]]]:
        """Lists the rows with a score at every level."""
        return [
            (response, row)
            for response in self.scored
            for row in self.rows(response)
            if all(math.isfinite(score) for score in row)
        ]

    def interval(self, values: Sequence[float], tasks: Sequence[str]) -> dict[str, float]:
        """Computes a mean and its 95 % interval over tasks."""
        return interval_over_tasks(values, tasks, seed=self.seed)


def interval_over_tasks(
    values: Sequence[float], tasks: Sequence[str], *, seed: int
) -> dict[str, float]:
    """Computes a mean and its 95 % interval over tasks.

    Values of one task depend on each other, so whole tasks are drawn.
    """
    # An interval of no values does not exist, but the keys of the numbers stay the same.
    if not values:
        return {"mean": math.nan, "low": math.nan, "high": math.nan, "tasks": 0.0}
    interval = bootstrap(values, seed=seed, resamples=_RESAMPLES, groups=tasks)
    return {
        "mean": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "tasks": float(interval.n),
    }
