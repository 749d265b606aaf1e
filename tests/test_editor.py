"""The FLUX.1-Kontext editor on small weights: bit for bit the stock pipeline, row by row independent of its batch, and
honest about where it looks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from diffusers.models.embeddings import apply_rotary_emb
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from actors.reward import RewardActor
from actors.rollout import RolloutActor
from learner.learner import Learner
from rl_edit import wire
from rl_edit.data import open_dataset
from rl_edit.editors import (
    BUILTIN,
    BUILTIN_WEIGHTS,
    FluxKontextConfig,
    editor_identity,
    inspect_editor,
    load_editor,
    location,
    lora,
)
from rl_edit.editors.flux_kontext import FluxKontextEditor
from rl_edit.editors.tiny.architecture import new_editor
from rl_edit.errors import InputError
from rl_edit.messages import LearnOrder, LearnSlot
from rl_edit.method.attention import MassTally
from rl_edit.method.rollout import denoise
from rl_edit.types import Conditioning, EditTask, WorkItem
from runs import small_config


def random_pipeline(seed: int = 0) -> FluxKontextPipeline:
    """The built-in architecture with random weights (its zero-initialised layers too, or it would predict nothing)."""
    pipeline = new_editor(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in pipeline.transformer.parameters():
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return pipeline


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An editor on disk: the shipped one where it is built, or its architecture with random weights."""
    if BUILTIN_WEIGHTS.is_dir():
        return BUILTIN_WEIGHTS
    folder = tmp_path_factory.mktemp("editor")
    random_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def editor(home: Path) -> FluxKontextEditor:
    loaded = load_editor(
        FluxKontextConfig(path=str(home), micro_batch=4, attention_layers=2, device="cpu")
    )
    assert isinstance(loaded, FluxKontextEditor)
    return loaded


def with_settings(editor: FluxKontextEditor, **changes: object) -> FluxKontextEditor:
    """The same weights run another way."""
    return FluxKontextEditor(editor.pipeline, editor.config.model_copy(update=changes))


