"""The tiny FLUX.2-dev, with a tiny Mistral that could also see images."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from diffusers import Flux2Pipeline
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessorPil,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
)

from rl_edit.data import shapes
from rl_edit.editors.tiny_families._byte_level import byte_level_tokenizer
from rl_edit.editors.tiny_families._flux2_parts import (
    make_autoencoder,
    make_scheduler,
    make_transformer,
)
from rl_edit.files import replace_json

_WIDTH = 24

_MAX_TOKENS = 96
"""The system message takes about half of them."""

_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}

_MARKS = (
    *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"),
    *("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
)

# As Mistral Small's own, without tools.
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}[SYSTEM_PROMPT]{% else %}[INST]{% endif %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}[IMG]{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% if message.role == 'system' %}[/SYSTEM_PROMPT]{% else %}[/INST]{% endif %}{% endfor %}"
)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer that has a token for each word that it usually reads."""
    words = (*shapes.vocabulary(), *re.findall(r"\w+", SYSTEM_MESSAGE))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(words),
        model_max_length=_MAX_TOKENS,
        # As the released one; the pipeline's text rows then end with the instruction.
        padding_side="left",
        **_SPECIAL,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(_MARKS)})
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def _encoder(vocabulary: int, image_token: int) -> Mistral3ForConditionalGeneration:
    text = MistralConfig(
        vocab_size=vocabulary,
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        # The pipeline reads the states of layers 10, 20 and 30.
        num_hidden_layers=31,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        max_position_embeddings=512,
    )
    vision = PixtralVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=4,
    )
    return Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=vision, image_token_index=image_token)
    )


def pipeline(*, seed: int) -> Flux2Pipeline:
    """Makes the pipeline with random weights. Deterministic in ``seed``."""
    tokenizer = _tokenizer()
    # A fork: making an editor must not move the process's own random stream.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = _encoder(len(tokenizer), tokenizer.convert_tokens_to_ids("[IMG]"))
        transformer = make_transformer(text_width=3 * _WIDTH, guidance_embeds=True)
        vae = make_autoencoder()
    return Flux2Pipeline(
        scheduler=make_scheduler(),
        vae=vae.eval(),
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )


def write(directory: Path, *, seed: int) -> None:
    """Writes the editor to a directory.

    As released: the tokenizer lies in the folder of a processor, which needs torchvision to load.
    """
    pipeline(seed=seed).save_pretrained(directory)
    folder, image_side = directory / "tokenizer", {"longest_edge": 32}
    PixtralImageProcessorPil(size=image_side, patch_size=4).save_pretrained(folder)
    processor = {"processor_class": "PixtralProcessor", "patch_size": 4, "spatial_merge_size": 2}
    replace_json(folder / "processor_config.json", processor)
    index = json.loads((directory / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PixtralProcessor"]
    replace_json(directory / "model_index.json", index)
