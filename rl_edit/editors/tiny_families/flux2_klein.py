"""The tiny FLUX.2-klein: a base checkpoint, which can run with guidance and without."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline
from transformers import Qwen3Config, Qwen3ForCausalLM

from rl_edit.editors.tiny_families._flux2_parts import (
    make_autoencoder,
    make_scheduler,
    make_transformer,
)
from rl_edit.editors.tiny_families._qwen_tokenizer import make_qwen_tokenizer

_WIDTH = 24


def pipeline(*, seed: int, is_distilled: bool = False) -> Flux2KleinPipeline:
    """Makes the pipeline with random weights. Deterministic in ``seed``."""
    # The settings take the tokenizer's limit: 512 rows of padding would make a forward slow.
    tokenizer = make_qwen_tokenizer(max_length=64)
    # A fork: making an editor must not move the process's own random stream.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=_WIDTH,
                intermediate_size=2 * _WIDTH,
                # The pipeline reads the states of layers 9, 18 and 27.
                num_hidden_layers=28,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=12,
                max_position_embeddings=512,
                tie_word_embeddings=True,
            )
        )
        transformer = make_transformer(text_width=3 * _WIDTH, guidance_embeds=False)
        vae = make_autoencoder()
    return Flux2KleinPipeline(
        scheduler=make_scheduler(),
        vae=vae.eval(),
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        is_distilled=is_distilled,
    )


def write(directory: Path, *, seed: int) -> None:
    """Writes the editor to a directory."""
    pipeline(seed=seed).save_pretrained(directory)