def task_of(
    height: int = 64, width: int = 64, instruction: str = "remove the red circle", seed: int = 0
) -> EditTask:
    """A smooth random picture."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    picture = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0].permute(
        1, 2, 0
    )
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[:8, :8] = True
    return EditTask(
        task_id=f"t{seed}",
        task_type="edit",
        source=(picture * 255).byte(),
        instruction=instruction,
        edit_mask=mask,
    )


def noise_for(
    editor: FluxKontextEditor, conditioning: Conditioning, rows: int, seed: int = 0
) -> Tensor:
    return torch.randn(
        rows, *editor.latent_shape(conditioning), generator=torch.Generator().manual_seed(seed)
    )


def stock(editor: FluxKontextEditor, task: EditTask, latents: Tensor, steps: int, output_type: str):  # type: ignore[no-untyped-def]
    height, width = task.edit_mask.shape
    return editor.pipeline(
        image=Image.fromarray(task.source.numpy()),
        prompt=task.instruction,
        latents=latents,
        num_images_per_prompt=len(latents),
        num_inference_steps=steps,
        guidance_scale=editor.config.guidance,
        true_cfg_scale=editor.config.true_cfg,
        negative_prompt=editor.config.negative_prompt if editor.config.true_cfg > 1 else None,
        height=height,
        width=width,
        max_area=height * width,
        _auto_resize=False,
        max_sequence_length=editor.config.max_text_tokens,
        output_type=output_type,
    ).images


# --- the stock pipeline ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (96, 64)])
def test_our_denoising_loop_is_the_stock_pipeline_bitwise_in_latents_and_images(
    editor: FluxKontextEditor, height: int, width: int, group: int
) -> None:
    same = with_settings(editor, micro_batch=group)
    task = task_of(height, width)
    conditioning = same.encode(task)
    noise = noise_for(same, conditioning, group)
    ours = denoise(
        lambda x, s: same.velocity(x, s, conditioning), noise, same.sigmas(3, conditioning)
    ).final
    assert not torch.equal(ours, noise)
    assert torch.equal(ours, stock(same, task, noise, 3, "latent"))
    images = same.decode(ours, conditioning)
    assert images.shape == (group, height, width, 3)
    assert np.array_equal(
        images.numpy(), (stock(same, task, noise, 3, "np") * 255).round().astype(np.uint8)
    )


def test_the_grid_runs_from_one_to_zero_and_depends_on_the_canvas(
    editor: FluxKontextEditor,
) -> None:
    small, large = (editor.sigmas(6, editor.encode(task_of(side, side))) for side in (32, 96))
    for grid in (small, large):
        assert len(grid) == 7 and float(grid[0]) == 1.0 and float(grid[-1]) == 0.0
        assert bool((grid.diff() < 0).all())
    assert bool((large[1:-1] > small[1:-1]).all())


def test_guidance_reaches_the_transformer(editor: FluxKontextEditor) -> None:
    conditioning = editor.encode(task_of())
    latents, sigma = noise_for(editor, conditioning, 1), torch.tensor([0.7])
    assert not torch.equal(
        with_settings(editor, guidance=7.0).velocity(latents, sigma, conditioning),
        editor.velocity(latents, sigma, conditioning),
    )


# --- true classifier-free guidance -----------------------------------------------------------------------------------


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
    plain = with_settings(editor, micro_batch=group)
    assert not torch.equal(ours, stock(plain, task, noise, 3, "latent"))


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
        lambda *given, **more: calls.append(1) or forward(*given, **more),
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
            match="are settings of a negative forward, which true_cfg 1 leaves out: raise true_cfg above 1",
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
    """Detached, what is left is the positive branch's gradient times the scale; the velocity keeps its bits either way."""
    pipeline = random_pipeline()
    settings = {"device": "cpu", "true_cfg": 2.0, "negative_prompt": "recolour it"}
    both = FluxKontextEditor(pipeline, FluxKontextConfig.model_validate(settings))
    detached = with_settings(both, detach_negative=True)
    plain = with_settings(both, true_cfg=1.0, negative_prompt="")
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

    def gradient(run: FluxKontextEditor, asked: EditTask) -> tuple[Tensor, Tensor]:
        velocity = run.velocity(latents, sigma, run.encode(asked))
        return velocity.detach(), torch.cat(
            [part.flatten() for part in torch.autograd.grad((velocity * weights).sum(), parameters)]
        )

    of_positive, of_negative = (gradient(plain, asked)[1] for asked in (task, negative))
    whole, half = gradient(both, task), gradient(detached, task)
    assert torch.equal(whole[0], half[0])
    assert torch.allclose(
        half[1], 2 * of_positive, rtol=1e-4, atol=1e-5 * float(of_positive.abs().max())
    )
    assert torch.allclose(
        whole[1],
        2 * of_positive - of_negative,
        rtol=1e-4,
        atol=1e-4 * float(of_positive.abs().max()),
    )
    assert not torch.allclose(whole[1], half[1], rtol=1e-2)


def test_under_guidance_rollout_and_learner_compute_the_same_function_and_the_ratio_is_exactly_one(
    small_editor: str,
) -> None:
    """Through the real actor and learner; the negative branch travels with the group, and an update of it changes the weights."""
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
        rolled, blob = actor.run(wire.pack(item))
        assert "negative_pooled" in wire.unpack(blob).conditioning.tensors
        assert learner.ratio(blob) == 0.0
        slots.append(LearnSlot(task_type="edit", areas=rolled.areas, tables=(reward.score(blob),)))
        groups.append(blob)
    unguided = Learner(small_config(small_editor), 1)
    with pytest.raises(ValueError, match="other guidance"):
        unguided.ratio(groups[0])
    answer = learner.learn(LearnOrder(update=0, plan="plan", slots=tuple(slots)), *groups)[0]
    assert answer.metrics["ratio/max_deviation"] == 0.0 and answer.used == len(groups)
    assert answer.adapter != report.adapter


# --- bits of a row ---------------------------------------------------------------------------------------------------


