"""One denoising loop: from a group's initial noises to the trajectory that training needs.

A group may be rolled out and scored in chunks of its candidates; :func:`merged` and :func:`joined`
make it whole again. The loop takes a velocity function and knows neither editor nor weights nor
Ray.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rl_edit.method import flow
from rl_edit.scores import Measures, PerCandidate, RegionTable
from rl_edit.types import (
    SDE,
    AdapterId,
    Candidates,
    Conditioning,
    EditTask,
    RewardTable,
    RolloutGroup,
)

Solver = Literal["euler", "dpm++"]
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
    solver: Solver = "euler",
    step_noise: Float[Tensor, " all_steps"] | None = None,
    sde: SDE = "flow",
    normal: Callable[[int], Tensor] | None = None,
    project: Callable[[Tensor], Tensor] | None = None,
) -> Trajectory:
    """Integrates every candidate over the whole grid and keeps the named steps. Latents stay fp32
    throughout.

    Args:
        sigmas: decreasing grid from (near) 1 to 0.
        keep: indices of the steps to store, ascending.
        solver: "euler", or "dpm++": DPM-Solver++(2M), second order from the steps before. Kept
            velocities serve either.
        step_noise: SDE level per step; None is the ODE. A multistep solver has none.
        sde: the law of stochastic steps.
        normal: standard normals for stochastic steps, by step index.
        project: what is done to the candidates' states after each step but the last.
    """
    num_steps = len(sigmas) - 1
    levels = torch.zeros(num_steps) if step_noise is None else step_noise
    latents = initial.float()
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    clean: Tensor | None = None
    for step in range(num_steps):
        rate = velocity(latents, sigmas[step].expand(len(latents)))
        level = float(levels[step])
        before, clean = clean, flow.clean_from_velocity(latents, rate, sigmas[step])
        if (
            solver == "dpm++"
            and before is not None
            and sigmas[step + 1] > 0
            and sigmas[step - 1] < 1
        ):
            assert level == 0, "a multistep solver has no stochastic steps"
            grid = [float(sigmas[i]) for i in (step - 1, step, step + 1)]
            following = flow.multistep(
                latents, clean, before, sigma_before=grid[0], sigma=grid[1], sigma_next=grid[2]
            )
        else:
            following = flow.transition(
                latents,
                rate,
                sigma=float(sigmas[step]),
                sigma_next=float(sigmas[step + 1]),
                level=level,
                sde=sde,
                noise=normal(step).to(latents) if level and normal is not None else None,
            )
        if project is not None and step + 1 < num_steps:
            following = project(following)
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


def blank_task(pixels_per_token: int) -> EditTask:
    """An edit of nothing on a canvas of 4 by 4 tokens: for forwards whose result nobody looks
    at."""
    side = 4 * pixels_per_token
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[:pixels_per_token] = True
    source = torch.full((side, side, 3), 128, dtype=torch.uint8)
    return EditTask(
        task_id="blank", task_type="edit", source=source, instruction="nothing", edit_mask=mask
    )


def blank_group(
    conditioning: Conditioning,
    shape: tuple[int, int],
    *,
    size: int,
    levels: Tensor,
    keep: tuple[int, ...],
) -> RolloutGroup:
    """A group of zeros with every record a real one has, for forwards whose result nobody looks at.

    Args:
        conditioning: of :func:`blank_task`; ``shape``: (token, channel) of its latents.
        levels: SDE level of each rollout step; ``keep``: the kept ones.
    """
    areas = torch.zeros(1, *conditioning.grid, dtype=torch.bool)
    areas[0, 0, 0] = True
    task, kept = blank_task(1), list(keep)
    grid = torch.linspace(1, 0, len(levels) + 1)
    states = torch.zeros(size, len(kept), *shape)
    return RolloutGroup(
        group_id="blank",
        adapter=AdapterId(0, "blank"),
        candidates=Candidates(
            task=task,
            images=task.source.expand(size, -1, -1, -1),
            attention=torch.full((size, shape[0]), 1 / shape[0]),
            token_mask=areas.any(dim=0).flatten(),
        ),
        conditioning=conditioning,
        latents=states,
        next_latents=states,
        velocities=states,
        sigmas=grid[kept],
        sigmas_next=grid[[step + 1 for step in kept]],
        step_noise=levels[kept],
        sde="flow",
        schedule=grid,
        areas=areas,
    )


def merged(chunks: Sequence[RolloutGroup]) -> RolloutGroup:
    """The group that its chunks, in candidate order, are parts of.

    Raises:
        ValueError: for chunks of several groups or of several adapters.
    """
    first = chunks[0]
    _require_one("groups", [chunk.group_id for chunk in chunks])
    _require_one("adapters", [str(chunk.adapter) for chunk in chunks])
    return replace(
        first,
        candidates=replace(
            first.candidates,
            images=torch.cat([chunk.candidates.images for chunk in chunks]),
            attention=torch.cat([chunk.candidates.attention for chunk in chunks]),
        ),
        latents=torch.cat([chunk.latents for chunk in chunks]),
        next_latents=torch.cat([chunk.next_latents for chunk in chunks]),
        velocities=torch.cat([chunk.velocities for chunk in chunks]),
    )


def joined(tables: Sequence[RewardTable]) -> RewardTable:
    """Joins the reward tables of a group's chunks, in candidate order.

    What a chunk lacks is NaN there.

    Raises:
        ValueError: for tables of several groups or of different terms.
    """
    first = tables[0]
    _require_one("groups", [table.group_id for table in tables])
    _require_one("terms", [f"{table.names} with weights {table.weights}" for table in tables])
    sizes = [len(table.values) for table in tables]
    components = {
        term: _joined_columns([table.components.get(term, {}) for table in tables], sizes)
        for term in _keys(table.components for table in tables)
    }
    regions = {
        term: _joined_regions([table.regions.get(term) for table in tables], sizes)
        for term in _keys(table.regions for table in tables)
    }
    return replace(
        first,
        values=torch.cat([table.values for table in tables]),
        valid=torch.cat([table.valid for table in tables]),
        reasons=tuple(dict.fromkeys(reason for table in tables for reason in table.reasons)),
        out_of_contract=any(table.out_of_contract for table in tables),
        components=components,
        regions=regions,
        repeats=_joined_columns([table.repeats for table in tables], sizes),
        measures=_joined_measures([table.measures for table in tables], sizes),
        counts={
            key: sum(table.counts.get(key, 0) for table in tables)
            for key in _keys(table.counts for table in tables)
        },
        seconds=sum(table.seconds for table in tables),
    )


def _keys(mappings: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _joined_columns(
    chunks: Sequence[Mapping[str, PerCandidate]], sizes: Sequence[int]
) -> dict[str, PerCandidate]:
    return {
        key: tuple(
            value
            for chunk, size in zip(chunks, sizes, strict=True)
            for value in chunk.get(key, (math.nan,) * size)
        )
        for key in _keys(chunks)
    }


def _joined_regions(chunks: Sequence[RegionTable | None], sizes: Sequence[int]) -> RegionTable:
    # One task, so chunks agree in the number of areas, unless a chunk has no score at all.
    width = max(chunk.areas.shape[1] for chunk in chunks if chunk is not None)
    areas = torch.full((sum(sizes), width), math.nan, dtype=torch.float64)
    background = torch.full((sum(sizes),), math.nan, dtype=torch.float64)
    start = 0
    for chunk, size in zip(chunks, sizes, strict=True):
        if chunk is not None:
            areas[start : start + size, : chunk.areas.shape[1]] = chunk.areas
            background[start : start + size] = chunk.background
        start += size
    return RegionTable(areas=areas, background=background)


def _joined_measures(chunks: Sequence[Measures | None], sizes: Sequence[int]) -> Measures | None:
    measured = [chunk for chunk in chunks if chunk is not None]
    if len(measured) < len(chunks):
        return None
    return Measures(
        background=_joined_columns([chunk.background for chunk in measured], sizes),
        change_inside=tuple(value for chunk in measured for value in chunk.change_inside),
        concentration=tuple(value for chunk in measured for value in chunk.concentration),
        # Variances of chunks say nothing about the variance of their group.
        variance=measured[0].variance if len(measured) == 1 else None,
    )


def _require_one(what: str, names: Sequence[str]) -> None:
    if len(set(names)) != 1:
        raise ValueError(
            f"chunks of different {what} do not make one group: {', '.join(sorted(set(names)))}"
        )
