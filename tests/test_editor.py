"""The FLUX.1-Kontext editor: the stock pipeline's bits, rows independent of their batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kontext import noise_for, random_pipeline, shipped_editor, stock, task_of, with_settings
from rl_edit.editors import (
    FluxKontextConfig,
    lora,
)
from rl_edit.editors.flux_kontext import FluxKontextEditor
from rl_edit.method.attention import MassTally
from rl_edit.method.rollout import denoise


@pytest.fixture
def editor() -> FluxKontextEditor:
    return shipped_editor()


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


def test_the_velocity_of_a_row_does_not_depend_on_the_batch_it_is_in(
    editor: FluxKontextEditor,
) -> None:
    conditioning = editor.encode(task_of())
    latents, sigma = noise_for(editor, conditioning, 9), torch.linspace(1, 0.2, 9)
    rows = [editor.velocity(latents[[i]], sigma[[i]], conditioning) for i in range(9)]
    single_rows = torch.cat(rows)
    for count in range(2, 10):
        together = editor.velocity(latents[:count], sigma[:count], conditioning)
        assert torch.equal(together, single_rows[:count]), count
    order = [7, 2, 5, 0, 8, 1]
    shuffled = editor.velocity(latents[order], sigma[order], conditioning)
    assert torch.equal(shuffled, single_rows[order])


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