def test_the_velocity_of_a_row_does_not_depend_on_the_batch_it_is_in(
    editor: FluxKontextEditor,
) -> None:
    conditioning = editor.encode(task_of())
    latents, sigma = noise_for(editor, conditioning, 9), torch.linspace(1, 0.2, 9)
    alone = torch.cat([editor.velocity(latents[[i]], sigma[[i]], conditioning) for i in range(9)])
    for rows in range(2, 10):
        assert torch.equal(
            editor.velocity(latents[:rows], sigma[:rows], conditioning), alone[:rows]
        ), rows
    order = [7, 2, 5, 0, 8, 1]
    assert torch.equal(editor.velocity(latents[order], sigma[order], conditioning), alone[order])


def test_mixed_conditionings_in_one_batch_equal_one_by_one(editor: FluxKontextEditor) -> None:
    words = ("remove the red circle", "add a blue square on the left", "recolour it")
    conditionings = [
        editor.encode(task_of(instruction=text, seed=i)) for i, text in enumerate(words)
    ] * 2
    latents, sigma = noise_for(editor, conditionings[0], 6), torch.linspace(1, 0.2, 6)
    together_tally = MassTally()
    together = editor.velocity(latents, sigma, conditionings, together_tally)
    for row, conditioning in enumerate(conditionings):
        tally = MassTally()
        assert torch.equal(
            editor.velocity(latents[[row]], sigma[[row]], conditioning, tally)[0], together[row]
        )
        assert torch.equal(tally.mean()[0], together_tally.mean()[row])


def test_one_batch_of_two_canvases_is_refused(editor: FluxKontextEditor) -> None:
    conditionings = [editor.encode(task_of(64, 64)), editor.encode(task_of(32, 128))]
    with pytest.raises(ValueError, match="must share one canvas"):
        editor.velocity(noise_for(editor, conditionings[0], 2), torch.ones(2), conditionings)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_grad_mode_and_checkpointing_change_no_bit_and_gradients_arrive(
    checkpointing: bool,
) -> None:
    """With an adapter that really changes the function, as in training."""
    pipeline = random_pipeline()
    learner = FluxKontextEditor(
        pipeline, FluxKontextConfig(device="cpu", gradient_checkpointing=checkpointing)
    )
    lora.attach(learner.transformer, lora.LoraConfig(rank=4, alpha=8), seed=0)
    parameters = lora.parameters(learner.transformer)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            )
    conditioning = learner.encode(task_of())
    latents, sigma = noise_for(learner, conditioning, 3), torch.tensor([1.0, 0.6, 0.3])
    with torch.no_grad():
        acting = learner.velocity(latents, sigma, conditioning)
    training = learner.velocity(latents, sigma, conditioning)
    assert training.requires_grad and not acting.requires_grad
    assert torch.equal(training, acting)
    gradients = torch.autograd.grad(training.square().sum(), parameters, allow_unused=True)
    missing = [gradient for gradient in gradients if gradient is None or not bool(gradient.any())]
    assert not missing


# --- attention -------------------------------------------------------------------------------------------------------


def reference_masses(
    editor: FluxKontextEditor, latents: Tensor, sigma: Tensor, conditioning: Conditioning
) -> list[Tensor]:
    """Per joint layer: the full softmax over [text, target, source] in float64, renormalised over target tokens."""
    transformer, inputs = editor.transformer, []
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    handles = [
        b.attn.register_forward_pre_hook(lambda m, a, k: inputs.append((m, a, k)), with_kwargs=True)
        for b in blocks
    ]
    with torch.no_grad():
        editor.velocity(latents, sigma, conditioning)
    for handle in handles:
        handle.remove()
    masses, (num_text, tokens) = [], (len(conditioning.tensors["text_rows"]), latents.shape[1])
    for attn, args, kwargs in inputs:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        text = kwargs.get("encoder_hidden_states")
        heads = lambda x: x.unflatten(-1, (attn.heads, -1))  # noqa: E731, B023
        with torch.no_grad():
            query, key = (
                attn.norm_q(heads(attn.to_q(hidden))),
                attn.norm_k(heads(attn.to_k(hidden))),
            )
            if text is not None:
                query = torch.cat([attn.norm_added_q(heads(attn.add_q_proj(text))), query], dim=1)
                key = torch.cat([attn.norm_added_k(heads(attn.add_k_proj(text))), key], dim=1)
        rotary = kwargs["image_rotary_emb"]
        query, key = (apply_rotary_emb(x, rotary, sequence_dim=1).double() for x in (query, key))
        assert query.shape[1] == num_text + 2 * tokens
        joint = (
            torch.einsum("bshd,blhd->bhsl", query, key).div(query.shape[-1] ** 0.5).softmax(dim=-1)
        )
        target = joint[:, :, :num_text, num_text : num_text + tokens]
        target = (target / target.sum(dim=-1, keepdim=True)).mean(dim=1)
        masses.append(target[:, conditioning.tensors["text_rows"]].mean(dim=1))
    return masses


