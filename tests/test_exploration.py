"""How candidates come to differ: windows of stochastic steps, a spread that is steered, backgrounds
held together, and the solver."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from actors.reward import RewardActor
from actors.rollout import RolloutActor
from learner.learner import Learner
from reference import mixgrpo
from rl_edit import wire
from rl_edit.editors import lora
from rl_edit.errors import InputError
from rl_edit.method import flow
from rl_edit.method.exploration import (
    AdaptiveSpread,
    NoiseSource,
    Perturbation,
    pull_background,
)
from rl_edit.method.objectives import NeighborSurrogate, Velocities
from rl_edit.method.regions import softened, token_areas, token_mask
from rl_edit.method.rollout import Solver, Trajectory, denoise, joined, merged
from rl_edit.method.step_noise import ConstantNoise, NoiseWindow, NoStepNoise
from rl_edit.types import AdapterWeights, RewardTable, RolloutGroup
from runs import adapter_bytes, colocated, run_inline, small_config
from test_methods import FIELDS, group_of, item_of, uniform, work

G, L, C = 4, 9, 3
MASK = torch.arange(L) < 3


def normals(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def swirl(latents: Tensor, sigma: Tensor) -> Tensor:
    """A velocity in which every token feels its neighbours, as attention would have it."""
    return torch.sin(latents + 0.8 * latents.roll(1, dims=1) + sigma[:, None, None])


# --- windows of stochastic steps
# --------------------------------------------------------------------------------------


def window_of(law: NoiseWindow, update: int, num_steps: int) -> list[int]:
    levels = law(update, num_steps)
    steps: list[int] = levels.nonzero().flatten().tolist()
    assert bool((levels[steps] == law.level).all())
    return steps


@pytest.mark.parametrize(
    ("size", "stride", "num_steps"), [(4, 1, 25), (2, 1, 6), (2, 2, 9), (3, 2, 10), (4, 4, 25)]
)
@pytest.mark.parametrize("decay", [None, 0.1, 0.4])
def test_moving_windows_are_those_of_the_reference(
    size: int, stride: int, num_steps: int, decay: float | None
) -> None:
    more: dict[str, Any] = (
        {} if decay is None else {"schedule": "exponential", "decay": decay, "threshold": 3}
    )
    law = NoiseWindow(size=size, stride=stride, every=5, **more)
    law.check(num_steps)
    expected = mixgrpo.windows(
        260,
        num_steps=num_steps,
        size=size,
        every=5,
        stride=stride,
        decay=decay,
        threshold=3,
        whole_windows=True,
    )
    assert [window_of(law, update, num_steps) for update in range(260)] == expected


def test_before_the_window_reaches_the_end_the_published_schedule_is_the_same() -> None:
    law = NoiseWindow(size=4, every=25)
    published = mixgrpo.windows(300, num_steps=25, size=4, every=25)
    assert [window_of(law, update, 25) for update in range(300)] == published
    assert (
        max(max(steps) for steps in published) == 14
    )  # the default run of 300 iterations never trains the later steps


@pytest.mark.parametrize("schedule", ["progressive", "exponential", "random", "fixed"])
def test_a_window_is_never_empty_and_never_shrinks(schedule: Any) -> None:
    law = NoiseWindow(size=3, schedule=schedule, every=2)
    assert {len(window_of(law, update, 9)) for update in range(200)} == {3}


def test_past_the_last_position_the_window_rolls_back_to_the_first() -> None:
    law = NoiseWindow(size=2, every=3, first=1)
    firsts = [window_of(law, update, 8)[0] for update in range(30)]
    assert firsts == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4] * 2 + [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("schedule", ["progressive", "exponential", "random"])
@pytest.mark.parametrize(("size", "stride"), [(1, 1), (4, 1), (2, 2), (3, 2), (4, 4), (4, 3)])
@pytest.mark.parametrize("num_steps", [8, 9, 25])
def test_over_a_full_cycle_the_windows_cover_every_step_but_the_last_two(
    schedule: Any, size: int, stride: int, num_steps: int
) -> None:
    law = NoiseWindow(size=size, stride=stride, schedule=schedule, every=2)
    seen = {step for update in range(400) for step in window_of(law, update, num_steps)}
    assert seen == set(range(num_steps - 2))


@pytest.mark.parametrize("schedule", ["progressive", "exponential", "random"])
def test_the_schedule_is_a_function_of_the_update_so_that_all_ranks_and_actors_agree(
    schedule: Any,
) -> None:
    law = NoiseWindow(size=2, schedule=schedule, every=3, seed=5)
    there = NoiseWindow.model_validate_json(law.model_dump_json())
    here = [window_of(law, update, 9) for update in range(60)]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1)).tolist()
    assert {update: window_of(there, update, 9) for update in order} == dict(enumerate(here))
    if schedule == "random":
        assert [
            window_of(law.model_copy(update={"seed": 6}), update, 9) for update in range(60)
        ] != here


def test_a_window_over_every_step_but_the_last_is_constant_noise() -> None:
    for num_steps in (3, 6, 10):
        law = NoiseWindow(level=0.9, size=num_steps - 1, stop=num_steps - 1)
        law.check(num_steps)
        assert all(
            torch.equal(law(update, num_steps), ConstantNoise(level=0.9)(update, num_steps))
            for update in range(60)
        )
        assert float(ConstantNoise(level=0.9)(0, num_steps)[-1]) == 0 and bool(
            ConstantNoise(level=0.9)(0, num_steps)[:-1].all()
        )


@pytest.mark.parametrize("law", ["flow", "dance", "cps"])
def test_outside_the_window_the_trajectory_is_the_odes_bitwise(law: Any) -> None:
    grid, levels = torch.linspace(1, 0, 7), torch.tensor([0.0, 0.0, 0.6, 0.6, 0.0, 0.0])
    start = normals(0, G, L, C)
    every = tuple(range(6))
    mixed = denoise(
        swirl,
        start,
        grid,
        keep=every,
        step_noise=levels,
        sde=law,
        normal=lambda step: normals(step, G, L, C),
    )
    plain = denoise(swirl, start, grid, keep=every)
    assert torch.equal(mixed.latents[:, :3], plain.latents[:, :3]) and not torch.equal(
        mixed.latents[:, 3], plain.latents[:, 3]
    )
    rest = denoise(swirl, mixed.latents[:, 4], grid[4:])
    assert torch.equal(mixed.final, rest.final)


@pytest.mark.parametrize(
    ("law", "num_steps", "words"),
    [
        (NoiseWindow(size=5), 6, ("size 5", "num_steps 6", "smaller window")),
        (NoiseWindow(size=1, stop=6), 6, ("stop 6", "at most 5")),
        (NoiseWindow(size=2, first=4), 6, ("size 2", "step 4")),
        (ConstantNoise(skip_last=6), 6, ("skip_last 6", "no stochastic step")),
    ],
)
def test_a_schedule_that_does_not_fit_the_rollout_is_refused(
    law: Any, num_steps: int, words: Sequence[str]
) -> None:
    with pytest.raises(ValueError) as refusal:
        law.check(num_steps)
    assert [word for word in words if word not in str(refusal.value)] == []


def test_more_than_all_fresh_noise_is_refused() -> None:
    for made in (ConstantNoise, NoiseWindow):
        with pytest.raises(ValueError, match="use at most 1"):
            made(level=1.2, sde="cps")
    assert NoStepNoise()(0, 3).tolist() == [0.0] * 3


# --- a spread that is steered
# -----------------------------------------------------------------------------------------


def scores(*values: float, name: str = "judge", **components: Sequence[float]) -> RewardTable:
    column = torch.tensor(values)[:, None]
    parts: dict[str, dict[str, tuple[float, ...]]] = {}
    for key, values_of_part in components.items():
        term, _, part = key.partition("__")
        parts.setdefault(term, {})[part] = tuple(values_of_part)
    return RewardTable(
        group_id="g",
        names=(name,),
        weights=(1.0,),
        values=column,
        valid=~column.isnan(),
        components=parts,
    )


STEERED = AdaptiveSpread(
    start=Perturbation(inside=0.4),
    watch="judge",
    band=(1.0, 2.0),
    rate=0.1,
    min_spread=0.3,
    max_spread=0.45,
)


@pytest.mark.parametrize(
    ("values", "factor"),
    [((0.0, 0.1), math.exp(0.1)), ((0.0, 20.0), math.exp(-0.1)), ((0.0, 3.0), 1.0)],
    ids=["little", "much", "right"],
)
def test_the_spread_grows_when_scores_differ_too_little_and_shrinks_when_too_much(
    values: tuple[float, ...], factor: float
) -> None:
    free = STEERED.model_copy(update={"min_spread": 0.01, "max_spread": 1.0})
    assert free.steered({}, [("add", scores(*values))]) == pytest.approx({"add": 0.4 * factor})
    assert free.steered({"add": 0.2}, [("add", scores(*values))]) == pytest.approx(
        {"add": 0.2 * factor}
    )


def test_the_spread_stays_within_its_bounds() -> None:
    state: dict[str, float] = {}
    for _ in range(5):
        state = STEERED.steered(state, [("add", scores(1.0, 1.0)), ("remove", scores(0.0, 50.0))])
    assert state == {"add": 0.45, "remove": 0.3}


def test_every_kind_of_edit_has_a_spread_of_its_own_from_the_mean_deviation_of_its_groups() -> None:
    seen = [
        ("add", scores(0.0, 0.0)),
        ("remove", scores(0.0, 3.0)),
        ("add", scores(0.0, 6.2)),
    ]  # add: mean 1.55, in the band
    assert STEERED.steered({}, seen) == {"add": 0.4, "remove": 0.4}
    assert STEERED.steered({"replace": 0.31}, seen[:1]) == pytest.approx(
        {"replace": 0.31, "add": 0.4 * math.exp(0.1)}
    )
    assert (
        STEERED.at({"add": 0.33}, "add").inside == 0.33
        and STEERED.at({"add": 0.33}, "remove") == STEERED.start
    )


def test_a_group_that_lacks_the_watched_score_says_nothing() -> None:
    assert STEERED.steered(
        {"add": 0.35}, [("add", scores(1.0, math.nan)), ("add", scores(1.0, 1.0, name="other"))]
    ) == {"add": 0.35}
    part = STEERED.model_copy(update={"watch": "judge.instruction"})
    table = scores(1.0, 50.0, judge__instruction=(3.0, 3.0))
    assert part.steered({}, [("add", table)]) == pytest.approx({"add": 0.4 * math.exp(0.1)})


def test_a_component_that_no_reward_gives_is_refused_before_anything_is_steered_by_nothing() -> (
    None
):
    part = STEERED.model_copy(update={"watch": "judge.instrction"})
    table = scores(1.0, 50.0, judge__instruction=(3.0, 4.0), other__x=(1.0, 2.0))
    with pytest.raises(
        InputError,
        match=r"'judge.instrction' is no score of reward 'judge'.* "
        r"It has judge, judge.instruction\.$",
    ):
        part.steered({}, [("add", table)])
    assert part.steered({"add": 0.3}, [("add", table)]) == {"add": 0.3}
    assert part.steered({}, [("add", scores(1.0, math.nan))]) == {}


def test_spread_and_deviation_in_use_are_reported_by_kind_of_edit() -> None:
    seen = [
        ("add", scores(0.0, 0.0)),
        ("add", scores(0.0, 6.2)),
        ("remove", scores(1.0, math.nan)),
        ("replace", scores(0.0, 3.0)),
    ]
    assert STEERED.measured({"add": 0.33}, seen) == pytest.approx(
        {
            "exploration/add/inside": 0.33,
            "exploration/add/deviation": 1.55,
            "exploration/replace/inside": 0.4,
            "exploration/replace/deviation": 1.5,
        }
    )
    assert Perturbation().measured({}, seen) == {}


def test_the_steered_spread_reaches_the_candidates_noise_and_nothing_else() -> None:
    source, state = NoiseSource(0, "t", 0), {"add": 0.8}
    law = AdaptiveSpread(start=Perturbation(inside=0.4, outside=0.1))
    found, start = (law.at(state, kind)(G, (L, C), MASK, source) for kind in ("add", "remove"))
    expected = (1 - 0.8**2) ** 0.5 * found[0] + 0.8 * torch.stack(
        [source.normal("candidate", i, (L, C)) for i in range(G)]
    )
    assert torch.allclose(found[1:, MASK], expected[1:, MASK], atol=1e-6)
    assert torch.equal(found[:, ~MASK], start[:, ~MASK]) and torch.equal(found[0], start[0])


def test_what_an_adaptive_spread_cannot_mean_is_refused() -> None:
    with pytest.raises(ValueError, match="lies outside"):
        AdaptiveSpread(start=Perturbation(inside=0.01))
    with pytest.raises(ValueError, match="wanted range"):
        AdaptiveSpread(band=(2.0, 1.0))


ADAPTIVE = (
    "initial_noise: {kind: adaptive, watch: preservation, band: [50, 60], rate: 0.2, "
    "start: {inside: 0.5, outside: 0.05}}"
)


def test_the_steered_spread_travels_to_the_actor_and_survives_a_restore(small_editor: str) -> None:
    config = small_config(
        small_editor, f"algorithm={{name: rc-grpo, objective: {{num_anchors: 2}}, {ADAPTIVE}}}"
    )
    actor, learner = colocated(config)
    start, adapter, _, _ = learner.export()
    actor.load(adapter)
    step = work(config, actor, start.adapter)
    kinds = {slot.task_type for slot in step.order.slots}
    report, adapter, state, _ = learner.learn(step.order, *step.groups)
    weights: AdapterWeights = wire.unpack(adapter)
    assert {report.metrics[f"exploration/{kind}/inside"] for kind in kinds} == {0.5}
    assert all(report.metrics[f"exploration/{kind}/deviation"] >= 0 for kind in kinds)
    assert weights.exploration == pytest.approx({kind: 0.5 * math.exp(0.2) for kind in kinds})

    actor.load(adapter)
    item = item_of(config, 0, report.adapter, update=1)
    group: RolloutGroup = wire.unpack(actor.run(wire.pack(item))[1])
    law = Perturbation(inside=weights.exploration[item.task.task_type], outside=0.05)
    source = NoiseSource(item.run_seed, item.task.task_id, item.epoch)
    expected = law(
        item.num_candidates, tuple(group.latents.shape[2:]), group.candidates.token_mask, source
    )
    assert torch.equal(group.latents[:, 0], expected)

    other = Learner(config, 1)
    other.restore(state)
    assert other.policy.exploration == weights.exploration and np.array_equal(
        other.export()[1], adapter
    )
    order = replace(step.order, update=1)
    here, there = learner.learn(order, *step.groups), other.learn(order, *step.groups)
    assert wire.unpack(here[1]).exploration == wire.unpack(there[1]).exploration
    assert wire.unpack(here[1]).exploration == pytest.approx(
        {kind: 0.5 * math.exp(0.4) for kind in kinds}
    )
    assert all(
        np.array_equal(ours, theirs) for ours, theirs in zip(here[1:], there[1:], strict=True)
    )


def test_a_resumed_run_explores_as_the_undisturbed_one(small_editor: str, tmp_path: Any) -> None:
    config = small_config(
        small_editor,
        f"algorithm={{name: rc-grpo, objective: {{num_anchors: 2, num_steps: 1}}, {ADAPTIVE}}}",
    )
    whole = run_inline(config, tmp_path / "whole")
    run_inline(config, tmp_path / "cut", stop_after=1)
    resumed = run_inline(config, tmp_path / "cut", resume=True)
    assert whole.adapter is not None and resumed.adapter is not None
    assert whole.adapter.exploration == resumed.adapter.exploration != {}
    assert adapter_bytes(whole) == adapter_bytes(resumed)


# --- backgrounds held together
# ----------------------------------------------------------------------------------------

GRID = torch.linspace(1, 0, 6)


def held(background_pull: float, *, solver: Solver = "euler") -> Trajectory:
    law = Perturbation(inside=0.8, outside=0.05, background_pull=background_pull)
    start = law(G, (L, C), MASK, NoiseSource(0, "t", 0))
    project = (
        (lambda states: pull_background(states, MASK, background_pull))
        if background_pull > 0
        else None
    )
    return denoise(swirl, start, GRID, keep=tuple(range(5)), solver=solver, project=project)


@pytest.mark.parametrize("solver", ["euler", "dpm++"])
def test_at_locality_one_every_background_is_the_references_after_each_step_but_the_last(
    solver: Solver,
) -> None:
    trajectory = held(1.0, solver=solver)
    for step in range(4):
        states = trajectory.next_latents[:, step]
        assert torch.equal(states[:, ~MASK], states[:1, ~MASK].expand(G, -1, -1))
        assert not torch.equal(states[1, MASK], states[0, MASK])
    assert not torch.equal(
        trajectory.final[:, ~MASK], trajectory.final[:1, ~MASK].expand(G, -1, -1)
    )
    assert (
        float((trajectory.latents[:, 0, ~MASK] - trajectory.latents[:1, 0, ~MASK]).abs().max()) > 0
    )


def test_at_locality_zero_the_rollout_is_bitwise_the_one_without() -> None:
    plain = denoise(
        swirl,
        Perturbation(inside=0.8, outside=0.05)(G, (L, C), MASK, NoiseSource(0, "t", 0)),
        GRID,
        keep=(0, 1, 2, 3, 4),
    )
    for name, value in vars(held(0.0)).items():
        assert torch.equal(value, getattr(plain, name))
    states = normals(1, G, L, C)
    assert torch.equal(pull_background(states, MASK, 0.0), states)


@pytest.mark.parametrize("background_pull", [0.0, 0.3, 0.7, 1.0])
def test_a_background_moves_by_its_pull_and_the_edit_region_and_the_reference_stay(
    background_pull: float,
) -> None:
    states = normals(1, G, L, C)
    found = pull_background(states, MASK, background_pull)
    assert torch.equal(found[:, MASK], states[:, MASK]) and torch.equal(found[0], states[0])
    expected = background_pull * states[:1, ~MASK] + (1 - background_pull) * states[:, ~MASK]
    assert torch.allclose(found[:, ~MASK], expected, atol=1e-6)


def test_the_reference_candidates_trajectory_is_the_same_at_every_locality() -> None:
    assert all(
        torch.equal(held(background_pull).final[0], held(0.0).final[0])
        for background_pull in (0.4, 1.0)
    )


def test_more_locality_leaves_less_spread_in_the_background() -> None:
    spreads = [
        float(held(background_pull).final[:, ~MASK].std(dim=0).mean())
        for background_pull in (0.0, 0.5, 1.0)
    ]
    assert spreads[0] > 1.1 * spreads[1] > 1.2 * spreads[2]


def real(editor: str, background_pull: str, *overrides: str) -> RolloutActor:
    changes = f"{{inside: 0.8, outside: 0.05{background_pull}}}"
    name = (
        "algorithm={name: rc-grpo, objective: {num_anchors: 2, skip_last: 0}, initial_noise: "
        + changes
        + "}"
    )
    return RolloutActor(small_config(editor, name, "rollout.group_size=8", *overrides), 1)


def rolled(actor: RolloutActor, chunk: tuple[int, int] | None = None) -> np.ndarray:
    name = actor.load(wire.pack(lora.export(actor.editor.transformer, step=0)))
    return actor.run(wire.pack(item_of(actor.config, 0, name, chunk=chunk)))[1]


def test_chunks_of_a_group_held_together_are_the_whole_groups_bytes(small_editor: str) -> None:
    actor = real(small_editor, ", background_pull: 0.6")
    parts = [wire.unpack(rolled(actor, chunk)) for chunk in ((0, 4), (4, 8))]
    assert np.array_equal(wire.pack(merged(parts)), rolled(actor))


def test_the_real_actor_holds_backgrounds_together_and_at_zero_leaves_them_as_they_are(
    small_editor: str,
) -> None:
    together: RolloutGroup = wire.unpack(rolled(real(small_editor, ", background_pull: 1.0")))
    outside = ~together.candidates.token_mask
    assert together.next_latents.shape[1] == 3
    for step in range(2):
        states = together.next_latents[:, step][:, outside]
        assert torch.equal(states, states[:1].expand_as(states))
    assert np.array_equal(
        rolled(real(small_editor, ", background_pull: 0.0")), rolled(real(small_editor, ""))
    )


# --- DPM-Solver++(2M)
# -------------------------------------------------------------------------------------------------


UNEVEN = torch.tensor([1.0, 0.96, 0.9, 0.8, 0.62, 0.4, 0.15, 0.0])


@pytest.mark.parametrize(
    "grid",
    [torch.linspace(1, 0, 9), UNEVEN, torch.tensor([0.97, 0.5, 0.2, 0.0])],
    ids=["even", "uneven", "below"],
)
@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_the_multistep_solver_is_diffusers_dpm_solver_on_the_same_grid(grid: Tensor) -> None:
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        final_sigmas_type="zero",
        lower_order_final=True,
    )
    scheduler.set_timesteps(len(grid) - 1)
    scheduler.sigmas = grid.clone()
    start = normals(0, G, L, C)
    states, state = [start], start
    for step, timestep in enumerate(scheduler.timesteps):
        state = scheduler.step(swirl(state, grid[step].expand(G)), timestep, state).prev_sample
        states.append(state)
    ours = denoise(swirl, start, grid, keep=tuple(range(len(grid) - 1)), solver="dpm++")
    for step in range(len(grid) - 1):
        assert torch.allclose(ours.latents[:, step], states[step], rtol=1e-5, atol=2e-6)
    assert torch.allclose(ours.final, states[-1], rtol=1e-5, atol=2e-6)
    euler = denoise(swirl, start, grid)
    assert float((ours.final - euler.final).abs().max()) > 1e-3


def error_of(solver: Solver, num_steps: int) -> float:
    """At sigma 0.05, from 0.95 in equal steps of the log signal-to-noise ratio, on data N(m, d^2),
    whose flow is known: a noise z lies at ``(1 - s) m + sqrt((1 - s)^2 d^2 + s^2) z``."""
    mean, variance = 1.5, 0.3

    def marginal(s: Tensor) -> Tensor:
        return (1 - s) ** 2 * variance + s**2

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma[:, None, None].double()
        return (
            (s - (1 - s) * variance) / marginal(s) * (x.double() - (1 - s) * mean) - mean
        ).float()

    grid = (
        torch.linspace(-math.log(19), math.log(19), num_steps + 1, dtype=torch.float64)
        .neg()
        .sigmoid()
    )
    noise = normals(0, G, L, C).double()
    first, last = ((1 - s) * mean + marginal(s).sqrt() * noise for s in (grid[0], grid[-1]))
    return float(
        (denoise(velocity, first.float(), grid.float(), solver=solver).final - last).abs().max()
    )


def test_the_multistep_solver_converges_with_second_order_where_euler_has_first() -> None:
    errors = {
        solver: [error_of(solver, steps) for steps in (20, 40, 80)] for solver in ("euler", "dpm++")
    }  # type: ignore[arg-type]
    euler, multistep = (
        [before / after for before, after in pairwise(errors[solver])]
        for solver in ("euler", "dpm++")
    )
    assert all(1.9 < ratio < 2.1 for ratio in euler) and all(
        3.6 < ratio < 4.3 for ratio in multistep
    )
    assert errors["dpm++"][1] < errors["euler"][1] / 10


def test_a_multistep_rollouts_surrogate_has_ratio_one_though_its_states_are_not_eulers() -> None:
    start = Perturbation(inside=0.5, outside=0.1)(G, (L, C), MASK, NoiseSource(0, "t", 0))
    rollout = denoise(swirl, start, GRID, keep=(1, 2, 3), solver="dpm++")
    one_step = flow.euler(
        rollout.latents,
        rollout.velocities,
        sigma=rollout.sigmas[None, :, None, None],
        sigma_next=rollout.sigmas_next[None, :, None, None],
    )
    assert float((one_step - rollout.next_latents)[:, 1:].abs().max()) > 1e-3
    group = replace(
        group_of(),
        latents=rollout.latents,
        next_latents=rollout.next_latents,
        velocities=rollout.velocities,
        sigmas=rollout.sigmas,
        sigmas_next=rollout.sigmas_next,
    )
    credit = replace(
        uniform(),
        regions=torch.full((1, L), 1 / L),
        values=uniform().values.float(),
        weights=torch.ones(1),
    )
    objective = NeighborSurrogate(num_anchors=3)
    for point in objective.replay(group, credit, num_references=1, generator=torch.Generator()):
        said = objective.loss(point, Velocities(policy=swirl(point.latents, point.sigma))).metrics
        assert (float(said["ratio/min"]), float(said["ratio/max"])) == (1.0, 1.0)


# --- regions on the token grid
# ----------------------------------------------------------------------------------------


def test_areas_of_tokens_are_disjoint_cover_the_mask_and_the_smallest_takes_a_shared_one() -> None:
    for seed in range(20):
        labels = torch.randint(0, 4, (16, 16), generator=torch.Generator().manual_seed(seed))
        sparse = labels * (
            torch.rand(16, 16, generator=torch.Generator().manual_seed(seed + 100)) < 0.1
        )
        areas = torch.stack([sparse == number for number in (1, 2, 3)])
        found = token_areas(areas, (4, 4))
        assert int(found.sum(dim=0).max()) <= 1
        assert torch.equal(found.any(dim=0).flatten(), token_mask(areas.any(dim=0), (4, 4)))
        smallest = int(areas.flatten(1).sum(dim=1).argmin())
        assert torch.equal(found[smallest].flatten(), token_mask(areas[smallest], (4, 4)))


def test_a_softened_border_never_looks_beyond_the_picture() -> None:
    flat = torch.full((5, 6), 0.7)
    assert torch.allclose(softened(flat, 2), flat, atol=1e-6)
    assert torch.equal(softened(flat, 0), flat)


def test_rewards_of_a_chunk_and_of_the_group_steer_alike(small_editor: str) -> None:
    """Tables of chunks are joined before the spread is steered: one per group, whatever the
    chunks."""
    actor = real(small_editor, "")
    reward = RewardActor(actor.config, FIELDS, 1)
    tables = [wire.unpack(reward.score(rolled(actor, chunk))) for chunk in ((0, 8), (0, 4), (4, 8))]
    law = AdaptiveSpread(start=Perturbation(inside=0.7), watch="preservation", band=(0.0, 1e-6))
    whole, parts = (law.steered({}, [("add", joined(some))]) for some in (tables[:1], tables[1:]))
    assert whole == parts == pytest.approx({"add": 0.7 * math.exp(-0.05)})
