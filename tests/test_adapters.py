"""Adapters: exact from memory to file to stock diffusers, and named by what they contain."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from kontext import random_pipeline
from rl_edit.data import shapes
from rl_edit.editors import FluxKontextConfig, lora
from rl_edit.editors.flux_kontext import FluxKontextEditor
from rl_edit.editors.lora import WEIGHTS_FILE, LoraConfig
from rl_edit.errors import InputError
from rl_edit.method.rollout import denoise
from rl_edit.types import AdapterId, AdapterWeights, Conditioning

LORA = LoraConfig(rank=4, alpha=10)
TASK = shapes.task("train", 0)


def trained(editor: FluxKontextEditor, seed: int = 1) -> AdapterWeights:
    """An adapter as after training, with no zero B, loaded into ``editor``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.parameters(editor.transformer):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return lora.export(editor.transformer, step=7)


@pytest.fixture(scope="module")
def base() -> FluxKontextEditor:
    return FluxKontextEditor(
        random_pipeline(),
        FluxKontextConfig(
            path="random", resolution=64, max_text_tokens=32, dtype="float32", device="cpu"
        ),
    )


@pytest.fixture(scope="module")
def attached() -> FluxKontextEditor:
    fresh = FluxKontextEditor(
        random_pipeline(),
        FluxKontextConfig(
            path="random", resolution=64, max_text_tokens=32, dtype="float32", device="cpu"
        ),
    )
    lora.attach(fresh.transformer, LORA, seed=0)
    return fresh


@pytest.fixture
def editor(attached: FluxKontextEditor) -> Iterator[FluxKontextEditor]:
    """The editor with a new adapter; every test finds it as attached."""
    new = lora.export(attached.transformer, step=0)
    yield attached
    lora.load(attached.transformer, new)
    lora.set_active(attached.transformer, True)


@pytest.fixture(scope="module")
def conditioning(base: FluxKontextEditor) -> Conditioning:
    return base.encode(TASK)


def noise(conditioning: Conditioning, rows: int = 4) -> Tensor:
    return torch.randn(
        rows, *conditioning.source_latents.shape, generator=torch.Generator().manual_seed(0)
    )


def velocity(editor: FluxKontextEditor, conditioning: Conditioning) -> Tensor:
    with torch.no_grad():
        return editor.velocity(noise(conditioning), torch.linspace(1, 0.2, 4), conditioning)


# --- on and off ----------------------------------------------------------------------------------


def test_a_new_adapter_is_the_base_bitwise(
    base: FluxKontextEditor, editor: FluxKontextEditor, conditioning: Conditioning
) -> None:
    b = [
        value
        for name, value in lora.export(editor.transformer, step=0).tensors.items()
        if "lora_B" in name
    ]
    assert b and not any(bool(value.any()) for value in b)
    assert torch.equal(velocity(editor, conditioning), velocity(base, conditioning))


def test_switched_off_is_the_base_exactly_and_switched_on_again_the_policy(
    base: FluxKontextEditor, editor: FluxKontextEditor, conditioning: Conditioning
) -> None:
    trained(editor)
    policy, base_result = velocity(editor, conditioning), velocity(base, conditioning)
    assert not torch.allclose(policy, base_result, atol=1e-3)
    lora.set_active(editor.transformer, False)
    assert torch.equal(velocity(editor, conditioning), base_result)
    lora.set_active(editor.transformer, True)
    assert torch.equal(velocity(editor, conditioning), policy)


def test_only_the_adapter_is_trainable_and_on_attention_projections(
    editor: FluxKontextEditor,
) -> None:
    names = {
        name for name, parameter in editor.transformer.named_parameters() if parameter.requires_grad
    }
    assert len(names) == len(lora.parameters(editor.transformer)) > 0
    targets = {name.split(".lora_")[0].split("attn.")[1] for name in names}
    assert targets == set(lora.ATTENTION_PROJECTIONS)


def test_attaching_depends_on_the_seed_alone_and_leaves_the_global_generator() -> None:
    ids, state = [], torch.get_rng_state()
    for seed in (0, 0, 1):
        transformer = random_pipeline().transformer
        torch.set_rng_state(state)
        torch.rand(len(ids))
        before = torch.get_rng_state()
        lora.attach(transformer, LORA, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        ids.append(lora.export(transformer, step=0).id)
    assert ids[0] == ids[1] != ids[2]


def test_the_adapter_is_fp32_over_a_bf16_base() -> None:
    transformer = random_pipeline().transformer.to(torch.bfloat16)
    lora.attach(transformer, LORA, seed=0)
    assert {parameter.dtype for parameter in lora.parameters(transformer)} == {torch.float32}


# --- export and load -----------------------------------------------------------------------------


def test_export_and_load_round_trip_exactly(
    editor: FluxKontextEditor, conditioning: Conditioning
) -> None:
    weights = trained(editor)
    before = velocity(editor, conditioning)
    trained(editor, seed=2)
    assert not torch.equal(velocity(editor, conditioning), before)
    lora.load(editor.transformer, weights)
    again = lora.export(editor.transformer, step=7)
    assert again.id == weights.id and again.tensors.keys() == weights.tensors.keys()
    assert all(torch.equal(again.tensors[name], value) for name, value in weights.tensors.items())
    assert torch.equal(velocity(editor, conditioning), before)


def test_an_export_is_a_copy(editor: FluxKontextEditor) -> None:
    weights = trained(editor)
    trained(editor, seed=2)
    assert lora.digest(weights.tensors) == weights.id.sha256


@pytest.mark.parametrize("damage", ["rank", "missing", "unexpected"])
def test_an_adapter_of_another_shape_is_refused(editor: FluxKontextEditor, damage: str) -> None:
    tensors = dict(trained(editor).tensors)
    name = next(iter(tensors))
    if damage == "rank":
        tensors[name] = torch.zeros(tensors[name].shape[0] + 1, *tensors[name].shape[1:])
    elif damage == "missing":
        del tensors[name]
    else:
        tensors["no.such.module.lora_A.weight"] = torch.zeros(4, 4)
    with pytest.raises(InputError, match="does not fit this editor's LoRA"):
        lora.load(editor.transformer, AdapterWeights(id=AdapterId(0, "x"), tensors=tensors))


# --- names ---------------------------------------------------------------------------------------


def some_tensors() -> dict[str, Tensor]:
    return {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(4), "c": torch.zeros(1, 2)}


@settings(deadline=None, max_examples=50)
@given(name=st.sampled_from(["a", "b", "c"]), byte=st.integers(0, 23), bit=st.integers(0, 7))
def test_the_digest_changes_with_any_bit(name: str, byte: int, bit: int) -> None:
    changed = some_tensors()
    raw = changed[name].numpy().view(np.uint8).reshape(-1)
    raw[byte % len(raw)] ^= np.uint8(1 << bit)
    assert lora.digest(changed) != lora.digest(some_tensors())


def test_the_digest_changes_with_names_shapes_and_types_and_not_with_order() -> None:
    tensors = some_tensors()
    digest = lora.digest(tensors)
    assert (
        lora.digest(dict(sorted(tensors.items(), reverse=True)))
        == digest
        == lora.digest(dict(sorted(tensors.items())))
    )
    assert (
        lora.digest({"d" if name == "c" else name: value for name, value in tensors.items()})
        != digest
    )
    assert lora.digest(tensors | {"b": tensors["b"].reshape(3, 2)}) != digest
    assert lora.digest(tensors | {"c": torch.zeros(1, 2, dtype=torch.int32)}) != digest


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adapter",
    [LORA, LoraConfig(rank=4, alpha=4), LoraConfig(rank=2, alpha=3)],
    ids=["r4a10", "r4a4", "r2a3"],
)
def test_stock_diffusers_with_the_saved_adapter_makes_our_image_bitwise(
    adapter: LoraConfig, tmp_path: Path, conditioning: Conditioning
) -> None:
    editor = FluxKontextEditor(
        random_pipeline(),
        FluxKontextConfig(
            path="random",
            resolution=64,
            max_text_tokens=32,
            dtype="float32",
            device="cpu",
            micro_batch=1,
        ),
    )
    lora.attach(editor.transformer, adapter, seed=0)
    start = noise(conditioning, 1)
    base_result = denoise(
        lambda x, s: editor.velocity(x, s, conditioning), start, editor.sigmas(3, conditioning)
    ).final
    lora.save(tmp_path, trained(editor), adapter)
    final = denoise(
        lambda x, s: editor.velocity(x, s, conditioning), start, editor.sigmas(3, conditioning)
    ).final
    ours = editor.decode(final, conditioning)

    stock = random_pipeline()
    stock.load_lora_weights(tmp_path, weight_name=WEIGHTS_FILE)
    (config,) = stock.transformer.peft_config.values()
    assert (config.r, config.lora_alpha) == (adapter.rank, adapter.alpha)
    theirs = stock(
        image=Image.fromarray(TASK.source.numpy()),
        prompt=TASK.instruction,
        latents=start,
        num_inference_steps=3,
        guidance_scale=editor.config.guidance,
        height=64,
        width=64,
        max_area=64 * 64,
        _auto_resize=False,
        max_sequence_length=editor.config.max_text_tokens,
        output_type="np",
    ).images
    assert np.array_equal(ours.numpy(), (theirs * 255).round().astype(np.uint8))
    assert not torch.equal(ours, editor.decode(base_result, conditioning))


def test_reading_gives_back_tensors_name_step_and_settings(
    editor: FluxKontextEditor, tmp_path: Path
) -> None:
    weights = trained(editor)
    lora.save(tmp_path, weights, LORA)
    for where in (tmp_path, tmp_path / WEIGHTS_FILE):
        read, config = lora.read(where)
        assert read.id == weights.id and all(
            torch.equal(read.tensors[name], value) for name, value in weights.tensors.items()
        )
        assert (config.rank, config.alpha, set(config.targets)) == (
            LORA.rank,
            LORA.alpha,
            set(LORA.targets),
        )


def test_equal_adapters_are_equal_files(editor: FluxKontextEditor, tmp_path: Path) -> None:
    weights = trained(editor)
    files = []
    for number in range(8):
        lora.save(tmp_path / str(number), weights, LORA)
        files.append({path.name: path.read_bytes() for path in (tmp_path / str(number)).iterdir()})
    assert set(files[0]) == {WEIGHTS_FILE, "adapter.json"}
    assert all(file == files[0] for file in files)


def test_a_diffusers_lora_without_our_note_is_read_by_its_own_metadata(
    editor: FluxKontextEditor, tmp_path: Path
) -> None:
    weights = trained(editor)
    lora.save(tmp_path, weights, LORA)
    (tmp_path / "adapter.json").unlink()
    read, config = lora.read(tmp_path)
    assert read.id == AdapterId(0, weights.id.sha256) and config.alpha == LORA.alpha


def test_altered_bytes_are_refused(editor: FluxKontextEditor, tmp_path: Path) -> None:
    lora.save(tmp_path, trained(editor), LORA)
    raw = bytearray((tmp_path / WEIGHTS_FILE).read_bytes())
    raw[-100] ^= 1
    (tmp_path / WEIGHTS_FILE).write_bytes(bytes(raw))
    with pytest.raises(InputError, match="the adapter was altered or half-copied"):
        lora.read(tmp_path)


def test_a_cut_file_is_refused(editor: FluxKontextEditor, tmp_path: Path) -> None:
    lora.save(tmp_path, trained(editor), LORA)
    raw = (tmp_path / WEIGHTS_FILE).read_bytes()
    for size in (0, 5, 300, len(raw) - 1):
        (tmp_path / WEIGHTS_FILE).write_bytes(raw[:size])
        with pytest.raises(InputError, match="not a readable safetensors file"):
            lora.read(tmp_path)


def test_a_missing_adapter_is_refused(tmp_path: Path) -> None:
    for where in (tmp_path, tmp_path / "nowhere", tmp_path / "weights.bin"):
        with pytest.raises(
            InputError, match=r"no adapter at .*expected pytorch_lora_weights\.safetensors"
        ):
            lora.read(where)


@pytest.mark.parametrize("key", ["vae.conv.weight", "transformer.proj_out.weight"])
def test_a_file_that_is_no_transformer_lora_is_refused(key: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(2, 2)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(InputError, match="holds no transformer LoRA"):
        lora.read(tmp_path)


@pytest.mark.parametrize(
    "note", ["{", "[]", json.dumps({"step": 1}), json.dumps({"step": "x", "sha256": "y"})]
)
def test_a_broken_note_is_refused_in_words(
    editor: FluxKontextEditor, tmp_path: Path, note: str
) -> None:
    lora.save(tmp_path, trained(editor), LORA)
    (tmp_path / "adapter.json").write_text(note)
    with pytest.raises(InputError, match=r"adapter\.json is not readable .*copy the adapter again"):
        lora.read(tmp_path)
