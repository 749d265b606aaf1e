"""SpatialFlow-GRPO (arXiv 2606.26872): a reward, an advantage and a ratio for every region.

Eq. 3 is published; the rest is reconstructed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reference.flow_grpo import clipped, log_prob


def region_reward(
    success: float, preservation: float, naturalness: float, artifacts: float, *, scale: float
) -> float:
    """Computes Eq. 3 of an edited region, ``sqrt(phi AES) / C``.

    ``phi = min(success, preservation)`` and ``AES = min(naturalness, artifacts)``.
    """
    return math.sqrt(min(success, preservation) * min(naturalness, artifacts)) / scale


def background_reward(
    background: float, naturalness: float, artifacts: float, *, scale: float
) -> float:
    """Computes Eq. 3 of the background, whose phi is its one score."""
    return math.sqrt(background * min(naturalness, artifacts)) / scale


def advantages(rewards: Tensor) -> Tensor:
    """Standardises each region [candidate, region] over the group by itself."""
    return torch.stack(
        [(column - column.mean()) / column.std(correction=0) for column in rewards.T], dim=1
    )


def ratios(
    following: Tensor, mean: Tensor, old_mean: Tensor, deviation: float, law: str, shares: Tensor
) -> Tensor:
    """Exponentiates each region's mean change of the log-density, to [candidate, region].

    Shares [region, token] need not be 0 or 1.
    """
    change = (
        log_prob(following, mean, deviation, law) - log_prob(following, old_mean, deviation, law)
    ).mean(dim=2)
    return torch.stack([(change * share).sum(dim=1) / share.sum() for share in shares], dim=1).exp()


def loss(
    ratio: Tensor,
    advantage: Tensor,
    shares: Tensor,
    *,
    clip: float,
    area_power: float = 1.0,
    clip_by_area: bool = False,
) -> Tensor:
    """Computes ``-sum_r w_r mean_i min(rho A, clip(rho) A)``.

    ``w_r`` are the regions' areas to the power ``area_power``, made to sum to 1.
    """
    num_tokens = shares.shape[1]
    areas = shares.sum(dim=1)
    weights = areas**area_power / (areas**area_power).sum()
    total = torch.zeros((), dtype=torch.float64)
    for region, share in enumerate(shares):
        averaged = float(share.sum() ** 2 / (share**2).sum())  # tokens that the mean is really over
        half_width = clip * (math.sqrt(num_tokens / averaged) if clip_by_area else 1.0)
        total = (
            total
            + weights[region]
            * clipped(ratio[:, region], advantage[:, region], half_width, half_width).mean()
        )
    return total
