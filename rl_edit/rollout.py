"""One denoising loop: from a group's initial noises to the trajectory that training needs.

The loop takes a velocity function and knows neither editor nor weights nor Ray.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rl_edit import flow

Velocity = Callable[[Tensor, Tensor], Tensor]
"""``(latents [batch, token, channel], sigma [batch]) -> velocity [batch, token, channel]``."""


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """The kept steps of a group's trajectories, and where they end."""

    latents: Float[Tensor, "group step token channel"]
    next_latents: Float[Tensor, "group step token channel"]
    velocities: Float[Tensor, "group step token channel"]
    sigmas: Float[Tensor, " step"]
    sigmas_next: Float[Tensor, " step"]
    step_noise: Float[Tensor, " step"]
    final: Float[Tensor, "group token channel"]


@torch.no_grad()
def denoise(
    velocity: Velocity,
    initial: Float[Tensor, "group token channel"],
    sigmas: Float[Tensor, " step_plus_1"],
    *,
    keep: tuple[int, ...] = (),
    step_noise: Float[Tensor, " all_steps"] | None = None,
    normal: Callable[[int], Tensor] | None = None,
) -> Trajectory:
    """Integrates every candidate over the whole grid and keeps the named steps. Latents stay fp32 throughout.

    Args:
        sigmas: decreasing grid from (near) 1 to 0.
        keep: indices of the steps to store, ascending.
        step_noise: SDE level per step; None is the ODE.
        normal: standard normals for stochastic steps, by step index.
    """
    num_steps = len(sigmas) - 1
    levels = torch.zeros(num_steps) if step_noise is None else step_noise
    latents = initial.float()
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for step in range(num_steps):
        rate = velocity(latents, sigmas[step].expand(len(latents)))
        level = float(levels[step])
        following = flow.transition(
            latents,
            rate,
            sigma=float(sigmas[step]),
            sigma_next=float(sigmas[step + 1]),
            level=level,
            noise=normal(step).to(latents) if level and normal is not None else None,
        )
        if step in keep:
            kept.append((latents, following, rate))
        latents = following
    index = torch.tensor(keep, dtype=torch.long)
    stacked = [torch.stack(parts, dim=1) for parts in zip(*kept, strict=True)] or [
        latents.new_zeros(len(latents), 0, *latents.shape[1:])
    ] * 3
    return Trajectory(
        latents=stacked[0],
        next_latents=stacked[1],
        velocities=stacked[2],
        sigmas=sigmas.cpu()[index],
        sigmas_next=sigmas.cpu()[index + 1],
        step_noise=levels[index],
        final=latents,
    )
