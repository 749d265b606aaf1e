"""Rectified-flow algebra: interpolation, the named conversions, and the transition of one sampling step.

``sigma`` = 1 is noise and 0 is clean; ``x = (1 - sigma) * clean + sigma * noise``; ``velocity = noise - clean``.
No other file writes this algebra inline.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

TIMESTEPS = 1000
"""diffusers' flow schedulers count time in [0, 1000]; transformers are fed ``timestep / 1000``."""


def timestep_from_sigma(sigma: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The scheduler's timestep of a noise level."""
    return sigma * TIMESTEPS


def model_time(sigma: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """What a FLUX-family transformer of ``dtype`` is fed for a noise level (fp32).

    The timestep is formed in fp32, rounded to the model's dtype and divided there, as the stock pipeline does: leaving
    the round trip out, or rounding sigma first, is another function (in bf16 by up to 4 of 1000).
    """
    return timestep_from_sigma(sigma.float()).to(dtype) / TIMESTEPS


def interpolate(
    clean: Float[Tensor, "*shape"], noise: Float[Tensor, "*shape"], sigma: Float[Tensor, "*broadcast"]
) -> Float[Tensor, "*shape"]:
    """State at noise level ``sigma`` on the straight path."""
    return (1 - sigma) * clean + sigma * noise


def clean_from_velocity(
    latents: Float[Tensor, "*shape"], velocity: Float[Tensor, "*shape"], sigma: Float[Tensor, "*broadcast"]
) -> Float[Tensor, "*shape"]:
    """Predicted clean sample, ``x - sigma * v``."""
    return latents - sigma * velocity


def noise_from_velocity(
    latents: Float[Tensor, "*shape"], velocity: Float[Tensor, "*shape"], sigma: Float[Tensor, "*broadcast"]
) -> Float[Tensor, "*shape"]:
    """Predicted noise, ``x + (1 - sigma) * v``."""
    return latents + (1 - sigma) * velocity


def euler(
    latents: Float[Tensor, "*shape"],
    velocity: Float[Tensor, "*shape"],
    *,
    sigma: Float[Tensor, "*broadcast"],
    sigma_next: Float[Tensor, "*broadcast"],
) -> Float[Tensor, "*shape"]:
    """One deterministic step, ``x + (sigma_next - sigma) * v``: DDIM with eta = 0, bit for bit the stock scheduler's."""
    return latents + (sigma_next - sigma) * velocity


def transition(
    latents: Float[Tensor, "*shape"],
    velocity: Float[Tensor, "*shape"],
    *,
    sigma: float,
    sigma_next: float,
    level: float,
    noise: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """One sampling step at SDE ``level`` a (Flow-GRPO, arXiv 2505.05470): ``s_t = a * sqrt(sigma / (1 - sigma))``.

    Level 0 is exactly :func:`euler`. At sigma = 1 the denominator uses the next grid point, as the released code does.
    ``noise`` is standard normal, needed when the level is positive.
    """
    grid = torch.tensor([sigma, sigma_next], dtype=torch.float32, device=latents.device)
    if level == 0.0:
        return euler(latents, velocity, sigma=grid[0], sigma_next=grid[1])
    assert noise is not None, "a stochastic step needs its noise"
    delta = sigma_next - sigma
    spread = level * (sigma / (1 - (sigma if sigma < 1.0 else sigma_next))) ** 0.5
    drift = latents * (1 + spread**2 * delta / (2 * sigma)) + velocity * (1 + spread**2 * (1 - sigma) / (2 * sigma)) * delta
    return drift + spread * (-delta) ** 0.5 * noise
