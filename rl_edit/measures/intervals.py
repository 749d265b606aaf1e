"""Computes bootstrap intervals of means and of paired differences. A seed repeats them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rl_edit.errors import InputError

# Resamples are drawn in blocks of about this many indices: thousands of tasks must not need
# gigabytes.
_BLOCK = 2_000_000


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval.

    Attributes:
        mean: over all values.
        low, high: ends of the interval; -inf and inf for n = 1, where the spread is unknown.
        n: independent units behind it: values, or clusters where values were grouped.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def sign(self) -> int:
        """The side of zero on which all of the interval lies, 1 or -1; else 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def bootstrap(
    values: Sequence[float] | NDArray[np.floating],
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
    groups: Sequence[Hashable] | None = None,
) -> Interval:
    """Computes the percentile bootstrap interval of the mean.

    Args:
        values: one per observation, finite. Failed measurements must be left out and counted by
            the caller.
        groups: the unit each value belongs to (its task, when a task was measured with several
            seeds). Complete units are resampled, because repeats of one task do not add tasks.
    """
    sample = _checked(values, "values")
    if not 0 < level < 1:
        raise InputError(f"level({level}) of an interval must lie between 0 and 1; 0.95 is usual.")
    if resamples < 100:
        raise InputError(
            f"resamples({resamples}) is too few for the ends of an interval. Use at least 100; "
            "2000 is usual."
        )
    sums, counts = _clustered(sample, groups)
    n = len(sums)
    mean = float(sample.mean())
    # One unit says nothing about the spread.
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, _BLOCK // n)
    for start in range(0, resamples, block):
        drawn = generator.integers(0, n, size=(min(block, resamples - start), n))
        # A ratio of sums: units of several values keep their weight.
        means[start : start + len(drawn)] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), n)


def paired_bootstrap(
    a: Sequence[float] | NDArray[np.floating],
    b: Sequence[float] | NDArray[np.floating],
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
    groups: Sequence[Hashable] | None = None,
) -> Interval:
    """Computes the interval of the mean of ``b - a``.

    ``a[i]`` and ``b[i]`` are the same task under the same noise. Differences are resampled, so what
    makes a task easy or hard for both cancels. ``groups`` as in ``bootstrap``.
    """
    first, second = _checked(a, "a"), _checked(b, "b")
    if len(first) != len(second):
        raise InputError(
            f"A paired comparison needs the same tasks on both sides, got {len(first)} and "
            f"{len(second)} values. Match them."
        )
    return bootstrap(second - first, seed=seed, resamples=resamples, level=level, groups=groups)


def _checked(values: Sequence[float] | NDArray[np.floating], what: str) -> NDArray[np.float64]:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size == 0:
        raise InputError(
            f"{what} has shape {sample.shape}: a mean needs a list of at least one number."
        )
    if not np.isfinite(sample).all():
        bad = int((~np.isfinite(sample)).sum())
        raise InputError(
            f"{what} holds {bad} values that are not finite, so its mean means nothing. Leave "
            "failed measurements out and count them."
        )
    return sample


def _clustered(
    sample: NDArray[np.float64], groups: Sequence[Hashable] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums and counts the values of each unit, in order of first appearance."""
    if groups is None:
        return sample, np.ones_like(sample)
    if len(groups) != len(sample):
        raise InputError(
            f"groups has {len(groups)} entries for {len(sample)} values. Give each value its unit."
        )
    unit_of = {unit: row for row, unit in enumerate(dict.fromkeys(groups))}
    # Units in order of first appearance, so that a seed repeats whatever the units are called.
    rows = np.array([unit_of[unit] for unit in groups])
    return np.bincount(rows, weights=sample).astype(np.float64), np.bincount(rows).astype(
        np.float64
    )
