"""The FLUX.1-Kontext editor of the tests: pipelines, tasks, noises, and the stock result."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers import FluxKontextPipeline
from PIL import Image
from torch import Tensor

from rl_edit.editors import (
    BUILTIN_WEIGHTS,
    editor_config,
    load_editor,
)
from rl_edit.editors.flux_kontext import FluxKontextEditor
from rl_edit.editors.tiny_families.flux_kontext import pipeline
from rl_edit.types import Conditioning, EditTask


def random_pipeline(seed: int = 0) -> FluxKontextPipeline:
    """The built-in architecture with random weights, none of them zero."""
    return pipeline(seed=seed)


@cache
def shipped_editor() -> FluxKontextEditor:
    """The built-in editor from its directory, loaded once. No test changes it."""
    settings = {"path": str(BUILTIN_WEIGHTS), "micro_batch": 4, "attention_layers": 2}
    loaded = load_editor(editor_config({**settings, "device": "cpu"}))
    assert isinstance(loaded, FluxKontextEditor)
    return loaded


def with_settings(editor: FluxKontextEditor, **changes: object) -> FluxKontextEditor:
    """The same weights run another way."""
    return FluxKontextEditor(editor.pipeline, editor.config.model_copy(update=changes))


def task_of(
    height: int = 64, width: int = 64, instruction: str = "remove the red circle", seed: int = 0
) -> EditTask:
    """A task with a smooth random image."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0].permute(
        1, 2, 0
    )
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[:8, :8] = True
    return EditTask(
        task_id=f"t{seed}",
        task_type="edit",
        source=(image * 255).byte(),
        instruction=instruction,
        edit_mask=mask,
    )


def noise_for(
    editor: FluxKontextEditor, conditioning: Conditioning, rows: int, seed: int = 0
) -> Tensor:
    return torch.randn(
        rows, *editor.latent_shape(conditioning), generator=torch.Generator().manual_seed(seed)
    )


def stock(
    editor: FluxKontextEditor, task: EditTask, latents: Tensor, steps: int, output_type: str
) -> Any:
    """The stock pipeline's result from the same latents."""
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
