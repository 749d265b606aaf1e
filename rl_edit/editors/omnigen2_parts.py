"""Parts of an OmniGen2 directory, and the arithmetic of its pipeline, which is not in diffusers.

Its time runs from 0 (noise) to 1 (clean) and its velocity is ``clean - noise``; ours run the other
way. Both are turned at the border: here for the grid, in the editor for the forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from rl_edit.editors.chat_text import ChatText
from rl_edit.editors.family import Dtype
from rl_edit.editors.location import Location
from rl_edit.editors.pixels import source_image
from rl_edit.editors.stock_pipeline import whole_model
from rl_edit.editors.text_reading import tokenizer_of
from rl_edit.errors import InputError
from rl_edit.types import EditTask

PATCH = 2
"""Side of the square of latent pixels that one token covers."""

SYSTEM = (
    "You are a helpful assistant that generates high-quality images based on user instructions."
)
"""System message of the chat around an instruction."""

_SCHEDULER = "scheduler/scheduler_config.json"


@dataclass(frozen=True, kw_only=True)
class OmniGen2Parts:
    """The models of an OmniGen2 directory.

    Attributes:
        shifted: does the grid of noise levels depend on the canvas?
    """

    transformer: Any
    vae: Any
    mllm: Any
    tokenizer: Any
    shifted: bool

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """Lists the parts that have weights."""
        return self.transformer, self.vae, self.mllm

    @property
    def image_processor(self) -> Any:
        """Turns images to numbers of the VAE and back; sizes are the canvas's already."""
        from diffusers.image_processor import VaeImageProcessor

        return VaeImageProcessor(do_resize=False)


def load_parts(place: Location, dtype: Dtype, device: str) -> OmniGen2Parts:
    """Loads all models of a directory or of the hub; code that lies there is never run.

    Raises:
        InputError: one of them cannot be loaded, with what to do.
    """
    import transformers
    from diffusers import AutoencoderKL

    from rl_edit.editors.omnigen2_transformer import OmniGen2Transformer2DModel

    def loaded(kind: Any, part: str) -> Any:
        return whole_model(place, part, kind, dtype).to(device)

    return OmniGen2Parts(
        transformer=loaded(OmniGen2Transformer2DModel, "transformer"),
        vae=loaded(AutoencoderKL, "vae"),
        mllm=loaded(transformers.Qwen2_5_VLForConditionalGeneration, "mllm"),
        tokenizer=text_tokenizer(place),
        shifted=bool(scheduler_settings(place).get("dynamic_time_shift", True)),
    )


def text_tokenizer(place: Location) -> Any:
    """Loads the tokenizer alone: the processor would need torchvision, and for images only."""
    return tokenizer_of(place, "processor", kind="AutoTokenizer")


def scheduler_settings(place: Location) -> Mapping[str, Any]:
    """Reads the settings of the scheduler.

    Raises:
        InputError: they are missing, or are those of another scheduler.
    """
    settings = place.read_json(_SCHEDULER)
    kind = settings.get("_class_name", "") if isinstance(settings, dict) else ""
    if kind != "FlowMatchEulerDiscreteScheduler" or "shift" in settings:
        raise InputError(
            f"{_SCHEDULER} of {place.name} describes {kind or 'no scheduler'}"
            f"{' of diffusers' * ('shift' in settings)}, and OmniGen2 takes the noise levels of "
            "its own FlowMatchEulerDiscreteScheduler: copy the file again"
        )
    return dict(settings)


def chat_text(tokenizer: Any, max_tokens: int) -> ChatText:
    """The chat of the stock pipeline: its system message, then the instruction, no answer."""

    def render(instruction: str) -> str:
        text: str = tokenizer.apply_chat_template(
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": instruction}],
            tokenize=False,
            add_generation_prompt=False,
        )
        return text

    return ChatText(tokenizer=tokenizer, render=render, max_tokens=max_tokens, padded=False)


def text_states(parts: OmniGen2Parts, chat: ChatText, words: str) -> Float[Tensor, "text width"]:
    """Encodes a text without padding: the last states of the language model, after its norm."""
    tokens = parts.tokenizer(
        chat.render(words), max_length=chat.max_tokens, truncation=True, return_tensors="pt"
    ).to(parts.mllm.device)
    # Without the head: no logits are read.
    states = parts.mllm.model(tokens.input_ids, attention_mask=tokens.attention_mask)
    last: Tensor = states.last_hidden_state[0].cpu()
    return last


def packed(latents: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch token _"]:
    """Makes tokens of patches, whose numbers are ordered row, column, channel."""
    rows = latents.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    # [batch, channel, row, column, inner row, inner column]
    return rows.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, grid: tuple[int, int]) -> Float[Tensor, "batch channel height width"]:
    """Inverts :func:`packed`."""
    split = tokens.unflatten(1, grid).unflatten(-1, (PATCH, PATCH, -1))
    # [batch, row, column, inner row, inner column, channel]
    spatial: Tensor = split.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
    return spatial


def encoded_source(parts: OmniGen2Parts, task: EditTask, unit: int) -> tuple[Tensor, Any]:
    """Encodes a task's source: packed latents on the CPU in fp32, and their grid.

    The mean of the VAE's posterior; the stock pipeline draws from it without a seed.
    """
    image, vae = source_image(task, unit=unit), parts.vae
    pixels = parts.image_processor.preprocess(image)
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    # The order of the stock pipeline: shift, then scale.
    latents = (latents - (vae.config.shift_factor or 0.0)) * (vae.config.scaling_factor or 1.0)
    return packed(latents)[0].float().cpu(), (image.height // unit, image.width // unit)


def decoded_pixels(parts: OmniGen2Parts, tokens: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Decodes packed latents to pixels in [0, 1]."""
    vae = parts.vae
    latents = unpacked(tokens.to(vae.device, vae.dtype), grid)
    latents = latents / (vae.config.scaling_factor or 1.0) + (vae.config.shift_factor or 0.0)
    decoded = vae.decode(latents, return_dict=False)[0]
    pixels: np.ndarray = parts.image_processor.postprocess(decoded, output_type="np")
    return pixels


def noise_levels(
    num_steps: int, grid: tuple[int, int], *, shifted: bool
) -> Float[Tensor, " step_plus_1"]:
    """Returns ``1 - t`` for the stock grid of times t; large canvases stay noisy for longer.

    ``t = u / (m - m u + u)`` for uniform u, where m is the root of the number of latent pixels by
    40: 1 for 320 x 320 pixels, 3.2 for 1024 x 1024. In fp32 ``1 - t`` is off by up to 6e-8.
    """
    # fp32 before the shift and float64 in it, as released.
    times = np.linspace(0, 1, num_steps + 1, dtype=np.float32)[:-1]
    if shifted:
        m = np.sqrt(PATCH * PATCH * grid[0] * grid[1]) / 40
        times = times / (m - m * times + times)
    return 1 - torch.from_numpy(np.append(times, 1).astype(np.float32))
