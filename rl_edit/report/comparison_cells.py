"""Cells of the tables of a comparison: a difference as text, with its interval and verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rl_edit.evaluation.arms import Measure
from rl_edit.measures.intervals import Interval
from rl_edit.report.numbers import format_signed


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A difference as text.

    Attributes:
        verdict: a CSS class: "better", "worse" or "unclear". More of every measure is better.
    """

    mean: str
    span: str
    verdict: str


def cell_of(interval: Interval | None, measure: Measure) -> Cell:
    """Writes an interval with the decimals of its measure."""
    if interval is None:
        return Cell(mean="\u2014", span="not measured", verdict="unclear")
    mean = format_signed(interval.mean, measure.digits)
    # The spread over tasks is unknown from a single one.
    if not math.isfinite(interval.low):
        return Cell(mean=mean, span="one task", verdict="unclear")
    ends = (format_signed(end, measure.digits) for end in (interval.low, interval.high))
    # Colour follows the interval, never the mean: a large mean may still be noise.
    verdict = {1: "better", -1: "worse", 0: "unclear"}[interval.sign]
    return Cell(mean=mean, span=" to ".join(ends), verdict=verdict)
