"""One denoising loop: from a group's initial noises to the trajectory that training needs.

A group may be rolled out and scored in chunks of its candidates; :func:`merged` and :func:`joined`
join the parts again. The loop takes a velocity function and knows neither editor nor weights nor
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
    """The trained steps of a group's trajectories, and where they end."""

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
    """Integrates every candidate over the grid and stores the named steps.

    Latents stay fp32 throughout.

    Args:
        velocity: under the weights to roll out; called once a step for all candidates.
        sigmas: decreasing grid from (near) 1 to 0.
        keep: indices of the steps to store, ascending.
        solver: "euler", or "dpm++": DPM-Solver++(2M), second order from the steps before. Stored
            velocities serve either.
        step_noise: SDE level per step; None is the ODE. A multistep solver has none.
        sde: the law of stochastic steps.
        normal: draws standard normals for stochastic steps, by step index.
        project: what is done to the candidates' states after each step but the last.
    """
    num_steps = len(sigmas) - 1
    levels = torch.zeros(num_steps) if step_noise is None else step_noise
    latents = initial.float()
    stored: list[tuple[Tensor, Tensor, Tensor]] = []
    # The clean sample predicted one step earlier: all that the multistep solver remembers.
    clean: Tensor | None = None
    for step in range(num_steps):
        rate = velocity(latents, sigmas[step].expand(len(latents)))
        level = float(levels[step])
        before, clean = clean, flow.clean_from_velocity(latents, rate, sigmas[step])
        if solver == "dpm++" and before is not None and _second_order(sigmas, step):
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
        # Not after the last step: the final state is the edit itself. Before storing, so that the
        # surrogate's candidates are the states that the rollout goes on from.
        if project is not None and step + 1 < num_steps:
            following = project(following)
        if step in keep:
            stored.append((latents, following, rate))
        latents = following
    return _trajectory(stored, latents, sigmas.cpu(), levels, keep)


def _second_order(sigmas: Tensor, step: int) -> bool:
    """True where ``log((1 - sigma) / sigma)`` is finite before and after the step.

    It is infinite at sigma = 1 and at sigma = 0; there the solver's step is first order.
    """
    return bool(sigmas[step + 1] > 0 and sigmas[step - 1] < 1)


def _trajectory(
    stored: Sequence[tuple[Tensor, Tensor, Tensor]],
    final: Tensor,
    sigmas: Tensor,
    levels: Tensor,
    keep: tuple[int, ...],
) -> Trajectory:
    """Stacks (state, next state, velocity) of the stored steps, step by step."""
    index = torch.tensor(keep, dtype=torch.long)
    # Evaluation stores no step: then the tensors are empty and have their other axes all the same.
    empty = final.new_zeros(len(final), 0, *final.shape[1:])
    stacked = [torch.stack(parts, dim=1) for parts in zip(*stored, strict=True)] or [empty] * 3
    return Trajectory(
        latents=stacked[0],
        next_latents=stacked[1],
        velocities=stacked[2],
        sigmas=sigmas[index],
        sigmas_next=sigmas[index + 1],
        step_noise=levels[index],
        final=final,
    )


def blank_task(pixels_per_token: int) -> EditTask:
    """Makes a task on a canvas of 4 by 4 tokens, for forwards whose result is not read."""
    side = 4 * pixels_per_token
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[:pixels_per_token] = True  # one row of tokens: a mask is neither empty nor full
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
    """Makes a group of zeros with all records, for forwards whose result is not read.

    Args:
        conditioning: of :func:`blank_task`; ``shape``: (token, channel) of its latents.
        levels: SDE level of each rollout step; ``keep``: the indices of those to train.
    """
    # Objectives divide by the size of areas and by that of the background: neither is empty.
    areas = torch.zeros(1, *conditioning.grid, dtype=torch.bool)
    areas[0, 0, 0] = True
    task, steps = blank_task(1), list(keep)
    grid = torch.linspace(1, 0, len(levels) + 1)
    states = torch.zeros(size, len(steps), *shape)
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
        sigmas=grid[steps],
        sigmas_next=grid[[step + 1 for step in steps]],
        step_noise=levels[steps],
        sde="flow",
        schedule=grid,
        areas=areas,
    )


def merged(chunks: Sequence[RolloutGroup]) -> RolloutGroup:
    """Joins the chunks of a group, in candidate order.

    Raises:
        ValueError: for chunks of several groups or of several adapters.
    """
    first = chunks[0]
    _require_one("groups", [chunk.group_id for chunk in chunks])
    _require_one("adapters", [str(chunk.adapter) for chunk in chunks])
    # What all candidates share (task, conditioning, grid, areas) is the first chunk's.
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
    # Names and weights are those of the run, so any chunk's are the group's.
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
        # The same reason from several chunks is one, and the first one comes first.
        reasons=tuple(dict.fromkeys(reason for table in tables for reason in table.reasons)),
        notes=tuple(dict.fromkeys(note for table in tables for note in table.notes)),
        out_of_contract=any(table.out_of_contract for table in tables),
        components=components,
        regions=regions,
        repeats=_joined_columns([table.repeats for table in tables], sizes),
        measures=_joined_measures([table.measures for table in tables], sizes),
        counts={
            key: sum(table.counts.get(key, 0) for table in tables)
            for key in _keys(table.counts for table in tables)
        },
        # Seconds of work, not of waiting: chunks are scored side by side.
        seconds=sum(table.seconds for table in tables),
    )


def _keys(mappings: Iterable[Mapping[str, object]]) -> list[str]:
    # A dict keeps the order of first sight; a set would not be the same in every process.
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _joined_columns(
    chunks: Sequence[Mapping[str, PerCandidate]], sizes: Sequence[int]
) -> dict[str, PerCandidate]:
    # Every column has one number per candidate, so a chunk that lacks it gives NaN for its own.
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
    # A chunk that was not scored leaves its rows NaN.
    start = 0
    for chunk, size in zip(chunks, sizes, strict=True):
        if chunk is not None:
            areas[start : start + size, : chunk.areas.shape[1]] = chunk.areas
            background[start : start + size] = chunk.background
        start += size
    return RegionTable(areas=areas, background=background)


def _joined_measures(chunks: Sequence[Measures | None], sizes: Sequence[int]) -> Measures | None:
    measured = [chunk for chunk in chunks if chunk is not None]
    # All or none: a part of a group's measures would pass for all of them.
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
