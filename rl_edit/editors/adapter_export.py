"""Writes an adapter in the form that another program reads, and compares what it does there.

``diffusers`` and ``peft`` keep the settings beside the tensors. ComfyUI reads no settings, and
takes a scale of 1 where no alpha stands beside the matrices, so the scale is folded into them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from rl_edit.data.canvas import task_without_mask
from rl_edit.editors import lora
from rl_edit.editors.adapter_config import AdapterConfig
from rl_edit.editors.adapter_forms import PEFT_FILE, PEFT_PREFIX, PREFIX, WEIGHTS_FILE
from rl_edit.editors.editing import edited
from rl_edit.editors.family import Editor
from rl_edit.errors import InputError
from rl_edit.method.exploration import NoiseSource
from rl_edit.types import AdapterWeights

Form = Literal["diffusers", "comfyui", "peft"]

COMFYUI_FILE = "lora_comfyui.safetensors"

_EXPORTED = "exported"
"""Name of the adapter that was read back, beside the run's own."""


def write_adapter(
    directory: Path, weights: AdapterWeights, config: AdapterConfig, *, form: Form, base: str
) -> Path:
    """Writes an adapter into a directory and returns its file.

    Args:
        base: name of the editor, which PEFT's settings hold.

    Raises:
        InputError: the form has no place for a part of the adapter.
    """
    if form == "diffusers":
        lora.save(directory, weights, config)
        return directory / WEIGHTS_FILE
    # PEFT's own record and file names, from which it loads a folder.
    if form == "peft":
        settings = config.peft()
        settings.base_model_name_or_path = base
        settings.save_pretrained(str(directory))
        tensors = {PEFT_PREFIX + name: value for name, value in weights.tensors.items()}
        save_file(tensors, directory / PEFT_FILE, {"format": "pt"})
        return directory / PEFT_FILE
    tensors = {PREFIX + name: value for name, value in _folded(weights.tensors, config).items()}
    save_file(tensors, directory / COMFYUI_FILE, {"format": "pt"})
    return directory / COMFYUI_FILE


def _folded(tensors: dict[str, Tensor], config: AdapterConfig) -> dict[str, Tensor]:
    """Multiplies each second matrix by its module's scale."""
    # Magnitudes of a DoRA and biases have no place in the form.
    strange = [name for name in tensors if not name.endswith(("lora_A.weight", "lora_B.weight"))]
    if strange:
        raise InputError(
            f"ComfyUI reads the two matrices of a LoRA, and this adapter has more ({strange[0]}): "
            "export it as diffusers or peft"
        )
    return {
        name: value * scale_of(name.split(".lora_")[0], config) if ".lora_B." in name else value
        for name, value in tensors.items()
    }


def scale_of(module: str, config: AdapterConfig) -> float:
    """Returns what PEFT multiplies a module's adapter by."""
    from peft.utils.other import get_pattern_key

    # A pattern names single modules, as PEFT finds them.
    ranks, alphas = config.rank_pattern, config.alpha_pattern
    rank = ranks.get(get_pattern_key(ranks.keys(), module), config.rank)
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), config.alpha)
    return float(alpha) / (rank**0.5 if config.rslora else rank)


def acts_alike(
    trained: tuple[AdapterWeights, AdapterConfig], exported: tuple[AdapterWeights, AdapterConfig]
) -> bool:
    """Do two adapters change every layer by the same matrices, up to the rounding of fp32?"""
    (one, settings), (two, others) = trained, exported
    if one.tensors.keys() != two.tensors.keys():
        return False
    for name, value in one.tensors.items():
        module, other = name.split(".lora_")[0], two.tensors[name]
        # The scale stands in the settings, in the second matrix, or in both.
        is_second = name.endswith("lora_B.weight")
        scales = [scale_of(module, of) if is_second else 1.0 for of in (settings, others)]
        if not torch.allclose(value * scales[0], other * scales[1], rtol=1e-5, atol=0):
            return False
    return True


def largest_difference(
    editor: Editor,
    trained: tuple[AdapterWeights, AdapterConfig],
    exported: tuple[AdapterWeights, AdapterConfig],
) -> int:
    """Edits a test image with both adapters and returns the largest difference, of 255."""
    images = []
    # Both on one base: it is loaded once, and the adapter switched on acts by itself.
    for name, (weights, config) in ((lora.POLICY, trained), (_EXPORTED, exported)):
        lora.attach(editor.transformer, config, seed=0, adapter_name=name)
        lora.load(editor.transformer, weights, adapter_name=name)
        lora.set_active(editor.transformer, True, adapter_name=name)
        images.append(_edited(editor).int())
    return int((images[0] - images[1]).abs().max())


def _edited(editor: Editor) -> Tensor:
    """Edits a ramp of 8 x 8 tokens in two solver steps, always from the same noise."""
    # Small, so that a real editor takes seconds; its own canvas would show no more.
    side = 8 * editor.pixels_per_token
    ramp = torch.linspace(0, 255, side).byte().expand(side, side)
    task = task_without_mask(
        torch.stack([ramp, ramp.T, ramp], dim=-1),
        "make it red",
        task_id="check",
        resolution=side,
        multiple=editor.pixels_per_token,
    )
    return edited(editor, [task], num_steps=2, noise=NoiseSource(0, "check", 0))[0]
