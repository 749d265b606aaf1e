"""Adapter files in the forms that people bring, made with PEFT and diffusers, and stock's reading.

All are of the built-in architecture with random weights, none of them zero.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxKontextPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig as PeftLoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kontext import random_pipeline
from rl_edit.editors import lora
from rl_edit.editors.lora import ATTENTION_PROJECTIONS, WEIGHTS_FILE

ATTENTION = list(ATTENTION_PROJECTIONS)
DOUBLE = r".*\.?transformer_blocks\.\d+\.(attn\.(to|add)_[a-z_]+(\.0)?|ff\.net\.2)"


@cache
def _pipeline() -> FluxKontextPipeline:
    return random_pipeline()


def fresh() -> FluxKontextPipeline:
    """A pipeline whose transformer no test has changed."""
    pipeline = copy.copy(_pipeline())
    pipeline.transformer = copy.deepcopy(_pipeline().transformer)
    # A second pipeline of the same other parts.
    return FluxKontextPipeline(**{**_pipeline().components, "transformer": pipeline.transformer})


def fill(transformer: nn.Module, seed: int = 0) -> None:
    """Gives every tensor of an adapter values, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(transformer.named_parameters()):
        if "lora_A" in name or "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        elif "magnitude" in name:
            parameter.data = parameter.data * 1.1


def written(folder: Path, *, settings: bool = True, **config: Any) -> Path:
    """Writes a LoRA by diffusers' ``save_lora_weights``, with or without PEFT's settings."""
    transformer = fresh().transformer
    config = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, **config}
    transformer.add_adapter(PeftLoraConfig(**config), adapter_name="default")
    fill(transformer)
    metadata = _collate_lora_metadata({"transformer": transformer}) if settings else {}
    FluxKontextPipeline.save_lora_weights(
        folder, transformer_lora_layers=get_peft_model_state_dict(transformer), **metadata
    )
    return folder


def rewritten(
    folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config: Any
) -> Path:
    """Writes a LoRA without settings, with its tensors changed by ``change``."""
    tensors = load_file(written(folder, settings=False, **config) / WEIGHTS_FILE)
    save_file(
        {name: t.contiguous().clone() for name, t in change(tensors).items()},
        folder / WEIGHTS_FILE,
    )
    return folder


def with_alphas(
    tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Adds an ``.alpha`` beside each pair; the ones of ``to_q`` are larger."""
    alphas = {
        name.replace(".lora_A.weight", ".alpha"): torch.tensor(
            10.0 if ".to_q." in name else 7.0, dtype=dtype
        )
        for name in tensors
        if "lora_A" in name
    }
    return tensors | alphas


def down_up(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names the pairs ``lora_down`` and ``lora_up``."""
    return {
        n.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for n, t in tensors.items()
    }


def bfl(prefix: str, separator: str, *, alpha: float | None) -> dict[str, Tensor]:
    """A LoRA of the double blocks in Black Forest Labs' names: q, k and v are one matrix."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for block in range(2):
        for part, out in (("img_attn.qkv", 384), ("img_attn.proj", 128), ("txt_attn.qkv", 384)):
            name = prefix + f"double_blocks.{block}.{part}".replace(".", separator)
            tensors[f"{name}.lora_down.weight"] = torch.randn(4, 128, generator=generator) * 0.1
            tensors[f"{name}.lora_up.weight"] = torch.randn(out, 4, generator=generator) * 0.1
            if alpha is not None:
                tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def stored(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """Writes tensors as they are, without metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, folder / WEIGHTS_FILE)
    return folder


def kohya_mixture(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names a LoRA ``lora_transformer_...``, with diffusers' modules."""
    renamed = {}
    for name, value in down_up(with_alphas(tensors)).items():
        module, part = re.fullmatch(r"transformer\.(.*?)\.((?:lora_|alpha).*)", name).groups()  # type: ignore[union-attr]
        renamed[f"lora_transformer_{module.replace('.', '_')}.{part}"] = value
    return renamed


def peft_folder(folder: Path, **config: Any) -> Path:
    """Writes a folder as ``PeftModel.save_pretrained`` does."""
    from peft import get_peft_model

    config = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, **config}
    model = get_peft_model(fresh().transformer, PeftLoraConfig(**config))
    fill(model)
    model.save_pretrained(str(folder))
    return folder


def inputs(transformer: nn.Module) -> dict[str, Any]:
    """Inputs of one forward, the same each time."""
    generator = torch.Generator().manual_seed(1)
    config: Any = transformer.config
    image, text = 32, 8
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "hidden_states": draw(1, image, config.in_channels),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([2.5]),
        "pooled_projections": draw(1, config.pooled_projection_dim),
        "encoder_hidden_states": draw(1, text, config.joint_attention_dim),
        "txt_ids": torch.zeros(text, 3),
        "img_ids": torch.zeros(image, 3),
        "return_dict": False,
    }


@torch.no_grad()
def output(transformer: nn.Module) -> Tensor:
    """The transformer's output."""
    return transformer(**inputs(transformer))[0]


def ours(place: Path) -> Tensor:
    """The output with an adapter that we read."""
    transformer = fresh().transformer
    weights, config = lora.read(place)
    lora.attach(transformer, config, seed=0)
    lora.load(transformer, weights)
    return output(transformer)


def stock(place: Path, weight_name: str = WEIGHTS_FILE) -> Tensor:
    """The output with an adapter that stock diffusers loads."""
    pipeline = fresh()
    pipeline.load_lora_weights(str(place), weight_name=weight_name)
    # PEFT's new dropout layers begin in training mode.
    return output(pipeline.transformer.eval())


def settings_of(place: Path) -> dict[str, Any]:
    """PEFT's settings in a file's metadata."""
    from safetensors import safe_open

    with safe_open(place / WEIGHTS_FILE, "pt") as file:
        return json.loads(file.metadata()["lora_adapter_metadata"])
