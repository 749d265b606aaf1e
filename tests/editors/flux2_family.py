"""FLUX.2-dev in the conformance suite."""

from __future__ import annotations

from typing import Any

import numpy as np
from conformance import Family, Published, StockResult, image_of
from diffusers.pipelines.flux2.pipeline_flux2 import SYSTEM_MESSAGE, format_input
from klein_family import transformer_config
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
        guidance_scale=editor.config.guidance,
        height=height,
        width=width,
        max_sequence_length=editor.config.max_text_tokens,
        output_type="np",
        callback_on_step_end=lambda pipeline, step, time, kwargs: last.append(kwargs) or {},
    ).images
    return StockResult(latents=last[-1]["latents"], images=(images * 255).round().astype(np.uint8))


def read_words(editor: Any, instruction: str, rows: Tensor) -> str:
    inputs = editor.pipeline.tokenizer.apply_chat_template(
        format_input(prompts=[instruction], system_message=SYSTEM_MESSAGE),
        tokenize=True,
        return_dict=True,
        padding="max_length",
        truncation=True,
        max_length=len(rows),
    )
    ids = inputs["input_ids"][0]
    marked = [i for i, chosen in zip(ids, rows, strict=True) if chosen]
    return str(editor.pipeline.tokenizer.decode(marked))


FAMILY = Family(
    kind="flux2",
    pipeline="Flux2Pipeline",
    stock=stock,
    read_words=read_words,
    settings={"resolution": 64, "max_text_tokens": 96},
    embedded={"guidance": 7.0},
    attention="diffusers.models.transformers.transformer_flux2",
    published=(
        Published(
            name="black-forest-labs/FLUX.2-dev",
            config=transformer_config(8, 48, 48, 15360, guidance_embeds=True),
            # Published as "32B".
            parameters=32_223_281_152,
        ),
    ),
)
