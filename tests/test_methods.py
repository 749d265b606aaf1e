"""The methods of the family against plain second writings of them (``tests/reference``), and the
invariants of each as claims.

Where the reference is compared with, both sides get the same states, velocities and advantages in
double precision. What every method must do is asked of every bundle of ``METHODS``, on made-up
groups first and then through the real rollout actor and learner.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.reward import RewardActor
from actors.rollout import RolloutActor
from learner.learner import Learner
from learner.ranks import Alone
from reference import cocoedit, diffusion_nft, edit_grpo, flow_grpo, mixgrpo, neighbor, spatialflow
from rl_edit import wire
from rl_edit.config import RunConfig
from rl_edit.data import open_dataset
from rl_edit.data.canvas import fit
from rl_edit.data.masks import Reading, read_mask
from rl_edit.measures import pixels
from rl_edit.messages import LearnOrder, LearnSlot
from rl_edit.method import flow
from rl_edit.method.advantages import (
    Declined,
    GroupCredit,
    RegionCredit,
    SplitCredit,
    bounded,
    quasi_norm,
)
from rl_edit.method.algorithms import METHODS, Algorithm, Decayed, Latest
from rl_edit.method.exploration import NoiseSource, Perturbation
from rl_edit.method.objectives import (
    ForwardProcess,
    NeighborSurrogate,
    ObjectiveProtocol,
    RegionRegularised,
    ReplayPoint,
    TransitionSurrogate,
    Velocities,
)
from rl_edit.method.objectives.region_regularised import RING_WEIGHT
from rl_edit.method.objectives.wrapper import WrappedContext
from rl_edit.method.regions import MaskedRows, eroded, softened
from rl_edit.method.rollout import denoise
from rl_edit.method.update import LearningConfig, learning_step, losses
from rl_edit.rewards.vlm.region_judge import RegionJudge
from rl_edit.scores import RegionTable
from rl_edit.types import (
    AdapterId,
    AdapterWeights,
    Advantages,
    Candidates,
    Conditioning,
    EditTask,
    RewardTable,
    RolloutGroup,
    WorkItem,
)
from runs import colocated, small_config

G, C, ROWS, COLUMNS = 4, 3, 4, 4
L = ROWS * COLUMNS
SCHEDULE = (1.0, 0.8, 0.55, 0.25, 0.0)

# Powers of two, so that a region's mean weighs its tokens by numbers that single precision holds
# exactly.
AREAS = torch.zeros(2, ROWS, COLUMNS, dtype=torch.bool)
AREAS[0, 0], AREAS[1, 2] = True, True
EDITED = AREAS.any(dim=0)
HALF = torch.zeros(1, ROWS, COLUMNS, dtype=torch.bool)
HALF[0, :, :2] = True
LAWS = ("flow", "dance", "cps")

Field = Callable[[Tensor, Tensor], Tensor]


def field(shift: float) -> Field:
    """A velocity that mixes tokens, channels and noise level, elementwise so that a row's bits do
    not depend on its batch."""

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        around = latents.roll(1, dims=1) + latents.roll(1, dims=2)
        return torch.sin((1.3 + shift) * latents + 0.4 * around) + shift * (
            0.3 + sigma[:, None, None] * latents
        )

    return velocity


OLD, NEW, BASE = field(0.0), field(0.15), field(-0.2)
"""Velocities under the weights that acted, under the policy a few updates on, and of the base
editor."""


def normals(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def group_of(
    *,
    level: float = 0.0,
    law: str = "flow",
    keep: Sequence[int] = (0, 1, 2),
    seed: int = 0,
    num: int = G,
    areas: Tensor = AREAS,
    dtype: torch.dtype = torch.float64,
) -> RolloutGroup:
    """A group rolled out under OLD, with stochastic steps at ``level`` but for the last."""
    grid = torch.tensor(SCHEDULE, dtype=dtype)
    state, kept = normals(seed, num, L, C).to(dtype), []
    for step in range(len(SCHEDULE) - 1):
        velocity = OLD(state, grid[step].expand(num))
        stochastic = level > 0 and step + 2 < len(SCHEDULE)
        if stochastic:
            mean, deviation = flow.moments(
                state,
                velocity,
                sigma=float(grid[step]),
                sigma_next=float(grid[step + 1]),
                level=level,
                sde=law,
            )  # type: ignore[arg-type]
            following = mean + deviation * normals(100 * seed + step + 1, num, L, C).to(dtype)
        else:
            following = flow.euler(state, velocity, sigma=grid[step], sigma_next=grid[step + 1])
        if step in keep:
            kept.append((state, following, velocity, level if stochastic else 0.0))
        state = following
    mask = areas.any(dim=0)
    task = EditTask(
        task_id="t",
        task_type="edit",
        source=torch.zeros(ROWS, COLUMNS, 3, dtype=torch.uint8),
        instruction="do",
        edit_mask=mask,
    )
    return RolloutGroup(
        group_id="g",
        adapter=AdapterId(0, "0"),
        candidates=Candidates(
            task=task,
            images=task.source.expand(num, -1, -1, -1),
            attention=torch.full((num, L), 1 / L),
            token_mask=mask.flatten(),
        ),
        conditioning=Conditioning(
            source_latents=normals(7, L, C).to(dtype),
            grid=(ROWS, COLUMNS),
        ),
        latents=torch.stack([part[0] for part in kept], dim=1),
        next_latents=torch.stack([part[1] for part in kept], dim=1),
        velocities=torch.stack([part[2] for part in kept], dim=1),
        sigmas=grid[list(keep)],
        sigmas_next=grid[[step + 1 for step in keep]],
        step_noise=torch.tensor([part[3] for part in kept]),
        sde=law,  # type: ignore[arg-type]
        schedule=grid,
        areas=areas,
    )


def advantages_of(values: Tensor, regions: Tensor, weights: Sequence[float] = (1.0,)) -> Advantages:
    return Advantages(
        values=values.reshape(len(values), -1),
        regions=regions.double(),
        weights=torch.tensor(weights, dtype=torch.float64),
    )


def standardised(seed: int, columns: int = 1, num: int = G) -> Tensor:
    values = normals(seed, num, columns)
    return (values - values.mean(dim=0)) / values.std(dim=0, correction=0)


def uniform(seed: int = 3, *, num: int = G) -> Advantages:
    """Whole-image credit."""
    return advantages_of(standardised(seed, num=num), torch.full((1, L), 1 / L))


@dataclass(frozen=True)
class Evaluated:
    """An objective's loss over all its points, and its gradient in the velocities there, point
    after point."""

    points: list[ReplayPoint]
    loss: Tensor
    gradient: Tensor
    metrics: list[dict[str, Tensor]]


def evaluated(
    objective: ObjectiveProtocol,
    group: RolloutGroup,
    credit: Advantages,
    policy: Field,
    *,
    num_references: int = 0,
    seed: int = 0,
) -> Evaluated:
    generator = torch.Generator().manual_seed(seed)
    points = objective.replay(group, credit, num_references=num_references, generator=generator)
    leaves = [policy(point.latents, point.sigma).requires_grad_() for point in points]
    total, said = torch.zeros((), dtype=group.latents.dtype), []
    for point, velocity in zip(points, leaves, strict=True):
        others = {
            "reference": BASE(point.latents, point.sigma),
            "acting": OLD(point.latents, point.sigma),
        }
        output = objective.loss(
            point,
            Velocities(policy=velocity, **{name: others[name] for name in objective.policies}),
        )
        total = total + point.weight * output.loss
        said.append(output.metrics)
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    filled = [
        torch.zeros_like(leaf) if part is None else part
        for leaf, part in zip(leaves, gradients, strict=True)
    ]
    return Evaluated(points, total.detach(), torch.cat(filled), said)


def reference_of(
    group: RolloutGroup,
    points: Sequence[ReplayPoint],
    policy: Field,
    loss: Callable[[int, Tensor], Tensor],
) -> Evaluated:
    """The same from a reference: ``loss(index of the point, velocities there)``, every point with
    an equal share."""
    leaves = [policy(point.latents, point.sigma).requires_grad_() for point in points]
    total = torch.stack(
        [loss(index, velocity) / len(points) for index, velocity in enumerate(leaves)]
    ).sum()
    return Evaluated(
        list(points), total.detach(), torch.cat(torch.autograd.grad(total, leaves)), []
    )


def assert_same(ours: Evaluated, theirs: Evaluated, *, rtol: float = 1e-9) -> None:
    scale = float(theirs.gradient.abs().max())
    assert scale > 0
    assert float(ours.loss) == pytest.approx(
        float(theirs.loss), rel=rtol, abs=rtol * max(scale, 1e-9)
    )
    assert float((ours.gradient - theirs.gradient).abs().max()) < rtol * scale


def table_of(
    values: dict[str, Tensor],
    weights: Sequence[float] = (1.0,),
    regions: dict[str, RegionTable] | None = None,
) -> RewardTable:
    scores = torch.stack([column.double() for column in values.values()], dim=1)
    return RewardTable(
        group_id="g",
        names=tuple(values),
        weights=tuple(weights),
        values=scores,
        valid=torch.ones_like(scores, dtype=torch.bool),
        regions=regions or {},
    )


# --- against the references: the surrogate over neighbours
# ------------------------------------------------------------


@pytest.mark.parametrize("policy", [OLD, NEW], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("masked", [False, True], ids=["uniform", "masked"])
@pytest.mark.parametrize("references", [0, 1])
def test_the_surrogate_and_its_gradient_are_those_of_the_reference(
    policy: Field, masked: bool, references: int
) -> None:
    group, values = group_of(), standardised(1)[:, 0]
    weights = (
        neighbor.metric(EDITED.flatten(), 0.5, 2.0, sum_to_one=True)
        if masked
        else torch.full((L,), 1 / L, dtype=torch.float64)
    )
    objective = NeighborSurrogate(
        num_anchors=G - references, temperature=0.4, clip=0.02, skip_last=0
    )
    ours = evaluated(
        objective, group, advantages_of(values, weights[None]), policy, num_references=references
    )
    theirs = reference_of(
        group,
        ours.points,
        policy,
        lambda step, velocity: neighbor.loss(
            list(range(references, G)),
            group.latents[:, step],
            group.next_latents[:, step],
            group.velocities[:, step],
            velocity,
            values,
            weights,
            sigma=SCHEDULE[step],
            sigma_next=SCHEDULE[step + 1],
            temperature=0.4,
            clip=0.02,
        ),
    )
    assert_same(ours, theirs)
    if policy is NEW:
        assert max(float(said["clip/share"]) for said in ours.metrics) > 0


def test_the_masked_row_is_the_references_metric_made_to_sum_to_one() -> None:
    mask = torch.tensor([True, False, False, True, False])
    row = MaskedRows(inside=0.5, outside=2.0)(mask)[0]
    assert torch.allclose(row.double(), neighbor.metric(mask, 0.5, 2.0, sum_to_one=True), rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_the_surrogates_gradient_at_the_old_weights_is_the_references_closed_form(
    temperature: float,
) -> None:
    group, values = group_of(keep=(1,)), standardised(2)[:, 0]
    weights = neighbor.metric(EDITED.flatten(), 1.0, 0.5, sum_to_one=True)
    objective = NeighborSurrogate(num_anchors=3, temperature=temperature)
    ours = evaluated(objective, group, advantages_of(values, weights[None]), OLD, num_references=1)
    closed = neighbor.gradient_at_old_weights(
        3,
        group.next_latents[:, 0],
        values,
        weights,
        sigma=SCHEDULE[1],
        sigma_next=SCHEDULE[2],
        temperature=temperature,
    )
    assert len(ours.gradient) == 3
    for anchor in ours.gradient:
        assert float((anchor - closed).norm() / closed.norm()) < 1e-10


@pytest.mark.parametrize("p", [0.5, 0.8, 2.0])
def test_the_quasi_norm_is_the_references(p: float) -> None:
    rewards = normals(5, 12)
    assert torch.allclose(quasi_norm(rewards, p), neighbor.quasi_norm(rewards, p), rtol=1e-12)
    credit = GroupCredit(normalise="group", quasi_norm=p)([table_of({"judge": rewards})], [AREAS])[
        0
    ]
    assert isinstance(credit, Advantages)
    assert torch.allclose(credit.values[:, 0].double(), neighbor.quasi_norm(rewards, p), atol=1e-6)


def test_region_decoupled_credit_is_the_references_two_stages() -> None:
    rewards = [normals(seed, G, 2) * torch.tensor([1.0, 9.0]) for seed in (1, 2, 3)]
    expected = neighbor.rc_advantages(rewards, [1.0, 0.25])
    credit = METHODS["rc-grpo"].algorithm.credit
    tables = [
        table_of({"judge": group[:, 0], "attention": group[:, 1]}, (1.0, 0.25)) for group in rewards
    ]
    for ours, theirs in zip(credit(tables, [AREAS] * 3), expected, strict=True):
        assert isinstance(ours, Advantages)
        assert torch.allclose(ours.values[:, 0].double(), theirs, atol=1e-5)


@pytest.mark.parametrize(("inside", "outside"), [(0.3, 0.3), (0.7, 0.05), (1.0, 0.0)])
def test_the_neighbourhood_is_the_references(inside: float, outside: float) -> None:
    source, mask = NoiseSource(0, "t", 0), EDITED.flatten()
    ours = Perturbation(inside=inside, outside=outside, keep_reference=False)(
        G, (L, C), mask, source
    )
    shared = source.normal("shared", -1, (L, C)).double()
    fresh = torch.stack([source.normal("candidate", index, (L, C)).double() for index in range(G)])
    assert torch.allclose(
        ours.double(), neighbor.neighbourhood(shared, fresh, mask, inside, outside), atol=1e-6
    )


# --- against the references: stochastic transitions
# -------------------------------------------------------------------

STEPS = [(1.0, 0.9), (0.8, 0.6), (0.3, 0.1)]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("sigma", "sigma_next"), STEPS)
def test_a_stochastic_step_is_the_references(law: str, sigma: float, sigma_next: float) -> None:
    x, v, noise = normals(1, G, L, C), normals(2, G, L, C), normals(3, G, L, C)
    mean, deviation = flow.moments(x, v, sigma=sigma, sigma_next=sigma_next, level=0.7, sde=law)  # type: ignore[arg-type]
    expected, scale = flow_grpo.step(x, v, sigma, sigma_next, 0.7, law)
    assert torch.allclose(mean, expected, rtol=1e-12, atol=1e-12) and deviation == pytest.approx(
        scale, rel=1e-12
    )
    went = flow.transition(
        x, v, sigma=sigma, sigma_next=sigma_next, level=0.7, sde=law, noise=noise
    )  # type: ignore[arg-type]
    assert torch.allclose(went, expected + scale * noise, rtol=1e-12, atol=1e-12)
    density = flow.log_density(went, mean, deviation, sde=law)  # type: ignore[arg-type]
    assert torch.allclose(
        density, flow_grpo.log_prob(went, expected, scale, law).mean(dim=-1), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("policy", [OLD, NEW], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("guard", [False, True], ids=["plain", "guard"])
@pytest.mark.parametrize(
    ("kl", "exact_kl"),
    [("none", False), ("gaussian", True), ("released", False), ("velocity", False)],
)
def test_the_clipped_ratio_of_transitions_and_its_gradient_are_those_of_the_reference(
    policy: Field, law: str, guard: bool, kl: str, exact_kl: bool
) -> None:
    group, values = group_of(level=0.6, law=law), standardised(4)[:, 0]
    objective = TransitionSurrogate(
        clip=1e-3,
        clip_high=3e-3,
        guard=guard,
        kl_weight=0.0 if kl == "none" else 0.3,
        kl="gaussian" if kl == "none" else kl,  # type: ignore[arg-type]
    )
    ours = evaluated(objective, group, advantages_of(values, torch.full((1, L), 1 / L)), policy)

    def loss(step: int, velocity: Tensor) -> Tensor:
        s, s_next = SCHEDULE[step], SCHEDULE[step + 1]
        level = float(group.step_noise[step])  # 0.6 as single precision holds it
        x, base = (
            group.latents[:, step],
            BASE(group.latents[:, step], torch.full((G,), s, dtype=torch.float64)),
        )
        mean, deviation = flow_grpo.step(x, velocity, s, s_next, level, law)
        old, _ = flow_grpo.step(x, group.velocities[:, step], s, s_next, level, law)
        anchored, _ = flow_grpo.step(x, base, s, s_next, level, law)
        ratio = flow_grpo.ratios(
            group.next_latents[:, step], mean, old, deviation, law, guard=guard
        )
        surrogate = flow_grpo.clipped(ratio, values, 1e-3, 3e-3).mean()
        if kl == "none":
            return surrogate
        if kl == "velocity":
            return surrogate + 0.3 * ((velocity - base) ** 2).mean()
        return surrogate + 0.3 * flow_grpo.divergence(
            mean, anchored, deviation, s=s, s_next=s_next, law=law, exact_kl=exact_kl
        )

    assert_same(ours, reference_of(group, ours.points, policy, loss), rtol=1e-8)
    if policy is NEW:
        assert any(float(said["clip/share"]) > 0 for said in ours.metrics)


@pytest.mark.parametrize("largest", [1.0, 40.0])
def test_batch_wide_credit_is_the_references_but_a_group_is_scaled_down_whole(
    largest: float,
) -> None:
    rewards = [
        normals(seed, 6) * scale + 3 * seed for seed, scale in ((1, 1.0), (2, 0.1), (3, 1.0))
    ]
    rewards[0][2] += largest
    expected = flow_grpo.advantages(rewards, limit=1.5, scale_whole_group=True)
    ours = GroupCredit(normalise="none", deviation="batch", advantage_clip=1.5)(
        [table_of({"judge": group}) for group in rewards], [AREAS] * 3
    )
    for credit, theirs in zip(ours, expected, strict=True):
        assert isinstance(credit, Advantages)
        assert torch.allclose(credit.values[:, 0].double(), theirs, atol=1e-6)
    # A group whose candidates are all alike teaches nothing, and is one of the batch.
    alike, rule = (
        [*rewards, torch.full((6,), 2.0, dtype=torch.float64)],
        GroupCredit(normalise="none", deviation="batch"),
    )
    *heard, silent = rule([table_of({"judge": group}) for group in alike], [AREAS] * 4)
    assert isinstance(silent, Declined) and silent.kind == "spread"
    for credit, theirs in zip(heard, flow_grpo.advantages(alike, limit=1e9), strict=False):
        assert isinstance(credit, Advantages) and torch.allclose(
            credit.values[:, 0].double(), theirs, atol=1e-6
        )
    # What lies between the groups makes the deviation larger.
    within = flow_grpo.advantages(rewards, limit=1e9, between_groups=False)
    over_all = flow_grpo.advantages(rewards, limit=1e9)
    assert float(torch.cat(within).abs().max() / torch.cat(over_all).abs().max()) > 1.01
    published = flow_grpo.advantages(rewards, limit=1.5)
    clamped = float((torch.cat(published) - torch.cat(expected)).abs().max())
    assert (clamped > 0.1) == (largest > 1)


def test_summed_credit_is_the_references_with_population_deviations() -> None:
    rewards = normals(1, 6, 2) * torch.tensor([1.0, 50.0])
    algorithm = METHODS["mixgrpo"].algorithm
    (ours,) = algorithm.credit(
        [table_of({"a": rewards[:, 0], "b": rewards[:, 1]}, (1.0, 0.5))], [AREAS]
    )
    assert isinstance(ours, Advantages)
    assert torch.allclose(
        ours.values[:, 0].double(),
        mixgrpo.advantages(rewards, [1.0, 0.5], unbiased=False),
        atol=1e-6,
    )
    published = mixgrpo.advantages(rewards, [1.0, 0.5])
    assert torch.allclose(ours.values[:, 0].double(), published * math.sqrt(6 / 5), atol=1e-6)


# --- against the references: the forward process
# ----------------------------------------------------------------------


def noised(points: Sequence[ReplayPoint]) -> list[tuple[Tensor, float, Tensor]]:
    """(noised states, level, finished samples) of each point of a forward process."""
    inner = [
        point.context.inner if isinstance(point.context, WrappedContext) else point
        for point in points
    ]
    return [(point.latents, float(point.sigma[0]), point.context.clean) for point in inner]


@pytest.mark.parametrize("policy", [OLD, NEW], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("adaptive", [True, False], ids=["adaptive", "plain"])
@pytest.mark.parametrize("reference_weight", [0.0, 0.05])
def test_the_forward_process_loss_and_its_gradient_are_those_of_the_reference(
    policy: Field, beta: float, adaptive: bool, reference_weight: float
) -> None:
    group, values = group_of(keep=(3,)), 2 * standardised(5)[:, 0]
    objective = ForwardProcess(
        beta=beta, cut=1.5, adaptive=adaptive, reference_weight=reference_weight
    )
    ours = evaluated(objective, group, advantages_of(values, torch.full((1, L), 1 / L)), policy)
    states = noised(ours.points)
    assert len(states) == len(SCHEDULE) - 2 and {s for _, s, _ in states} < set(SCHEDULE[:-1])
    assert all(torch.equal(clean, group.next_latents[:, -1]) for _, _, clean in states)

    def loss(step: int, velocity: Tensor) -> Tensor:
        x, s, clean = states[step]
        sigma = torch.full((G,), s, dtype=torch.float64)
        return diffusion_nft.loss(
            x,
            s,
            clean,
            velocity,
            OLD(x, sigma),
            BASE(x, sigma),
            diffusion_nft.optimality(values, 1.5),
            beta=beta,
            cut=1.5,
            reference_weight=reference_weight,
            adaptive=adaptive,
        )

    assert_same(ours, reference_of(group, ours.points, policy, loss))


def test_samples_are_noised_anew_at_every_drawn_level() -> None:
    group = group_of(keep=(3,))
    points = ForwardProcess().replay(
        group, uniform(), num_references=0, generator=torch.Generator().manual_seed(0)
    )
    noises = [(x - (1 - s) * clean) / s for x, s, clean in noised(points)]
    assert all(abs(float(noise.std()) - 1) < 0.2 for noise in noises)
    correlation = torch.corrcoef(torch.stack([noise.flatten() for noise in noises])) - torch.eye(
        len(noises)
    )
    assert float(correlation.abs().max()) < 0.3
    for noise in noises:  # every candidate has its own
        assert float((torch.corrcoef(noise.flatten(1)) - torch.eye(G)).abs().max()) < 0.7


def test_one_level_of_the_grid_is_left_out_at_random_and_each_is_some_time() -> None:
    """As released: all but one of the levels above 0, so the lowest is trained too."""
    group, every = group_of(keep=(3,)), set(SCHEDULE[:-1])
    left_out = []
    for seed in range(40):
        points = ForwardProcess().replay(
            group, uniform(), num_references=0, generator=torch.Generator().manual_seed(seed)
        )
        drawn = [s for _, s, _ in noised(points)]
        assert len(set(drawn)) == len(drawn) == len(every) - 1
        left_out += list(every - set(drawn))
    assert set(left_out) == every


@pytest.mark.parametrize("policy", [OLD, NEW], ids=["on-policy", "off-policy"])
def test_the_forward_process_hears_every_region_as_much_as_credit_says(policy: Field) -> None:
    group, values, rows = group_of(keep=(3,)), standardised(11, 2), rows_of(AREAS[:1])
    objective = ForwardProcess(cut=1.5, reference_weight=0.0)
    both = evaluated(objective, group, advantages_of(values, rows, (0.2, 0.8)), policy)
    alone = [
        evaluated(objective, group, advantages_of(values[:, r], rows[r : r + 1]), policy)
        for r in (0, 1)
    ]
    assert float(both.loss) == pytest.approx(float(0.2 * alone[0].loss + 0.8 * alone[1].loss))
    assert torch.allclose(
        both.gradient, 0.2 * alone[0].gradient + 0.8 * alone[1].gradient, rtol=1e-9, atol=1e-12
    )


def test_the_hinges_of_the_regulariser_take_the_mean_optimality_of_the_regions() -> None:
    group, values, rows = (
        replace(group_of(keep=(3,)), areas=HALF),
        1.4 * standardised(12, 2),
        rows_of(HALF),
    )
    sizes = {"keep_weight": 0.7, "edit_weight": 0.9, "keep_tolerance": 0.5, "edit_tolerance": 2.5}
    inner, credit = ForwardProcess(cut=1.5), advantages_of(values, rows, (0.3, 0.7))
    ours = evaluated(RegionRegularised(inner=inner, erosion=1, **sizes), group, credit, NEW)
    plain, r = (
        evaluated(inner, group, credit, NEW),
        diffusion_nft.optimality(values, 1.5).mean(dim=1),
    )
    keep, edit = cocoedit.region_weights(HALF[0], 1, silent_without_core=True)
    states = noised(ours.points)

    def loss(step: int, velocity: Tensor) -> Tensor:
        x, s, clean = states[step]
        old = OLD(x, torch.full((G,), s, dtype=torch.float64))
        source = group.conditioning.source_latents
        return cocoedit.hinges(
            x, s, clean, source, velocity, old, r, keep, edit, beta=1.0, variant="fixed", **sizes
        )

    theirs = reference_of(group, ours.points, NEW, loss)
    # The ring's 0.2 is single precision.
    assert_same(
        replace(ours, loss=ours.loss - plain.loss, gradient=ours.gradient - plain.gradient),
        theirs,
        rtol=1e-6,
    )


def test_a_ratio_at_a_small_temperature_stays_a_number_and_so_does_its_gradient() -> None:
    group = group_of()
    values = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [2.0, 0.0], [-2.0, 0.0]])
    credit = replace(split_credit(values, 0), weights=torch.tensor([0.5, 0.5], dtype=torch.float64))
    found = evaluated(
        NeighborSurrogate(num_anchors=3, temperature=1e-5, skip_last=0),
        group,
        credit,
        field(0.9),
        num_references=1,
    )
    assert max(float(said["ratio/max"]) for said in found.metrics) == pytest.approx(math.exp(10))
    assert bool(found.loss.isfinite()) and bool(found.gradient.isfinite().all())


@pytest.mark.parametrize(
    ("schedule", "acting"),
    [
        (0, Decayed(rate=0.0)),
        (0, Latest()),
        (1, Decayed()),
        (2, Decayed(start=75, rate=0.0075, max_decay=0.999)),
    ],
    ids=["copy", "latest", "default", "late"],
)
def test_the_acting_weights_decay_by_the_references_schedule(schedule: int, acting: Any) -> None:
    for update in (0, 1, 2, 74, 75, 76, 100, 207, 209, 499, 500, 501, 5000):
        assert acting.decay(update) == pytest.approx(
            diffusion_nft.decay(update, schedule), abs=1e-12
        )


@pytest.mark.parametrize("policy", [OLD, NEW], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("variant", ["paper", "release", "fixed"])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_the_region_regularised_loss_and_its_gradient_are_those_of_the_reference(
    policy: Field, variant: str, beta: float
) -> None:
    group, values = group_of(keep=(3,)), standardised(6)[:, 0]
    sizes = {"keep_weight": 0.7, "edit_weight": 0.9, "keep_tolerance": 0.5, "edit_tolerance": 2.5}
    inner = ForwardProcess(beta=beta, cut=1.5, reference_weight=0.05)
    objective = RegionRegularised(inner=inner, variant=variant, erosion=1, **sizes)  # type: ignore[arg-type]
    group = replace(group, areas=HALF)
    keep, edit = cocoedit.region_weights(HALF[0], 1, silent_without_core=True)
    assert sorted(set(keep.tolist())) == sorted(set(edit.tolist())) == [0.0, 0.2, 1.0]
    ours = evaluated(objective, group, advantages_of(values, torch.full((1, L), 1 / L)), policy)
    states, r = noised(ours.points), diffusion_nft.optimality(values, 1.5)

    def loss(step: int, velocity: Tensor) -> Tensor:
        x, s, clean = states[step]
        sigma = torch.full((G,), s, dtype=torch.float64)
        forward = diffusion_nft.loss(
            x,
            s,
            clean,
            velocity,
            OLD(x, sigma),
            BASE(x, sigma),
            r,
            beta=beta,
            cut=1.5,
            reference_weight=0.05,
        )
        source = group.conditioning.source_latents
        return forward + cocoedit.hinges(
            x,
            s,
            clean,
            source,
            velocity,
            OLD(x, sigma),
            r,
            keep,
            edit,
            beta=beta,
            variant=variant,
            **sizes,
        )  # fmt: skip

    theirs = reference_of(group, ours.points, policy, loss)
    # The ring's 0.2 is single precision.
    assert_same(ours, theirs, rtol=1e-6)
    plain = evaluated(inner, group, advantages_of(values, torch.full((1, L), 1 / L)), policy)
    assert float((ours.gradient - plain.gradient).abs().max()) > 1e-3 * float(
        plain.gradient.abs().max()
    )


@pytest.mark.parametrize("radius", [0, 1, 2])
def test_region_weights_are_those_of_the_reference(radius: int) -> None:
    for seed in range(20):
        mask = (
            torch.rand(1, 6, 7, generator=torch.Generator().manual_seed(seed))
            < (0.2, 0.5, 0.9)[seed % 3]
        )
        if seed % 4 == 0:
            mask = torch.zeros(1, 6, 7, dtype=torch.bool)
            mask[0, 1:5, 1:6] = True
        ours = weights_of(mask, radius)
        for part, expected in zip(
            ours, cocoedit.region_weights(mask[0], radius, silent_without_core=True), strict=True
        ):
            assert torch.allclose(part.double(), expected, atol=1e-7)


def weights_of(areas: Tensor, erosion: int) -> tuple[Tensor, Tensor]:
    """W of the kept and of the edited tokens for areas on a grid of any size."""
    edited = areas.any(dim=0)
    point = ReplayPoint(
        latents=torch.zeros(1, edited.numel(), C), sigma=torch.ones(1), context=None, weight=1.0
    )
    context = WrappedContext(inner=point, source=torch.zeros(edited.numel(), C), edited=edited)
    return RegionRegularised(erosion=erosion).weights(context)


# --- against the references: credit and ratios by region
# --------------------------------------------------------------


def test_a_region_judges_score_is_the_references_equation() -> None:
    answers = {
        "success": (7.0, 3.0),
        "preservation": (9.0, 2.0),
        "background": 6.0,
        "naturalness": 8.0,
        "cleanness": 5.0,
    }
    judge = RegionJudge(
        kind="region_judge",
        transport={"kind": "openai", "base_url": "http://127.0.0.1:1/v1", "model": "m"},
    )
    said = (7.0, 9.0, 3.0, 2.0, 6.0, 8.0, 5.0)
    score = judge.combined([[said]])
    expected = [
        spatialflow.region_reward(
            success, preservation, answers["naturalness"], answers["cleanness"], scale=10
        )
        for success, preservation in zip(answers["success"], answers["preservation"], strict=True)
    ]
    expected.append(
        spatialflow.background_reward(
            answers["background"], answers["naturalness"], answers["cleanness"], scale=10
        )
    )
    assert score.regions is not None
    found = [*score.regions.areas, score.regions.background]
    assert found == pytest.approx(expected, rel=1e-9)
    # On the published scale of 0..25 the same answers give the same reward.
    scaled = [
        spatialflow.region_reward(
            2.5 * s, 2.5 * p, 2.5 * answers["naturalness"], 2.5 * answers["cleanness"], scale=25
        )
        for s, p in zip(answers["success"], answers["preservation"], strict=True)
    ]
    assert found[:2] == pytest.approx(scaled, rel=1e-9)


def region_table(scores: Tensor) -> RewardTable:
    """Scores [candidate, area + background] as a judge by region gives them."""
    regions = RegionTable(areas=scores[:, :-1].double(), background=scores[:, -1].double())
    return table_of({"judge": scores.mean(dim=1)}, regions={"judge": regions})


def rows_of(areas: Tensor) -> Tensor:
    """Every area and the background as 0 and 1 [region, token]."""
    return torch.cat([areas.flatten(1), ~areas.any(dim=0).flatten()[None]]).double()


@pytest.mark.parametrize("area_power", [0.0, 0.5, 1.0])
def test_region_credit_is_the_references(area_power: float) -> None:
    scores = normals(1, 6, 3).abs()
    (ours,) = RegionCredit(area_power=area_power)([region_table(scores)], [AREAS])
    assert isinstance(ours, Advantages)
    assert torch.allclose(ours.values.double(), spatialflow.advantages(scores), atol=1e-6)
    rows = rows_of(AREAS)
    areas = rows.sum(dim=1)
    assert torch.allclose(ours.regions.double(), rows / areas[:, None], atol=1e-7)
    assert (ours.regions > 0).sum(dim=0).tolist() == [1] * L  # every token belongs to one region
    assert torch.allclose(
        ours.weights.double(), areas**area_power / (areas**area_power).sum(), atol=1e-7
    )


@pytest.mark.parametrize("policy", [OLD, NEW], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("clip_by_area", [True, False])
@pytest.mark.parametrize("area_power", [0.0, 1.0])
@pytest.mark.parametrize("law", ["flow", "cps"])
def test_the_ratio_by_region_and_its_gradient_are_those_of_the_reference(
    policy: Field, clip_by_area: bool, area_power: float, law: str
) -> None:
    group, values, rows = group_of(level=0.6, law=law), standardised(8, 3), rows_of(AREAS)
    sizes = rows.sum(dim=1)
    shares = sizes**area_power
    credit = Advantages(values=values, regions=rows / sizes[:, None], weights=shares / shares.sum())
    ours = evaluated(
        TransitionSurrogate(clip=0.01, clip_by_area=clip_by_area), group, credit, policy
    )

    def loss(step: int, velocity: Tensor) -> Tensor:
        s, s_next, level = SCHEDULE[step], SCHEDULE[step + 1], float(group.step_noise[step])
        mean, deviation = flow_grpo.step(group.latents[:, step], velocity, s, s_next, level, law)
        old, _ = flow_grpo.step(
            group.latents[:, step], group.velocities[:, step], s, s_next, level, law
        )
        ratio = spatialflow.ratios(group.next_latents[:, step], mean, old, deviation, law, rows)
        return spatialflow.loss(
            ratio, values, rows, clip=0.01, area_power=area_power, clip_by_area=clip_by_area
        )

    assert_same(ours, reference_of(group, ours.points, policy, loss), rtol=1e-8)
    if policy is NEW:
        assert any(0 < float(said["clip/share"]) < 1 for said in ours.metrics)


@pytest.mark.parametrize("soft_border", [0, 1, 2])
def test_credit_split_between_edit_and_background_is_the_references(soft_border: int) -> None:
    edit, keep = normals(1, 6), 30 + normals(2, 6)
    (ours,) = SplitCredit(soft_border=soft_border)(
        [table_of({"judge": edit, "preservation": keep}, (1.0, 0.3))], [AREAS]
    )
    shares = edit_grpo.shares(EDITED, soft_border)
    assert isinstance(ours, Advantages)
    assert torch.allclose(ours.values.double(), edit_grpo.advantages(edit, keep), atol=1e-5)
    assert torch.allclose(
        ours.regions.double(), shares / shares.sum(dim=1, keepdim=True), atol=1e-6
    )
    assert ours.weights.tolist() == [0.5, 0.5]


def split_credit(values: Tensor, soft_border: int) -> Advantages:
    shares = edit_grpo.shares(EDITED, soft_border)
    return advantages_of(values, shares / shares.sum(dim=1, keepdim=True), (0.5, 0.5))


@pytest.mark.parametrize("policy", [OLD, NEW], ids=["on-policy", "off-policy"])
def test_split_credit_over_stochastic_transitions_is_the_references_two_region_ratio(
    policy: Field,
) -> None:
    group, values, shares = group_of(level=0.6), standardised(9, 2), edit_grpo.shares(EDITED, 1)
    ours = evaluated(TransitionSurrogate(clip=0.01), group, split_credit(values, 1), policy)

    def loss(step: int, velocity: Tensor) -> Tensor:
        s, s_next, level = SCHEDULE[step], SCHEDULE[step + 1], float(group.step_noise[step])
        mean, deviation = flow_grpo.step(group.latents[:, step], velocity, s, s_next, level, "flow")
        old, _ = flow_grpo.step(
            group.latents[:, step], group.velocities[:, step], s, s_next, level, "flow"
        )
        ratio = spatialflow.ratios(
            group.next_latents[:, step], mean, old, deviation, "flow", shares
        )
        return spatialflow.loss(ratio, values, shares, clip=0.01, area_power=0.0, clip_by_area=True)

    assert_same(ours, reference_of(group, ours.points, policy, loss), rtol=1e-8)


@pytest.mark.parametrize("policy", [OLD, NEW], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("share", [0.5, 0.2])
def test_split_credit_over_the_surrogate_is_a_softmax_for_each_area_with_its_share(
    policy: Field, share: float
) -> None:
    group, values, shares = group_of(), standardised(9, 2), edit_grpo.shares(EDITED, 1)
    objective = NeighborSurrogate(num_anchors=3, temperature=0.5, clip=0.02, skip_last=0)
    credit = replace(
        split_credit(values, 1), weights=torch.tensor([share, 1 - share], dtype=torch.float64)
    )
    ours = evaluated(objective, group, credit, policy, num_references=1)

    def loss(step: int, velocity: Tensor) -> Tensor:
        halves = [
            neighbor.loss(
                [1, 2, 3],
                group.latents[:, step],
                group.next_latents[:, step],
                group.velocities[:, step],
                velocity,
                values[:, area],
                shares[area] / shares[area].sum(),
                sigma=SCHEDULE[step],
                sigma_next=SCHEDULE[step + 1],
                temperature=0.5,
                clip=0.02,
            )
            for area in (0, 1)
        ]
        return share * halves[0] + (1 - share) * halves[1]

    assert_same(ours, reference_of(group, ours.points, policy, loss))


# --- invariants of stochastic transitions
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("sigma", "sigma_next"), STEPS)
def test_without_noise_a_stochastic_step_is_the_euler_step(
    law: str, sigma: float, sigma_next: float
) -> None:
    x, v = normals(1, G, L, C), normals(2, G, L, C)
    mean, deviation = flow.moments(x, v, sigma=sigma, sigma_next=sigma_next, level=0.0, sde=law)  # type: ignore[arg-type]
    euler = x + (sigma_next - sigma) * v
    assert deviation == 0 and torch.allclose(mean, euler, rtol=1e-12, atol=1e-13)
    single, grid = (x.float(), v.float()), torch.tensor([sigma, sigma_next])
    went = flow.transition(
        *single, sigma=float(grid[0]), sigma_next=float(grid[1]), level=0.0, sde=law
    )  # type: ignore[arg-type]
    assert torch.equal(went, flow.euler(*single, sigma=grid[0], sigma_next=grid[1]))


def marginal_error(law: str, sigma: float, sigma_next: float, *, variance: float = 0.4) -> float:
    """By how much a step misses the flow's marginal variance when data are N(0, variance) and the
    velocity is exact."""

    def marginal(s: float) -> float:
        return (1 - s) ** 2 * variance + s**2

    one = torch.ones((), dtype=torch.float64)
    velocity = (sigma - (1 - sigma) * variance) / marginal(sigma) * one  # E[noise - clean | x = 1]
    mean, deviation = flow.moments(
        one, velocity, sigma=sigma, sigma_next=sigma_next, level=0.7, sde=law
    )  # type: ignore[arg-type]
    return abs(float(mean) ** 2 * marginal(sigma) + deviation**2 - marginal(sigma_next))


@pytest.mark.parametrize("law", ["flow", "dance"])
@pytest.mark.parametrize("sigma", [0.9, 0.6, 0.3])
def test_the_error_of_the_marginal_variance_falls_with_the_square_of_the_step(
    law: str, sigma: float
) -> None:
    errors = [marginal_error(law, sigma, sigma - step) for step in (1e-2, 1e-3, 1e-4)]
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(100, rel=0.02)


def test_coefficient_preserving_steps_lose_marginal_variance_however_small_they_are() -> None:
    errors = [marginal_error("cps", 0.6, 0.6 - step) for step in (1e-2, 1e-3, 1e-4)]
    assert errors[2] > 0.01 and errors[1] == pytest.approx(errors[2], rel=0.02)


@pytest.mark.parametrize("law", ["flow", "dance"])
def test_the_mean_log_density_of_a_steps_own_sample_is_minus_a_half_minus_the_log_of_its_normaliser(
    law: str,
) -> None:
    x, v, noise = normals(1, 40, L, 64), normals(2, 40, L, 64), normals(3, 40, L, 64)
    mean, deviation = flow.moments(x, v, sigma=0.6, sigma_next=0.5, level=0.7, sde=law)  # type: ignore[arg-type]
    found = float(flow.log_density(mean + deviation * noise, mean, deviation, sde=law).mean())  # type: ignore[arg-type]
    assert found == pytest.approx(
        -0.5 - math.log(deviation * math.sqrt(2 * math.pi)), abs=5 * 0.5**0.5 / noise.numel() ** 0.5
    )


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kl", ["gaussian", "released", "velocity"])
def test_the_divergence_from_the_base_is_zero_only_at_equal_velocities_and_has_a_gradient(
    law: str, kl: str
) -> None:
    group = group_of(level=0.6, law=law)
    objective = TransitionSurrogate(kl_weight=1.0, kl=kl)  # type: ignore[arg-type]
    nothing = advantages_of(torch.zeros(G, dtype=torch.float64), torch.full((1, L), 1 / L))
    same = evaluated(objective, group, nothing, BASE)
    apart = evaluated(objective, group, nothing, NEW)
    assert (
        all(float(said["kl/reference"]) == 0 for said in same.metrics)
        and float(same.gradient.abs().max()) == 0
    )
    assert (
        all(float(said["kl/reference"]) > 0 for said in apart.metrics)
        and float(apart.gradient.abs().min(dim=0).values.max()) > 0
    )


@pytest.mark.parametrize("law", LAWS)
def test_guarded_log_ratios_have_mean_zero_under_the_acting_policy_and_plain_ones_lie_below(
    law: str,
) -> None:
    group = group_of(level=0.6, law=law, num=4000, keep=(1,))
    credit = advantages_of(torch.zeros(4000, dtype=torch.float64), torch.full((1, L), 1 / L))
    found = {}
    for guard in (False, True):
        objective = TransitionSurrogate(guard=guard)
        (point,) = objective.replay(group, credit, num_references=0, generator=torch.Generator())
        mean, deviation = point.context.step.moments(point.latents, NEW(point.latents, point.sigma))
        logs = objective._ratio(point.context, mean, deviation).log().flatten()
        found[guard] = float(logs.mean() / logs.std() * len(logs) ** 0.5)  # in standard errors
    assert abs(found[True]) < 4 and found[False] < -6


def test_log_densities_outside_the_window_never_enter_the_loss() -> None:
    levels = torch.tensor([0.0, 0.7, 0.7, 0.0, 0.0])
    assert TransitionSurrogate().trained_steps(levels, torch.Generator()) == (1, 2)
    drawn = {
        TransitionSurrogate(num_steps=1).trained_steps(levels, torch.Generator().manual_seed(seed))
        for seed in range(20)
    }
    assert drawn == {(1,), (2,)}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("num_steps", [4, 6, 25])
def test_the_last_step_is_never_stochastic(name: str, num_steps: int) -> None:
    law = METHODS[name].algorithm.step_noise
    law.check(num_steps)
    assert all(float(law(update, num_steps)[-1]) == 0 for update in range(0, 400, 7))


# --- invariants of the forward process
# --------------------------------------------------------------------------------


def test_beta_cancels_in_the_gradient_at_the_acting_weights() -> None:
    group, credit = group_of(keep=(3,)), uniform()
    gradients = [
        evaluated(ForwardProcess(beta=beta), group, credit, OLD).gradient
        for beta in (0.1, 1.0, 3.0)
    ]
    assert float(gradients[0].abs().max()) > 0
    assert all(
        torch.allclose(other, gradients[0], rtol=1e-9, atol=1e-14) for other in gradients[1:]
    )
    away = [
        evaluated(ForwardProcess(beta=beta), group, credit, NEW).gradient for beta in (0.1, 1.0)
    ]
    assert not torch.allclose(*away, rtol=1e-3)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_the_loss_is_a_linear_pull_in_proportion_to_the_reward_and_a_proximal_term_of_strength_beta(
    beta: float,
) -> None:
    """``(r l+ + (1 - r) l-) / beta = l(old) / beta - 2 (2r - 1) t e.d + beta t^2 d^2`` with e the
    old error and d the move."""
    group, credit = group_of(keep=(3,)), uniform()
    objective = ForwardProcess(beta=beta, adaptive=False, reference_weight=0.0, cut=1.5)
    for point in objective.replay(
        group, credit, num_references=0, generator=torch.Generator().manual_seed(0)
    ):
        x, s, clean = point.latents, float(point.sigma[0]), point.context.clean
        old, new = OLD(x, point.sigma), NEW(x, point.sigma)
        error, move, r = x - s * old - clean, new - old, 0.5 + credit.values[:, 0] / 3
        linear = -2 * (2 * r - 1) * s * (error * move).mean(dim=(1, 2))
        proximal = beta * s**2 * (move**2).mean(dim=(1, 2))
        constant = (error**2).mean(dim=(1, 2)) / beta
        found = objective.loss(point, Velocities(policy=new, acting=old)).loss
        assert float(found) == pytest.approx(
            1.5 * float((constant + linear + proximal).mean()), rel=1e-10
        )


def test_optimality_lies_between_zero_and_one_and_is_a_half_without_advantage() -> None:
    group = group_of(keep=(3,))
    values = torch.tensor([-100.0, 0.0, 2.0, 100.0], dtype=torch.float64)
    points = ForwardProcess(cut=5).replay(
        group,
        replace(uniform(), values=values[:, None]),
        num_references=0,
        generator=torch.Generator(),
    )
    assert points[0].context.optimality[:, 0].tolist() == [0.0, 0.5, 0.7, 1.0]


def test_the_implicit_policies_average_to_the_acting_one_and_coincide_with_it_at_the_start() -> (
    None
):
    group, objective = group_of(keep=(3,)), ForwardProcess(beta=0.7)
    point = objective.replay(group, uniform(), num_references=0, generator=torch.Generator())[1]
    old, new = OLD(point.latents, point.sigma), NEW(point.latents, point.sigma)
    own = flow.clean_from_velocity(point.latents, old, point.sigma[:, None, None])
    apart = objective.implicit(point, Velocities(policy=new, acting=old))
    assert torch.allclose(
        apart.positive + apart.negative, 2 * own, atol=1e-12
    ) and not torch.allclose(apart.positive, own, atol=1e-3)
    start = objective.implicit(point, Velocities(policy=old, acting=old))
    assert torch.allclose(start.positive, own, atol=1e-12) and torch.allclose(
        start.negative, own, atol=1e-12
    )
    said = objective.loss(point, Velocities(policy=old, acting=old, reference=old)).metrics
    assert float(said["forward/positive"]) == pytest.approx(
        float(said["forward/negative"]), rel=1e-12
    )
    assert float(said["forward/from_acting"]) == float(said["kl/reference"]) == 0


def test_without_advantage_there_is_no_gradient_at_the_acting_weights() -> None:
    nothing = advantages_of(torch.zeros(G, dtype=torch.float64), torch.full((1, L), 1 / L))
    objective = ForwardProcess(reference_weight=0.0)
    assert (
        float(evaluated(objective, group_of(keep=(3,)), nothing, OLD).gradient.abs().max()) < 1e-15
    )
    assert (
        float(evaluated(objective, group_of(keep=(3,)), nothing, NEW).gradient.abs().max()) > 1e-5
    )


def test_descending_the_forward_loss_moves_to_samples_with_positive_advantage_only() -> None:
    group, credit = group_of(keep=(3,)), uniform()
    found = evaluated(ForwardProcess(reference_weight=0.0), group, credit, OLD)
    for number, point in enumerate(found.points):
        gradient = found.gradient[number * G : (number + 1) * G]
        towards = (
            OLD(point.latents, point.sigma)
            - (point.latents - point.context.clean) / point.sigma[:, None, None]
        )
        signs = (gradient * towards).sum(dim=(1, 2)).sign()
        assert torch.equal(signs, credit.values[:, 0].sign())


# --- invariants of the region regularisers
# ----------------------------------------------------------------------------


def regularised(
    areas: Tensor, *, policy: Field = NEW, source: Tensor | None = None, **settings: Any
) -> tuple[Evaluated, Evaluated]:
    """(with the two terms, without them) on a group whose areas and source are given."""
    group = replace(group_of(keep=(3,)), areas=areas)
    if source is not None:
        group = replace(group, conditioning=replace(group.conditioning, source_latents=source))
    inner = ForwardProcess(cut=1.5)
    objective = RegionRegularised(inner=inner, **settings)
    return evaluated(objective, group, uniform(), policy), evaluated(
        inner, group, uniform(), policy
    )


NOTHING = torch.zeros(1, ROWS, COLUMNS, dtype=torch.bool)


@pytest.mark.parametrize("variant", ["fixed", "paper", "release"])
def test_where_everything_is_to_be_kept_the_edit_hinge_is_zero(variant: str) -> None:
    with_terms, plain = regularised(
        NOTHING, variant=variant, keep_weight=0.0, edit_weight=100.0, edit_tolerance=1e6
    )
    assert torch.equal(with_terms.loss, plain.loss) and torch.equal(
        with_terms.gradient, plain.gradient
    )
    with_terms, plain = regularised(
        HALF, variant=variant, keep_weight=0.0, edit_weight=100.0, edit_tolerance=1e6
    )
    assert float(with_terms.loss) > float(plain.loss) + 1


@pytest.mark.parametrize("variant", ["fixed", "paper", "release"])
def test_where_the_kept_region_is_what_it_should_be_its_hinge_is_zero(variant: str) -> None:
    """A velocity that predicts the target exactly: the source, or as released the sample itself."""
    group = replace(group_of(keep=(3,)), areas=HALF)
    target = (
        group.next_latents[:, -1]
        if variant == "release"
        else group.conditioning.source_latents.expand(G, -1, -1)
    )
    objective = RegionRegularised(
        inner=ForwardProcess(), variant=variant, keep_weight=100.0, edit_weight=0.0
    )  # type: ignore[arg-type]
    (point, *_) = objective.replay(group, uniform(), num_references=0, generator=torch.Generator())
    velocity = (point.latents - target) / point.sigma[:, None, None]
    for offset, hinge in ((0.0, 0.0), (0.5, 1.0)):
        given = Velocities(policy=velocity + offset, acting=velocity + offset, reference=velocity)
        added = (
            objective.loss(point, given).loss
            - objective.inner.loss(point.context.inner, given).loss
        )
        assert (float(added) > 1) == bool(hinge) and (hinge or float(added) == 0)


@pytest.mark.parametrize(
    ("variant", "grows"), [("fixed", True), ("paper", False), ("release", False)]
)
def test_descending_the_edit_hinge_moves_the_edit_region_away_from_the_source_and_only_as_meant(
    variant: str, grows: bool
) -> None:
    group = replace(group_of(keep=(3,)), areas=HALF)
    inner = ForwardProcess(reference_weight=0.0)
    objective = RegionRegularised(
        inner=inner, variant=variant, keep_weight=0.0, edit_weight=1.0, edit_tolerance=1e3
    )  # type: ignore[arg-type]
    _, edit = cocoedit.region_weights(HALF[0], 1)
    source = group.conditioning.source_latents
    for point in objective.replay(
        group, uniform(), num_references=0, generator=torch.Generator().manual_seed(0)
    ):
        velocity = OLD(point.latents, point.sigma).requires_grad_()
        given = Velocities(policy=velocity, acting=velocity.detach())
        hinge = objective.loss(point, given).loss - inner.loss(point.context.inner, given).loss
        (gradient,) = torch.autograd.grad(hinge, velocity)
        s = float(point.sigma[0])

        def far(v: Tensor, point: ReplayPoint = point, s: float = s) -> Tensor:
            return torch.stack(
                [
                    cocoedit.distance(state - s * each, source, edit)
                    for state, each in zip(point.latents, v, strict=True)
                ]
            )

        change = far(velocity.detach() - 0.1 * gradient) - far(velocity.detach())
        assert bool(((change > 0) == grows).all()) and bool((change != 0).all())


@pytest.mark.parametrize("variant", ["fixed", "paper", "release"])
def test_beyond_its_tolerance_a_hinge_does_nothing(variant: str) -> None:
    idle, plain = regularised(
        HALF,
        variant=variant,
        keep_weight=5.0,
        edit_weight=5.0,
        keep_tolerance=1e6,
        edit_tolerance=0.0,
    )
    assert torch.equal(idle.loss, plain.loss) and torch.equal(idle.gradient, plain.gradient)
    acting, plain = regularised(
        HALF,
        variant=variant,
        keep_weight=5.0,
        edit_weight=5.0,
        keep_tolerance=0.0,
        edit_tolerance=1e6,
    )
    assert not torch.allclose(acting.gradient, plain.gradient, rtol=1e-2)


@pytest.mark.parametrize("variant", ["fixed", "paper", "release"])
def test_regularisers_of_weight_zero_are_the_plain_forward_process_bitwise(variant: str) -> None:
    with_terms, plain = regularised(HALF, variant=variant, keep_weight=0.0, edit_weight=0.0)
    assert torch.equal(with_terms.loss, plain.loss) and torch.equal(
        with_terms.gradient, plain.gradient
    )


def test_region_weights_lie_between_zero_and_one_and_the_ring_is_disjoint_from_both_cores() -> None:
    for seed in range(30):
        mask = (
            torch.rand(8, 8, generator=torch.Generator().manual_seed(seed)) < 0.1 + 0.8 * seed / 30
        )
        keep, edit = (part.reshape(8, 8) for part in weights_of(mask[None], 1))
        cores = torch.stack([eroded(~mask, 1), eroded(mask, 1)])
        ring = ~cores.any(dim=0)
        assert bool(((keep >= 0) & (keep <= 1) & (edit >= 0) & (edit <= 1)).all())
        assert not bool((cores[0] & cores[1]).any())
        assert bool((keep[cores[0]] == 1).all()) and bool((edit[cores[1]] == 1).all())
        assert not bool(keep[cores[1]].any()) and not bool(edit[cores[0]].any())
        for weights, core in ((keep, cores[0]), (edit, cores[1])):
            expected = RING_WEIGHT if bool(core.any()) else 0.0
            assert torch.allclose(weights[ring], torch.full_like(weights[ring], expected))


def test_a_mask_of_either_polarity_names_the_same_edit_region(tmp_path: Any) -> None:
    from PIL import Image

    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[:2] = 255
    for name, content in (("white.png", pixels), ("black.png", 255 - pixels)):
        Image.fromarray(content).save(tmp_path / name)
    white = read_mask(tmp_path / "white.png", Reading(polarity="edit_white"), where="row")
    black = read_mask(tmp_path / "black.png", Reading(polarity="edit_black"), where="row")
    assert np.array_equal(white, black) and bool(white[0].all()) and not bool(white[7].any())


def test_the_psnr_of_a_constant_shift_is_the_analytic_one() -> None:
    picture, keep = (
        torch.full((16, 16, 3), 0.4, dtype=torch.float64),
        torch.ones(16, 16, dtype=torch.bool),
    )
    assert float(pixels.psnr(picture, picture + 0.05, keep, "masked")) == pytest.approx(
        -20 * math.log10(0.05), abs=1e-9
    )
    released = float(pixels.psnr(picture, picture + 0.05, keep, "cocoedit"))
    assert released == pytest.approx(-20 * math.log10(0.05) - 4.77, abs=2e-3)


def test_ssim_is_one_for_equal_pictures_and_below_a_fifth_for_flat_against_textured() -> None:
    textured = torch.rand(
        32, 32, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    keep = torch.ones(32, 32, dtype=torch.bool)
    assert float(pixels.ssim(textured, textured, keep, "map_masked")) == pytest.approx(1, abs=1e-12)
    assert float(pixels.ssim(textured, textured.mean().expand(32, 32, 3), keep, "map_masked")) < 0.2


# --- invariants of credit by region
# -----------------------------------------------------------------------------------

EVERYWHERE = torch.ones(1, ROWS, COLUMNS, dtype=torch.bool)


def by_region(values: Tensor, areas: Tensor, *, area_power: float = 1.0) -> Advantages:
    """Region credit with these advantages [candidate, area + background]."""
    rows = rows_of(areas)
    sizes = rows.sum(dim=1)
    shares = sizes**area_power * (sizes > 0)
    return Advantages(
        values=values,
        regions=torch.where(
            sizes[:, None] > 0, rows / sizes[:, None].clamp(min=1), torch.full_like(rows, 1 / L)
        ),
        weights=shares / shares.sum(),
    )


@pytest.mark.parametrize("policy", [OLD, NEW], ids=["on-policy", "off-policy"])
def test_one_region_that_is_the_whole_image_is_whole_image_credit_bitwise(policy: Field) -> None:
    scores = normals(1, G)
    (regional,) = RegionCredit()(
        [region_table(torch.stack([scores, normals(2, G)], dim=1))], [EVERYWHERE]
    )
    (whole,) = GroupCredit(normalise="group")([table_of({"judge": scores})], [EVERYWHERE])
    assert isinstance(regional, Advantages) and isinstance(whole, Advantages)
    assert regional.weights.tolist() == [1.0, 0.0] and torch.equal(
        regional.regions[0], whole.regions[0]
    )
    assert torch.equal(regional.values[:, 0], whole.values[:, 0])
    group = group_of(level=0.6, dtype=torch.float32)
    objective = TransitionSurrogate(clip=1e-3)
    one, other = (
        evaluated(objective, group, regional, policy),
        evaluated(objective, group, whole, policy),
    )
    assert torch.equal(one.loss, other.loss) and torch.equal(one.gradient, other.gradient)
    assert float(one.gradient.abs().max()) > 0


def test_equal_advantages_weighed_by_area_have_the_gradient_of_whole_image_credit() -> None:
    group, values = group_of(level=0.6), standardised(3)
    alike = by_region(values.expand(-1, 3), AREAS)
    one, other = (
        evaluated(TransitionSurrogate(), group, credit, OLD) for credit in (alike, uniform())
    )
    assert float(other.gradient.abs().max()) > 0
    assert torch.allclose(one.gradient, other.gradient, rtol=1e-10, atol=1e-16)
    apart = [
        evaluated(TransitionSurrogate(clip=10), group, credit, NEW).loss
        for credit in (alike, uniform())
    ]
    assert (
        abs(float(apart[0] - apart[1])) > 1e-6
    )  # off-policy the exponential of a mean is not the mean of exponentials


@pytest.mark.parametrize("policy", [OLD, NEW], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("silent", [0, 1, 2])
def test_a_region_without_advantage_gets_no_direct_gradient(policy: Field, silent: int) -> None:
    group, values = group_of(level=0.6), standardised(8, 3)
    values[:, silent] = 0
    gradient = (
        evaluated(TransitionSurrogate(clip=10), group, by_region(values, AREAS), policy)
        .gradient.abs()
        .amax(dim=(0, 2))
    )
    tokens = rows_of(AREAS)[silent].bool()
    assert float(gradient[tokens].max()) == 0 and float(gradient[~tokens].min()) > 0


@pytest.mark.parametrize("area_power", [0.0, 1.0])
def test_region_rows_and_weights_sum_to_one_and_an_area_without_tokens_weighs_nothing(
    area_power: float,
) -> None:
    credit, scores = RegionCredit(area_power=area_power), normals(1, G, 3)
    covered = AREAS.clone()
    covered[1] = False  # an area that another covers whole has no token left
    for areas in (AREAS, covered, AREAS.flip(0)):
        (found,) = credit([region_table(scores)], [areas])
        assert isinstance(found, Advantages)
        assert torch.allclose(found.regions.sum(dim=1), torch.ones(3)) and float(
            found.weights.sum()
        ) == pytest.approx(1)
        assert (found.weights > 0).tolist() == [*areas.flatten(1).any(dim=1).tolist(), True]


@pytest.mark.parametrize("policy", [OLD, NEW], ids=["on-policy", "off-policy"])
def test_the_order_of_regions_does_not_matter(policy: Field) -> None:
    group, values = group_of(level=0.6), standardised(8, 3)
    order = [1, 0, 2]
    here = evaluated(TransitionSurrogate(clip=0.01), group, by_region(values, AREAS), policy)
    there = evaluated(
        TransitionSurrogate(clip=0.01), group, by_region(values[:, order], AREAS[order[:2]]), policy
    )
    assert torch.allclose(here.gradient, there.gradient, rtol=1e-12, atol=1e-18)
    assert float(here.loss) == pytest.approx(float(there.loss), rel=1e-12, abs=1e-16)


@pytest.mark.parametrize("limit", [None, 0.5])
def test_every_regions_advantages_sum_to_zero(limit: float | None) -> None:
    (found,) = RegionCredit(advantage_clip=limit)([region_table(normals(1, 7, 3) ** 3)], [AREAS])
    assert isinstance(found, Advantages)
    assert float(found.values.sum(dim=0).abs().max()) < 1e-5
    assert limit is None or float(found.values.abs().max()) == pytest.approx(limit)


def test_limited_advantages_keep_their_sum_of_zero_and_their_proportions() -> None:
    values = torch.cat([standardised(1, num=9), 20 * standardised(2, num=9)], dim=1)
    found = bounded(values, 5.0)
    assert torch.equal(found[:, 0], values[:, 0])
    assert (
        float(found[:, 1].abs().max()) == pytest.approx(5) and abs(float(found[:, 1].sum())) < 1e-12
    )
    ratio = found[:, 1] / values[:, 1]
    assert torch.allclose(ratio, ratio[:1].expand(9))


# --- invariants of edit and background judged apart
# -------------------------------------------------------------------


def split_of(edit: Tensor, keep: Tensor, **settings: Any) -> Advantages:
    (found,) = SplitCredit(**settings)(
        [table_of({"judge": edit, "preservation": keep}, (1.0, 1.0))], [AREAS]
    )
    assert isinstance(found, Advantages)
    return found


def test_when_edit_and_background_agree_split_credit_is_the_two_region_case_of_region_credit() -> (
    None
):
    scores, one_area = normals(1, G), EDITED[None]
    split = split_of(scores, scores)
    (regional,) = RegionCredit(area_power=0)(
        [region_table(torch.stack([scores, scores], dim=1))], [one_area]
    )
    assert isinstance(regional, Advantages)
    assert torch.allclose(split.values, regional.values, atol=1e-6)
    assert torch.equal(split.values[:, 0], split.values[:, 1])
    assert torch.equal(split.regions, regional.regions) and torch.equal(
        split.weights, regional.weights
    )


@pytest.mark.parametrize(
    "objective",
    [TransitionSurrogate(), NeighborSurrogate(num_anchors=4)],
    ids=["transition", "neighbor"],
)
def test_a_background_whose_reward_does_not_vary_has_no_term(objective: ObjectiveProtocol) -> None:
    credit = split_of(normals(1, G), torch.full((G,), 30.0, dtype=torch.float64))
    assert not bool(credit.values[:, 1].any()) and bool(credit.values[:, 0].all())
    group = group_of(
        level=0.6 if isinstance(objective, TransitionSurrogate) else 0.0, dtype=torch.float32
    )
    gradient = evaluated(objective, group, credit, NEW).gradient.abs().amax(dim=(0, 2))
    kept = ~EDITED.flatten()
    assert float(gradient[kept].max()) == 0 and float(gradient[~kept].min()) > 0


@pytest.mark.parametrize("soft_border", [0, 1, 2])
def test_a_softened_border_keeps_rows_and_every_tokens_shares_summing_to_one(
    soft_border: int,
) -> None:
    credit = split_of(normals(1, G), normals(2, G), soft_border=soft_border)
    assert torch.allclose(credit.regions.sum(dim=1), torch.ones(2))
    inside = softened(EDITED.float(), soft_border)
    assert bool(((inside >= 0) & (inside <= 1)).all())
    sums = torch.stack([inside.flatten().sum(), (1 - inside).flatten().sum()])
    assert torch.allclose((credit.regions * sums[:, None]).sum(dim=0), torch.ones(L), atol=1e-6)
    assert bool((inside != EDITED.float()).any()) == (soft_border > 0)


def test_what_the_background_earns_leaves_the_edit_regions_advantages_and_gradient_unchanged() -> (
    None
):
    edit = normals(1, G)
    one, other = (
        split_of(edit, normals(2, G), advantage_clip=5.0),
        split_of(edit, 100 * normals(3, G), advantage_clip=5.0),
    )
    assert torch.equal(one.values[:, 0], other.values[:, 0]) and not torch.allclose(
        one.values[:, 1], other.values[:, 1]
    )
    group = group_of(level=0.6, dtype=torch.float32)
    inside = EDITED.flatten()
    here, there = (
        evaluated(TransitionSurrogate(), group, credit, NEW).gradient for credit in (one, other)
    )
    assert torch.equal(here[:, inside], there[:, inside]) and not torch.allclose(
        here[:, ~inside], there[:, ~inside]
    )


# --- what every method does, on made-up groups
# ------------------------------------------------------------------------

NAMES = sorted(METHODS)
RATIO_FREE = {"diffusion-nft", "cocoedit"}


def rolled_out(
    algorithm: Algorithm, *, num: int = 5, num_steps: int = 5, seed: int = 0, solver: Any = "euler"
) -> RolloutGroup:
    """A group of a method, made under OLD in single precision by the loop that actors run."""
    source, levels, grid = (
        NoiseSource(seed, "t", 0),
        algorithm.step_noise(0, num_steps),
        torch.linspace(1, 0, num_steps + 1),
    )
    trajectory = denoise(
        OLD,
        algorithm.initial_noise(num, (L, C), EDITED.flatten(), source),
        grid,
        keep=algorithm.objective.trained_steps(levels, source.generator("trained steps")),
        solver=solver,
        step_noise=levels,
        sde=algorithm.step_noise.sde,
        normal=lambda step: torch.stack(
            [source.normal(f"step {step}", i, (L, C)) for i in range(num)]
        ),
    )
    return replace(
        group_of(num=num, dtype=torch.float32),
        latents=trajectory.latents,
        next_latents=trajectory.next_latents,
        velocities=trajectory.velocities,
        sigmas=trajectory.sigmas,
        sigmas_next=trajectory.sigmas_next,
        step_noise=trajectory.step_noise,
        sde=algorithm.step_noise.sde,
        schedule=grid,
    )


def credit_of(algorithm: Algorithm, *, num: int = 5, seed: int = 0) -> Advantages:
    """Its credit for made-up rewards: two terms, and scores by region."""
    draw = normals(seed, num, 5)
    regions = {"judge": RegionTable(areas=draw[:, 2:4].double(), background=draw[:, 4].double())}
    values = {"judge": draw[:, 0], "preservation": 30 + draw[:, 1]}
    (found,) = algorithm.credit([table_of(values, (1.0, 0.3), regions)], [AREAS])
    assert isinstance(found, Advantages)
    return found


@pytest.mark.parametrize("solver", ["euler", "dpm++"])
@pytest.mark.parametrize("name", NAMES)
def test_with_unchanged_weights_every_ratio_is_exactly_one(name: str, solver: str) -> None:
    algorithm = METHODS[name].algorithm
    if solver == "dpm++" and algorithm.step_noise.kind != "none":
        with pytest.raises(ValueError, match="multistep rollout solver"):
            algorithm.check(group_size=5, num_steps=5, multistep=True)
        return
    group = rolled_out(algorithm, solver=solver)
    found = evaluated(
        algorithm.objective,
        group,
        credit_of(algorithm),
        OLD,
        num_references=algorithm.initial_noise.num_references,
    )
    assert found.points and bool(found.gradient.any())
    for said in found.metrics:
        if name in RATIO_FREE:
            assert not any(metric.startswith("ratio/") for metric in said)
            assert (
                torch.equal(said["forward/positive"], said["forward/negative"])
                and float(said["forward/from_acting"]) == 0
            )
        else:
            assert (
                float(said["ratio/min"]),
                float(said["ratio/max"]),
                float(said["ratio/max_deviation"]),
            ) == (1.0, 1.0, 0.0)
            assert float(said["clip/share"]) == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name not in RATIO_FREE])
def test_with_other_weights_ratios_leave_one_and_the_clip_acts(name: str) -> None:
    algorithm = METHODS[name].algorithm
    objective: Any = algorithm.objective.model_copy(update={"clip": 1e-4})
    found = evaluated(
        objective,
        rolled_out(algorithm),
        credit_of(algorithm),
        NEW,
        num_references=algorithm.initial_noise.num_references,
    )
    assert max(float(said["ratio/max_deviation"]) for said in found.metrics) > 1e-4
    assert any(float(said["clip/share"]) > 0 for said in found.metrics)


def in_double(record: Any) -> Any:
    """The record with its floating-point tensors in double precision."""
    changed = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in vars(record).items()
    }
    return replace(record, **changed)


@pytest.mark.parametrize("name", NAMES)
def test_splitting_and_joining_points_by_rows_changes_neither_loss_nor_gradient(name: str) -> None:
    algorithm = METHODS[name].algorithm
    group = in_double(rolled_out(algorithm))
    group = replace(group, conditioning=in_double(group.conditioning))
    credit, found, forwards = in_double(credit_of(algorithm)), {}, {}
    for rows in (None, 1, 2, 3, 7, 1000):
        parameter, sizes = torch.full((C,), 0.1, dtype=torch.float64, requires_grad=True), []

        def velocity(
            latents: Tensor,
            sigma: Tensor,
            _: Conditioning,
            parameter: Tensor = parameter,
            sizes: list[int] = sizes,
        ) -> Tensor:
            sizes.append(len(latents))
            return NEW(latents, sigma) + parameter * torch.cos(latents)

        batches = losses(
            velocity,
            {"reference": lambda x, s, _: BASE(x, s), "acting": lambda x, s, _: OLD(x, s)},
            algorithm.objective,
            group,
            credit,
            num_references=algorithm.initial_noise.num_references,
            generator=torch.Generator().manual_seed(0),
            states_per_forward=rows,
        )
        pairs = [pair for batch in batches for pair in batch]
        total = torch.stack([point.weight * output.loss for point, output in pairs]).sum()
        assert sum(point.weight for point, _ in pairs) == pytest.approx(1, rel=1e-12)
        (gradient,) = torch.autograd.grad(total, parameter)
        found[rows], forwards[rows] = (total.detach(), gradient), sizes
    whole = found[None]
    assert float(whole[1].abs().max()) > 0
    for rows, (total, gradient) in found.items():
        assert torch.allclose(total, whole[0], rtol=1e-11, atol=1e-13) and torch.allclose(
            gradient, whole[1], rtol=1e-9, atol=1e-15
        )
        assert rows is None or max(forwards[rows]) <= rows
        assert sum(forwards[rows]) == sum(forwards[None])
    assert len(forwards[1000]) == 1 and len(forwards[1]) == sum(forwards[1])


@pytest.mark.parametrize("rows", [3, 4])
def test_splitting_a_group_into_unequal_points_leaves_the_reported_loss(rows: int) -> None:
    algorithm = METHODS["flow-grpo"].algorithm
    group, credit, reported = rolled_out(algorithm), credit_of(algorithm), []
    for size in (None, rows):
        offset = torch.zeros(C, requires_grad=True)
        result = learning_step(
            lambda x, s, _, offset=offset: NEW(x, s) + offset * torch.cos(x),
            {},
            [offset],
            torch.optim.SGD([offset], lr=0.1),
            algorithm.objective,
            {0: (group, credit)},
            trained=[0],
            ranks=Alone(),
            config=LearningConfig(max_grad_norm=1e9, ratio_tolerance=0.0, states_per_forward=size),
            num_references=0,
            run_seed=0,
            update=0,
            pass_index=0,
            on_policy="",
        )
        reported.append(result.metrics)
    assert reported[1]["gradient/norm"] == pytest.approx(reported[0]["gradient/norm"], rel=1e-4)
    assert reported[1]["loss"] == pytest.approx(reported[0]["loss"], rel=1e-3)


# --- what every method does, through the real rollout actor and learner
# -----------------------------------------------

FIELDS = frozenset({"target", "caption", "regions"})
REWARDS = {
    "judge": {"kind": "shapes_judge", "weight": 1.0},
    "preservation": {"kind": "preservation", "weight": 0.3},
    "attention": {"kind": "concentration", "weight": 0.3},
}
FEW_ANCHORS = {"rc-grpo", "neighbor-grpo", "edit-grpo-neighbor"}
"""Surrogates over deterministic rollouts, whatever their solver."""


def config_of(editor: str, name: str, *overrides: str) -> RunConfig:
    """A method at its smallest: 2 groups of 4 candidates, 4 solver steps, 16 tokens."""
    changes = "objective: {num_anchors: 2}" if name in FEW_ANCHORS else ""
    return small_config(
        editor,
        f"algorithm={{name: {name}, {changes}}}",
        "rollout.num_steps=4",
        *overrides,
        rewards=REWARDS,
    )


@dataclass(frozen=True)
class Work:
    """One update's order and its groups as blobs, by slot."""

    order: LearnOrder
    groups: tuple[np.ndarray, ...]


