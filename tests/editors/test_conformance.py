"""Conformance: what every family of editors promises, each check run over every family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance import (
    INSTRUCTION,
    Family,
    attention_calls,
    loaded,
    noise_for,
    task_of,
    vae_inputs,
    with_settings,
)
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor, nn

from rl_edit.config import RunConfig
from rl_edit.editors import (
    FAMILIES as PRODUCT_FAMILIES,
)
from rl_edit.editors import (
    editor_config,
    inspect_editor,
    lora,
    read_adapter,
    require_adapter,
    require_targets,
)
from rl_edit.editors.tiny_families import KINDS
from rl_edit.errors import InputError
from rl_edit.method.attention import MassTally
from rl_edit.method.rollout import denoise
from rl_edit.types import Conditioning

NUM_STEPS = 3


def edited(
    editor: Any, conditioning: Conditioning, noise: Tensor, num_steps: int = NUM_STEPS
) -> Tensor:
    """Our loop's latents."""
    with torch.no_grad():
        return denoise(
            lambda x, s: editor.velocity(x, s, conditioning),
            noise,
            editor.sigmas(num_steps, conditioning),
        ).final


def require_stock(family: Family, editor: Any, size: tuple[int, int], rows: int) -> None:
    same = with_settings(editor, micro_batch=rows)
    task = task_of(*size)
    conditioning = same.encode(task)
    noise = noise_for(same, conditioning, rows)
    ours, theirs = edited(same, conditioning, noise), family.stock(same, task, noise, NUM_STEPS)
    assert not torch.equal(ours, noise)
    assert torch.equal(ours, theirs.latents)
    images = same.decode(ours, conditioning)
    assert images.shape == (rows, *size, 3)
    assert np.array_equal(images.numpy(), theirs.images)


def attached(editor: Any, config: Any, seed: int = 0) -> list[nn.Parameter]:
    """Attaches an adapter that changes the function, as after training."""
    lora.attach(editor.transformer, config, seed=seed)
    parameters = lora.parameters(editor.transformer)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return parameters


def run_of(editor: Any, **lora_settings: Any) -> RunConfig:
    """A run of the editor's settings, which names the LoRA targets of its family."""
    return RunConfig.model_validate(
        {
            "editor": editor.config.model_dump(),
            "lora": lora_settings,
            "algorithm": {"name": "flow-grpo"},
            "rewards": {"judge": {"kind": "shapes_judge"}},
        }
    )


# --- the seam ------------------------------------------------------------------------------------


def test_every_family_of_the_union_is_checked_and_has_a_tiny_editor() -> None:
    from families import FAMILIES

    kinds = [family.model_fields["kind"].default for family in PRODUCT_FAMILIES]
    assert [family.kind for family in FAMILIES] == kinds
    assert sorted(KINDS) == sorted(kinds)


def test_the_kind_is_found_from_the_directory(family: Family, directory: Path) -> None:
    config = editor_config({"path": str(directory)})
    assert config.kind == family.kind and config.pipeline == family.pipeline
    index = json.loads((directory / "model_index.json").read_text())
    assert index["_class_name"] == family.pipeline


def test_facts_without_weights_are_those_of_the_editor(editor: Any) -> None:
    assert inspect_editor(editor.config).pixels_per_token == editor.pixels_per_token


