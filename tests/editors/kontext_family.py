"""FLUX.1-Kontext in the conformance suite."""

from __future__ import annotations

from typing import Any

import numpy as np
from conformance import Family, Published, StockResult, image_of
from torch import Tensor

from rl_edit.types import EditTask


def stock(editor: Any, task: EditTask, latents: Tensor, num_steps: int) -> StockResult:
    """The stock pipeline, which neither resizes nor chooses another area."""
    height, width = task.edit_mask.shape
    config, last = editor.config, []
    images = editor.pipeline(
        image=image_of(task),
        prompt=task.instruction,
        latents=latents,
        num_images_per_prompt=len(latents),
        num_inference_steps=num_steps,
        guidance_scale=config.guidance,
        true_cfg_scale=config.true_cfg,
        negative_prompt=config.negative_prompt if config.true_cfg > 1 else None,
        height=height,
        width=width,
        max_area=height * width,
        _auto_resize=False,
        max_sequence_length=config.max_text_tokens,
        output_type="np",
        callback_on_step_end=lambda pipeline, step, time, kwargs: last.append(kwargs) or {},
    ).images
    return StockResult(latents=last[-1]["latents"], images=(images * 255).round().astype(np.uint8))


def read_words(editor: Any, instruction: str, rows: Tensor) -> str:
    tokenizer = editor.pipeline.tokenizer_2
    ids = tokenizer(instruction, padding="max_length", max_length=len(rows)).input_ids
    return str(tokenizer.decode([i for i, marked in zip(ids, rows, strict=True) if marked]))


FAMILY = Family(
    kind="flux_kontext",
    pipeline="FluxKontextPipeline",
    stock=stock,
    read_words=read_words,
    settings={"resolution": 64, "max_text_tokens": 32},
    guided=({"true_cfg": 2.5}, {"true_cfg": 2.5, "negative_prompt": "add a blue square"}),
    embedded={"guidance": 7.0},
    attention="diffusers.models.transformers.transformer_flux",
    published=(
        Published(
            name="black-forest-labs/FLUX.1-Kontext-dev",
            config={
                "_class_name": "FluxTransformer2DModel",
                "attention_head_dim": 128,
                "axes_dims_rope": [16, 56, 56],
                "guidance_embeds": True,
                "in_channels": 64,
                "joint_attention_dim": 4096,
                "num_attention_heads": 24,
                "num_layers": 19,
                "num_single_layers": 38,
                "out_channels": None,
                "patch_size": 1,
                "pooled_projection_dim": 768,
            },
            # Published as "12B".
            parameters=11_901_408_320,
        ),
    ),
)
