"""Defaults of a FLUX.1-Kontext editor that is not built in, from its own configuration files."""

from __future__ import annotations

from typing import Any

from rl_edit.editors.location import BUILTIN, local_value
from rl_edit.editors.tiny.recipe import MAX_TEXT_TOKENS

_KONTEXT: dict[str, Any] = {
    # vae/config.json of black-forest-labs/FLUX.1-Kontext-dev: sample_size 1024.
    "resolution": 1024,
    # FluxKontextPipeline.__call__: max_sequence_length 512, which is also its largest.
    "max_text_tokens": 512,
    # text_encoder_2/config.json of the same: torch_dtype bfloat16, as its model card loads it.
    "dtype": "bfloat16",
}
"""Numbers of FLUX.1-Kontext-dev. They stand in for an editor on the hub, which is not asked while a
configuration is read, and for what a directory does not say."""

_MIN_SIDE, _MIN_TOKENS = 16, 4


def flux_defaults(path: str) -> dict[str, Any]:
    """Returns resolution, text length and number format of the editor at a path.

    A directory is asked; an id of the hub gets the numbers of FLUX.1-Kontext-dev.
    """
    defaults = dict(_KONTEXT)
    side = local_value(path, "vae/config.json", "sample_size")
    if isinstance(side, int) and side >= _MIN_SIDE:
        defaults["resolution"] = side
    length = local_value(path, "tokenizer_2/tokenizer_config.json", "model_max_length")
    # A tokenizer without a limit has 1e30 there.
    if isinstance(length, int) and _MIN_TOKENS <= length < defaults["max_text_tokens"]:
        defaults["max_text_tokens"] = length
    encoder = "text_encoder_2/config.json"
    # rl-edit pretrain gives T5 a reach of exactly the text that it trains with; T5-XXL has 128.
    if local_value(path, encoder, "relative_attention_max_distance") == MAX_TEXT_TOKENS:
        defaults["max_text_tokens"] = MAX_TEXT_TOKENS
    # transformers 5 writes dtype, earlier versions torch_dtype. Nothing trains in float16, so an
    # editor stored in it runs in bfloat16.
    if (
        local_value(path, encoder, "dtype") or local_value(path, encoder, "torch_dtype")
    ) == "float32":
        defaults["dtype"] = "float32"
    return defaults


def builtin_misfit(height: int, width: int, resolution: int) -> str:
    """Says what the built-in editor is for; "" for an image that may be of its world."""
    # Its scenes fill exactly one canvas; twice that may be a drawn scene that was enlarged.
    if max(height, width) <= 2 * resolution:
        return ""
    return (
        f"{BUILTIN} is a small editor for drawn scenes of coloured shapes, 64 x 64 px. This image "
        f"has {width} x {height} px: a photograph becomes a smear of about {resolution} x "
        f"{resolution} px. Name a real editor instead, such as "
        "black-forest-labs/FLUX.1-Kontext-dev or a directory that holds it."
    )
