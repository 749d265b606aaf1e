"""Architecture of the built-in editor: the classes of FLUX.1-Kontext with small numbers."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from rl_edit.data import shapes
from rl_edit.editors.tiny.recipe import LATENT_CHANNELS, MAX_TEXT_TOKENS, VAE_WIDTHS
from rl_edit.editors.tiny.tokenizers import make_clip_tokenizer, make_t5_tokenizer

MODELS = ("vae", "transformer", "text_encoder", "text_encoder_2")
"""Parts of the pipeline that have parameters."""


def new_editor(*, seed: int) -> FluxKontextPipeline:
    """Makes an untrained `tiny-kontext` in eval mode. Deterministic in ``seed``."""
    words = tuple(shapes.vocabulary())
    tokenizer, tokenizer_2 = make_clip_tokenizer(words), make_t5_tokenizer(words)
    # A fork: making an editor must not move the process's own random stream. The order of the
    # parts decides which numbers each of them draws.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = _clip(tokenizer)
        t5 = _t5(tokenizer_2)
        transformer = _transformer()
        vae = _autoencoder()
    pipeline = FluxKontextPipeline(
        scheduler=_scheduler(),
        vae=vae.eval(),
        text_encoder=clip.eval(),
        tokenizer=tokenizer,
        text_encoder_2=t5.eval(),
        tokenizer_2=tokenizer_2,
        transformer=transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def trainable(pipeline: FluxKontextPipeline) -> nn.ModuleDict:
    """Returns the parts that flow matching trains: all but the autoencoder."""
    return nn.ModuleDict(
        {
            "transformer": pipeline.transformer,
            "clip": pipeline.text_encoder,
            "t5": pipeline.text_encoder_2,
        }
    )


def _clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Makes the encoder of the pooled vector."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            # pooled_projection_dim of the transformer.
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=77,
            projection_dim=32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """Makes the encoder of the text tokens."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            # joint_attention_dim of the transformer.
            d_model=64,
            d_kv=16,
            num_heads=4,
            d_ff=128,
            num_layers=2,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=MAX_TEXT_TOKENS,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def _transformer() -> FluxTransformer2DModel:
    """Makes the transformer: two double and two single blocks."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        guidance_embeds=True,
        # Per head: 4 for source or target, 14 each for row and column; together attention_head_dim.
        axes_dims_rope=(4, 14, 14),
    )
    # Blocks that start as the identity (adaLN-zero, Peebles & Xie 2022, sec. 3.2) save about a
    # thousand steps here.
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and ("norm" in name or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer


def _autoencoder() -> AutoencoderKL:
    """Makes the autoencoder, without attention."""
    blocks = len(VAE_WIDTHS)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=VAE_WIDTHS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        # Set after training, from the latents that it gives.
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    # The numbers of FLUX.1: the shift grows with the number of tokens.
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