def item_of(
    config: RunConfig,
    slot: int,
    adapter: AdapterId,
    *,
    update: int = 0,
    chunk: tuple[int, int] | None = None,
) -> WorkItem:
    size = config.rollout.group_size
    return WorkItem(
        group_id=f"g{update}-{slot}",
        chunk=chunk or (0, size),
        task=fit(
            open_dataset(config.data, "train")[slot],
            resolution=config.editor.resolution,
            multiple=8,
        ),
        epoch=0,
        update=update,
        num_candidates=size,
        run_seed=config.seed,
        adapter=adapter,
    )


def work(config: RunConfig, actor: Any, adapter: AdapterId, *, update: int = 0) -> Work:
    """RolloutResult out and scored as the controller would have it done, with weights that the
    actor holds."""
    reward, slots, groups = RewardActor(config, FIELDS, 1), [], []
    for slot in range(config.train.groups_per_update):
        item = item_of(config, slot, adapter, update=update)
        rolled, blob = actor.run(wire.pack(item))
        slots.append(
            LearnSlot(
                task_type=item.task.task_type, areas=rolled.areas, tables=(reward.score(blob),)
            )
        )
        groups.append(blob)
    return Work(LearnOrder(update=update, plan=f"plan {update}", slots=tuple(slots)), tuple(groups))


