"""The alarm: a training reward that rises while the trusted one falls.

This file compares held-out evaluations that were recorded; it makes none.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from pydantic import BaseModel, ConfigDict


class Evaluation(BaseModel):
    """One held-out evaluation: a line of ``heldout.jsonl``.

    Attributes:
        update: the last one applied.
        gold, total: means of the gold term and of the weighted sum of all terms.
        training: mean total reward of the training groups since the evaluation before; None when
            none was scored.
        n: tasks with a valid score of gold and of every weighted term. Only these count.
        background_psnr: dB, masked convention; None where it was not measured.
        protocol: everything that decides gold besides the adapter. Evaluations under different
            protocols are not compared.
    """

    model_config = ConfigDict(frozen=True)
    update: int
    gold: float
    total: float
    training: float | None
    n: int
    background_psnr: float | None
    seconds: float
    protocol: str


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A training reward that rose while gold fell.

    Attributes:
        before: the evaluation that the others are compared with.
        in_a_row: number of evaluations over which it lasted.
    """

    before: Evaluation
    last: Evaluation
    in_a_row: int

    def __str__(self) -> str:
        # An alarm is raised over evaluations whose training reward is known.
        first, last = cast("float", self.before.training), cast("float", self.last.training)
        return (
            f"training reward rose from {_apart(first, last)} while held-out gold fell from "
            f"{_apart(self.before.gold, self.last.gold)}, {self.in_a_row} evaluations in a row "
            f"(updates {self.before.update + 1} to "
            f"{self.last.update + 1})"
        )


def _apart(before: float, after: float) -> str:
    """Writes both numbers with as many digits as show their difference."""
    digits = next(
        (digits for digits in range(4, 17) if f"{before:.{digits}g}" != f"{after:.{digits}g}"), 17
    )
    return f"{before:.{digits}g} to {after:.{digits}g}"


def alarm(history: Sequence[Evaluation], patience: int) -> Alarm | None:
    """Returns the alarm that stands after the last evaluation, if any.

    Args:
        patience: evaluations in a row that it takes, each compared with the one before.
    """
    in_a_row = 0
    # Backwards from the newest: an alarm stands only while the pattern lasts.
    for after, before in itertools.pairwise(reversed(history)):
        if (
            # Without a known training reward nothing can be compared; equal values are no rise.
            before.training is None
            or after.training is None
            or after.training <= before.training
            or after.gold >= before.gold
        ):
            break
        in_a_row += 1
    if in_a_row < patience:
        return None
    return Alarm(before=history[-1 - in_a_row], last=history[-1], in_a_row=in_a_row)
