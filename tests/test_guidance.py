"""True classifier-free guidance of the FLUX.1-Kontext editor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from actors.reward import RewardActor
from actors.rollout import RolloutActor
from kontext import noise_for, random_pipeline, shipped_editor, stock, task_of, with_settings
from learner.learner import Learner
from rl_edit import wire
from rl_edit.data import open_dataset
from rl_edit.editors import (
    FluxKontextConfig,
    lora,
)
from rl_edit.editors.flux_kontext import FluxKontextEditor
from rl_edit.messages import LearnOrder, LearnSlot
from rl_edit.method.attention import MassTally
from rl_edit.method.rollout import denoise
from rl_edit.types import EditTask, WorkItem
from runs import small_config


@pytest.fixture
def editor() -> FluxKontextEditor:
    return shipped_editor()


@pytest.mark.parametrize("negative", ["", "add a blue square"])
@pytest.mark.parametrize("group", [1, 4])
def test_guided_denoising_is_the_stock_pipelines_true_cfg_bitwise(
    editor: FluxKontextEditor, group: int, negative: str
) -> None:
    guided = with_settings(editor, micro_batch=group, true_cfg=2.5, negative_prompt=negative)
    task = task_of(48, 80)
    conditioning = guided.encode(task)
    noise = noise_for(guided, conditioning, group)
    ours = denoise(
        lambda x, s: guided.velocity(x, s, conditioning), noise, guided.sigmas(3, conditioning)
    ).final
    assert torch.equal(ours, stock(guided, task, noise, 3, "latent"))
    unguided = with_settings(editor, micro_batch=group)
    assert not torch.equal(ours, stock(unguided, task, noise, 3, "latent"))


def test_the_guided_velocity_leads_from_the_negative_through_the_positive(
    editor: FluxKontextEditor,
) -> None:
    guided = with_settings(editor, true_cfg=3.0, negative_prompt="recolour it")
    task = task_of()
    positive, negative = (
        editor.encode(task),
        editor.encode(replace(task, instruction="recolour it")),
    )
    latents, sigma = noise_for(editor, positive, 2), torch.tensor([0.9, 0.4])
    there, away = (
        editor.velocity(latents, sigma, conditioning) for conditioning in (positive, negative)
    )
    assert torch.equal(
        guided.velocity(latents, sigma, guided.encode(task)), away + 3 * (there - away)
    )


def test_without_guidance_there_is_no_negative_branch_and_one_forward(
    editor: FluxKontextEditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    forward = FluxKontextEditor._forward
    monkeypatch.setattr(
        FluxKontextEditor,
        "_forward",
        lambda *arguments, **more: calls.append(1) or forward(*arguments, **more),
    )
    for scale, forwards in ((1.0, 1), (2.0, 2)):
        run = with_settings(editor, true_cfg=scale)
        conditioning = run.encode(task_of())
        assert ("negative_pooled" not in conditioning.tensors) == (forwards == 1)
        calls.clear()
        run.velocity(noise_for(run, conditioning, 4), torch.full((4,), 0.5), conditioning)
        assert len(calls) == forwards


def test_a_conditioning_encoded_for_other_guidance_is_refused(editor: FluxKontextEditor) -> None:
    guided = with_settings(editor, true_cfg=2.0)
    for encoder, user in ((editor, guided), (guided, editor)):
        conditioning = encoder.encode(task_of())
        with pytest.raises(
            ValueError,
            match=f"other guidance than true_cfg {user.config.true_cfg:g}: encode the task anew",
        ):
            user.velocity(noise_for(user, conditioning, 1), torch.ones(1), conditioning)


def test_a_negative_prompt_that_nothing_reads_is_refused() -> None:
    for idle in ({"negative_prompt": "blurry"}, {"detach_negative": True}):
        with pytest.raises(
            ValidationError,
            match="are settings of a negative forward, which true_cfg 1 leaves out: raise true_cfg",
        ):
            FluxKontextConfig.model_validate(idle)


def test_attention_under_guidance_is_that_of_the_forward_that_reads_the_instruction(
    editor: FluxKontextEditor,
) -> None:
    guided = with_settings(editor, true_cfg=2.0, negative_prompt="add a blue square on the left")
    latents, sigma = noise_for(editor, editor.encode(task_of()), 3), torch.full((3,), 0.5)
    masses = []
    for run in (editor, guided):
        tally = MassTally()
        run.velocity(latents, sigma, run.encode(task_of()), tally)
        masses.append(tally.mean())
    assert torch.equal(*masses)


def test_guided_rows_do_not_depend_on_their_batch_or_on_what_else_is_in_it(
    editor: FluxKontextEditor,
) -> None:
    guided = with_settings(editor, true_cfg=2.0, negative_prompt="recolour it")
    conditionings = [
        guided.encode(task_of(instruction=text, seed=i))
        for i, text in enumerate(("remove the red circle", "recolour"))
    ] * 3
    latents, sigma = noise_for(guided, conditionings[0], 6), torch.linspace(1, 0.2, 6)
    together = guided.velocity(latents, sigma, conditionings)
    for row, conditioning in enumerate(conditionings):
        assert torch.equal(
            guided.velocity(latents[[row]], sigma[[row]], conditioning)[0], together[row]
        )


def test_both_branches_have_their_gradient_unless_the_negative_one_is_detached() -> None:
    """Detached, the gradient is the positive branch's times the scale; the velocity's bits stay."""
    pipeline = random_pipeline()
    settings = {"device": "cpu", "true_cfg": 2.0, "negative_prompt": "recolour it"}
    both = FluxKontextEditor(pipeline, FluxKontextConfig.model_validate(settings))
    detached = with_settings(both, detach_negative=True)
    unguided = with_settings(both, true_cfg=1.0, negative_prompt="")
    lora.attach(both.transformer, lora.LoraConfig(rank=4, alpha=8), seed=0)
    parameters = lora.parameters(both.transformer)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            )
    task, negative = task_of(), task_of(instruction="recolour it")
    latents, sigma = noise_for(both, both.encode(task), 2), torch.tensor([0.8, 0.4])
    weights = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))

    def gradient(run: FluxKontextEditor, requested: EditTask) -> tuple[Tensor, Tensor]:
        velocity = run.velocity(latents, sigma, run.encode(requested))
        return velocity.detach(), torch.cat(
            [part.flatten() for part in torch.autograd.grad((velocity * weights).sum(), parameters)]
        )

    of_positive, of_negative = (gradient(unguided, requested)[1] for requested in (task, negative))
    both_parts, half = gradient(both, task), gradient(detached, task)
    assert torch.equal(both_parts[0], half[0])
    assert torch.allclose(
        half[1], 2 * of_positive, rtol=1e-4, atol=1e-5 * float(of_positive.abs().max())
    )
    assert torch.allclose(
        both_parts[1],
        2 * of_positive - of_negative,
        rtol=1e-4,
        atol=1e-4 * float(of_positive.abs().max()),
    )
    assert not torch.allclose(both_parts[1], half[1], rtol=1e-2)


def test_under_guidance_rollout_and_learner_compute_the_same_function_and_the_ratio_is_exactly_one(
    small_editor: str,
) -> None:
    """Through the real actor and learner; the negative branch travels with the group."""
    config = small_config(small_editor, "editor.true_cfg=2", "editor.negative_prompt=recolour it")
    actor, learner = RolloutActor(config, 1), Learner(config, 1)
    report, weights, _, _ = learner.export()
    actor.load(weights)
    reward = RewardActor(config, frozenset({"target", "caption", "regions"}), 1)
    slots, groups = [], []
    for slot in range(config.train.groups_per_update):
        item = WorkItem(
            group_id=f"g{slot}",
            chunk=(0, config.rollout.group_size),
            task=open_dataset(config.data, "train")[slot],
            epoch=0,
            update=0,
            num_candidates=config.rollout.group_size,
            run_seed=config.seed,
            adapter=report.adapter,
        )
        result, blob = actor.run(wire.pack(item))
        assert "negative_pooled" in wire.unpack(blob).conditioning.tensors
        assert learner.ratio(blob) == 0.0
        slots.append(LearnSlot(task_type="edit", areas=result.areas, tables=(reward.score(blob),)))
        groups.append(blob)
    unguided = Learner(small_config(small_editor), 1)
    with pytest.raises(ValueError, match="other guidance"):
        unguided.ratio(groups[0])
    answer = learner.learn(LearnOrder(update=0, plan="plan", slots=tuple(slots)), *groups)[0]
    assert answer.metrics["ratio/max_deviation"] == 0.0 and answer.used == len(groups)
    assert answer.adapter != report.adapter
