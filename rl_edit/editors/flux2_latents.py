"""Latents, positions and noise levels that the FLUX.2 pipelines share.

A token is 2 x 2 latent pixels, normalised by the statistics of the VAE's batch norm. Positions have
four coordinates: image (0 the target, 10 the source), row, column, and place in the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rl_edit.editors.attention_capture import captured
from rl_edit.editors.chunks import Prediction, shared_grid, stacked
from rl_edit.editors.pixels import source_image
from rl_edit.method import flow
from rl_edit.method.attention import HeadAverage
from rl_edit.types import Conditioning, EditTask


@dataclass(frozen=True, kw_only=True)
class Flux2Inputs:
    """Batched inputs of one forward of one micro-batch, on the device."""

    prompt_embeds: Float[Tensor, "batch text text_dim"]
    text_rows: Bool[Tensor, "batch text"]
    source: Float[Tensor, "batch token channel"]
    text_ids: Int[Tensor, "text 4"]
    image_ids: Int[Tensor, "token_both 4"]


def encoded_source(
    pipeline: Any, task: EditTask, *, unit: int, device: torch.device, dtype: torch.dtype
) -> tuple[Float[Tensor, "token channel"], tuple[int, int]]:
    """Encodes a task's source: packed latents on the CPU, and their token grid."""
    image = source_image(task, unit=unit)
    # The arguments of the stock pipeline; an image of this size is not changed by them.
    pixels = pipeline.image_processor.preprocess(
        image, height=image.height, width=image.width, resize_mode="crop"
    )
    clean = pipeline._encode_vae_image(pixels.to(device, dtype), generator=None)
    packed: Tensor = pipeline._pack_latents(clean)[0]
    return packed.float().cpu(), (image.height // unit, image.width // unit)


def batched_inputs(
    pipeline: Any,
    many: Sequence[Conditioning],
    prefix: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Flux2Inputs:
    """Batches conditionings, with positions as the stock pipelines build them.

    Args:
        prefix: of the names of the encodings that the forward reads.

    Raises:
        ValueError: they do not share one canvas.
    """
    rows, columns = shared_grid(many)
    # Positions follow from the grid; the values are not read.
    blank = torch.empty(1, 1, rows, columns)
    # The stock functions add a batch dimension, of which the transformer reads the first row.
    target = pipeline._prepare_latent_ids(blank)[0]
    source = pipeline._prepare_image_ids([blank])[0]
    embeds = stacked(many, f"{prefix}prompt_embeds")
    return Flux2Inputs(
        prompt_embeds=embeds.to(device, dtype),
        text_rows=stacked(many, "text_rows").to(device),
        source=torch.stack([c.source_latents for c in many]).to(device, dtype),
        text_ids=pipeline._prepare_text_ids(embeds[:1])[0].to(device),
        image_ids=torch.cat([target, source]).to(device),
    )


def flux2_forward(
    transformer: Any,
    latents: Tensor,
    sigma: Tensor,
    inputs: Flux2Inputs,
    *,
    watched: Sequence[torch.nn.Module],
    average: HeadAverage,
    guidance: float | None = None,
) -> Prediction:
    """Runs the transformer once.

    Args:
        watched: attention modules whose mass is recorded.
        average: order of averaging heads and renormalising.
        guidance: the embedded scale; None where the transformer has no embedding of it.
    """
    # Latents arrive in fp32; the transformer runs in the base's number format.
    device, dtype, tokens = inputs.source.device, inputs.source.dtype, latents.shape[1]
    scale = None if guidance is None else torch.full((len(latents),), guidance, device=device)
    # The source's tokens follow the target's.
    hidden = torch.cat([latents.to(device, dtype), inputs.source], dim=1)
    with captured(watched, inputs.text_rows, tokens, average=average) as masses:
        out = transformer(
            hidden_states=hidden,
            timestep=flow.model_time(sigma.to(device), dtype),
            guidance=scale,
            encoder_hidden_states=inputs.prompt_embeds,
            txt_ids=inputs.text_ids,
            img_ids=inputs.image_ids,
            return_dict=False,
        )[0][:, :tokens]
    mass = torch.stack(masses).mean(dim=0) if masses else None
    return Prediction(velocity=out.to(latents.device, torch.float32), mass=mass)


def flux2_sigmas(
    scheduler: Any, num_steps: int, conditioning: Conditioning
) -> Float[Tensor, " step_plus_1"]:
    """Returns the stock pipelines' grid, shifted by the number of tokens and of steps."""
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    rows, columns = conditioning.grid
    mu = compute_empirical_mu(image_seq_len=rows * columns, num_steps=num_steps)
    uniform = np.linspace(1.0, 1 / num_steps, num_steps)
    scheduler.set_timesteps(sigmas=uniform, mu=mu, device="cpu")
    # A copy: the scheduler keeps and changes its own.
    grid: Tensor = scheduler.sigmas.clone()
    return grid


def decoded_pixels(pipeline: Any, latents: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Decodes packed latents on the VAE's device to pixels in [0, 1]."""
    vae = pipeline.vae
    # Tokens are row-major: [batch, token, channel] -> [batch, channel, row, column].
    spatial = latents.permute(0, 2, 1).unflatten(-1, grid)
    # Inverts the normalisation of _encode_vae_image.
    mean = vae.bn.running_mean.view(1, -1, 1, 1).to(spatial)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(spatial)
    spatial = pipeline._unpatchify_latents(spatial * std + mean)
    decoded = vae.decode(spatial, return_dict=False)[0]
    pixels: np.ndarray = pipeline.image_processor.postprocess(decoded, output_type="np")
    return pixels
