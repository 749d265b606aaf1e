"""Small parts of FLUX.2 pipelines that do not depend on the text encoder."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
)

LATENT_CHANNELS = 4
"""Channels of the VAE; a token has four times as many."""


def make_transformer(*, text_width: int, guidance_embeds: bool) -> Flux2Transformer2DModel:
    """Makes a transformer of two double and two single blocks.

    Args:
        text_width: of the states that the text encoder gives, all its layers together.
        guidance_embeds: is there an embedding of the guidance scale?
    """
    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=text_width,
        timestep_guidance_channels=32,
        # Image, row, column and place in the text; together attention_head_dim.
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=guidance_embeds,
    )


def make_autoencoder() -> AutoencoderKLFlux2:
    """Makes an autoencoder that shrinks a side four times, so that a token covers 8 x 8 pixels.

    The statistics of its batch norm are other than 0 and 1, which would hide a mistake.
    """
    widths = (8, 16, 16)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        # The canvas side that the settings take by default.
        sample_size=64,
    )
    # A batch norm that never trained would leave latents as they are.
    channels = 4 * LATENT_CHANNELS
    vae.bn.running_mean.copy_(torch.linspace(-0.3, 0.3, channels))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2.0, channels))
    return vae


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Makes the scheduler of the released checkpoints."""
    return FlowMatchEulerDiscreteScheduler(
        # With dynamic shifting this number is not read; it stands in the released file.
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
