"""The two losses of pretraining. Each is a function of the step alone, given the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from diffusers import AutoencoderKL, FluxKontextPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift
from torch import Tensor
from torch.nn import functional

from rl_edit.editors.tiny.latent_tasks import LatentTasks, ahead, draw, pixels, step_generator
from rl_edit.editors.tiny.recipe import (
    MAX_TEXT_TOKENS,
    PIXELS_PER_TOKEN,
    FlowStage,
    PretrainConfig,
)


def vae_losses(vae: AutoencoderKL, config: PretrainConfig, steps: range) -> Iterator[Tensor]:
    """Yields the reconstruction loss of each step: L1 + 10 MSE + 1e-3 KL per latent.

    The MSE is what PSNR measures; L1 preserves edges; the KL leaves latents bounded and smooth
    enough to denoise. Every task is new; even rows show the source, odd rows the target.
    """
    count = config.vae_batch
    batches = ahead(steps, lambda step: draw(step * count, count, config))
    for step, tasks in zip(steps, batches, strict=True):
        images = tasks.source.clone()
        images[1::2] = tasks.target[1::2]
        clean = pixels(images)
        posterior = vae.encode(clean).latent_dist
        decoded = vae.decode(posterior.sample(step_generator(config.seed, 1, step))).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        yield (
            functional.l1_loss(decoded, clean)
            + 10.0 * functional.mse_loss(decoded, clean)
            + 1e-3 * kl
        )


def flow_losses(
    pipeline: FluxKontextPipeline,
    tasks: LatentTasks,
    stage: FlowStage,
    config: PretrainConfig,
    steps: range,
) -> Iterator[Tensor]:
    """Yields the flow-matching loss of each step (Lipman et al. 2023; Esser et al. 2024).

    ``x = (1 - sigma) * clean + sigma * noise``, velocity target ``noise - clean``. sigma is uniform
    or logit-normal in equal parts, then moved by the resolution shift that the scheduler applies at
    this token count. Latents inside the edit mask weigh ``config.edit_weight``.
    """
    side = config.resolution // PIXELS_PER_TOKEN
    num_tokens = side * side
    prepare_ids = FluxKontextPipeline._prepare_latent_image_ids
    target_ids = prepare_ids(1, side, side, torch.device("cpu"), torch.float32)
    # Source tokens stand behind the target's, and their first id is 1.
    source_ids = target_ids.clone()
    source_ids[:, 0] = 1
    img_ids = torch.cat([target_ids, source_ids])
    txt_ids = torch.zeros(MAX_TEXT_TOKENS, 3)
    shift = math.exp(calculate_shift(num_tokens))
    for step in steps:
        # The order of these draws is part of the recipe.
        generator = step_generator(config.seed, 5 if stage.flawed else 2, step)
        rows = torch.randint(len(tasks.sources), (config.batch,), generator=generator)
        clean, edited = tasks.targets[rows], tasks.edit_masks[rows]
        noise = torch.randn(clean.shape, generator=generator)
        sigma = _noise_levels(config.batch, shift, generator)
        noisy = (1 - sigma[:, None, None]) * clean + sigma[:, None, None] * noise
        velocity = pipeline.transformer(
            hidden_states=torch.cat([noisy, tasks.sources[rows]], dim=1),
            timestep=sigma,
            # The embedding exists because FLUX.1-Kontext has it. Any value in use must be harmless,
            # so all are trained.
            guidance=1 + 3 * torch.rand(config.batch, generator=generator),
            pooled_projections=pipeline.text_encoder(tasks.clip_ids[rows]).pooler_output,
            encoder_hidden_states=pipeline.text_encoder_2(tasks.t5_ids[rows])[0],
            txt_ids=txt_ids,
            img_ids=img_ids,
            return_dict=False,
        )[0][:, :num_tokens]
        weight = torch.where(edited, config.edit_weight, 1.0)
        yield (weight * (velocity - (noise - clean)).square()).sum() / weight.sum()


def _noise_levels(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """Draws sigma: uniform or logit-normal in equal parts, then shifted (Esser et al. 2024)."""
    uniform = torch.rand(count, generator=generator)
    logit_normal = torch.sigmoid(torch.randn(count, generator=generator))
    # Logit-normal favours the middle; the uniform half covers the ends.
    sigma = torch.where(torch.rand(count, generator=generator) < 0.5, uniform, logit_normal)
    return shift * sigma / (1 + (shift - 1) * sigma)