@pytest.mark.parametrize("last", [1, 2, 3, 4])
def test_captured_mass_is_the_full_joint_softmax_renormalised_over_target_keys_in_double_and_single_blocks(
    editor: FluxKontextEditor, last: int
) -> None:
    watching = with_settings(editor, attention_layers=last)
    conditioning = editor.encode(task_of(48, 80))
    latents, sigma = noise_for(editor, conditioning, 4), torch.tensor([1.0, 0.8, 0.5, 0.2])
    tally = MassTally()
    with torch.no_grad():
        watching.velocity(latents, sigma, conditioning, tally)
    references = reference_masses(editor, latents, sigma, conditioning)
    assert len(references) == 4
    expected = torch.stack(references[-last:]).mean(dim=0)
    assert float((tally.mean().double() - expected).abs().max()) < 1e-6
    assert float((expected - 1 / expected.shape[1]).abs().max()) > 1e-5


def test_rows_of_mass_sum_to_one_for_any_number_of_rows(editor: FluxKontextEditor) -> None:
    conditioning = editor.encode(task_of())
    tally = MassTally()
    for sigma in (1.0, 0.4):
        editor.velocity(
            noise_for(editor, conditioning, 5), torch.full((5,), sigma), conditioning, tally
        )
    assert torch.allclose(tally.mean().sum(dim=1), torch.ones(5), atol=1e-5)


def test_capture_changes_no_bit_and_its_hooks_are_gone_afterwards(
    editor: FluxKontextEditor,
) -> None:
    conditioning = editor.encode(task_of())
    latents, sigma = noise_for(editor, conditioning, 3), torch.full((3,), 0.5)
    before = editor.velocity(latents, sigma, conditioning)
    assert torch.equal(editor.velocity(latents, sigma, conditioning, MassTally()), before)
    assert torch.equal(editor.velocity(latents, sigma, conditioning), before)
    assert not any(module._forward_hooks for module in editor.transformer.modules())


def test_hooks_are_gone_after_a_forward_that_failed(editor: FluxKontextEditor) -> None:
    conditioning = editor.encode(task_of())
    with pytest.raises(RuntimeError):
        editor.velocity(
            noise_for(editor, conditioning, 2)[..., :-1], torch.ones(2), conditioning, MassTally()
        )
    assert not any(module._forward_hooks for module in editor.transformer.modules())


def test_attention_that_was_not_measured_is_no_number(editor: FluxKontextEditor) -> None:
    conditioning = editor.encode(task_of())
    tally = MassTally()
    with_settings(editor, attention_layers=0).velocity(
        noise_for(editor, conditioning, 2), torch.ones(2), conditioning, tally
    )
    assert tally.mean().shape == (2, 64) and bool(tally.mean().isnan().all())


@pytest.mark.parametrize("use", [load_editor, inspect_editor])
def test_more_attention_layers_than_the_editor_has_are_refused(
    editor: FluxKontextEditor, use
) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(
        InputError, match=r"attention_layers is 5, but .* has 4 joint layers: use at most that"
    ):
        use(editor.config.model_copy(update={"attention_layers": 5}))


def test_text_rows_are_the_tokens_of_the_instruction_without_end_and_padding(
    editor: FluxKontextEditor,
) -> None:
    rows = editor.encode(task_of(instruction="remove the red circle")).tensors["text_rows"]
    pieces = editor.pipeline.tokenizer_2(
        "remove the red circle", add_special_tokens=False
    ).input_ids
    assert rows.tolist() == [i < len(pieces) for i in range(editor.config.max_text_tokens)]


def test_an_empty_instruction_reads_every_row_rather_than_none(editor: FluxKontextEditor) -> None:
    assert bool(editor.encode(task_of(instruction="")).tensors["text_rows"].all())