def test_a_missing_shard_is_named_before_any_weight_is_read(
    family: Family, directory: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(directory, broken)
    (broken / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"cannot be loaded: transformer/ has no weights"):
        inspect_editor(editor_config({"path": str(broken), **family.settings}))


# --- the stock pipeline's bits -------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1, 2])
def test_latents_and_images_are_the_stock_pipelines_bitwise(
    family: Family, editor: Any, place: int
) -> None:
    require_stock(family, editor, family.sizes[place], rows=(1, 4, 2)[place])


def test_guided_latents_and_images_are_the_stock_pipelines_bitwise(
    family: Family, editor: Any
) -> None:
    if not family.guided:
        pytest.skip("the family has no guidance that takes further forwards")
    for settings in family.guided:
        guided = with_settings(editor, **settings)
        assert guided.config.guided
        require_stock(family, guided, family.sizes[1], rows=2)
        conditioning = guided.encode(task_of())
        noise, sigma = noise_for(guided, conditioning, 2), torch.full((2,), 0.6)
        unguided = editor.velocity(noise, sigma, editor.encode(task_of()))
        assert not torch.allclose(guided.velocity(noise, sigma, conditioning), unguided)
        with pytest.raises(ValueError, match="encoded for other guidance"):
            editor.velocity(noise, sigma, conditioning)


def test_an_embedded_scale_reaches_the_transformer_as_in_the_stock_pipeline(
    family: Family, editor: Any
) -> None:
    if not family.embedded:
        pytest.skip("the family's transformer takes no scale")
    other = with_settings(editor, **family.embedded)
    require_stock(family, other, family.sizes[0], rows=1)
    conditioning = editor.encode(task_of())
    noise, sigma = noise_for(editor, conditioning, 1), torch.full((1,), 0.6)
    usual = editor.velocity(noise, sigma, conditioning)
    assert not torch.equal(other.velocity(noise, sigma, conditioning), usual)


def test_the_grid_runs_from_one_to_zero(family: Family, editor: Any) -> None:
    grid = editor.sigmas(6, editor.encode(task_of(*family.sizes[0])))
    assert len(grid) == 7 and float(grid[0]) == 1.0 and float(grid[-1]) == 0.0
    assert bool((grid.diff() < 0).all())


# --- batches -------------------------------------------------------------------------------------


def test_a_row_does_not_depend_on_its_batch(editor: Any) -> None:
    words = (INSTRUCTION, "add a blue square on the left", "recolour it")
    conditionings = [
        editor.encode(task_of(instruction=text, seed=i)) for i, text in enumerate(words)
    ] * 2
    latents, sigma = noise_for(editor, conditionings[0], 6), torch.linspace(1, 0.2, 6)
    together_tally = MassTally()
    together = editor.velocity(latents, sigma, conditionings, together_tally)
    for row, conditioning in enumerate(conditionings):
        tally = MassTally()
        isolated = editor.velocity(latents[[row]], sigma[[row]], conditioning, tally)
        assert torch.equal(isolated[0], together[row])
        assert torch.equal(tally.mean()[0], together_tally.mean()[row])


def test_one_batch_of_two_canvases_is_refused(family: Family, editor: Any) -> None:
    conditionings = [editor.encode(task_of(*size)) for size in family.sizes[:2]]
    with pytest.raises(ValueError, match="must share one canvas"):
        editor.velocity(noise_for(editor, conditionings[0], 2), torch.ones(2), conditionings)


def test_a_source_beside_the_canvas_is_refused(editor: Any) -> None:
    with pytest.raises(ValueError, match=r"is 63x64 px, not a multiple of \d+"):
        editor.encode(task_of(63, 64))


def test_tokens_are_row_major_squares_of_the_image(family: Family, editor: Any) -> None:
    """A token of the packed latents lies where its square of the image lies, and nowhere else."""
    for size in family.sizes:
        conditioning = editor.encode(task_of(*size))
        rows, columns = conditioning.grid
        assert (rows, columns) == tuple(side // editor.pixels_per_token for side in size)
        base = conditioning.source_latents
        for token in (0, columns - 1, columns, rows * columns - 1):
            changed = base.clone()
            changed[token] += 1
            with vae_inputs(family.vae(editor)) as inputs:
                for latents in (base, changed):
                    editor.decode(latents[None], conditioning)
            # Of any number of dimensions: the last two are rows and columns.
            places = (inputs[0] != inputs[1]).flatten(end_dim=-3).any(dim=0)
            edge = places.shape[0] // rows
            expected = torch.zeros(rows, columns, dtype=torch.bool)
            expected.view(-1)[token] = True
            expected = expected.repeat_interleave(edge, 0).repeat_interleave(edge, 1)
            assert torch.equal(places, expected)


# --- attention -----------------------------------------------------------------------------------


def test_attention_is_the_joint_softmax_renormalised_over_target_tokens(
    family: Family, editor: Any
) -> None:
    conditioning = editor.encode(task_of(*family.sizes[1]))
    latents, sigma = noise_for(editor, conditioning, 4), torch.tensor([1.0, 0.8, 0.5, 0.2])
    with attention_calls(family) as calls, torch.no_grad():
        editor.velocity(latents, sigma, conditioning)
    rows = conditioning.tensors["text_rows"]
    num_text, tokens = len(rows), latents.shape[1]
    masses: dict[str, list[Tensor]] = {"renormalised": [], "joint": []}
    # Refiners attend within the text or an image.
    longest = max(query.shape[1] for query, _ in calls)
    calls = [call for call in calls if call[0].shape[1] == longest]
    first_target = longest - tokens if family.target_last else num_text
    for query, key in calls:
        scores = torch.einsum("bshd,blhd->bhsl", query.double(), key.double())
        joint = scores.div(query.shape[-1] ** 0.5).softmax(dim=-1)
        target = joint[:, :, :num_text, first_target : first_target + tokens]
        first = (target / target.sum(dim=-1, keepdim=True)).mean(dim=1)
        average = target.mean(dim=1)
        afterwards = average / average.sum(dim=-1, keepdim=True)
        masses["renormalised"].append(first[:, rows].mean(dim=1))
        masses["joint"].append(afterwards[:, rows].mean(dim=1))
    num_layers = len(calls)
    assert num_layers > 2
    for order in editor.config.head_averages:
        for last in (1, 2, num_layers):
            tally = MassTally()
            watching = with_settings(editor, attention_layers=last, attention_average=order)
            watching.velocity(latents, sigma, conditioning, tally)
            expected = torch.stack(masses[order][-last:]).mean(dim=0)
            assert float((tally.mean().double() - expected).abs().max()) < 1e-6
            assert float((expected - 1 / tokens).abs().max()) > 1e-6
    with pytest.raises(InputError, match=f"has {num_layers} joint layers"):
        with_settings(editor, attention_layers=num_layers + 1)


def test_capture_changes_no_bit_and_leaves_no_hook(editor: Any) -> None:
    conditioning = editor.encode(task_of())
    latents, sigma = noise_for(editor, conditioning, 3), torch.full((3,), 0.5)
    before = editor.velocity(latents, sigma, conditioning)
    tally = MassTally()
    assert torch.equal(editor.velocity(latents, sigma, conditioning, tally), before)
    assert torch.allclose(tally.mean().sum(dim=1), torch.ones(3), atol=1e-5)
    # Attention kernels of PyTorch: queries and keys are read before any of them runs.
    for backend in ("native", "_native_math", "_native_flash"):
        with attention_backend(backend):
            plain = editor.velocity(latents, sigma, conditioning)
            again = MassTally()
            assert torch.equal(editor.velocity(latents, sigma, conditioning, again), plain)
        assert torch.allclose(again.mean(), tally.mean(), atol=1e-5)
    with pytest.raises(RuntimeError):
        editor.velocity(latents[..., :-1], sigma, conditioning, MassTally())
    assert not any(module._forward_hooks for module in editor.transformer.modules())


# --- text ----------------------------------------------------------------------------------------


def test_text_rows_are_the_words_of_the_instruction_alone(family: Family, editor: Any) -> None:
    for text in (INSTRUCTION, "Add a blue square, please!", "user"):
        rows = editor.encode(task_of(instruction=text)).tensors["text_rows"]
        words = family.read_words(editor, text, rows)
        assert "".join(words.split()) == "".join(text.split())
    assert bool(editor.encode(task_of(instruction="")).tensors["text_rows"].any())


def test_a_long_instruction_is_said_never_cut_silently(family: Family, editor: Any) -> None:
    short, long = editor.config.read_text([INSTRUCTION, family.long_instruction])
    assert not short.lost and short.num_tokens <= short.max_tokens
    assert long.lost and long.num_tokens > long.max_tokens
    assert family.long_instruction.endswith(long.lost)


# --- training ------------------------------------------------------------------------------------


def test_default_targets_reach_every_attention_projection(editor: Any) -> None:
    run = run_of(editor)
    require_targets(run.editor, run.lora)
    skeleton = run.editor.skeleton()
    projections = {
        name
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear) and ".attn" in name and "norm" not in name
    }
    lora.attach(skeleton, run.lora, seed=0)
    reached = {name.split(".lora_")[0] for name in lora.named_parameters(skeleton)}
    assert projections and reached >= projections


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_adapter_tensor_and_change_no_bit(
    family: Family, directory: Path, checkpointing: bool
) -> None:
    editor = loaded(family, directory, gradient_checkpointing=checkpointing)
    parameters = attached(editor, run_of(editor, rank=4, alpha=8).lora)
    conditioning = editor.encode(task_of())
    latents, sigma = noise_for(editor, conditioning, 3), torch.tensor([1.0, 0.6, 0.3])
    with torch.no_grad():
        acting = editor.velocity(latents, sigma, conditioning)
    training = editor.velocity(latents, sigma, conditioning)
    assert training.requires_grad and not acting.requires_grad
    assert torch.equal(training, acting)
    gradients = torch.autograd.grad(training.square().sum(), parameters, allow_unused=True)
    names = lora.named_parameters(editor.transformer)
    missing = [
        name
        for name, gradient in zip(names, gradients, strict=True)
        if gradient is None or not bool(gradient.any())
    ]
    # Exactly those: an exception that is no longer one is an error too.
    assert missing == [name for name in names if name.startswith(family.without_gradient)]


def test_an_adapter_makes_the_same_image_in_the_stock_pipeline_with_its_alpha(
    family: Family, directory: Path, tmp_path: Path
) -> None:
    ours, theirs = loaded(family, directory), loaded(family, directory)
    # A rank that is not alpha: an alpha that was lost would act at another strength.
    config = run_of(ours, rank=4, alpha=10).lora
    task = task_of()
    base = ours.encode(task)
    noise = noise_for(ours, base, 4)
    untrained = edited(ours, base, noise)
    attached(ours, config)
    lora.save(tmp_path, lora.export(ours.transformer, step=1), config)
    family.load_adapter(theirs, tmp_path, lora.WEIGHTS_FILE)
    latents = edited(ours, base, noise)
    assert not torch.allclose(latents, untrained, atol=1e-3)
    stock = family.stock(theirs, task, noise, NUM_STEPS)
    assert torch.equal(latents, stock.latents)
    assert np.array_equal(ours.decode(latents, base).numpy(), stock.images)


def test_a_saved_adapter_is_read_again_with_its_settings(
    family: Family, directory: Path, tmp_path: Path
) -> None:
    editor = loaded(family, directory)
    config = run_of(editor, rank=4, alpha=10).lora
    attached(editor, config)
    weights = lora.export(editor.transformer, step=1)
    lora.save(tmp_path, weights, config)
    again, settings = read_adapter(editor.config, tmp_path)
    assert again.id == weights.id and settings.alpha == 10 and settings.rank == 4
    require_adapter(editor.config, again)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rollout_and_learner_compute_one_function_and_the_ratio_is_exactly_one(
    family: Family, directory: Path, dtype: str
) -> None:
    """Through the real actor and learner, with every forward of the guidance; in bf16 too."""
    from actors.rollout import RolloutActor
    from learner.learner import Learner
    from rl_edit import wire
    from rl_edit.data import open_dataset
    from rl_edit.types import WorkItem
    from runs import small_config

    settings = {"path": str(directory), "device": "cpu", "dtype": dtype, "attention_layers": 1}
    for guided in ({}, *family.guided[:1]):
        config = small_config({**settings, **family.settings, **guided})
        actor, learner = RolloutActor(config, 1), Learner(config, 1)
        report, weights, _, _ = learner.export()
        actor.load(weights)
        item = WorkItem(
            group_id="g0",
            chunk=(0, config.rollout.group_size),
            task=open_dataset(config.data, "train")[0],
            epoch=0,
            update=0,
            num_candidates=config.rollout.group_size,
            run_seed=config.seed,
            adapter=report.adapter,
        )
        _, blob = actor.run(wire.pack(item))
        assert learner.ratio(blob) == 0.0


# --- released checkpoints ------------------------------------------------------------------------


def test_the_published_configuration_has_the_published_number_of_parameters(
    family: Family,
) -> None:
    if not family.published:
        pytest.skip("no published configuration is known here")
    for published in family.published:
        with torch.device("meta"):
            transformer = family.build(published.config)
        count = sum(parameter.numel() for parameter in transformer.parameters())
        assert count == published.parameters, published.name
