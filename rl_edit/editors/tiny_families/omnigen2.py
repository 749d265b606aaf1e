"""The tiny OmniGen2, with a tiny Qwen2.5-VL that could also see images."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from rl_edit.editors.omnigen2_transformer import OmniGen2Transformer2DModel
from rl_edit.editors.tiny_families._qwen_tokenizer import VISION, make_qwen_tokenizer
from rl_edit.files import replace_json

_WIDTH = 24

_CHANNELS = 4

_MODULES = {
    "mllm": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "processor": ["transformers", "Qwen2_5_VLProcessor"],
    # As released: these two are classes of the pipeline's own code.
    "scheduler": ["scheduling_flow_match_euler_discrete", "FlowMatchEulerDiscreteScheduler"],
    "transformer": ["transformer_omnigen2", "OmniGen2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _language_model(vocabulary: int, marks: dict[str, int]) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": vocabulary,
                "hidden_size": _WIDTH,
                "intermediate_size": 2 * _WIDTH,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 512,
                # Time, row and column; together half a head.
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [2, 2, 2],
                },
                "bos_token_id": None,
                "eos_token_id": marks["<|im_end|>"],
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": _WIDTH,
                "fullatt_block_indexes": [0],
            },
            image_token_id=marks["<|image_pad|>"],
            video_token_id=marks["<|video_pad|>"],
            vision_start_token_id=marks["<|vision_start|>"],
            vision_end_token_id=marks["<|vision_end|>"],
        )
    )


def _transformer() -> OmniGen2Transformer2DModel:
    """Makes a transformer whose norms are not all 1, which would hide a mistake."""
    made: OmniGen2Transformer2DModel = OmniGen2Transformer2DModel(
        patch_size=2,
        in_channels=_CHANNELS,
        hidden_size=48,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(1024, 1664, 1664),
        text_feat_dim=_WIDTH,
        timestep_scale=1000.0,
    )
    for name, parameter in made.named_parameters():
        if "norm" in name or name == "image_index_embedding":
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
    return made


def _autoencoder() -> AutoencoderKL:
    """Makes an autoencoder that shrinks a side four times, so that a token covers 8 x 8 pixels."""
    widths = (8, 16, 16)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        latent_channels=_CHANNELS,
        norm_num_groups=4,
        # Of FLUX.1's autoencoder, which the released one is.
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        # The canvas side that the settings take by default.
        sample_size=64,
    )


def write(directory: Path, *, seed: int) -> None:
    """Writes the editor to a directory. Deterministic in ``seed``."""
    tokenizer = make_qwen_tokenizer(max_length=128, further=VISION)
    marks = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in ("<|im_end|>", *VISION)}
    # A fork: making an editor must not move the process's own random stream.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _language_model(len(tokenizer), marks).save_pretrained(directory / "mllm")
        _transformer().save_pretrained(directory / "transformer")
        _autoencoder().save_pretrained(directory / "vae")
    tokenizer.save_pretrained(directory / "processor")
    Qwen2VLImageProcessorPil().save_pretrained(directory / "processor")
    (directory / "scheduler").mkdir(exist_ok=True)
    scheduler = {"_class_name": _MODULES["scheduler"][1], "dynamic_time_shift": True}
    replace_json(
        directory / "scheduler" / "scheduler_config.json",
        {**scheduler, "num_train_timesteps": 1000},
    )
    replace_json(directory / "model_index.json", {"_class_name": "OmniGen2Pipeline", **_MODULES})
