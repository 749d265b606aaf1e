"""Checks the scale of a score: its dependence on the image size, and the convention of a PSNR."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rl_edit.audit.checks.case import Case
from rl_edit.audit.checks.ranks import mean
from rl_edit.audit.checks.response import FLAT
from rl_edit.audit.checks.verdict import Check, grade, not_applicable, passed, warned
from rl_edit.audit.responses import Responses

# Factor by which a corruption costs more when every pixel is doubled. A windowed metric may change
# a little; a sum over pixels grows fourfold.
_GROWTH_PASS, _GROWTH_FAIL = 1.5, 2.5
# In dB: largest deviation from a straight line in background PSNR, and tolerance of its offset.
_LINE_DB, _OFFSET_DB = 0.1, 0.15
# A squared error summed over three channels is three times the mean: 10 log10(1/3) = -4.77 dB.
_CHANNEL_SLIP_DB = -10 * math.log10(3)
_MIN_POINTS = 8


def check_image_size(case: Case) -> Check:
    """Checks that the image's size does not matter."""
    falls = [
        response.growth
        for response in case.scored
        if all(math.isfinite(fall) for fall in response.growth)
    ]
    small, large = mean([fall for fall, _ in falls]), mean([fall for _, fall in falls])
    if not falls or abs(small) < FLAT * abs(case.fall) or not small:
        return not_applicable("image size", "The tint used here does not move the score.")
    factor = large / small
    # Shrinking by a factor is as bad as growing by it; a change of sign is worse than any.
    change = max(factor, 1 / factor) if factor > 0 else math.inf
    verdict = grade(-change, (-_GROWTH_PASS, -_GROWTH_FAIL))
    shown = f"the same corruption costs {factor:.2f} times as much when every pixel is doubled"
    if verdict == "pass":
        sentence = f"Independent of the image's size: {shown}."
        return passed("image size", sentence, {"factor": factor})
    cause = (
        "it grows with the image, as a sum over pixels does"
        if factor > 1
        else "it changes with the image's size"
    )
    return Check(
        name="image size",
        verdict=verdict,
        sentence=f"Not a mean: {cause}; {shown}.",
        numbers={"factor": factor},
    )


def check_psnr_convention(case: Case) -> Check:
    """Checks the zero of scores that are linear in PSNR."""
    name = "PSNR convention"
    if case.expected.one_side != "outside":
        return not_applicable(name, "It is not a measure of the background alone.")
    points = np.array(
        [
            point
            for response in case.scored
            for corruption, row in response.decibel.items()
            for point in _points(response, corruption, row)
        ]
    )
    if len(points) < _MIN_POINTS or np.ptp(points[:, 1]) == 0:
        return not_applicable(name, "Too few different scores.")
    # Scores at the ends of a clipped scale do not lie on the line.
    scores = points[:, 1]
    inner = points[(scores > scores.min()) & (scores < scores.max())]
    if len(inner) < _MIN_POINTS or np.ptp(inner[:, 0]) == 0:
        return not_applicable(name, "Too few scores between its ends.")
    line = _line(inner)
    if line is None:
        return not_applicable(name, "The score is no straight line in background PSNR.")
    return _convention(name, *line)


def _line(points: NDArray[np.float64]) -> tuple[float, float] | None:
    """Fits score = slope * dB + zero; None where the points do not lie on a line."""
    slope, zero = np.polyfit(points[:, 0], points[:, 1], 1)
    residual = np.std(points[:, 1] - slope * points[:, 0] - zero)
    # Over the slope, the residual is in dB and does not depend on the unit of the score.
    if not slope or float(residual) / abs(slope) > _LINE_DB:
        return None
    return float(slope), float(zero / slope)


def _convention(name: str, slope: float, offset: float) -> Check:
    numbers = {"offset_db": offset, "score_per_db": slope}
    if abs(offset - _CHANNEL_SLIP_DB) < _OFFSET_DB:
        return warned(
            name,
            f"{offset:.2f} dB off the masked PSNR: a squared error summed over three channels and "
            "divided by one channel's pixels. Advantages are the same; clipping points and "
            "published numbers are not.",
            numbers,
        )
    if abs(offset) < _OFFSET_DB:
        return passed(name, f"It is the masked PSNR ({slope:.3g} per dB).", numbers)
    return passed(name, f"It is a straight line in masked PSNR, zero at {-offset:.2f} dB.", numbers)


def _points(
    response: Responses, corruption: str, decibel: Sequence[float]
) -> list[tuple[float, float]]:
    """Pairs background PSNR with the score, by level."""
    return [
        (db, score)
        for db, score in zip(decibel, response.graded[corruption, "outside"], strict=True)
        if math.isfinite(score) and math.isfinite(db)
    ]
