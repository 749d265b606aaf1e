"""The tiny Qwen-Image-Edit-Plus."""

from __future__ import annotations

from pathlib import Path

from diffusers import QwenImageEditPlusPipeline

from rl_edit.editors.tiny_families import _qwen_edit_parts as parts


def pipeline(*, seed: int) -> QwenImageEditPlusPipeline:
    """Makes the pipeline with random weights. Deterministic in ``seed``."""
    made: QwenImageEditPlusPipeline = parts.make_pipeline(QwenImageEditPlusPipeline, seed=seed)
    return made


def write(directory: Path, *, seed: int) -> None:
    """Writes the editor to a directory."""
    parts.save(pipeline(seed=seed), directory)
