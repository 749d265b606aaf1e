"""Defaults of Qwen-Image-Edit editors from their own configuration files."""

from __future__ import annotations

from typing import Any

from rl_edit.editors.local_defaults import local_defaults
from rl_edit.editors.location import local_value

NEGATIVE_PROMPT = " "
"""As in the model cards: without one the stock pipelines leave the guidance out."""


def qwen_defaults(path: str) -> dict[str, Any]:
    """Returns resolution, text length and number format of the editor at a path.

    The VAE of Qwen-Image names no canvas. 1024 is the side of the area to which the stock pipelines
    fit a source; a tiny editor names its own.
    """
    # check_inputs of both pipelines: max_sequence_length is at most 1024.
    defaults = local_defaults(path, max_text_tokens=1024)
    side = local_value(path, "vae/config.json", "_sample_size")
    return {**defaults, "resolution": side} if isinstance(side, int) else defaults
