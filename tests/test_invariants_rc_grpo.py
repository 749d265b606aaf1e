"""The invariants of RC-GRPO-Editing, each a test whose name is the claim. Formulas here are written
out independently."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from rl_edit.data import shapes
from rl_edit.editors import FluxKontextConfig
from rl_edit.editors.flux_kontext import FluxKontextEditor
from rl_edit.editors.tiny.architecture import new_editor
from rl_edit.method import flow
from rl_edit.method.attention import MassTally, concentration_density, text_to_image_mass
from rl_edit.method.exploration import NoiseSource, Perturbation
from rl_edit.method.objectives import NeighborSurrogate, ReplayPoint, Velocities
from rl_edit.method.objectives.neighbor import region_distances
from rl_edit.method.regions import MaskedRows, UniformRows
from rl_edit.method.rollout import denoise
from rl_edit.method.update import losses
from rl_edit.types import AdapterId, Advantages, Candidates, Conditioning, EditTask, RolloutGroup

G, L, C = 5, 6, 3
MASK = torch.tensor([True, False, False, True, False, False])
SPREADS = {"inside": 0.6, "outside": 0.2}


def draws(law: Perturbation, number: int = 4000) -> Tensor:
    """[draw, candidate, token, channel] over independent groups."""
    return torch.stack(
        [law(G, (L, C), MASK, NoiseSource(0, "task", draw)) for draw in range(number)]
    )


@pytest.fixture(scope="module")
def noises() -> Tensor:
    return draws(Perturbation(**SPREADS))


def group_of(
    *, dtype: torch.dtype = torch.float32, num: int = G, seed: int = 0, mask: Tensor = MASK
) -> RolloutGroup:
    """A group of ``num`` nearby trajectories on hand-made states, one trained step."""
    generator = torch.Generator().manual_seed(seed)
    tokens = len(mask)
    latents, velocities = (
        torch.randn(num, 1, tokens, C, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(2)
    )
    sigmas, sigmas_next = torch.tensor([0.9], dtype=dtype), torch.tensor([0.55], dtype=dtype)
    task = EditTask(
        task_id="t",
        task_type="edit",
        source=torch.zeros(4, tokens, 3, dtype=torch.uint8),
        instruction="",
        edit_mask=mask.expand(4, -1),
    )
    return RolloutGroup(
        group_id="w",
        adapter=AdapterId(0, "0"),
        candidates=Candidates(
            task=task,
            images=torch.zeros(num, 4, tokens, 3, dtype=torch.uint8),
            attention=torch.full((num, tokens), 1 / tokens),
            token_mask=mask,
        ),
        conditioning=Conditioning(
            source_latents=torch.zeros(tokens, C),
            grid=(1, tokens),
        ),
        latents=latents,
        next_latents=flow.euler(latents, velocities, sigma=sigmas, sigma_next=sigmas_next),
        velocities=velocities,
        sigmas=sigmas,
        sigmas_next=sigmas_next,
        step_noise=torch.zeros(1),
        sde="flow",
        schedule=torch.tensor([0.9, 0.55, 0.0]),
        areas=mask.reshape(1, 1, -1),
    )


def credit(group: RolloutGroup, rows: MaskedRows | UniformRows, seed: int = 0) -> Advantages:
    values = torch.randn(
        len(group.latents), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    values = (values - values.mean()) / values.std(correction=0)
    dtype = group.latents.dtype
    return Advantages(
        values=values.to(dtype)[:, None],
        regions=rows(group.candidates.token_mask).to(dtype),
        weights=torch.ones(1, dtype=dtype),
    )


def point_of(
    objective: NeighborSurrogate,
    group: RolloutGroup,
    advantages: Advantages,
    *,
    num_references: int = 1,
    seed: int = 0,
) -> ReplayPoint:
    generator = torch.Generator().manual_seed(seed)
    (point,) = objective.replay(
        group, advantages, num_references=num_references, generator=generator
    )
    return point


def anchors_of(group: RolloutGroup, point: ReplayPoint) -> list[int]:
    """Which candidates a point's states are, in the point's order."""
    return [
        [torch.equal(state, other) for other in group.latents[:, 0]].index(True)
        for state in point.latents
    ]


def stored_velocity(group: RolloutGroup, point: ReplayPoint) -> Tensor:
    return group.velocities[anchors_of(group, point), 0]


def plain_loss(
    group: RolloutGroup,
    advantages: Advantages,
    anchors: list[int],
    new: Tensor,
    *,
    weights: np.ndarray,
    temperature: float,
    clip: float,
) -> float:
    """Eq. 5, 14 and 15 in numpy float64, one anchor after the other; ``weights`` is W's diagonal
    over tokens."""
    candidates, gain = (
        group.next_latents[:, 0].double().numpy(),
        advantages.values[:, 0].double().numpy(),
    )
    dt = float(group.sigmas_next[0]) - float(group.sigmas[0])
    total = 0.0
    for row, anchor in enumerate(anchors):
        start = group.latents[anchor, 0].double().numpy()
        policies = []
        for velocity in (
            new[row].detach().double().numpy(),
            group.velocities[anchor, 0].double().numpy(),
        ):
            end = start + dt * velocity
            d = np.array([(weights[:, None] * (end - y) ** 2).sum() / C for y in candidates])
            p = np.exp(-(d - d.min()) / temperature)
            policies.append(p / p.sum())
        ratio = policies[0] / policies[1]
        total += np.minimum(ratio * gain, np.clip(ratio, 1 - clip, 1 + clip) * gain).mean()
    return -total / len(anchors)


def moved_velocity(group: RolloutGroup, point: ReplayPoint, size: float, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return stored_velocity(group, point) + size * torch.randn(
        point.latents.shape, generator=generator, dtype=torch.float64
    ).to(point.latents)


@pytest.fixture(scope="module")
def editor() -> FluxKontextEditor:
    """The built-in architecture with random weights (its zero-initialised layers too, or it would
    predict nothing)."""
    pipeline = new_editor(seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in pipeline.transformer.parameters():
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return FluxKontextEditor(
        pipeline,
        FluxKontextConfig(
            path="random",
            resolution=64,
            max_text_tokens=32,
            dtype="float32",
            device="cpu",
            micro_batch=4,
            attention_layers=4,
        ),
    )


# --- 1. the law of the noises
# ---------------------------------------------------------------------------------------


def test_every_noise_has_unit_variance_elementwise(noises: Tensor) -> None:
    # The standard error of a variance over 4000 draws is 0.022; 90 elements stay within five of
    # them.
    assert float((noises.var(dim=0) - 1).abs().max()) < 0.112
    assert float(noises.mean(dim=0).abs().max()) < 5 / 4000**0.5


@pytest.mark.parametrize("area", ["inside", "outside"])
def test_perturbed_pair_correlation_is_one_minus_alpha_squared(noises: Tensor, area: str) -> None:
    here = noises[:, :, MASK if area == "inside" else ~MASK]
    for i in range(1, G):
        for j in range(i + 1, G):
            assert float((here[:, i] * here[:, j]).mean()) == pytest.approx(
                1 - SPREADS[area] ** 2, abs=0.05
            )


@pytest.mark.parametrize("area", ["inside", "outside"])
def test_correlation_with_the_reference_is_the_root_of_one_minus_alpha_squared(
    noises: Tensor, area: str
) -> None:
    here = noises[:, :, MASK if area == "inside" else ~MASK]
    for i in range(1, G):
        assert float((here[:, i] * here[:, 0]).mean()) == pytest.approx(
            (1 - SPREADS[area] ** 2) ** 0.5, abs=0.05
        )


def test_the_reference_sits_at_about_half_the_squared_distance_of_two_perturbed_candidates() -> (
    None
):
    noises = draws(Perturbation(inside=0.3, outside=0.3), 500)
    pair, reference = (
        ((noises[:, 1] - noises[:, 2]) ** 2).mean(),
        ((noises[:, 1] - noises[:, 0]) ** 2).mean(),
    )
    assert float(pair) == pytest.approx(2 * 0.3**2, rel=0.06)
    assert float(reference) == pytest.approx(2 - 2 * (1 - 0.3**2) ** 0.5, rel=0.06)


def test_reference_is_the_shared_noise_bitwise() -> None:
    source = NoiseSource(3, "task", 2)
    for inside, outside in [(0.6, 0.2), (1.0, 1.0), (0.3, 0.0)]:
        assert torch.equal(
            Perturbation(inside=inside, outside=outside)(G, (L, C), MASK, source)[0],
            source.normal("shared", -1, (L, C)),
        )


# --- 2. its limits
# --------------------------------------------------------------------------------------------------


def test_sigma_out_zero_leaves_background_noise_bitwise_shared() -> None:
    group = Perturbation(inside=0.7, outside=0.0)(G, (L, C), MASK, NoiseSource(0, "task", 0))
    assert all(torch.equal(candidate[~MASK], group[0][~MASK]) for candidate in group)
    assert not any(torch.equal(candidate[MASK], group[0][MASK]) for candidate in group[1:])


@pytest.mark.parametrize("keep_reference", [False, True])
def test_equal_spreads_are_neighbor_grpo_noise_exactly(keep_reference: bool) -> None:
    source, sigma = NoiseSource(0, "task", 0), torch.tensor(0.3)
    group = Perturbation(inside=0.3, outside=0.3, keep_reference=keep_reference)(
        G, (L, C), MASK, source
    )
    shared = source.normal("shared", -1, (L, C))
    for i in range(int(keep_reference), G):
        assert torch.equal(
            group[i], (1 - sigma**2).sqrt() * shared + sigma * source.normal("candidate", i, (L, C))
        )


def test_spread_one_is_independent_inside() -> None:
    source = NoiseSource(0, "task", 0)
    group = Perturbation(inside=1.0, outside=0.1)(G, (L, C), MASK, source)
    for i in range(1, G):
        assert torch.equal(group[i][MASK], source.normal("candidate", i, (L, C))[MASK])


def test_candidates_of_spread_one_are_uncorrelated() -> None:
    inside = draws(Perturbation(inside=1.0, outside=0.1), 2000)[:, :, MASK]
    assert all(
        abs(float((inside[:, i] * inside[:, j]).mean())) < 0.05 for i in range(G) for j in range(i)
    )


# --- 3. at the old weights
# --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.01, 0.5, 1.0]),
    masked=st.booleans(),
    num_anchors=st.integers(1, 4),
)
def test_on_policy_every_ratio_is_one_bitwise(
    seed: int, temperature: float, masked: bool, num_anchors: int
) -> None:
    group = group_of(seed=seed)
    objective = NeighborSurrogate(num_anchors=num_anchors, temperature=temperature)
    point = point_of(
        objective,
        group,
        credit(group, MaskedRows(inside=0.5) if masked else UniformRows()),
        seed=seed,
    )
    metrics = objective.loss(point, Velocities(policy=stored_velocity(group, point))).metrics
    assert (
        float(metrics["ratio/min"]),
        float(metrics["ratio/max"]),
        float(metrics["ratio/max_deviation"]),
    ) == (1.0, 1.0, 0.0)


def test_surrogate_policy_sums_to_one() -> None:
    group = group_of()
    policy = point_of(
        NeighborSurrogate(), group, credit(group, MaskedRows())
    ).context.old_log_policy.exp()
    assert policy.shape == (4, G, 1)
    assert torch.allclose(policy.sum(dim=1), torch.ones(4, 1), atol=1e-6)


def test_surrogate_policy_is_the_softmax_of_masked_distances_over_the_whole_group() -> None:
    group = group_of()
    point = point_of(
        NeighborSurrogate(num_anchors=2, temperature=0.5),
        group,
        credit(group, MaskedRows(inside=1.0, outside=1.0)),
    )
    candidates = group.next_latents[:, 0].double().numpy()
    inside = MASK.numpy()
    for row, anchor in enumerate(anchors_of(group, point)):
        error = ((candidates[anchor] - candidates) ** 2).mean(axis=-1)
        d = error[:, inside].mean(axis=1) + error[:, ~inside].mean(
            axis=1
        )  # both bandwidths 1, temperature 1
        expected = np.exp(-d) / np.exp(-d).sum()
        assert np.allclose(
            point.context.old_log_policy[row, :, 0].exp().numpy(), expected, atol=1e-6
        )


def test_objective_at_old_weights_is_mean_advantage_zero() -> None:
    group = group_of()
    objective = NeighborSurrogate()
    point = point_of(objective, group, credit(group, MaskedRows()))
    assert (
        abs(float(objective.loss(point, Velocities(policy=stored_velocity(group, point))).loss))
        < 1e-7
    )


# --- 4. the gradient
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_gradient_at_old_weights_is_the_closed_form(
    dtype: torch.dtype, tolerance: float, temperature: float
) -> None:
    """d loss / d anchor = -2 / (B G temperature C) * row * sum_i A_i x_i, and the velocity's is
    that times the step."""
    group = group_of(dtype=dtype)
    advantages = credit(group, MaskedRows(inside=0.5, outside=2.0))
    objective = NeighborSurrogate(num_anchors=3, temperature=temperature)
    point = point_of(objective, group, advantages)
    velocity = stored_velocity(group, point).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        objective.loss(point, Velocities(policy=velocity)).loss, velocity
    )

    row = advantages.regions[0].double()
    centroid = torch.einsum(
        "g,glc->lc", advantages.values[:, 0].double(), group.next_latents[:, 0].double()
    )
    step = float(group.sigmas_next[0]) - float(group.sigmas[0])
    expected = -step * 2 / (3 * G * temperature * C) * row[:, None] * centroid
    for (
        anchor
    ) in gradient.double():  # the same for every anchor: position and softmax sharpness drop out
        assert float((anchor - expected).norm() / expected.norm()) < tolerance


def test_descending_the_loss_moves_an_anchor_towards_the_candidates_with_positive_advantage() -> (
    None
):
    group = group_of(dtype=torch.float64)
    values = torch.tensor([-0.5, 2.0, -0.5, -0.5, -0.5], dtype=torch.float64)
    advantages = Advantages(
        values=values[:, None],
        regions=UniformRows()(MASK).double(),
        weights=torch.ones(1, dtype=torch.float64),
    )
    objective = NeighborSurrogate(num_anchors=4)
    point = point_of(objective, group, advantages)
    velocity = stored_velocity(group, point).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        objective.loss(point, Velocities(policy=velocity)).loss, velocity
    )
    winner, others = group.next_latents[1, 0], group.next_latents[[0, 2, 3, 4], 0].mean(dim=0)
    change = (group.sigmas_next[0] - group.sigmas[0]) * -gradient
    assert all(float((part * (winner - others)).sum()) > 0 for part in change)


@pytest.mark.parametrize("clip", [0.01, 0.2, 10.0])
def test_off_policy_loss_is_the_clipped_objective_of_the_paper(clip: float) -> None:
    group = group_of()
    advantages = credit(group, MaskedRows(inside=0.5, outside=2.0))
    objective = NeighborSurrogate(num_anchors=3, temperature=0.7, clip=clip)
    point = point_of(objective, group, advantages)
    new = moved_velocity(group, point, 0.8)
    expected = plain_loss(
        group,
        advantages,
        anchors_of(group, point),
        new,
        weights=advantages.regions[0].double().numpy(),
        temperature=0.7,
        clip=clip,
    )
    output = objective.loss(point, Velocities(policy=new))
    assert abs(expected) > 1e-3
    assert float(output.loss) == pytest.approx(expected, rel=1e-4)
    assert (float(output.metrics["clip/share"]) > 0) == (clip < 10)


# --- 5, 6. the metric
# --------------------------------------------------------------------------------------------------


def test_full_mask_loss_is_mean_reduced_neighbor_grpo() -> None:
    """Without a reference and with inside bandwidth 1, whatever the outside bandwidth: nothing is
    outside."""
    group = group_of(mask=torch.ones(L, dtype=torch.bool))
    objective = NeighborSurrogate(num_anchors=3, temperature=1.0)
    masked, plain = (
        credit(group, MaskedRows(inside=1.0, outside=0.01)),
        credit(group, UniformRows()),
    )
    point, other = (
        point_of(objective, group, advantages, num_references=0) for advantages in (masked, plain)
    )
    new = moved_velocity(group, point, 0.8)
    loss = float(objective.loss(point, Velocities(policy=new)).loss)
    assert loss == pytest.approx(
        float(objective.loss(other, Velocities(policy=new)).loss), rel=1e-5
    )
    weights = np.full(L, 1 / L)
    expected = plain_loss(
        group,
        plain,
        anchors_of(group, point),
        new,
        weights=weights,
        temperature=1.0,
        clip=objective.clip,
    )
    assert loss == pytest.approx(expected, rel=1e-4)


tensors = st.integers(0, 2**32).map(
    lambda seed: torch.randn(7, L, C, generator=torch.Generator().manual_seed(seed))
)
bandwidths = st.floats(0.2, 5)
masks = st.lists(st.booleans(), min_size=L, max_size=L).map(torch.tensor)


@settings(deadline=None, max_examples=40)
@given(states=tensors, mask=masks, inside=bandwidths, outside=bandwidths, copies=st.integers(2, 5))
def test_metric_is_invariant_to_duplicated_background_tokens(
    states: Tensor, mask: Tensor, inside: float, outside: float, copies: int
) -> None:
    rows = MaskedRows(inside=inside, outside=outside)
    wider, wider_mask = (
        torch.cat([states, *[states[:, ~mask]] * copies], dim=1),
        torch.cat([mask, *[mask[~mask]] * copies]),
    )
    before = region_distances(states[:2], states[2:], rows(mask))
    after = region_distances(wider[:2], wider[2:], rows(wider_mask))
    assert torch.allclose(before, after, rtol=1e-4)


@settings(deadline=None, max_examples=40)
@given(states=tensors, mask=masks, inside=bandwidths, outside=bandwidths)
def test_swapping_mask_and_bandwidths_leaves_the_metric(
    states: Tensor, mask: Tensor, inside: float, outside: float
) -> None:
    here = region_distances(
        states[:2], states[2:], MaskedRows(inside=inside, outside=outside)(mask)
    )
    there = region_distances(
        states[:2], states[2:], MaskedRows(inside=outside, outside=inside)(~mask)
    )
    assert torch.allclose(here, there, rtol=1e-5)


def test_a_smaller_bandwidth_weighs_its_area_more() -> None:
    edit, plain, background = (MaskedRows(inside=h, outside=1.0)(MASK)[0] for h in (0.5, 1.0, 2.0))
    assert float(edit[MASK].sum()) == pytest.approx(0.8)
    assert float(plain[MASK].sum()) == pytest.approx(0.5)
    assert float(background[MASK].sum()) == pytest.approx(0.2)


# --- 7. attention concentration density
# ------------------------------------------------------------------------------


def test_uniform_attention_has_density_one() -> None:
    assert concentration_density(torch.full((2, L), 1 / L), MASK).tolist() == pytest.approx(
        [1.0, 1.0]
    )


def test_all_attention_in_the_mask_has_density_tokens_over_inside() -> None:
    mass = (MASK.float() * torch.tensor([0.9, 0, 0, 0.1, 0, 0]))[None]
    assert float(concentration_density(mass, MASK)) == pytest.approx(L / 2)


def test_all_attention_outside_has_density_zero() -> None:
    assert float(concentration_density((~MASK).float()[None] / 4, MASK)) == 0.0


@settings(deadline=None)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
def test_scaling_all_attention_rows_leaves_the_density(scale: float, seed: int) -> None:
    mass = torch.rand(3, L, generator=torch.Generator().manual_seed(seed)) + 0.01
    assert torch.allclose(
        concentration_density(mass * scale, MASK), concentration_density(mass, MASK), rtol=1e-5
    )


def test_excluding_pad_rows_that_are_duplicates_leaves_the_density() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (
        torch.randn(1, 4, 2, 8, generator=generator),
        torch.randn(1, L, 2, 8, generator=generator),
    )
    query[:, 2:] = query[:, :2]
    every, words = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[True, True, False, False]])
    densities = [
        concentration_density(text_to_image_mass(query, key, rows), MASK) for rows in (every, words)
    ]
    assert torch.allclose(*densities, atol=1e-6)
    query[:, 2:] = -3 * query[:, :2]
    assert not torch.allclose(
        densities[0], concentration_density(text_to_image_mass(query, key, every), MASK), atol=1e-3
    )


# --- 8, 9, 10. with an editor
# ----------------------------------------------------------------------------------------


def test_capture_leaves_the_forward_bit_identical(editor: FluxKontextEditor) -> None:
    conditioning = editor.encode(shapes.task("train", 0))
    latents = torch.randn(
        5, *editor.latent_shape(conditioning), generator=torch.Generator().manual_seed(0)
    )
    tally = MassTally()
    watched = editor.velocity(latents, torch.full((5,), 0.7), conditioning, tally)
    assert torch.equal(watched, editor.velocity(latents, torch.full((5,), 0.7), conditioning))
    assert float(watched.std()) > 0.01
    assert tally.mean().shape == latents.shape[:2]


def test_without_perturbation_rollout_is_the_stock_pipeline(editor: FluxKontextEditor) -> None:
    task = shapes.task("train", 0)
    conditioning = editor.encode(task)
    mask = torch.zeros(editor.latent_shape(conditioning)[0], dtype=torch.bool)
    source = NoiseSource(0, task.task_id, 0)
    initial = Perturbation(inside=0.0, outside=0.0)(
        4, editor.latent_shape(conditioning), mask, source
    )
    ours = denoise(
        lambda x, s: editor.velocity(x, s, conditioning), initial, editor.sigmas(3, conditioning)
    ).final
    pipeline: FluxKontextPipeline = editor.pipeline
    stock = pipeline(
        image=Image.fromarray(task.source.numpy()),
        prompt=task.instruction,
        latents=source.normal("shared", -1, editor.latent_shape(conditioning)).expand(4, -1, -1),
        num_images_per_prompt=4,
        num_inference_steps=3,
        guidance_scale=editor.config.guidance,
        height=64,
        width=64,
        max_area=64 * 64,
        _auto_resize=False,
        max_sequence_length=editor.config.max_text_tokens,
        output_type="latent",
    ).images
    assert torch.equal(ours, stock)
    assert all(torch.equal(candidate, ours[0]) for candidate in ours)


def test_gradient_reaches_only_anchor_forwards() -> None:
    """The trained velocity is asked for the anchors alone, at their stored states, and whatever
    else the loss reads is without a graph."""
    group = group_of()
    advantages = credit(group, MaskedRows())
    objective = NeighborSurrogate(num_anchors=2)
    scale, asked = torch.ones(1, requires_grad=True), []

    def velocity(latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        asked.append((latents, torch.is_grad_enabled()))
        return torch.sin(latents) * scale

    generator = torch.Generator().manual_seed(0)
    ((point, output),) = next(
        losses(
            velocity,
            {},
            objective,
            group,
            advantages,
            num_references=1,
            generator=generator,
            states_per_forward=None,
        )
    )
    ((states, with_gradient),) = asked
    assert with_gradient and not states.requires_grad
    assert torch.equal(states, group.latents[anchors_of(group, point), 0]) and len(
        states
    ) == 2 < len(group.latents)
    context = point.context
    assert not any(
        t.requires_grad
        for t in (context.candidates, context.old_log_policy, context.advantages.values)
    )
    (gradient,) = torch.autograd.grad(output.loss, scale)
    assert float(gradient) != 0


# --- anchors
# --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(num=st.integers(2, 10), num_anchors=st.integers(1, 12), seed=st.integers(0, 10_000))
def test_anchors_are_drawn_without_replacement_and_never_the_reference(
    num: int, num_anchors: int, seed: int
) -> None:
    group = group_of(num=num, seed=seed)
    point = point_of(
        NeighborSurrogate(num_anchors=num_anchors), group, credit(group, UniformRows()), seed=seed
    )
    anchors = anchors_of(group, point)
    assert 0 not in anchors
    assert len(set(anchors)) == len(anchors) == min(num_anchors, num - 1)


def test_the_reference_is_compared_with_though_never_an_anchor() -> None:
    group = group_of()
    point = point_of(NeighborSurrogate(), group, credit(group, MaskedRows()))
    assert point.context.candidates.shape[0] == G
    assert torch.equal(point.context.candidates[0], group.next_latents[0, 0])
    assert bool((point.context.old_log_policy[:, 0].exp() > 0).all())


def test_trained_steps_never_hold_the_last_of_several_and_are_a_draw_without_replacement() -> None:
    generator = torch.Generator().manual_seed(0)
    assert NeighborSurrogate().trained_steps(torch.zeros(6), generator) == (0, 1, 2, 3, 4)
    assert NeighborSurrogate().trained_steps(torch.zeros(1), generator) == (0,)
    seen = {
        NeighborSurrogate(num_steps=3).trained_steps(torch.zeros(6), generator) for _ in range(200)
    }
    assert len(seen) == 10  # all subsets of 3 of 5
    assert all(
        len(set(steps)) == 3 and list(steps) == sorted(steps) and max(steps) < 5 for steps in seen
    )