def state_of(learner: Any) -> dict[str, Tensor]:
    return wire.unpack(learner.export()[2]).tensors


@pytest.mark.parametrize(
    ("name", "solver"),
    [*((name, "euler") for name in NAMES), *((name, "dpm++") for name in sorted(FEW_ANCHORS))],
)
def test_on_a_real_rollout_the_ratio_is_exactly_one_and_an_update_changes_the_weights(
    small_editor: str, name: str, solver: str
) -> None:
    config = config_of(small_editor, name, f"rollout.solver={solver}")
    actor, learner = colocated(config)
    start, adapter, _, _ = learner.export()
    actor.load(adapter)
    step = work(config, actor, start.adapter)
    assert learner.ratio(step.groups[0]) == 0.0
    before = state_of(learner)
    report, adapter, _, _ = learner.learn(step.order, *step.groups)
    assert report.used == 2 and not report.skipped and report.adapter.sha256 != start.adapter.sha256
    assert (
        all(math.isfinite(value) for value in report.metrics.values())
        and report.metrics["gradient/norm"] > 0
    )
    assert report.metrics.get("ratio/max_deviation", 0.0) == 0.0
    assert ("ratio/max_deviation" in report.metrics) == (name not in RATIO_FREE)
    after = state_of(learner)
    moved = [
        key
        for key in after
        if key.startswith("parameter/") and not torch.equal(after[key], before[key])
    ]
    assert moved and all(bool(after[key].isfinite().all()) for key in moved)
    if name not in RATIO_FREE:
        assert learner.ratio(step.groups[0]) > 0
    weights: AdapterWeights = wire.unpack(adapter)
    assert actor.load(adapter) == weights.id == report.adapter


