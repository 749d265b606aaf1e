"""The tiny Qwen-Image-Edit."""

from __future__ import annotations

from pathlib import Path

from diffusers import QwenImageEditPipeline

from rl_edit.editors.tiny_families import _qwen_edit_parts as parts


def pipeline(*, seed: int) -> QwenImageEditPipeline:
    """Makes the pipeline with random weights. Deterministic in ``seed``."""
    made: QwenImageEditPipeline = parts.make_pipeline(QwenImageEditPipeline, seed=seed)
    return made


def write(directory: Path, *, seed: int) -> None:
    """Writes the editor to a directory."""
    parts.save(pipeline(seed=seed), directory)
