"""The invariants of Neighbor GRPO, each a test whose name is the claim: the same objects as RC-GRPO
with other values."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl_edit.method import flow
from rl_edit.method.advantages import quasi_norm
from rl_edit.method.exploration import NoiseSource, Perturbation
from rl_edit.method.objectives import NeighborSurrogate, ReplayPoint, Velocities
from rl_edit.method.regions import UniformRows
from rl_edit.types import AdapterId, Advantages, Candidates, Conditioning, EditTask, RolloutGroup

G, L, C = 5, 6, 3
MASK = torch.tensor([True, False, False, True, False, False])


def group_of(states: Tensor, velocities: Tensor) -> RolloutGroup:
    """One trained step from ``states`` [group, token, channel]."""
    sigmas, sigmas_next = (
        torch.tensor([0.9], dtype=states.dtype),
        torch.tensor([0.55], dtype=states.dtype),
    )
    task = EditTask(
        task_id="t",
        task_type="edit",
        source=torch.zeros(4, L, 3, dtype=torch.uint8),
        instruction="",
        edit_mask=MASK.expand(4, -1),
    )
    return RolloutGroup(
        group_id="w",
        adapter=AdapterId(0, "0"),
        candidates=Candidates(
            task=task,
            images=torch.zeros(len(states), 4, L, 3, dtype=torch.uint8),
            attention=torch.full((len(states), L), 1 / L),
            token_mask=MASK,
        ),
        conditioning=Conditioning(
            source_latents=torch.zeros(L, C),
            grid=(1, L),
        ),
        latents=states[:, None],
        next_latents=flow.euler(states, velocities, sigma=sigmas, sigma_next=sigmas_next)[:, None],
        velocities=velocities[:, None],
        sigmas=sigmas,
        sigmas_next=sigmas_next,
        step_noise=torch.zeros(1),
        sde="flow",
        schedule=torch.tensor([0.9, 0.55, 0.0]),
        areas=MASK.reshape(1, 1, L),
    )


def random_group(seed: int = 0) -> RolloutGroup:
    generator = torch.Generator().manual_seed(seed)
    states, velocities = (
        torch.randn(G, L, C, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return group_of(states, velocities)


def credit(values: Tensor) -> Advantages:
    return Advantages(
        values=values[:, None],
        regions=UniformRows()(MASK).double(),
        weights=torch.ones(1, dtype=torch.float64),
    )


def some_credit(seed: int = 0) -> Advantages:
    values = torch.randn(G, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return credit((values - values.mean()) / values.std(correction=0))


def every_anchor(
    group: RolloutGroup, advantages: Advantages, *, temperature: float = 1.0
) -> tuple[NeighborSurrogate, ReplayPoint]:
    objective = NeighborSurrogate(num_anchors=G, temperature=temperature)
    (point,) = objective.replay(
        group, advantages, num_references=0, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(point.latents, group.latents[:, 0])
    return objective, point


def restricted(point: ReplayPoint, anchors: tuple[int, ...]) -> ReplayPoint:
    """The same point with some of its anchors only."""
    index = list(anchors)
    context = replace(point.context, old_log_policy=point.context.old_log_policy[index])
    return replace(point, latents=point.latents[index], sigma=point.sigma[index], context=context)


def test_every_noise_has_unit_variance() -> None:
    law = Perturbation(inside=0.3, outside=0.3, keep_reference=False)
    noises = torch.stack([law(G, (L, C), MASK, NoiseSource(0, "t", draw)) for draw in range(4000)])
    assert float((noises.var(dim=0) - 1).abs().max()) < 0.112  # five standard errors


def test_no_candidate_is_the_shared_noise() -> None:
    source = NoiseSource(0, "t", 0)
    law = Perturbation(inside=0.3, outside=0.3, keep_reference=False)
    assert law.num_references == 0
    shared = source.normal("shared", -1, (L, C))
    assert not any(torch.equal(candidate, shared) for candidate in law(G, (L, C), MASK, source))


def test_spread_one_is_independent() -> None:
    source = NoiseSource(0, "t", 0)
    group = Perturbation(inside=1.0, outside=1.0, keep_reference=False)(
        G, (64, 16), torch.ones(64, dtype=torch.bool), source
    )
    assert all(torch.equal(group[i], source.normal("candidate", i, (64, 16))) for i in range(G))
    correlation = torch.corrcoef(
        torch.cat([group, source.normal("shared", -1, (64, 16))[None]]).flatten(1)
    ) - torch.eye(G + 1)
    assert float(correlation.abs().max()) < 5 / (64 * 16) ** 0.5


def test_spread_zero_is_one_noise() -> None:
    group = Perturbation(inside=0.0, outside=0.0, keep_reference=False)(
        G, (L, C), MASK, NoiseSource(0, "t", 0)
    )
    assert all(torch.equal(candidate, group[0]) for candidate in group)


def test_ratio_is_one_at_the_old_weights() -> None:
    group = random_group()
    objective, point = every_anchor(group, some_credit())
    metrics = objective.loss(point, Velocities(policy=group.velocities[:, 0])).metrics
    assert float(metrics["ratio/min"]) == float(metrics["ratio/max"]) == 1.0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_gradient_at_the_old_weights_is_the_closed_form(temperature: float) -> None:
    """d J / d anchor = 2 / (G temperature D) * sum_i A_i x_i with D = tokens * channels; the loss
    is -J averaged over anchors."""
    group, advantages = random_group(), some_credit()
    objective, point = every_anchor(group, advantages, temperature=temperature)
    velocity = group.velocities[:, 0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        objective.loss(point, Velocities(policy=velocity)).loss, velocity
    )
    centroid = np.einsum(
        "g,glc->lc", advantages.values[:, 0].numpy(), group.next_latents[:, 0].numpy()
    )
    step = float(group.sigmas_next[0] - group.sigmas[0])
    expected = -step / G * 2 / (G * temperature * L * C) * centroid
    # UniformRows makes its weights in fp32.
    assert np.allclose(
        gradient.numpy(), np.broadcast_to(expected, gradient.shape), rtol=1e-6, atol=1e-12
    )


@settings(deadline=None, max_examples=30)
@given(order=st.permutations(range(G)), seed=st.integers(0, 100))
def test_permuting_candidates_permutes_the_policy_and_leaves_the_objective(
    order: list[int], seed: int
) -> None:
    group, advantages = random_group(seed), some_credit(seed)
    new = group.velocities[:, 0] + 0.3 * torch.randn(
        G, L, C, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64
    )
    shuffled = group_of(group.latents[order, 0], group.velocities[order, 0])
    objective, point = every_anchor(group, advantages)
    _, other = every_anchor(shuffled, credit(advantages.values[order, 0]))
    assert torch.allclose(
        other.context.old_log_policy, point.context.old_log_policy[order][:, order], atol=1e-12
    )
    assert float(objective.loss(other, Velocities(policy=new[order])).loss) == pytest.approx(
        float(objective.loss(point, Velocities(policy=new)).loss), rel=1e-9, abs=1e-12
    )


# --- quasi-norm
# --------------------------------------------------------------------------------------------------

rewards = st.lists(st.floats(-50, 50), min_size=2, max_size=12).filter(
    lambda xs: float(np.std(xs)) > 1e-3
)


@settings(deadline=None)
@given(values=rewards)
def test_quasi_norm_with_p_two_is_the_centred_reward_over_its_population_deviation(
    values: list[float],
) -> None:
    result = quasi_norm(torch.tensor(values, dtype=torch.float64), 2.0).numpy()
    assert np.allclose(result, (np.array(values) - np.mean(values)) / np.std(values), atol=1e-9)


@settings(deadline=None)
@given(values=rewards, p=st.floats(0.2, 2.0))
def test_quasi_norm_keeps_sign_order_and_zero_sum(values: list[float], p: float) -> None:
    rewards_ = torch.tensor(values, dtype=torch.float64)
    result, centred = quasi_norm(rewards_, p), rewards_ - rewards_.mean()
    assert torch.equal(result.sign(), centred.sign())
    assert bool((result[centred.argsort()].diff() >= 0).all())
    assert abs(float(result.sum())) < 1e-8


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [([1.0, -1.0] * 6, 0.155), ([12.0] + [0.0] * 11, 0.314), ([3.0, 1.0, -2.0], None)],
)
def test_quasi_norm_is_the_published_formula_and_tempers_dense_patterns_more_than_outliers(
    pattern: list[float], expected: float | None
) -> None:
    values = np.array(pattern)
    centred = values - values.mean()
    formula = centred / (np.abs(centred) ** 0.8).sum() ** (1 / 0.8) * len(values) ** 0.5
    result = quasi_norm(torch.from_numpy(values), 0.8).numpy()
    assert np.allclose(result, formula, atol=1e-12)
    if expected is not None:
        assert (result**2).mean() ** 0.5 == pytest.approx(expected, abs=6e-4)


# --- anchors
# --------------------------------------------------------------------------------------------------


def test_all_anchors_average_to_the_full_objective() -> None:
    group, advantages = random_group(), some_credit()
    objective, point = every_anchor(group, advantages)
    new = group.velocities[:, 0] + 0.3
    each = [
        float(objective.loss(restricted(point, (a,)), Velocities(policy=new[[a]])).loss)
        for a in range(G)
    ]
    assert float(objective.loss(point, Velocities(policy=new)).loss) == pytest.approx(
        np.mean(each), rel=1e-9
    )
    assert len({round(value, 9) for value in each}) == G


@pytest.mark.parametrize("num_anchors", [1, 2, 4])
def test_expectation_over_anchor_subsets_of_the_gradient_is_the_full_gradient(
    num_anchors: int,
) -> None:
    """Over all subsets, exactly, with respect to a parameter that every anchor's forward shares,
    away from the old weights."""
    group, advantages = random_group(), some_credit()
    objective, point = every_anchor(group, advantages)
    start = 0.05 * torch.randn(
        L, C, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )

    def gradient(anchors: tuple[int, ...]) -> Tensor:
        shared = start.clone().requires_grad_()
        velocity = (
            group.velocities[list(anchors), 0]
            + shared * torch.arange(1, G + 1)[list(anchors), None, None]
        )
        return torch.autograd.grad(
            objective.loss(restricted(point, anchors), Velocities(policy=velocity)).loss, shared
        )[0]

    full = gradient(tuple(range(G)))
    mean = torch.stack([gradient(subset) for subset in combinations(range(G), num_anchors)]).mean(
        dim=0
    )
    assert float(full.norm()) > 0
    assert torch.allclose(mean, full, rtol=1e-9, atol=1e-14)


def test_every_anchor_subset_is_equally_likely() -> None:
    group, advantages, objective = random_group(), some_credit(), NeighborSurrogate(num_anchors=2)
    position = {tuple(state.flatten().tolist()): i for i, state in enumerate(group.latents[:, 0])}
    seen: Counter[tuple[int, ...]] = Counter()
    for seed in range(1000):
        generator = NoiseSource(0, "t", seed).generator("anchors", 0)
        (point,) = objective.replay(group, advantages, num_references=0, generator=generator)
        seen[tuple(position[tuple(state.flatten().tolist())] for state in point.latents)] += 1
    assert len(seen) == 10
    assert all(abs(count - 100) < 5 * (1000 * 0.1 * 0.9) ** 0.5 for count in seen.values())
