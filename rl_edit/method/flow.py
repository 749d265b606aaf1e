"""Rectified-flow algebra: interpolation, conversions, and transitions of sampling steps.

``sigma`` is 1 for noise and 0 for clean, ``x = (1 - sigma) * clean + sigma * noise`` and
``velocity = noise - clean``. No other file writes this algebra inline.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from rl_edit.types import SDE

TIMESTEPS = 1000
"""diffusers' flow schedulers count time in [0, 1000]; transformers are fed ``timestep / 1000``."""


def timestep_from_sigma(sigma: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Converts a noise level to the scheduler's timestep."""
    return sigma * TIMESTEPS


def model_time(sigma: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """Converts a noise level (fp32) to the time input of a FLUX-family transformer.

    The timestep is formed in fp32, rounded to the model's dtype and divided there, as the stock
    pipeline does: leaving the round trip out, or rounding sigma first, is another function (in bf16
    by up to 4 of 1000).
    """
    # fp32 -> dtype -> division, in this order (see above).
    return timestep_from_sigma(sigma.float()).to(dtype) / TIMESTEPS


def interpolate(
    clean: Float[Tensor, "*shape"],
    noise: Float[Tensor, "*shape"],
    sigma: Float[Tensor, "*broadcast"],
) -> Float[Tensor, "*shape"]:
    """Computes the state at noise level ``sigma`` on the straight path."""
    return (1 - sigma) * clean + sigma * noise


def clean_from_velocity(
    latents: Float[Tensor, "*shape"],
    velocity: Float[Tensor, "*shape"],
    sigma: Float[Tensor, "*broadcast"],
) -> Float[Tensor, "*shape"]:
    """Predicts the clean sample, ``x - sigma * v``."""
    return latents - sigma * velocity


def euler(
    latents: Float[Tensor, "*shape"],
    velocity: Float[Tensor, "*shape"],
    *,
    sigma: Float[Tensor, "*broadcast"],
    sigma_next: Float[Tensor, "*broadcast"],
) -> Float[Tensor, "*shape"]:
    """Takes one deterministic step, ``x + (sigma_next - sigma) * v``.

    DDIM with eta = 0, bit for bit the stock scheduler's.
    """
    return latents + (sigma_next - sigma) * velocity


def moments(
    latents: Float[Tensor, "*shape"],
    velocity: Float[Tensor, "*shape"],
    *,
    sigma: float,
    sigma_next: float,
    level: float,
    sde: SDE,
) -> tuple[Float[Tensor, "*shape"], float]:
    """Computes mean and deviation of the state after one stochastic step, at ``level`` a > 0.

    With ``dt = sigma' - sigma < 0``, the predicted clean sample x0 and the predicted noise x1:

    * flow (Flow-GRPO, arXiv 2505.05470): ``s = a sqrt(sigma / (1 - sigma))``,
      ``mean = x (1 + s^2 dt / 2 sigma) + v (1 + s^2 (1 - sigma) / 2 sigma) dt``, deviation
      ``s sqrt(-dt)``. At sigma = 1 the denominator uses the next grid point, as the released code
      does.
    * dance (DanceGRPO, arXiv 2505.07818): ``s = a``,
      ``mean = x + v dt + s^2/2 (x - (1 - sigma) x0) / sigma^2 dt``, deviation ``s sqrt(-dt)``.
    * cps (Flow-CPS, arXiv 2509.05952): deviation ``sigma' sin(a pi / 2)``,
      ``mean = (1 - sigma') x0 + sqrt(sigma'^2 - deviation^2) x1``.
    """
    delta = sigma_next - sigma
    if sde == "cps":
        # x0 and x1 keep their weights (1 - sigma', sigma'), with a part of the noise drawn anew:
        # (sigma'^2 - deviation^2) + deviation^2 = sigma'^2.
        deviation = sigma_next * math.sin(level * math.pi / 2)
        clean, noise = latents - sigma * velocity, latents + (1 - sigma) * velocity
        return (1 - sigma_next) * clean + math.sqrt(sigma_next**2 - deviation**2) * noise, deviation
    if sde == "dance":
        # The score of the flow at a state is -(x - (1 - sigma) x0) / sigma^2 = -x1 / sigma.
        noise = latents + (1 - sigma) * velocity
        return (
            latents + velocity * delta + 0.5 * level**2 * noise / sigma * delta,
            level * math.sqrt(-delta),
        )
    # Euler-Maruyama of dx = [v + s^2 / (2 sigma) (x + (1 - sigma) v)] dt + s dW.
    spread = level * (sigma / (1 - (sigma if sigma < 1.0 else sigma_next))) ** 0.5
    mean = (
        latents * (1 + spread**2 * delta / (2 * sigma))
        + velocity * (1 + spread**2 * (1 - sigma) / (2 * sigma)) * delta
    )
    return mean, spread * (-delta) ** 0.5


def log_density(
    state: Float[Tensor, "*batch token channel"],
    mean: Float[Tensor, "*batch token channel"],
    deviation: float,
    *,
    sde: SDE,
) -> Float[Tensor, "*batch token"]:
    """Computes the log-density of a stochastic step per token, as the mean over channels.

    Every released trainer takes the **mean**, not the sum. For "cps" it is ``-(x' - mean)^2``
    without scale or normaliser, as published.
    """
    squared = (state - mean).square()
    if sde == "cps":
        return -squared.mean(dim=-1)
    # log N(x'; mean, k^2) = -(x' - mean)^2 / 2k^2 - log k - log(2 pi) / 2
    return (-squared / (2 * deviation**2) - math.log(deviation) - 0.5 * math.log(2 * math.pi)).mean(
        dim=-1
    )


def transition(
    latents: Float[Tensor, "*shape"],
    velocity: Float[Tensor, "*shape"],
    *,
    sigma: float,
    sigma_next: float,
    level: float,
    sde: SDE = "flow",
    noise: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Takes one sampling step at SDE ``level``; level 0 is exactly :func:`euler`.

    ``noise`` is standard normal, needed when the level is positive.
    """
    # As fp32 tensors, so that the difference of levels is rounded as the stock scheduler rounds it.
    grid = torch.tensor([sigma, sigma_next], dtype=torch.float32, device=latents.device)
    if level == 0.0:
        return euler(latents, velocity, sigma=grid[0], sigma_next=grid[1])
    assert noise is not None, "a stochastic step needs its noise"
    mean, deviation = moments(
        latents, velocity, sigma=sigma, sigma_next=sigma_next, level=level, sde=sde
    )
    return mean + deviation * noise


def multistep(
    latents: Float[Tensor, "*shape"],
    clean: Float[Tensor, "*shape"],
    before: Float[Tensor, "*shape"],
    *,
    sigma_before: float,
    sigma: float,
    sigma_next: float,
) -> Float[Tensor, "*shape"]:
    """Takes one step of DPM-Solver++(2M) on the flow (arXiv 2211.01095, Algorithm 2).

    A second-order step at the price of a first-order one. In ``lambda = log((1 - sigma) / sigma)``
    with ``h = lambda' - lambda`` and ``r = h_before / h``: ``x' = (sigma' / sigma) x - (1 - sigma')
    (e^-h - 1) D``, ``D = x0 + (x0 - x0_before) / 2r``. Without a finite step before it (the grid
    starts at sigma = 1) and at the last step (sigma' = 0) it is first order, which is exactly
    :func:`euler`'s formula.

    Args:
        clean: predicted clean sample at ``latents``; ``before``: at the previous step.
    """

    def log_snr(level: float) -> float:
        return math.log((1 - level) / level)

    # h = lambda' - lambda, r = h_before / h, D = x0 + (x0 - x0_before) / 2r
    step = log_snr(sigma_next) - log_snr(sigma)
    ratio = (log_snr(sigma) - log_snr(sigma_before)) / step
    direction = clean + (clean - before) / (2 * ratio)
    # expm1 computes e^-h - 1 without cancellation where steps are short.
    return sigma_next / sigma * latents - (1 - sigma_next) * math.expm1(-step) * direction
