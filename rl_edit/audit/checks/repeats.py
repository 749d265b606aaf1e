"""Checks that the same image gets the same score."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rl_edit.audit.checks.case import Case
from rl_edit.audit.checks.ranks import finite, mean
from rl_edit.audit.checks.verdict import Check, failed, grade, not_applicable, passed

# Deviation of repeats over the deviation between differently corrupted images.
_NOISE_PASS, _NOISE_FAIL = 0.1, 0.5
# A repeat this far from the image's median, as a share of the fall, jumps; and the share of jumps
# that is too large. A made-up score in place of a missing one jumps, measurement noise does not.
_JUMP, _JUMPS_FAIL = 0.5, 0.02
# Below this ratio the repeats differ by rounding alone: a batch of another size may round single
# precision differently.
_ROUNDING = 1e-5


@dataclass(frozen=True, kw_only=True)
class _Spread:
    """Noise between repeats, and signal between images.

    Attributes:
        noise: root of the mean variance of repeats.
        signal: mean over tasks of the deviation between differently corrupted images.
        largest_gap: between two repeats of one image.
        jumps: share of repeats that lie far from their image's median.
    """

    noise: float
    signal: float
    largest_gap: float
    jumps: float

    @property
    def ratio(self) -> float:
        """Noise over signal. A constant score without noise has ratio 0."""
        return self.noise / self.signal if self.signal else (math.inf if self.noise else 0.0)


def check_repeats(case: Case) -> Check:
    """Compares repeated scores of one image.

    It is scored in a batch several times, and once in a separate call.
    Terms that draw random numbers get other seeds each time.
    """
    spread = _spread(case)
    if spread is None:
        return not_applicable("repeats", "No image was scored twice.")
    numbers = {
        "noise": spread.noise,
        "signal": spread.signal,
        "noise_to_signal": spread.ratio,
        "largest_gap": spread.largest_gap,
        "jumps": spread.jumps,
    }
    if spread.ratio < _ROUNDING and not spread.jumps:
        sentence = "The same image always gets the same score, in a batch and by itself."
        return passed("repeats", sentence, numbers)
    shown = (
        f"repeats differ by {spread.noise:.3g} (deviation) "
        f"where corruptions differ by {spread.signal:.3g}"
    )
    if spread.largest_gap and spread.jumps > _JUMPS_FAIL:
        return failed(
            "repeats",
            f"The same image jumps by half the scale in {spread.jumps:.1%} of repeats: {shown}.",
            numbers,
        )
    return Check(
        name="repeats",
        verdict=grade(-spread.ratio, (-_NOISE_PASS, -_NOISE_FAIL)),
        sentence=f"The same image gets different scores: {shown}.",
        numbers=numbers,
    )


def _spread(case: Case) -> _Spread | None:
    """Measures noise and signal; None when no image has two valid scores."""
    rows = [
        row
        for response in case.scored
        for repeats in response.repeats
        if len(row := finite(repeats)) > 1
    ]
    if not rows:
        return None
    images = [
        finite((response.clean, *(score for row in case.rows(response) for score in row)))
        for response in case.scored
    ]
    jumps = [
        abs(score - float(np.median(row))) > _JUMP * abs(case.fall) for row in rows for score in row
    ]
    return _Spread(
        # Variances are averaged, not deviations: a mean of deviations of few repeats is too small.
        noise=math.sqrt(mean([float(np.var(row)) for row in rows])),
        signal=mean([float(np.std(scores)) for scores in images]),
        largest_gap=max(max(row) - min(row) for row in rows),
        jumps=sum(jumps) / len(jumps),
    )
