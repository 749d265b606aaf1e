"""Measures order: Kendall's tau, and how often one score beats another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np


def kendall(scores: Sequence[float]) -> float:
    """Computes Kendall's tau-b between strength and falling score.

    The strength is the position in ``scores``, and has no ties. With n pairs of positions of which
    u have different scores, and S falling pairs minus rising ones: tau-b = S / sqrt(n u).

    Returns:
        1 when every step lowers the score, 0 when none changes it, -1 when every step raises it.
        Positions without a score are left out; NaN when fewer than two remain.
    """
    valid = finite(scores)
    if len(valid) < 2:
        return math.nan
    signs = [
        np.sign(valid[i] - valid[j]) for i in range(len(valid)) for j in range(i + 1, len(valid))
    ]
    untied = sum(sign != 0 for sign in signs)
    # Without an untied pair the formula is 0 / 0; a constant score shows no order.
    return float(sum(signs) / math.sqrt(len(signs) * untied)) if untied else 0.0


def win(better: float, worse: float) -> float:
    """Scores one pair for the AUROC: 1 when ``better`` scores higher, 1/2 for a tie, else 0.

    The mean over pairs is the AUROC (Mann and Whitney, 1947). NaN when either score is missing.
    """
    if not (math.isfinite(better) and math.isfinite(worse)):
        return math.nan
    # A tie counts half, so a constant score has an AUROC of 1/2 and not of 0.
    return float(better > worse) + 0.5 * float(better == worse)


def finite(values: Iterable[float]) -> list[float]:
    """Drops values that do not exist."""
    return [value for value in values if math.isfinite(value)]


def mean(values: Sequence[float]) -> float:
    """Averages exactly rounded; NaN of none."""
    return math.fsum(values) / len(values) if values else math.nan