# --- the acting and the resulting average
# -----------------------------------------------------------------------------

AVERAGED = ("algorithm.acting={kind: decayed, rate: 0.3, max_decay: 0.5}", "train.ema_decay=0.15")


@pytest.fixture(scope="module")
def first(small_editor: str) -> Work:
    """Groups to learn from, of a method that learns from any."""
    config = config_of(small_editor, "diffusion-nft")
    actor, learner = colocated(config)
    start, adapter, _, _ = learner.export()
    actor.load(adapter)
    return work(config, actor, start.adapter)


def shown(blob: np.ndarray) -> dict[str, Tensor]:
    return wire.unpack(blob).tensors


def policy_of(state: np.ndarray) -> dict[str, Tensor]:
    """The policy in a learner's state, under the names of an exported adapter."""
    tensors: dict[str, Tensor] = wire.unpack(state).tensors
    return {
        key.split("/", 1)[1].replace(".policy.", "."): value
        for key, value in tensors.items()
        if key.startswith("parameter/")
    }


def test_acting_and_resulting_weights_follow_their_formulas_and_survive_a_restore(
    small_editor: str, first: Work
) -> None:
    config = config_of(small_editor, "diffusion-nft", *AVERAGED)
    learner = Learner(config, 1)
    _, blob, state, _ = learner.export()
    acting, result = shown(blob), shown(blob)
    for update in range(3):
        report, blob, state, resulting = learner.learn(
            replace(first.order, update=update), *first.groups
        )
        policy = policy_of(state)
        keep, ema = min(0.3 * (update + 1), 0.5), min((1 + update) / (10 + update), 0.15)
        acting = {name: keep * acting[name] + (1 - keep) * policy[name] for name in policy}
        result = {name: ema * result[name] + (1 - ema) * policy[name] for name in policy}
        for expected, found, identity in (
            (acting, blob, report.adapter),
            (result, resulting, report.result),
        ):
            assert shown(found).keys() == expected.keys() and wire.unpack(found).id == identity
            assert all(
                torch.allclose(shown(found)[name], expected[name], rtol=1e-5, atol=1e-9)
                for name in expected
            )
        assert not torch.equal(
            torch.cat([v.flatten() for v in shown(resulting).values()]),
            torch.cat([v.flatten() for v in policy.values()]),
        )
    assert report.adapter != report.result

    other = Learner(config, 1)
    other.restore(state)
    again = other.export()
    assert again[0].adapter == report.adapter and again[0].result == report.result
    assert all(
        np.array_equal(ours, theirs)
        for ours, theirs in zip(again[1:], (blob, state, resulting), strict=True)
    )
    order = replace(first.order, update=3)
    here, there = learner.learn(order, *first.groups), other.learn(order, *first.groups)
    assert all(
        np.array_equal(ours, theirs) for ours, theirs in zip(here[1:], there[1:], strict=True)
    )
    assert here[0].adapter == there[0].adapter != report.adapter


