"""Latents, positions and noise levels that the Qwen-Image-Edit pipelines share.

A token is 2 x 2 latent pixels, normalised by the VAE's means and deviations. The VAE is one of
videos: an image is a film of one frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from rl_edit.editors.attention_capture import captured
from rl_edit.editors.chunks import Prediction, shared_grid, stacked
from rl_edit.errors import InputError
from rl_edit.method import flow
from rl_edit.method.attention import HeadAverage
from rl_edit.types import Conditioning

PROMPT = "prompt_embeds"
"""Name of the text encoder's states behind the template, ``[text, text_dim]``."""


@dataclass(frozen=True, kw_only=True)
class QwenInputs:
    """Batched inputs of one forward of one micro-batch, on the device."""

    prompt_embeds: Float[Tensor, "batch text text_dim"]
    text_rows: Bool[Tensor, "batch text"]
    source: Float[Tensor, "batch token channel"]
    grid: tuple[int, int]


def encoded_source(
    pipeline: Any, image: Image.Image, *, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "token channel"]:
    """Encodes a source that lies on the canvas: packed latents on the CPU."""
    # An image of this size is not changed by the processor.
    pixels = pipeline.image_processor.preprocess(image, image.height, image.width)
    film = pixels.unsqueeze(2).to(device, dtype)
    clean = pipeline._encode_vae_image(film, generator=None)
    _, channels, _, height, width = clean.shape
    packed: Tensor = pipeline._pack_latents(clean, 1, channels, height, width)[0]
    return packed.float().cpu()


def batched_inputs(
    many: Sequence[Conditioning], prefix: str, *, device: torch.device, dtype: torch.dtype
) -> QwenInputs:
    """Batches conditionings of one text length.

    Args:
        prefix: of the names of the encodings that the forward reads.

    Raises:
        ValueError: they do not share one canvas.
    """
    return QwenInputs(
        prompt_embeds=stacked(many, prefix + PROMPT).to(device, dtype),
        text_rows=stacked(many, "text_rows").to(device),
        source=torch.stack([c.source_latents for c in many]).to(device, dtype),
        grid=shared_grid(many),
    )


def qwen_forward(
    transformer: Any,
    latents: Tensor,
    sigma: Tensor,
    inputs: QwenInputs,
    *,
    watched: Sequence[torch.nn.Module],
    average: HeadAverage,
) -> Prediction:
    """Runs the transformer once.

    Args:
        watched: attention modules whose mass is recorded.
        average: order of averaging heads and renormalising.
    """
    # Latents arrive in fp32; the transformer runs in the base's number format.
    device, dtype, tokens = inputs.source.device, inputs.source.dtype, latents.shape[1]
    # The source's tokens follow the target's, as a second frame of the same size.
    hidden = torch.cat([latents.to(device, dtype), inputs.source], dim=1)
    frame = (1, *inputs.grid)
    with captured(watched, inputs.text_rows, tokens, average=average, rotate=_rotated) as masses:
        out = transformer(
            hidden_states=hidden,
            timestep=flow.model_time(sigma.to(device), dtype),
            encoder_hidden_states=inputs.prompt_embeds,
            # No row is padded.
            encoder_hidden_states_mask=None,
            # Of one row: all have the same, and the stock pipeline passes one for a prompt.
            img_shapes=[[frame, frame]],
            return_dict=False,
        )[0][:, :tokens]
    mass = torch.stack(masses).mean(dim=0) if masses else None
    return Prediction(velocity=out.to(latents.device, torch.float32), mass=mass)


def _rotated(values: Tensor, rotary: Sequence[Tensor], places: slice) -> Tensor:
    """Applies the complex rotary embedding, given as tables for images and for text."""
    from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

    images, text = rotary
    # In the joint sequence text comes first.
    table = torch.cat([text, images])[places]
    rotated: Tensor = apply_rotary_emb_qwen(values, table, use_real=False)
    return rotated


def qwen_sigmas(
    scheduler: Any, num_steps: int, conditioning: Conditioning
) -> Float[Tensor, " step_plus_1"]:
    """Returns the stock pipelines' grid, shifted by the number of tokens.

    Raises:
        InputError: a single step, from which the scheduler would make no number.
    """
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_shift

    settings = scheduler.config
    terminal = settings.get("shift_terminal")
    if terminal and num_steps < 2:
        raise InputError(
            f"the scheduler of this editor stretches its noise levels to end at {terminal:g}, "
            f"which takes at least 2 solver steps, got {num_steps}: raise num_steps"
        )
    rows, columns = conditioning.grid
    # The defaults are those of the stock pipeline.
    mu = calculate_shift(
        rows * columns,
        settings.get("base_image_seq_len", 256),
        settings.get("max_image_seq_len", 4096),
        settings.get("base_shift", 0.5),
        settings.get("max_shift", 1.15),
    )
    uniform = np.linspace(1.0, 1 / num_steps, num_steps)
    scheduler.set_timesteps(sigmas=uniform, mu=mu, device="cpu")
    # A copy: the scheduler keeps and changes its own.
    grid: Tensor = scheduler.sigmas.clone()
    return grid


def decoded_pixels(pipeline: Any, latents: Tensor, height: int, width: int) -> np.ndarray:
    """Decodes packed latents on the VAE's device to pixels in [0, 1]."""
    vae = pipeline.vae
    film = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
    mean, std = (
        torch.tensor(numbers).view(1, -1, 1, 1, 1)
        for numbers in (vae.config.latents_mean, vae.config.latents_std)
    )
    # The division by a reciprocal is the stock pipeline's, bit for bit.
    film = film / (1.0 / std.to(film)) + mean.to(film)
    decoded = vae.decode(film, return_dict=False)[0][:, :, 0]
    pixels: np.ndarray = pipeline.image_processor.postprocess(decoded, output_type="np")
    return pixels
