"""Checks the size of a term's response: constant, flat, saturated, or a single step."""

from __future__ import annotations

import math

from rl_edit.audit.checks.case import Case
from rl_edit.audit.checks.ranks import finite, mean
from rl_edit.audit.checks.verdict import Check, Verdict, failed
from rl_edit.audit.corruptions import LEVELS

# Share of the declared range between a correct edit and its worst corruption.
_USE_PASS, _USE_FAIL = 0.05, 0.01
# Share of the fall below which the mildest level hardly shows.
FLAT = 0.01
# Share of the fall below which a score ties with the correct edit's, and the share of ties that is
# too large.
_TIE, _TIES_FAIL = 1e-4, 0.5
# Levels from 1 to this one are mild.
_MILD = LEVELS // 2


def check_response(case: Case) -> Check:
    """Checks that corruption lowers the score visibly."""
    term, fall = case.session.term, case.fall
    scores = finite(
        score
        for response in case.scored
        for row in (*response.graded.values(), tuple(response.blanks.values()), (response.clean,))
        for score in row
    )
    width = term.high - term.low
    # A range without an end has no share. NaN is not below any limit, so nothing fails by it.
    use = fall / width if math.isfinite(width) else math.nan
    numbers = {"fall": fall, "share_of_range": use, "lowest": min(scores), "highest": max(scores)}
    if problem := _no_response(case, min(scores), max(scores)):
        return failed("response", problem, numbers)
    levels = [
        mean([(response.clean - row[level]) / fall for response, row in case.complete_rows()])
        for level in range(LEVELS)
    ]
    numbers |= {f"fall_at_level_{level + 1}": value for level, value in enumerate(levels)}
    if use < _USE_FAIL:
        return failed(
            "response",
            f"Flat: even the worst corruption moves it by only {use:.2%} of its declared range.",
            numbers,
        )
    numbers["ties_with_clean"] = ties = _ties(case)
    verdict, sentence = _graded(ties=ties, use=use, mildest=levels[0], fall=fall)
    return Check(name="response", verdict=verdict, sentence=sentence, numbers=numbers)


def _no_response(case: Case, lowest: float, highest: float) -> str:
    """Explains why there is no response to measure; "" where there is one."""
    if lowest == highest:
        return f"Constant: every image scored {lowest:g}, so every advantage would be zero."
    if math.isnan(case.fall):
        return "No corrupted image has a valid score."
    if case.fall <= 0:
        return f"No corruption {' and '.join(case.expected.sides)} the mask lowers the score."
    return ""


def _ties(case: Case) -> float:
    """Computes the share of mild corruptions without effect."""
    ties = [
        abs(response.clean - row[level]) < _TIE * case.fall
        for response, row in case.complete_rows()
        for level in range(_MILD)
    ]
    return sum(ties) / max(len(ties), 1)


def _graded(*, ties: float, use: float, mildest: float, fall: float) -> tuple[Verdict, str]:
    """Returns verdict and sentence, the most severe finding first."""
    if ties > _TIES_FAIL:
        return "fail", (
            f"Saturated: {ties:.0%} of mild corruptions (levels 1 to {_MILD}) "
            "tie with the correct edit."
        )
    if use < _USE_PASS:
        return "warn", (
            f"The worst corruption moves it by only {use:.1%} of its declared range. "
            "Declare the range it uses."
        )
    if mildest < FLAT:
        return "warn", (
            "The mildest corruptions hardly lower it: nearly correct edits come close to a tie."
        )
    if mildest > 1 - FLAT:
        return "warn", (
            "The mildest corruptions already cost everything: "
            "it separates right from wrong, but does not grade."
        )
    return "pass", (
        f"Corruption lowers it by up to {fall:.3g} and already shows at the mildest level."
    )