def test_acting_weights_copied_every_update_are_the_policy_and_the_reference_term_starts_at_zero(
    small_editor: str, first: Work
) -> None:
    learner = Learner(
        config_of(small_editor, "diffusion-nft", "algorithm.acting={kind: decayed, rate: 0.0}"), 1
    )
    for update in range(2):
        report, blob, state, resulting = learner.learn(
            replace(first.order, update=update), *first.groups
        )
        policy = policy_of(state)
        # What acts is the policy of before the update: its velocity, not the base editor's, is the
        # one learnt from.
        assert report.metrics["forward/from_acting"] == 0 and (
            report.metrics["kl/reference"] > 0
        ) == (update > 0)
        assert all(torch.equal(value, policy[name]) for name, value in shown(blob).items())
        assert len(resulting) == 0


def test_the_forward_process_reads_the_acting_average_and_not_the_policy(
    small_editor: str, first: Work
) -> None:
    learner, distances = Learner(config_of(small_editor, "diffusion-nft", *AVERAGED), 1), []
    for update in range(3):
        report, _, _, _ = learner.learn(replace(first.order, update=update), *first.groups)
        distances.append(report.metrics["forward/from_acting"])
    # The first update starts where all weights are one. It leaves 0.3 of what acted (decay(1), as
    # released), so the second learns away from the policy.
    assert distances[0] == 0.0 and min(distances[1:]) > 0


