"""DiffusionNFT (arXiv 2509.16117): learning on noised samples.

With an implicit positive and an implicit negative policy.
"""

from __future__ import annotations

import torch
from torch import Tensor


def optimality(advantage: Tensor, cut: float) -> Tensor:
    """Maps an advantage to r in [0, 1]."""
    return (0.5 + advantage.clamp(-cut, cut) / (2 * cut)).clamp(0, 1)


def predictions(
    x: Tensor, s: float, v: Tensor, v_old: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Predicts the clean samples of the positive and of the negative policy.

    Their velocities are ``beta v + (1 - beta) v_old`` and ``(1 + beta) v_old - beta v``.
    """
    return x - s * (beta * v + (1 - beta) * v_old), x - s * ((1 + beta) * v_old - beta * v)


def loss(
    x: Tensor,
    s: float,
    clean: Tensor,
    v: Tensor,
    v_old: Tensor,
    v_ref: Tensor,
    r: Tensor,
    *,
    beta: float,
    cut: float,
    reference_weight: float,
    adaptive: bool = True,
) -> Tensor:
    """Computes the loss at one noise level, mean over candidates; ``r`` is [candidate]."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(x)):
        positive, negative = predictions(x[i], s, v[i], v_old[i], beta)
        errors = []
        for predicted in (positive, negative):
            # The adaptive weight is a constant: no gradient goes through it.
            size = (
                max(float((predicted - clean[i]).detach().abs().mean()), 1e-5) if adaptive else 1.0
            )
            errors.append(((predicted - clean[i]) ** 2).mean() / size)
        total = total + cut * (r[i] * errors[0] / beta + (1 - r[i]) * errors[1] / beta) / len(x)
    return total + reference_weight * ((v - v_ref) ** 2).mean()


def decay(update: int, schedule: int) -> float:
    """Computes the share of the sampling weights that stays after an update.

    Under the released schedules 0, 1 and 2.
    """
    start, rate, largest = {0: (0, 0.0, 0.0), 1: (0, 0.001, 0.5), 2: (75, 0.0075, 0.999)}[schedule]
    return 0.0 if update < start else min((update - start) * rate, largest)
