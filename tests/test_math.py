"""The mathematics that both methods share, against formulas written out independently: flow,
regions, noise, attention, credit, records as bytes, the denoising loop and the learning step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.ranks import Alone
from rl_edit import wire
from rl_edit.data import shapes
from rl_edit.method import flow
from rl_edit.method.advantages import Declined, GroupCredit, SplitCredit, quasi_norm, standardise
from rl_edit.method.attention import MassTally, concentration_density, text_to_image_mass
from rl_edit.method.exploration import NoiseSource, Perturbation, keyed_seed
from rl_edit.method.objectives import BackgroundRegularised, NeighborSurrogate, Velocities
from rl_edit.method.regions import MaskedRows, UniformRows, token_mask
from rl_edit.method.rollout import denoise, joined, merged
from rl_edit.method.step_noise import NoStepNoise
from rl_edit.method.update import LearningConfig, StepResult, TrainingFailed, learning_step
from rl_edit.types import (
    AdapterId,
    Advantages,
    Candidates,
    Conditioning,
    EditTask,
    PairedTask,
    RewardTable,
    RolloutGroup,
    WorkItem,
    moved,
)

MASK = torch.tensor([True, False, False, True, False, False, False, False])
AREAS = MASK.reshape(1, 2, 4)


def table(
    values: list[list[float]], weights: tuple[float, ...] = (1.0,), valid: Tensor | None = None
) -> RewardTable:
    scores = torch.tensor(values, dtype=torch.float32)
    names = tuple(f"term{i}" for i in range(scores.shape[1]))
    ok = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    return RewardTable(
        group_id="w",
        names=names,
        weights=weights,
        values=scores,
        valid=ok,
        reasons=() if bool(ok.all()) else ("judge was down",),
    )


# --- flow
# --------------------------------------------------------------------------------------------------


def test_interpolation_runs_from_clean_at_zero_to_noise_at_one() -> None:
    clean, noise = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 4.0])
    assert torch.equal(flow.interpolate(clean, noise, torch.tensor(0.0)), clean)
    assert torch.equal(flow.interpolate(clean, noise, torch.tensor(1.0)), noise)
    assert torch.allclose(
        flow.interpolate(clean, noise, torch.tensor(0.25)), torch.tensor([1.625, 0.25])
    )


@settings(deadline=None)
@given(sigma=st.floats(0.01, 0.99))
def test_clean_is_recovered_from_the_velocity_at_every_noise_level(sigma: float) -> None:
    clean, noise = torch.linspace(-2, 2, 5).double(), torch.linspace(3, -1, 5).double()
    level = torch.tensor(sigma, dtype=torch.float64)
    state, velocity = flow.interpolate(clean, noise, level), noise - clean
    assert torch.allclose(flow.clean_from_velocity(state, velocity, level), clean, atol=1e-12)


@settings(deadline=None)
@given(sigma=st.floats(0.1, 1.0), share=st.floats(0.0, 1.0))
def test_an_euler_step_remixes_the_predicted_clean_and_noise(sigma: float, share: float) -> None:
    state, velocity = torch.linspace(-1, 1, 7).double(), torch.linspace(2, -3, 7).double()
    now, then = (
        torch.tensor(sigma, dtype=torch.float64),
        torch.tensor(sigma * share, dtype=torch.float64),
    )
    clean, noise = (
        flow.clean_from_velocity(state, velocity, now),
        state + (1 - now) * velocity,
    )
    assert torch.allclose(
        flow.euler(state, velocity, sigma=now, sigma_next=then),
        (1 - then) * clean + then * noise,
        atol=1e-12,
    )


def test_a_timestep_is_a_thousand_sigmas_and_model_time_is_rounded_as_the_model_does() -> None:
    sigma = torch.tensor([0.0, 0.3337, 0.9963, 1.0])
    assert torch.equal(flow.timestep_from_sigma(sigma), sigma * 1000)
    assert torch.equal(flow.model_time(sigma, torch.float32), (sigma * 1000) / 1000)
    half = flow.model_time(sigma, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, torch.tensor([0.0, 334.0, 996.0, 1000.0], dtype=torch.bfloat16) / 1000)


def test_a_transition_at_level_zero_is_the_euler_step_bitwise() -> None:
    state, velocity = (
        torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)),
        torch.ones(2, 4, 3) / 3,
    )
    step = flow.transition(state, velocity, sigma=0.9, sigma_next=0.7, level=0.0)
    assert torch.equal(
        step, flow.euler(state, velocity, sigma=torch.tensor(0.9), sigma_next=torch.tensor(0.7))
    )


@pytest.mark.parametrize(("sigma", "sigma_next"), [(0.8, 0.6), (1.0, 0.9)])
def test_a_stochastic_transition_keeps_the_marginal_of_the_flow_to_first_order(
    sigma: float, sigma_next: float
) -> None:
    """For data N(0, 1) the exact velocity is known, and the SDE must move the ODE's variance to the
    next level's.

    An Euler-Maruyama step is first order, so halving the step must shrink the error at least
    threefold (locally second order).
    """
    errors = []
    for part in (1.0, 0.5, 0.25):
        then = sigma - (sigma - sigma_next) * part
        variance = (1 - sigma) ** 2 + sigma**2
        velocity_slope = (sigma - (1 - sigma)) / variance  # E[noise - clean | x] = slope * x
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        drift = flow.transition(
            one, velocity_slope * one, sigma=sigma, sigma_next=then, level=0.7, noise=zero
        )
        spread = flow.transition(zero, zero, sigma=sigma, sigma_next=then, level=0.7, noise=one)
        errors.append(abs(float(drift**2 * variance + spread**2) - ((1 - then) ** 2 + then**2)))
    if sigma == 1.0:  # the level there is frozen at the next grid point, which costs one order
        assert errors[0] < 0.1
    else:
        assert errors[1] < errors[0] / 3 and errors[2] < errors[1] / 3


# --- regions
# --------------------------------------------------------------------------------------------------


def test_a_token_belongs_to_the_edit_region_if_any_of_its_pixels_does() -> None:
    mask = torch.zeros(16, 24, dtype=torch.bool)
    mask[0, 23] = mask[8, 8] = True
    assert token_mask(mask, (2, 3)).tolist() == [False, False, True, False, True, False]


def test_token_order_is_row_major_as_latents_are_packed() -> None:
    from diffusers import FluxKontextPipeline

    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1, 4] = mask[3, 0] = True
    packed = FluxKontextPipeline._pack_latents(mask[None, None].float(), 1, 1, 4, 6)
    assert torch.equal(packed[0].amax(dim=-1).bool(), token_mask(mask, (2, 3)))


def test_a_mask_that_does_not_divide_into_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"15x16 px does not divide into a 2x2"):
        token_mask(torch.ones(15, 16, dtype=torch.bool), (2, 2))


@settings(deadline=None)
@given(
    bits=st.lists(st.booleans(), min_size=1, max_size=40),
    inside=st.floats(0.1, 10),
    outside=st.floats(0.1, 10),
)
def test_every_row_sums_to_one_for_any_mask_and_bandwidths(
    bits: list[bool], inside: float, outside: float
) -> None:
    for rows in (UniformRows(), MaskedRows(inside=inside, outside=outside)):
        row = rows(torch.tensor(bits))
        assert row.shape == (1, len(bits))
        assert bool((row >= 0).all()) and float(row.sum()) == pytest.approx(1, abs=1e-5)


def test_masked_rows_are_the_two_area_metric_up_to_its_constant() -> None:
    d = torch.rand(8, generator=torch.Generator().manual_seed(1))
    expected = d[MASK].mean() / 0.5**2 + d[~MASK].mean() / 2.0**2
    row = MaskedRows(inside=0.5, outside=2.0)(MASK)[0]
    assert float(row @ d) * (1 / 0.5**2 + 1 / 2.0**2) == pytest.approx(float(expected), rel=1e-5)


# --- exploration
# --------------------------------------------------------------------------------------------------


def test_noise_is_addressed_not_streamed() -> None:
    source = NoiseSource(3, "task", 0)
    first = source.normal("candidate", 2, (4, 2))
    source.normal("shared", -1, (9, 9))
    assert torch.equal(source.normal("candidate", 2, (4, 2)), first)
    assert torch.equal(NoiseSource(3, "task", 0).normal("candidate", 2, (4, 2)), first)


def test_every_part_of_an_address_changes_the_noise() -> None:
    draws = [
        NoiseSource(seed, task, draw).normal(purpose, candidate, (64,))
        for seed, task, draw, purpose, candidate in [
            (0, "a", 0, "shared", 0),
            (1, "a", 0, "shared", 0),
            (0, "b", 0, "shared", 0),
            (0, "a", 1, "shared", 0),
            (0, "a", 0, "candidate", 0),
            (0, "a", 0, "shared", 1),
        ]
    ]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert float(correlation.abs().max()) < 0.5


def test_keyed_seeds_do_not_run_parts_together() -> None:
    assert keyed_seed("ab", "c") != keyed_seed("a", "bc")
    assert keyed_seed(1, 23) != keyed_seed(12, 3)
    assert 0 <= keyed_seed("x") < 2**63


def test_a_candidate_noise_does_not_depend_on_the_group_size() -> None:
    law, source = Perturbation(inside=0.5, outside=0.1), NoiseSource(0, "t", 0)
    small, large = law(3, (8, 2), MASK, source), law(7, (8, 2), MASK, source)
    assert torch.equal(large[:3], small)


def test_deterministic_rollouts_have_no_step_noise() -> None:
    assert NoStepNoise()(5, 4).tolist() == [0.0] * 4


# --- attention
# --------------------------------------------------------------------------------------------------


def attention_inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key = (
        torch.randn(2, 5, 3, 4, generator=generator),
        torch.randn(2, 8, 3, 4, generator=generator),
    )
    return (
        query,
        key,
        torch.tensor([[True, True, False, True, False], [True, False, False, False, False]]),
    )


def test_mass_is_the_mean_over_heads_and_instruction_rows_of_the_softmax_over_target_tokens() -> (
    None
):
    query, key, rows = attention_inputs()
    mass = text_to_image_mass(query, key, rows).numpy()
    for b in range(2):
        weights = []
        for s in np.flatnonzero(rows[b].numpy()):
            for h in range(3):
                logits = np.array(
                    [
                        query[b, s, h].double().numpy() @ key[b, n, h].double().numpy()
                        for n in range(8)
                    ]
                ) / math.sqrt(4)
                weights.append(np.exp(logits) / np.exp(logits).sum())
        assert np.allclose(mass[b], np.mean(weights, axis=0), atol=1e-6)


def test_mass_equals_the_joint_softmax_renormalised_over_target_tokens() -> None:
    query, key, rows = attention_inputs()
    others = torch.randn(2, 11, 3, 4, generator=torch.Generator().manual_seed(9))
    joint = torch.einsum(
        "bshd,blhd->bhsl", query.double() / 2, torch.cat([others, key], dim=1).double()
    ).softmax(dim=-1)[..., 11:]
    joint = (joint / joint.sum(dim=-1, keepdim=True)).mean(dim=1)
    expected = torch.stack([joint[b, rows[b]].mean(dim=0) for b in range(2)])
    assert torch.allclose(text_to_image_mass(query, key, rows).double(), expected, atol=1e-6)


def test_a_joint_average_weighs_a_head_by_its_attention_to_the_target_at_all() -> None:
    query, key, rows = attention_inputs()
    others = torch.randn(2, 11, 3, 4, generator=torch.Generator().manual_seed(9))
    joint = torch.einsum(
        "bshd,blhd->bhsl", query.double() / 2, torch.cat([others, key], dim=1).double()
    ).softmax(dim=-1)[..., 11:]
    average = joint.mean(dim=1)
    average = average / average.sum(dim=-1, keepdim=True)
    expected = torch.stack([average[b, rows[b]].mean(dim=0) for b in range(2)])
    measured = text_to_image_mass(query, key, rows, others).double()
    assert torch.allclose(measured, expected, atol=1e-6)
    assert not torch.allclose(measured, text_to_image_mass(query, key, rows).double(), atol=1e-3)


def test_mass_of_every_sample_sums_to_one() -> None:
    assert torch.allclose(
        text_to_image_mass(*attention_inputs()).sum(dim=1), torch.ones(2), atol=1e-6
    )


def test_excluding_rows_that_are_duplicates_changes_nothing() -> None:
    query, key, _ = attention_inputs()
    doubled = torch.cat([query, query], dim=1)
    every, first = torch.ones(2, 10, dtype=torch.bool), torch.arange(10).expand(2, 10) < 5
    assert torch.allclose(
        text_to_image_mass(doubled, key, every), text_to_image_mass(doubled, key, first), atol=1e-7
    )


def test_a_tally_is_the_mean_over_forwards_and_an_empty_one_raises() -> None:
    tally = MassTally()
    with pytest.raises(RuntimeError, match="no attention was recorded"):
        tally.mean()
    tally.add(torch.tensor([[0.0, 1.0]]))
    tally.add(torch.tensor([[0.5, 0.5]]))
    assert tally.mean().tolist() == [[0.25, 0.75]]


def test_the_density_of_the_mean_mass_is_the_mean_of_the_densities() -> None:
    masses = torch.rand(6, 1, 8, generator=torch.Generator().manual_seed(0)).softmax(dim=-1)
    each = torch.stack([concentration_density(mass, MASK) for mass in masses]).mean(dim=0)
    assert torch.allclose(concentration_density(masses.mean(dim=0), MASK), each, atol=1e-6)


# --- advantages
# --------------------------------------------------------------------------------------------------

rewards = st.lists(st.floats(-100, 100, allow_nan=False, width=32), min_size=2, max_size=16).filter(
    lambda xs: float(np.std(xs)) > 1e-3
)


@settings(deadline=None)
@given(values=rewards)
def test_standardised_values_have_zero_mean_unit_deviation_and_the_same_order(
    values: list[float],
) -> None:
    result = standardise(torch.tensor(values, dtype=torch.float64)).numpy()
    assert np.allclose(result, (np.array(values) - np.mean(values)) / np.std(values), atol=1e-9)
    assert abs(result.sum()) < 1e-9 and np.std(result) == pytest.approx(1)


def test_the_standard_deviation_is_the_population_one() -> None:
    assert standardise(torch.tensor([0.0, 2.0])).tolist() == [-1.0, 1.0]


def test_minibatch_credit_is_the_hand_made_two_stage_standardisation() -> None:
    """Each term z-scored over all candidates of the update, then added by weight, then standardised
    in the group."""
    a, b = (
        np.array([[1.0, 10.0], [2.0, 30.0], [6.0, 20.0]]),
        np.array([[0.0, 5.0], [4.0, 5.0], [8.0, 65.0]]),
    )
    results = GroupCredit(normalise="minibatch")(
        [table(a.tolist(), (1.0, 0.25)), table(b.tolist(), (1.0, 0.25))], [AREAS, AREAS]
    )
    pooled = np.concatenate([a, b])
    for group, result in zip((a, b), results, strict=True):
        combined = ((group - pooled.mean(0)) / pooled.std(0)) @ np.array([1.0, 0.25])
        assert isinstance(result, Advantages)
        assert np.allclose(
            result.values[:, 0].numpy(), (combined - combined.mean()) / combined.std(), atol=1e-5
        )


def test_group_normalisation_gives_each_term_its_share_whatever_its_unit() -> None:
    credit = GroupCredit(normalise="group")
    plain = credit([table([[1.0, 10.0], [2.0, 30.0], [6.0, 20.0]], (0.5, 0.5))], [AREAS])[0]
    scaled = credit([table([[1.0, 10000.0], [2.0, 30000.0], [6.0, 20000.0]], (0.5, 0.5))], [AREAS])[
        0
    ]
    assert isinstance(plain, Advantages) and isinstance(scaled, Advantages)
    assert torch.allclose(plain.values, scaled.values, atol=1e-3)


def test_raw_credit_standardises_the_weighted_sum() -> None:
    result = GroupCredit(normalise="none")(
        [table([[1.0, 0.0], [2.0, 4.0], [6.0, 1.0]], (2.0, 0.5))], [AREAS]
    )[0]
    combined = np.array([2.0, 6.0, 12.5])
    assert isinstance(result, Advantages)
    assert np.allclose(
        result.values[:, 0].numpy(), (combined - combined.mean()) / combined.std(), atol=1e-6
    )


@settings(deadline=None)
@given(
    groups=st.lists(st.lists(st.floats(-10, 10), min_size=4, max_size=4), min_size=1, max_size=4),
    mode=st.sampled_from(["minibatch", "group", "none"]),
)
def test_advantages_of_every_trained_group_sum_to_zero(
    groups: list[list[float]], mode: str
) -> None:
    results = GroupCredit(normalise=mode)(
        [table([[x] for x in group]) for group in groups], [AREAS] * len(groups)
    )  # type: ignore[arg-type]
    for group, result in zip(groups, results, strict=True):
        if isinstance(result, Advantages):
            assert abs(float(result.values.sum())) < 1e-4
        else:
            assert result.kind == "spread" and np.std(np.float32(group)) < 1e-3


def test_a_group_with_an_invalid_reward_is_declined_whole_with_its_reason() -> None:
    valid = torch.tensor([[True], [False], [True]])
    result = GroupCredit()([table([[1.0], [math.nan], [3.0]], valid=valid)], [AREAS])[0]
    assert result == Declined("invalid", "judge was down")


def test_an_invalid_group_does_not_move_the_minibatch_statistics_of_the_others() -> None:
    good = [
        table([[1.0, 0.0], [2.0, 3.0], [6.0, 1.0]], (1.0, 1.0)),
        table([[0.0, 1.0], [2.0, 2.0], [4.0, 9.0]], (1.0, 1.0)),
    ]
    bad = table(
        [[math.nan, 500.0], [900.0, 2.0], [4.0, 9.0]],
        (1.0, 1.0),
        torch.tensor([[False, True], [True, True], [True, True]]),
    )
    alone = GroupCredit()(good, [AREAS] * 2)
    mixed = GroupCredit()([good[0], bad, good[1]], [AREAS] * 3)
    assert isinstance(mixed[1], Declined)
    for before, after in zip(alone, (mixed[0], mixed[2]), strict=True):
        assert isinstance(before, Advantages) and isinstance(after, Advantages)
        assert torch.equal(before.values, after.values)


def test_a_group_without_spread_is_declined_not_amplified() -> None:
    for group, spread in (
        ([0.5, 0.501, 0.5], 0.01),
        ([0.7, 0.7, 0.7], 0.0),
        ([100.0, 100.00001, 100.0], 1e-5),
    ):
        result = GroupCredit(normalise="group", min_spread=spread)(
            [table([[x] for x in group])], [AREAS]
        )[0]
        assert isinstance(result, Declined) and result.kind == "spread", group


@pytest.mark.parametrize("mode", ["minibatch", "group", "none"])
def test_a_term_that_differs_only_by_rounding_says_nothing_beside_one_that_differs(
    mode: str,
) -> None:
    credit = GroupCredit(normalise=mode)  # type: ignore[arg-type]
    alone = credit([table([[1.0], [2.0], [6.0]])], [AREAS])[0]
    beside = credit([table([[1.0, 30.0], [2.0, 30.00001], [6.0, 30.0]], (1.0, 1.0))], [AREAS])[0]
    assert isinstance(alone, Advantages) and isinstance(beside, Advantages)
    assert torch.equal(beside.values, alone.values)


def test_a_term_of_weight_zero_is_measured_and_decides_nothing_even_when_invalid() -> None:
    valid = torch.tensor([[True, False], [True, True], [True, True]])
    alone = GroupCredit()([table([[1.0], [2.0], [6.0]])], [AREAS])[0]
    beside = GroupCredit()(
        [table([[1.0, math.nan], [2.0, 5.0], [6.0, 1.0]], (1.0, 0.0), valid)], [AREAS]
    )[0]
    assert isinstance(alone, Advantages) and isinstance(beside, Advantages)
    assert torch.equal(beside.values, alone.values)


def test_constants_standardise_to_zero() -> None:
    assert standardise(torch.full((2, 5), 0.1)).tolist() == [[0.0] * 5] * 2


def test_credit_speaks_about_the_tokens_its_rows_name() -> None:
    result = GroupCredit(rows=MaskedRows(inside=0.5))([table([[0.0], [1.0]])], [AREAS])[0]
    assert isinstance(result, Advantages)
    assert torch.equal(
        result.regions, MaskedRows(inside=0.5)(MASK)
    ) and result.weights.tolist() == [1.0]


def test_groups_of_one_update_may_lie_on_different_canvases() -> None:
    tables = [table([[0.0, 3.0], [1.0, 2.0]], (1.0, 0.5))] * 2
    masks = [AREAS, MASK[:6].reshape(1, 2, 3)]
    for credit in (GroupCredit(), SplitCredit(background_terms=("term1",))):
        results = credit(tables, masks)
        assert [r.regions.shape[1] for r in results if isinstance(r, Advantages)] == [8, 6]


def test_judged_apart_each_area_follows_its_own_terms_only() -> None:
    split, edit, keep = (
        SplitCredit(background_terms=("term1",), edit_share=0.25),
        [1.0, 2.0, 6.0],
        [5.0, 0.0, 1.0],
    )
    (result,) = split(
        [table([list(pair) for pair in zip(edit, keep, strict=True)], (1.0, 0.1))], [AREAS]
    )
    assert isinstance(result, Advantages)
    for column, alone in enumerate((edit, keep)):
        assert torch.allclose(result.values[:, column], standardise(torch.tensor(alone)), atol=1e-6)
    assert torch.equal(result.regions, torch.stack([MASK / 2, ~MASK / 6]).float())
    assert result.weights.tolist() == [0.25, 0.75]
    (other,) = split(
        [table([[e, k] for e, k in zip(edit, reversed(keep), strict=True)], (1.0, 0.1))], [AREAS]
    )
    assert isinstance(other, Advantages)
    assert torch.equal(other.values[:, 0], result.values[:, 0]) and not torch.equal(
        other.values[:, 1], result.values[:, 1]
    )


def test_an_area_without_spread_has_advantage_zero_and_two_or_an_invalid_reward_decline() -> None:
    split = SplitCredit(background_terms=("term1",))
    (half,) = split([table([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]], (1.0, 1.0))], [AREAS])
    assert isinstance(half, Advantages)
    assert bool(half.values[:, 0].all()) and not bool(half.values[:, 1].any())
    (silent,) = split([table([[1.0, 5.0]] * 3, (1.0, 1.0))], [AREAS])
    assert isinstance(silent, Declined) and silent.kind == "spread"
    valid = torch.tensor([[True, True], [True, False], [True, True]])
    (invalid,) = split(
        [table([[1.0, 5.0], [2.0, math.nan], [6.0, 1.0]], (1.0, 1.0), valid)], [AREAS]
    )
    assert invalid == Declined("invalid", "judge was down")


def test_judged_apart_a_mask_over_the_whole_picture_leaves_the_background_no_weight() -> None:
    everywhere = torch.ones(1, 2, 4, dtype=torch.bool)
    (result,) = SplitCredit(background_terms=("term1",), edit_share=0.3)(
        [table([[1.0, 5.0], [2.0, 0.0]], (1.0, 1.0))], [everywhere]
    )
    assert isinstance(result, Advantages)
    assert result.weights.tolist() == pytest.approx([0.3, 0.0]) and not bool(
        result.regions[1].any()
    )


def test_quasi_norm_ignores_the_scale_and_offset_of_the_rewards() -> None:
    values = torch.tensor([1.0, 4.0, 2.0, 9.0], dtype=torch.float64)
    assert torch.allclose(quasi_norm(values * 37 + 5, 0.8), quasi_norm(values, 0.8), atol=1e-9)


# --- records
# --------------------------------------------------------------------------------------------------


def some_group(num: int = 4, steps: int = 2, channels: int = 3, seed: int = 0) -> RolloutGroup:
    """A group on eight tokens whose trained steps the Euler solver made."""
    generator = torch.Generator().manual_seed(seed)
    latents, velocities = (
        torch.randn(num, steps, 8, channels, generator=generator) for _ in range(2)
    )
    sigmas, sigmas_next = torch.linspace(1, 0.4, steps), torch.linspace(1, 0.4, steps) - 0.3
    task = EditTask(
        task_id="t",
        task_type="edit",
        source=torch.zeros(4, 8, 3, dtype=torch.uint8),
        instruction="do",
        edit_mask=torch.eye(4, 8).bool(),
    )
    return RolloutGroup(
        group_id="w",
        adapter=AdapterId(0, "0"),
        candidates=Candidates(
            task=task,
            images=torch.zeros(num, 4, 8, 3, dtype=torch.uint8),
            attention=torch.full((num, 8), 1 / 8),
            token_mask=MASK,
        ),
        conditioning=Conditioning(
            source_latents=torch.randn(8, channels, generator=generator),
            grid=(2, 4),
        ),
        latents=latents,
        next_latents=flow.euler(
            latents,
            velocities,
            sigma=sigmas[None, :, None, None],
            sigma_next=sigmas_next[None, :, None, None],
        ),
        velocities=velocities,
        sigmas=sigmas,
        sigmas_next=sigmas_next,
        step_noise=torch.zeros(steps),
        sde="flow",
        schedule=torch.cat([sigmas, torch.tensor([0.1, 0.0])]),
        areas=AREAS,
    )


def tensors_of(record: object, path: str = "") -> Iterator[tuple[str, object]]:
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        for field in dataclasses.fields(record):
            yield from tensors_of(getattr(record, field.name), f"{path}.{field.name}")
    else:
        yield path, record


def same(a: object, b: object) -> bool:
    left, right = dict(tensors_of(a)), dict(tensors_of(b))
    if type(a) is not type(b) or left.keys() != right.keys():
        return False
    for name, value in left.items():
        other = right[name]
        if isinstance(value, Tensor):
            assert isinstance(other, Tensor)
            if (
                value.dtype != other.dtype
                or value.shape != other.shape
                or value.numpy().tobytes() != other.numpy().tobytes()
            ):
                return False
        elif value != other:
            return False
    return True


@pytest.mark.parametrize(
    "record",
    [
        some_group(),
        some_group(steps=1),
        shapes.task("train", 0),
        WorkItem(
            group_id="ü",
            chunk=(0, 4),
            task=shapes.task("train", 1),
            epoch=2,
            update=3,
            num_candidates=4,
            run_seed=5,
            adapter=AdapterId(7, "ab"),
        ),
        table([[1.0], [math.nan]], valid=torch.tensor([[True], [False]])),
    ],
    ids=["group", "one-step", "shapes-task", "work-item", "rewards-with-nan"],
)
def test_a_record_comes_back_from_bytes_bit_for_bit(record: object) -> None:
    blob = wire.pack(record)
    assert blob.dtype == np.uint8
    assert same(wire.unpack(blob), record)


def test_packing_is_deterministic() -> None:
    first = wire.pack(some_group())
    assert all(np.array_equal(wire.pack(some_group()), first) for _ in range(8))


def test_a_record_whose_fields_share_memory_can_be_packed() -> None:
    image = torch.zeros(4, 4, 3, dtype=torch.uint8)
    task = PairedTask(
        task_id="t",
        task_type="edit",
        source=image,
        instruction="",
        edit_mask=torch.eye(4).bool(),
        target=image,
    )
    assert same(wire.unpack(wire.pack(task)), task)


def test_bytes_of_another_schema_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    blob, schema = wire.pack(table([[1.0]])), wire.SCHEMA
    monkeypatch.setattr(wire, "SCHEMA", 99)
    with pytest.raises(ValueError, match=f"schema {schema}, this version reads 99"):
        wire.unpack(blob)


def test_only_named_record_types_are_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    blob = wire.pack(table([[1.0]]))
    monkeypatch.delitem(wire.RECORDS, "RewardTable")
    with pytest.raises(ValueError, match="unknown record 'RewardTable'"):
        wire.unpack(blob)


def test_moving_a_record_moves_nested_tensors_and_nothing_else() -> None:
    group = some_group()
    there = moved(group, "meta")
    assert all(value.is_meta for _, value in tensors_of(there) if isinstance(value, Tensor))
    assert there.candidates.task.instruction == "do" and there.conditioning.grid == (2, 4)
    assert same(moved(group, "cpu"), group)


def chunk_of(group: RolloutGroup, start: int, past: int) -> RolloutGroup:
    part, candidates = slice(start, past), group.candidates
    return dataclasses.replace(
        group,
        candidates=dataclasses.replace(
            candidates, images=candidates.images[part], attention=candidates.attention[part]
        ),
        latents=group.latents[part],
        next_latents=group.next_latents[part],
        velocities=group.velocities[part],
    )


def test_merged_chunks_are_the_whole_group() -> None:
    group = some_group(num=6)
    assert same(merged([chunk_of(group, 0, 4), chunk_of(group, 4, 6)]), group)
    assert same(merged([group]), group)


@pytest.mark.parametrize(
    "change", [{"group_id": "other"}, {"adapter": AdapterId(0, "1")}], ids=["group", "adapter"]
)
def test_chunks_of_different_groups_or_adapters_are_not_merged(change: dict) -> None:
    group = some_group()
    with pytest.raises(ValueError, match="do not make one group"):
        merged([chunk_of(group, 0, 2), dataclasses.replace(chunk_of(group, 2, 4), **change)])


def test_joined_tables_keep_every_candidate_and_what_a_chunk_lacks_is_nan() -> None:
    first = dataclasses.replace(
        table([[1.0], [2.0]]),
        components={"judge": {"style": (0.1, 0.2)}},
        reasons=("late", "torn"),
        seconds=1.0,
    )
    second = dataclasses.replace(
        table([[3.0]]),
        components={"judge": {"form": (0.3,)}},
        reasons=("torn",),
        out_of_contract=True,
        seconds=2.0,
    )
    whole = joined([first, second])
    assert whole.values[:, 0].tolist() == [1.0, 2.0, 3.0] and whole.valid.shape == (3, 1)
    assert whole.reasons == ("late", "torn") and whole.out_of_contract and whole.seconds == 3.0
    assert whole.components["judge"]["style"] == pytest.approx((0.1, 0.2, math.nan), nan_ok=True)
    assert whole.components["judge"]["form"] == pytest.approx(
        (math.nan, math.nan, 0.3), nan_ok=True
    )
    with pytest.raises(ValueError, match="do not make one group"):
        joined([first, dataclasses.replace(second, weights=(2.0,))])


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        some_group().group_id = "other"  # type: ignore[misc]


# --- the denoising loop
# --------------------------------------------------------------------------------------------------


def test_the_loop_is_repeated_euler_steps_and_keeps_the_named_ones() -> None:
    sigmas = torch.tensor([1.0, 0.75, 0.3, 0.0])
    initial = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
    result = denoise(lambda x, s: torch.sin(x) * s[:, None, None], initial, sigmas, keep=(0, 2))
    x = initial
    states = []
    for now, then in pairwise(sigmas):
        v = torch.sin(x) * now
        states.append((x, x + (then - now) * v, v))
        x = states[-1][1]
    assert torch.equal(result.final, x)
    for kept, step in enumerate((0, 2)):
        assert torch.equal(result.latents[:, kept], states[step][0])
        assert torch.equal(result.next_latents[:, kept], states[step][1])
        assert torch.equal(result.velocities[:, kept], states[step][2])
    assert torch.equal(result.sigmas, sigmas[[0, 2]]) and torch.equal(
        result.sigmas_next, sigmas[[1, 3]]
    )


def test_keeping_nothing_gives_an_empty_trajectory_with_the_same_end() -> None:
    sigmas, initial = torch.tensor([1.0, 0.5, 0.0]), torch.ones(2, 3, 2)
    result = denoise(lambda x, s: -x, initial, sigmas)
    assert result.latents.shape == (2, 0, 3, 2)
    assert torch.equal(result.final, denoise(lambda x, s: -x, initial, sigmas, keep=(0, 1)).final)


def test_a_rollout_carries_no_gradient() -> None:
    weight = torch.ones(1, requires_grad=True)
    result = denoise(
        lambda x, s: x * weight, torch.ones(2, 3, 2), torch.tensor([1.0, 0.5, 0.0]), keep=(0,)
    )
    assert not any(
        t.requires_grad
        for t in (result.latents, result.next_latents, result.velocities, result.final)
    )


def test_stochastic_steps_use_the_noise_of_their_own_index() -> None:
    asked: list[int] = []

    def normal(step: int) -> Tensor:
        asked.append(step)
        return torch.full((1, 2, 1), float(step + 1))

    sigmas, levels = torch.tensor([1.0, 0.6, 0.3, 0.0]), torch.tensor([0.0, 0.5, 0.0])
    result = denoise(
        lambda x, s: torch.zeros_like(x),
        torch.zeros(1, 2, 1),
        sigmas,
        keep=(1,),
        step_noise=levels,
        normal=normal,
    )
    assert asked == [1] and result.step_noise.tolist() == [0.5]
    assert torch.allclose(
        result.final, torch.tensor(0.5 * math.sqrt(0.6 / 0.4) * math.sqrt(0.3) * 2)
    )


# --- the learning step
# --------------------------------------------------------------------------------------------------

CONFIG = LearningConfig(max_grad_norm=1e9, ratio_tolerance=1e-6)


class Additive(torch.nn.Module):
    """The stored velocity of each state plus a learned offset: on-policy at zero."""

    def __init__(self, *groups: RolloutGroup) -> None:
        super().__init__()
        self.groups = groups
        self.offset = torch.nn.Parameter(torch.zeros(8, 3))

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        (group,) = [g for g in self.groups if g.conditioning is conditioning]
        stored = torch.stack(
            [
                group.velocities[(group.latents == state).all(dim=-1).all(dim=-1)][0]
                for state in latents
            ]
        )
        return stored + self.offset


def credit_of(group: RolloutGroup, seed: int = 0) -> Advantages:
    values = standardise(
        torch.randn(len(group.latents), generator=torch.Generator().manual_seed(seed))
    )
    return Advantages(values=values[:, None], regions=UniformRows()(MASK), weights=torch.ones(1))


def learn(
    model: Additive, batch: list[tuple[RolloutGroup, Advantages]], **changes: object
) -> StepResult:
    """A step of one process; the groups of :func:`some_group` are on-policy."""
    counts = {"num_references": 1, "run_seed": 0, "update": 0, "pass_index": 0}
    arguments: dict = {
        "config": CONFIG,
        "on_policy": "0",
        "trained": range(len(batch)),
        "ranks": Alone(),
        **counts,
        **changes,
    }
    optimizer = arguments.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=1.0)
    objective = arguments.pop("objective", NeighborSurrogate(num_anchors=2))
    return learning_step(
        model.velocity,
        {"reference": model.velocity},
        list(model.parameters()),
        optimizer,
        objective,
        dict(enumerate(batch)),
        **arguments,
    )


def test_a_learning_step_applies_the_mean_gradient_over_groups_and_steps() -> None:
    groups = [some_group(seed=1), some_group(seed=2)]
    batch = [(group, credit_of(group, i)) for i, group in enumerate(groups)]
    model = Additive(*groups)
    learn(model, batch)
    objective, expected = NeighborSurrogate(num_anchors=2), torch.zeros(8, 3)
    for group, advantages in batch:
        for point in objective.replay(
            group,
            advantages,
            num_references=1,
            generator=NoiseSource(0, "w", 0).generator("anchors", 0),
        ):
            other = Additive(*groups)
            loss = objective.loss(
                point,
                Velocities(policy=other.velocity(point.latents, point.sigma, group.conditioning)),
            ).loss
            expected += torch.autograd.grad(loss, other.offset)[0] / 4
    assert float(expected.abs().max()) > 0
    assert torch.allclose(model.offset.detach(), -expected, atol=1e-7)


def test_the_same_learning_step_gives_the_same_bytes() -> None:
    groups = [some_group(seed=1), some_group(seed=2)]
    results = []
    for _ in range(2):
        model = Additive(*groups)
        learn(model, [(group, credit_of(group)) for group in groups])
        results.append(model.offset.detach().clone())
    assert torch.equal(*results)


def test_a_ratio_that_is_not_one_on_policy_stops_training_before_the_optimizer_steps() -> None:
    group = some_group()
    model = Additive(group)
    with torch.no_grad():
        model.offset.add_(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    before = model.offset.detach().clone()
    with pytest.raises(TrainingFailed, match="policy ratio deviates from 1"):
        learn(model, [(group, credit_of(group))])
    assert torch.equal(model.offset, before)
    assert (
        learn(model, [(group, credit_of(group))], on_policy="").metrics["ratio/max_deviation"]
        > 1e-6
    )


@pytest.mark.parametrize("part", ["advantages", "velocities"])
def test_a_loss_that_is_not_finite_skips_the_step_and_touches_neither_parameters_nor_optimizer(
    part: str,
) -> None:
    group = some_group()
    model = Additive(group)
    optimizer = torch.optim.AdamW([model.offset], lr=0.1)
    assert not learn(model, [(group, credit_of(group))], optimizer=optimizer).skipped
    held = model.offset.detach().clone()
    moments = {key: value.clone() for key, value in optimizer.state[model.offset].items()}
    advantages = credit_of(group)
    if part == "velocities":
        group = dataclasses.replace(group, velocities=torch.full_like(group.velocities, math.nan))
        model.groups = (group,)
    else:
        advantages = dataclasses.replace(
            advantages, values=torch.full_like(advantages.values, math.nan)
        )
    result = learn(model, [(group, advantages)], on_policy="", optimizer=optimizer)
    assert "not finite" in result.skipped and math.isnan(result.metrics["loss"])
    assert torch.equal(model.offset, held) and model.offset.grad is None
    assert all(
        torch.equal(value, moments[key]) for key, value in optimizer.state[model.offset].items()
    )


def test_the_gradient_is_scaled_down_to_the_allowed_norm() -> None:
    group = some_group()
    model = Additive(group)
    metrics = learn(
        model,
        [(group, credit_of(group))],
        config=LearningConfig(max_grad_norm=1e-3, ratio_tolerance=1e-6),
    ).metrics
    assert metrics["gradient/norm"] > 1e-3
    assert float(model.offset.detach().norm()) == pytest.approx(1e-3, rel=1e-3)


def test_each_pass_over_the_same_batch_draws_its_own_anchors() -> None:
    group = some_group(num=12, steps=1)
    steps = []
    for pass_index in range(4):
        model = Additive(group)
        learn(model, [(group, credit_of(group))], pass_index=pass_index)
        chosen = NeighborSurrogate(num_anchors=2).replay(
            group,
            credit_of(group),
            num_references=1,
            generator=NoiseSource(0, "w", 0).generator("anchors", pass_index),
        )[0]
        steps.append(tuple(chosen.latents.flatten().tolist()))
    assert len(set(steps)) > 1


def test_metrics_reduce_by_what_their_name_says() -> None:
    group = some_group()
    model = Additive(group)
    with torch.no_grad():
        model.offset.add_(0.3 * torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    metrics = learn(model, [(group, credit_of(group))], on_policy="").metrics
    assert metrics["ratio/min"] < metrics["ratio/mean"] < metrics["ratio/max"]
    assert metrics["ratio/max_deviation"] == pytest.approx(
        max(metrics["ratio/max"] - 1, 1 - metrics["ratio/min"]), abs=1e-6
    )


# --- the background anchor
# --------------------------------------------------------------------------------------------------


def test_a_background_anchor_of_weight_zero_is_the_wrapped_objective_bitwise() -> None:
    group = some_group()
    results = []
    for objective in (
        NeighborSurrogate(num_anchors=2),
        BackgroundRegularised(inner=NeighborSurrogate(num_anchors=2), weight=0.0),
    ):
        model = Additive(group)
        learn(model, [(group, credit_of(group))], objective=objective)
        results.append(model.offset.detach().clone())
    assert torch.equal(*results)


def test_background_regularisation_adds_the_mean_squared_drift_outside_the_mask_only() -> None:
    group = some_group()
    objective = BackgroundRegularised(inner=NeighborSurrogate(num_anchors=2), weight=0.1)
    point = objective.replay(
        group, credit_of(group), num_references=1, generator=torch.Generator().manual_seed(0)
    )[0]
    velocity = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    added = (
        objective.loss(point, Velocities(policy=velocity)).loss
        - objective.inner.loss(point.context.inner, Velocities(policy=velocity)).loss
    )
    sigma = float(point.sigma[0])
    clean = point.latents.numpy() - sigma * velocity.detach().numpy()
    error = (clean - group.conditioning.source_latents.numpy())[:, ~MASK.numpy()]
    assert float(added.detach()) == pytest.approx(0.1 * float((error**2).mean()), rel=1e-4)
    (gradient,) = torch.autograd.grad(added, velocity)
    assert float(gradient[:, MASK].abs().max()) < 1e-8
    assert float(gradient[:, ~MASK].abs().min()) > 0


def test_a_background_held_at_the_reference_costs_the_velocity_distance_outside_the_mask_only() -> (
    None
):
    group = some_group()
    objective = BackgroundRegularised(
        inner=NeighborSurrogate(num_anchors=2), weight=0.5, target="reference"
    )
    assert (
        objective.policies == {"reference"}
        and not BackgroundRegularised().policies
        and not NeighborSurrogate().policies
    )
    point = objective.replay(
        group, credit_of(group), num_references=1, generator=torch.Generator().manual_seed(0)
    )[0]
    velocity = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    reference = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(2))
    given = Velocities(policy=velocity, reference=reference)
    added = (
        objective.loss(point, given).loss - objective.inner.loss(point.context.inner, given).loss
    )
    error = (velocity.detach() - reference).numpy()[:, ~MASK.numpy()]
    assert float(added.detach()) == pytest.approx(0.5 * float((error**2).mean()), rel=1e-4)
    (gradient,) = torch.autograd.grad(added, velocity)
    assert float(gradient[:, MASK].abs().max()) < 1e-8 < float(gradient[:, ~MASK].abs().min())


def test_at_the_base_a_background_held_at_the_reference_has_no_gradient_of_its_own() -> None:
    group, offsets = some_group(), []
    for objective in (
        NeighborSurrogate(num_anchors=2),
        BackgroundRegularised(
            inner=NeighborSurrogate(num_anchors=2), weight=10.0, target="reference"
        ),
    ):
        model = Additive(group)
        learn(model, [(group, credit_of(group))], objective=objective)
        offsets.append(model.offset.detach().clone())
    assert torch.equal(*offsets) and bool(offsets[0].any())


def test_batch_deviation_keeps_the_difference_between_groups_that_vary_much_and_little() -> None:
    tables = [table([[0.0], [1.0], [2.0]]), table([[5.0], [5.1], [5.2]])]
    areas = torch.tensor([[[True, False]]])
    lifted = GroupCredit(normalise="none")(tables, [areas, areas])
    kept = GroupCredit(normalise="none", deviation="batch")(tables, [areas, areas])
    assert all(isinstance(credit, Advantages) for credit in (*lifted, *kept))
    much, little = (credit.values.abs().max() for credit in kept)  # type: ignore[union-attr]
    assert float(much / little) == pytest.approx(10, rel=1e-3)
    assert torch.allclose(lifted[0].values, lifted[1].values, atol=1e-4)  # type: ignore[union-attr]
    assert all(abs(float(credit.values.sum())) < 1e-5 for credit in kept)  # type: ignore[union-attr]


def test_skipped_steps_are_never_trained_and_the_rest_are_drawn_without_replacement() -> None:
    objective = NeighborSurrogate(num_steps=2, skip_first=1, skip_last=2)
    drawn = {
        objective.trained_steps(torch.zeros(6), torch.Generator().manual_seed(seed))
        for seed in range(40)
    }
    assert drawn == {(1, 2), (1, 3), (2, 3)}
    assert NeighborSurrogate(skip_first=3, skip_last=0).trained_steps(
        torch.zeros(6), torch.Generator()
    ) == (3, 4, 5)