def test_what_acts_stands_still_within_an_update_be_it_the_latest_or_a_copy(
    small_editor: str, first: Work
) -> None:
    answers = []
    for acting in ("{kind: latest}", "{kind: decayed, rate: 0.0}"):
        learner = Learner(
            config_of(
                small_editor, "diffusion-nft", f"algorithm.acting={acting}", "train.inner_epochs=2"
            ),
            1,
        )
        answers.append(
            [
                learner.learn(replace(first.order, update=update), *first.groups)
                for update in range(2)
            ]
        )
    for latest, copied in zip(*answers, strict=True):
        assert (
            latest[0].metrics["forward/from_acting"] == copied[0].metrics["forward/from_acting"] > 0
        )
        assert latest[0].adapter == copied[0].adapter == latest[0].result


@pytest.mark.parametrize("name", ["mixgrpo", "flow-grpo"])
def test_where_weights_are_compared_the_picture_depends_on_neither_the_update_nor_its_step_noise(
    small_editor: str, name: str
) -> None:
    config = config_of(
        small_editor, name, "algorithm.step_noise.size=1" if name == "mixgrpo" else "seed=0"
    )
    actor, (start, adapter, _, _) = RolloutActor(config, 1), Learner(config, 1).export()
    actor.load(adapter)
    finals = [
        wire.unpack(
            actor.run(
                wire.pack(
                    replace(item_of(config, 0, start.adapter, update=update), explores=explores)
                )
            )[1]
        )
        for explores in (False, True)
        for update in (0, 25)
    ]
    pictures = [group.candidates.images for group in finals]
    assert torch.equal(pictures[0], pictures[1])
    assert float(finals[0].step_noise.abs().max()) == 0 < float(finals[2].step_noise.abs().max())
    assert not torch.equal(pictures[2], pictures[0])
    # All candidates start from one noise, so without step noise they are one.
    assert all(torch.equal(picture, pictures[0][0]) for picture in pictures[0])


def test_the_moving_average_is_what_is_saved_and_changes_nothing_of_what_acts_or_learns(
    small_editor: str, first: Work
) -> None:
    without = Learner(
        config_of(small_editor, "diffusion-nft", "algorithm.acting={kind: latest}"), 1
    )
    averaged = Learner(
        config_of(
            small_editor, "diffusion-nft", "algorithm.acting={kind: latest}", "train.ema_decay=0.9"
        ),
        1,
    )
    for update in range(2):
        order = replace(first.order, update=update)
        plain, other = without.learn(order, *first.groups), averaged.learn(order, *first.groups)
        assert plain[0].adapter == other[0].adapter == plain[0].result != other[0].result
        assert (
            np.array_equal(plain[1], other[1])
            and policy_of(plain[2]).keys() == policy_of(other[2]).keys()
        )
        assert all(
            torch.equal(value, policy_of(other[2])[name])
            for name, value in policy_of(plain[2]).items()
        )
        assert len(plain[3]) == 0 and wire.unpack(other[3]).id == other[0].result
