"""Flow-GRPO (arXiv 2505.05470): a sampling step as a Gaussian policy.

With DanceGRPO's and Flow-CPS's laws, and GRPO-Guard's ratio.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence


def step(
    x: Tensor, v: Tensor, s: float, s_next: float, level: float, law: str
) -> tuple[Tensor, float]:
    """Computes mean and deviation of the next state.

    * flow: Euler-Maruyama of ``dx = [v + (w^2 / 2s)(x + (1 - s) v)] dt + w dW`` with
      ``w = level sqrt(s / (1 - s))``.
    * dance: of ``dx = [v - (w^2 / 2) score] dt + w dW`` with ``w = level``.
    * cps: predicted clean sample and noise are mixed anew, ``sin(level pi / 2)`` of the noise being
      fresh.
    """
    dt = s_next - s
    clean, noise = x - s * v, x + (1 - s) * v
    if law == "flow":
        # At s = 1 the released code takes the next level in the denominator.
        w = level * math.sqrt(s / (1 - (s_next if s == 1 else s)))
        return x + (v + w**2 / (2 * s) * (x + (1 - s) * v)) * dt, w * math.sqrt(-dt)
    if law == "dance":
        score = -(x - (1 - s) * clean) / s**2
        return x + v * dt - 0.5 * level**2 * score * dt, level * math.sqrt(-dt)
    deviation = s_next * math.sin(level * math.pi / 2)
    return (1 - s_next) * clean + math.sqrt(s_next**2 - deviation**2) * noise, deviation


def log_prob(following: Tensor, mean: Tensor, deviation: float, law: str) -> Tensor:
    """Computes the log-density [candidate, token, channel] of the step, unreduced.

    CPS leaves out scale and normaliser.
    """
    if law == "cps":
        return -((following - mean) ** 2)
    return Normal(mean, deviation).log_prob(following)


def ratios(
    following: Tensor,
    mean: Tensor,
    old_mean: Tensor,
    deviation: float,
    law: str,
    *,
    guard: bool = False,
) -> Tensor:
    """Exponentiates the mean change of the log-density over all elements, to [candidate].

    ``guard`` is GRPO-Guard (arXiv 2510.22319): ``exp(k (change + |mean - old_mean|^2 / 2k^2))``
    with Gaussian densities.
    """
    used = "flow" if guard else law
    change = (
        log_prob(following, mean, deviation, used) - log_prob(following, old_mean, deviation, used)
    ).mean(dim=(1, 2))
    if guard:
        change = deviation * (
            change + ((mean - old_mean) ** 2).mean(dim=(1, 2)) / (2 * deviation**2)
        )
    return change.exp()


def clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Computes ``-min(rho A, clip(rho, 1 - low, 1 + high) A)``, elementwise."""
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))


def divergence(
    mean: Tensor,
    reference_mean: Tensor,
    deviation: float,
    *,
    s: float,
    s_next: float,
    law: str,
    exact_kl: bool = False,
) -> Tensor:
    """Averages the distance of two steps over elements.

    Published code divides by ``2 w^2``, the exact divergence by ``2 w^2 (-dt)``. Under cps the
    published deviation k stands for w: ``2 k^2`` either way.
    """
    if exact_kl or law == "cps":
        return kl_divergence(Normal(mean, deviation), Normal(reference_mean, deviation)).mean()
    w = deviation / math.sqrt(s - s_next)
    return ((mean - reference_mean) ** 2).mean() / (2 * w**2)


def advantages(
    rewards: list[Tensor],
    *,
    limit: float,
    between_groups: bool = True,
    scale_whole_group: bool = False,
) -> list[Tensor]:
    """Divides group-centred rewards by the deviation of the batch ("global std").

    Args:
        rewards: [candidate] of each group.
        limit: largest absolute advantage.
    """
    centred = [group - group.mean() for group in rewards]
    deviation = torch.cat(rewards if between_groups else centred).std(correction=0)
    scaled = [group / deviation for group in centred]
    if scale_whole_group:
        return [group * min(1.0, limit / float(group.abs().max())) for group in scaled]
    return [group.clamp(-limit, limit) for group in scaled]
