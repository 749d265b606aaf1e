"""Qwen-Image-Edit and its successors in the conformance suite."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import numpy as np
from conformance import Family, Published, StockResult, image_of
from torch import Tensor

from rl_edit.types import EditTask

STOCK_AREA = 1024 * 1024
"""The area to which the stock pipelines fit a source, whatever its size."""


def stock(editor: Any, task: EditTask, latents: Tensor, num_steps: int) -> StockResult:
    """The stock pipeline, its area set to that of the canvas."""
    height, width = task.edit_mask.shape
    config, last = editor.config, []
    module = sys.modules[type(editor.pipeline).__module__]
    dimensions = module.calculate_dimensions

    def fitted(area: int, ratio: float) -> tuple[Any, ...]:
        usual: tuple[Any, ...] = dimensions(area, ratio)
        # The small image for the text encoder, which the later pipeline makes, keeps its area.
        return (width, height, *usual[2:]) if area == STOCK_AREA else usual

    with mock.patch.object(module, "calculate_dimensions", fitted):
        images = editor.pipeline(
            image=image_of(task),
            prompt=task.instruction,
            latents=latents,
            num_images_per_prompt=len(latents),
            num_inference_steps=num_steps,
            true_cfg_scale=config.true_cfg,
            negative_prompt=config.negative_prompt if config.true_cfg > 1 else None,
            height=height,
            width=width,
            output_type="np",
            callback_on_step_end=lambda pipeline, step, time, kwargs: last.append(kwargs) or {},
        ).images
    return StockResult(latents=last[-1]["latents"], images=(images * 255).round().astype(np.uint8))


def read_words(editor: Any, instruction: str, rows: Tensor) -> str:
    tokenizer = editor.pipeline.tokenizer
    _, after = editor.pipeline.prompt_template_encode.split("{}")
    ids = tokenizer(instruction + after).input_ids
    # Both end with the end of the template.
    marked = [bool(row) for row in rows][len(rows) - len(ids) :]
    assert sum(marked) == int(rows.sum())
    return str(tokenizer.decode([i for i, one in zip(ids, marked, strict=True) if one]))


def transformer_config(**more: Any) -> dict[str, Any]:
    return {
        "_class_name": "QwenImageTransformer2DModel",
        "attention_head_dim": 128,
        "axes_dims_rope": [16, 56, 56],
        "guidance_embeds": False,
        "in_channels": 64,
        "joint_attention_dim": 3584,
        "num_attention_heads": 24,
        "num_layers": 60,
        "out_channels": 16,
        "patch_size": 2,
        **more,
    }


def family(kind: str, pipeline: str, *published: Published) -> Family:
    last = "transformer_blocks.2.attn"
    return Family(
        kind=kind,
        pipeline=pipeline,
        stock=stock,
        read_words=read_words,
        settings={"resolution": 64, "max_text_tokens": 48, "true_cfg": 1.0},
        guided=({"true_cfg": 4.0}, {"true_cfg": 2.5, "negative_prompt": "add a blue square"}),
        attention="diffusers.models.transformers.transformer_qwenimage",
        # Nothing reads the text that leaves the last block.
        without_gradient=(f"{last}.add_q_proj", f"{last}.to_add_out"),
        published=published,
    )


# Published as "20B".
PARAMETERS = 20_430_401_088

EDIT = family(
    "qwen_image_edit",
    "QwenImageEditPipeline",
    Published(name="Qwen/Qwen-Image-Edit", config=transformer_config(), parameters=PARAMETERS),
)
PLUS = family(
    "qwen_image_edit_plus",
    "QwenImageEditPlusPipeline",
    Published(name="Qwen/Qwen-Image-Edit-2509", config=transformer_config(), parameters=PARAMETERS),
    Published(
        name="Qwen/Qwen-Image-Edit-2511",
        config=transformer_config(zero_cond_t=True),
        parameters=PARAMETERS,
    ),
)