# --- inputs ----------------------------------------------------------------------------------------------------------


def test_encode_refuses_a_picture_that_is_not_on_the_canvas(editor: FluxKontextEditor) -> None:
    with pytest.raises(
        ValueError, match="t0 is 60x64 px, not a multiple of 8: fit it to the canvas first"
    ):
        editor.encode(task_of(60, 64))


def test_encoding_and_loading_are_deterministic(editor: FluxKontextEditor, home: Path) -> None:
    again = load_editor(editor.config)
    first, second = editor.encode(task_of()), again.encode(task_of())
    assert torch.equal(first.source_latents, second.source_latents)
    assert set(first.tensors) == {"prompt_embeds", "pooled", "text_rows"}
    for name, value in first.tensors.items():
        assert torch.equal(value, second.tensors[name]), name
    assert first.grid == (8, 8)


def test_a_loaded_editor_is_frozen(editor: FluxKontextEditor) -> None:
    models = (
        editor.pipeline.transformer,
        editor.pipeline.vae,
        editor.pipeline.text_encoder,
        editor.pipeline.text_encoder_2,
    )
    assert not any(
        parameter.requires_grad or module.training
        for module in models
        for parameter in module.parameters()
    )


def test_inspection_agrees_with_the_loaded_editor(editor: FluxKontextEditor) -> None:
    assert inspect_editor(editor.config).pixels_per_token == editor.pixels_per_token == 8


@pytest.mark.parametrize("find", [load_editor, inspect_editor])
def test_a_missing_built_in_editor_says_how_to_make_it(
    find, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(location, "BUILTIN_WEIGHTS", tmp_path / "gone")
    with pytest.raises(
        InputError, match=r"built-in editor is missing at .*gone: .*rl-edit pretrain"
    ):
        find(FluxKontextConfig(path=BUILTIN))


@pytest.mark.parametrize("find", [load_editor, inspect_editor])
@pytest.mark.parametrize("path", ["/no/such/editor", "./nowhere", "kontext", "a/b/c"])
def test_a_path_that_is_nothing_says_what_an_editor_can_be(find, path: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(
        InputError,
        match=rf"no editor at {path}: give a directory written by save_pretrained, a Hugging Face id",
    ):
        find(FluxKontextConfig(path=path))


@pytest.mark.parametrize("find", [load_editor, inspect_editor])
def test_a_directory_that_is_no_editor_names_the_remedy(find, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(
        InputError,
        match=r"(?s)cannot load the editor .*Is it a directory written by .*save_pretrained\?",
    ):
        find(FluxKontextConfig(path=str(tmp_path)))


@pytest.mark.parametrize("find", [load_editor, inspect_editor])
def test_an_editor_on_the_hub_that_cannot_be_reached_names_the_remedy(find) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(
        InputError,
        match=r"cannot load the editor nobody/no-such-editor from the .*hub: .*Check the id and the network",
    ):
        find(FluxKontextConfig(path="nobody/no-such-editor"))


def test_another_kind_of_pipeline_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    for part in ("vae", "transformer"):
        (tmp_path / part).mkdir()
    (tmp_path / "transformer" / "config.json").write_text(
        json.dumps({"num_layers": 2, "num_single_layers": 2})
    )
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [8, 8]}))
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline"})
    )
    with pytest.raises(
        InputError, match="is a StableDiffusionPipeline, this version trains FluxKontextPipeline"
    ):
        inspect_editor(FluxKontextConfig(path=str(tmp_path)))


def test_an_editor_on_disk_is_what_its_files_hold_wherever_they_lie(
    home: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(home, tmp_path / "copy"))
    same = editor_identity(FluxKontextConfig(path=str(home)))
    assert editor_identity(FluxKontextConfig(path=str(copy))) == same
    (weights,) = (copy / "transformer").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert editor_identity(FluxKontextConfig(path=str(copy))) != same


def test_an_editor_on_the_hub_is_its_repository_and_revision() -> None:
    assert editor_identity(FluxKontextConfig(path="someone/editor")) == "someone/editor@main"
    assert (
        editor_identity(FluxKontextConfig(path="someone/editor", revision="abc"))
        == "someone/editor@abc"
    )
