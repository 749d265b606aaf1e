"""Small parts of the Qwen-Image-Edit pipelines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageTransformer2DModel,
)
from diffusers.utils import logging
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessorPil,
)

from rl_edit.editors.qwen_processor import FOLDER, ImageTextProcessor
from rl_edit.editors.tiny_families._qwen_tokenizer import VISION, make_qwen_tokenizer
from rl_edit.files import replace_json

CANVAS = 64
"""Canvas side that the settings of a tiny editor take by default."""

_WIDTH, _LATENT_CHANNELS, _PATCH = 24, 4, 4


def make_pipeline(kind: Any, *, seed: int, **transformer: Any) -> Any:
    """Makes a pipeline with random weights. Deterministic in ``seed``.

    Args:
        kind: class of the pipeline.
        transformer: further settings of the transformer.
    """
    tokenizer = make_qwen_tokenizer(max_length=64, further=VISION, words=_template_words())
    # A fork: making an editor must not move the process's own random stream.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = _make_encoder(tokenizer)
        denoiser = _make_transformer(**transformer)
        vae = _make_autoencoder()
    return kind(
        scheduler=_make_scheduler(),
        vae=vae.eval(),
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        processor=make_processor(tokenizer),
        transformer=denoiser.eval(),
    )


def make_processor(tokenizer: Qwen2TokenizerFast) -> ImageTextProcessor:
    """Makes a processor that shows the encoder at most 4 tokens of an image."""
    unit = 2 * _PATCH
    images = Qwen2VLImageProcessorPil(
        patch_size=_PATCH, merge_size=2, min_pixels=unit**2, max_pixels=4 * unit**2
    )
    return ImageTextProcessor(images, tokenizer)


def save(pipeline: Any, directory: Path) -> None:
    """Writes the directory; the VAE's configuration names the canvas that it was made for."""
    # A part that is left out gets a warning.
    logging.set_verbosity_error()
    processor = pipeline.processor
    pipeline.register_modules(processor=None)
    pipeline.save_pretrained(directory)
    # As released: the pipeline names transformers' own class, which needs torchvision to load.
    processor.image_processor.save_pretrained(directory / FOLDER)
    processor.tokenizer.save_pretrained(directory / FOLDER)
    _change(directory / "model_index.json", processor=["transformers", "Qwen2VLProcessor"])
    # The class has no such setting; diffusers passes over names that begin so.
    _change(directory / "vae" / "config.json", _sample_size=CANVAS)


def _change(file: Path, **values: Any) -> None:
    replace_json(file, {**json.loads(file.read_text()), **values})


def _template_words() -> tuple[str, ...]:
    """Lists what the released tokenizer reads as one token in the pipelines' template."""
    words = re.findall(r"\w+", _TEMPLATE)
    return (*words, " (", "),", "'s", "\n")


# Of the stock pipelines, whose first 64 tokens are dropped.
_TEMPLATE = (
    "system user assistant Describe the key features of the input image (color, shape, "
    "size, texture, objects, background), then explain how the user text instruction should alter "
    "or modify the image. Generate a new image that meets the user requirements while maintaining "
    "consistency with the original input where appropriate."
)


def _make_encoder(tokenizer: Qwen2TokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    ids = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        # Time, row and column; together half of a head.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [2, 2, 2],
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": _PATCH,
        "spatial_merge_size": 2,
        "window_size": 4 * _PATCH,
        "out_hidden_size": _WIDTH,
        "fullatt_block_indexes": [1],
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=ids("<|image_pad|>"),
            video_token_id=ids("<|video_pad|>"),
            vision_start_token_id=ids("<|vision_start|>"),
            vision_end_token_id=ids("<|vision_end|>"),
        )
    )


def _make_transformer(**more: Any) -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        in_channels=4 * _LATENT_CHANNELS,
        out_channels=_LATENT_CHANNELS,
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=_WIDTH,
        # Image, row and column; together attention_head_dim.
        axes_dims_rope=(8, 12, 12),
        **more,
    )


def _make_autoencoder() -> AutoencoderKLQwenImage:
    """Makes an autoencoder that shrinks a side four times, so that a token covers 8 x 8 pixels."""
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=_LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        # Other than 0 and 1, which would hide a mistake.
        latents_mean=[-0.3, -0.1, 0.1, 0.3],
        latents_std=[0.7, 0.9, 1.1, 1.4],
    )


def _make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Makes the scheduler of the released checkpoints."""
    return FlowMatchEulerDiscreteScheduler(
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )
