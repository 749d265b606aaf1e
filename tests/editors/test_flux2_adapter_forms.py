"""LoRA files of other trainers for FLUX.2: read as the stock pipeline applies them, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import klein_family
import pytest
import torch
from conformance import loaded, noise_for, task_of
from safetensors.torch import save_file
from torch import Tensor

from rl_edit.editors import lora, read_adapter, require_adapter
from rl_edit.editors.adapter_kinds import MODELS, recognised
from rl_edit.editors.tiny_families import write_tiny
from rl_edit.errors import InputError
from rl_edit.method.rollout import denoise

RANK, ALPHA = 4, 10.0
FAMILY = klein_family.FAMILY

SIDES = {
    "double_blocks.0.img_attn.qkv": (64, 192),
    "double_blocks.1.txt_attn.qkv": (64, 192),
    "double_blocks.0.img_attn.proj": (64, 64),
    "double_blocks.1.img_mlp.0": (64, 384),
    "double_blocks.1.txt_mlp.2": (192, 64),
    "single_blocks.0.linear1": (64, 192 + 384),
    "single_blocks.1.linear2": (64 + 192, 64),
}
"""Input and output of layers, by their names in the model's own code."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("klein") / "editor"
    write_tiny("flux2_klein", path)
    return path


def matrices() -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (
            0.2 * torch.randn(RANK, into, generator=generator),
            0.2 * torch.randn(out, RANK, generator=generator),
        )
        for name, (into, out) in SIDES.items()
    }


def ai_toolkit() -> dict[str, Tensor]:
    return {
        f"diffusion_model.{name}.lora_{part}.weight": value
        for name, pair in matrices().items()
        for part, value in zip("AB", pair, strict=True)
    }


def kohya() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in matrices().items():
        flat = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        tensors[f"{flat}.alpha"] = torch.tensor(ALPHA)
    return tensors


@pytest.mark.parametrize("form", [ai_toolkit, kohya])
def test_a_form_makes_the_image_of_the_stock_pipeline_bitwise(
    form: Callable[[], dict[str, Tensor]], directory: Path, tmp_path: Path
) -> None:
    save_file(
        {name: value.contiguous() for name, value in form().items()}, tmp_path / "x.safetensors"
    )
    ours, theirs = loaded(FAMILY, directory), loaded(FAMILY, directory)
    task = task_of()
    conditioning = ours.encode(task)
    noise = noise_for(ours, conditioning, 4)

    def latents() -> Tensor:
        with torch.no_grad():
            return denoise(
                lambda x, s: ours.velocity(x, s, conditioning), noise, ours.sigmas(3, conditioning)
            ).final

    before = latents()
    weights, config = read_adapter(ours.config, tmp_path / "x.safetensors")
    require_adapter(ours.config, weights)
    lora.attach(ours.transformer, config, seed=0)
    lora.load(ours.transformer, weights)
    theirs.pipeline.load_lora_weights(tmp_path, weight_name="x.safetensors")
    assert torch.equal(latents(), FAMILY.stock(theirs, task, noise, 3).latents)
    assert not torch.allclose(latents(), before, atol=1e-3)


def test_mlp_layers_of_flux_are_not_taken_for_qwen_image() -> None:
    names = [f"lora_unet_double_blocks_3_{side}_mlp_0.lora_down.weight" for side in ("img", "txt")]
    assert recognised(names, MODELS) is None
    assert recognised(["diffusion_model.double_blocks.0.img_mod.lin.lora_A.weight"], MODELS) is None
    qwen = recognised(["lora_unet_transformer_blocks_7_txt_mlp_net_2.lora_up.weight"], MODELS)
    assert qwen is not None and "Qwen" in qwen.name


def test_an_adapter_of_flux1_is_refused_by_its_modules(directory: Path, tmp_path: Path) -> None:
    name = "transformer.single_transformer_blocks.0.attn.to_q.lora_{}.weight"
    pair = {name.format("A"): torch.zeros(4, 64), name.format("B"): torch.ones(64, 4)}
    save_file(pair, tmp_path / "x.safetensors")
    config = loaded(FAMILY, directory).config
    weights, _ = read_adapter(config, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"does not fit this editor's LoRA.*are not there"):
        require_adapter(config, weights)
