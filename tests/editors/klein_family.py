"""FLUX.2-klein in the conformance suite."""

from __future__ import annotations

from typing import Any

import numpy as np
from conformance import Family, Published, StockResult, image_of
from torch import Tensor

from rl_edit.types import EditTask


def stock(editor: Any, task: EditTask, latents: Tensor, num_steps: int) -> StockResult:
    """The stock pipeline, which takes unpacked latents."""
    height, width = task.edit_mask.shape
    rows, columns = (side // editor.pixels_per_token for side in (height, width))
    last: list[dict[str, Any]] = []
    images = editor.pipeline(
        image=image_of(task),
        prompt=task.instruction,
        latents=latents.permute(0, 2, 1).unflatten(-1, (rows, columns)),
        num_images_per_prompt=len(latents),
        num_inference_steps=num_steps,
        guidance_scale=editor.config.true_cfg,
        height=height,
        width=width,
        max_sequence_length=editor.config.max_text_tokens,
        output_type="np",
        callback_on_step_end=lambda pipeline, step, time, kwargs: last.append(kwargs) or {},
    ).images
    return StockResult(latents=last[-1]["latents"], images=(images * 255).round().astype(np.uint8))


def read_words(editor: Any, instruction: str, rows: Tensor) -> str:
    tokenizer = editor.pipeline.tokenizer
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": instruction}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    ids = tokenizer(text, padding="max_length", max_length=len(rows)).input_ids
    return str(tokenizer.decode([i for i, marked in zip(ids, rows, strict=True) if marked]))


def transformer_config(
    layers: int, single: int, heads: int, text: int, **more: Any
) -> dict[str, Any]:
    return {
        "_class_name": "Flux2Transformer2DModel",
        "attention_head_dim": 128,
        "axes_dims_rope": [32, 32, 32, 32],
        "eps": 1e-06,
        "guidance_embeds": False,
        "in_channels": 128,
        "joint_attention_dim": text,
        "mlp_ratio": 3.0,
        "num_attention_heads": heads,
        "num_layers": layers,
        "num_single_layers": single,
        "out_channels": None,
        "patch_size": 1,
        "rope_theta": 2000,
        "timestep_guidance_channels": 256,
        **more,
    }


FAMILY = Family(
    kind="flux2_klein",
    pipeline="Flux2KleinPipeline",
    stock=stock,
    read_words=read_words,
    settings={"resolution": 64, "max_text_tokens": 48, "true_cfg": 1.0},
    guided=({"true_cfg": 4.0},),
    attention="diffusers.models.transformers.transformer_flux2",
    published=(
        Published(
            name="black-forest-labs/FLUX.2-klein-4B",
            config=transformer_config(5, 20, 24, 7680),
            # Its file of 2 bytes a parameter has 7.22 GiB.
            parameters=3_875_544_576,
        ),
        Published(
            name="black-forest-labs/FLUX.2-klein-9B",
            config=transformer_config(8, 24, 32, 12288),
            parameters=9_078_581_248,
        ),
    ),
)
