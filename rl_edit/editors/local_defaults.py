"""Defaults of an editor from its own configuration files, where it lies on this machine."""

from __future__ import annotations

from typing import Any

from rl_edit.editors.location import local_value

_MIN_SIDE = 16

_MIN_TOKENS = 16


def local_defaults(
    path: str,
    *,
    resolution: int = 1024,
    max_text_tokens: int = 512,
    tokenizer: str = "tokenizer",
    text_encoder: str = "text_encoder",
) -> dict[str, Any]:
    """Returns resolution, text length and number format of the editor at a path.

    A directory is asked; an id of the hub gets what is passed, and bfloat16.

    Args:
        resolution: of the released checkpoints.
        max_text_tokens: the longest text that the stock pipeline reads.
        tokenizer: folder of the tokenizer whose own limit holds where it is less.
        text_encoder: folder of the text encoder, in whose number format the editor is stored.
    """
    defaults: dict[str, Any] = {
        "resolution": resolution,
        "max_text_tokens": max_text_tokens,
        "dtype": "bfloat16",
    }
    side = local_value(path, "vae/config.json", "sample_size")
    if isinstance(side, int) and side >= _MIN_SIDE:
        defaults["resolution"] = side
    length = local_value(path, f"{tokenizer}/tokenizer_config.json", "model_max_length")
    # A tokenizer without a limit has 1e30 there.
    if isinstance(length, int) and _MIN_TOKENS <= length < max_text_tokens:
        defaults["max_text_tokens"] = length
    # transformers 5 writes dtype, earlier versions torch_dtype. Nothing trains in float16, so an
    # editor stored in it runs in bfloat16.
    stored = [
        local_value(path, f"{text_encoder}/config.json", name) for name in ("dtype", "torch_dtype")
    ]
    if "float32" in stored:
        defaults["dtype"] = "float32"
    return defaults
