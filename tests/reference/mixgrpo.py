"""MixGRPO (arXiv 2507.21802): moving windows of stochastic steps, and summed advantages."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def windows(
    num_updates: int,
    *,
    num_steps: int,
    size: int,
    every: int,
    stride: int = 1,
    decay: float | None = None,
    threshold: int = 13,
    whole_windows: bool = False,
) -> list[list[int]]:
    """Lists the stochastic steps of each update, ``[l, min(l + size, num_steps - 2))``.

    The window moves by ``stride`` after its stay, and back to 0 at the end.

    Args:
        decay: k of the exponential schedule, ``ceil(every exp(-k relu(l - threshold)))`` updates at
            l; None stays ``every`` everywhere.
        whole_windows: the last position is the last whole window, and the roll-back follows it.
    """
    end, left, steps = num_steps - 2, 0, []
    stayed = 0
    for _ in range(num_updates):
        steps.append(list(range(left, min(left + size, end))))
        stay = (
            every
            if decay is None
            else math.ceil(every * math.exp(-decay * max(left - threshold, 0)))
        )
        stayed += 1
        if stayed >= stay:
            stayed = 0
            left += stride
            if whole_windows and left + size > end:
                left = end - size if left - stride < end - size else 0
            elif left > end - 1:
                left = 0
    return steps


def advantages(rewards: Tensor, weights: list[float], *, unbiased: bool = True) -> Tensor:
    """Adds the standardised advantages of every reward by weight, to [candidate] of one group.

    Rewards are [candidate, reward].
    """
    total = torch.zeros(len(rewards), dtype=torch.float64)
    for weight, column in zip(weights, rewards.T, strict=True):
        total = total + weight * (column - column.mean()) / (
            column.std(correction=int(unbiased)) + 1e-8
        )
    return total
