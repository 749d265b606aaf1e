"""The tiny FLUX.1-Kontext: the built-in editor's architecture, untrained."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FluxKontextPipeline

from rl_edit.editors.tiny.architecture import new_editor


def pipeline(*, seed: int) -> FluxKontextPipeline:
    """Makes the pipeline with random weights, no layer of them zero.

    The built-in editor starts as the identity: with its zeros it would predict nothing.
    """
    made = new_editor(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.transformer.parameters():
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return made


def write(directory: Path, *, seed: int) -> None:
    """Writes the editor to a directory."""
    pipeline(seed=seed).save_pretrained(directory)
