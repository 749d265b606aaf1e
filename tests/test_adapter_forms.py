"""Adapters of other trainers: applied bitwise as stock diffusers applies them, or refused by name.

Each form is a file written by PEFT or diffusers (``tests/adapter_files.py``), read by us and by
``load_lora_weights`` into equal editors.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline, FluxTransformer2DModel
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapter_files as files
from adapter_files import ATTENTION, bfl, ours, output, rewritten, stored, written
from kontext import noise_for, stock, task_of
from rl_edit.editors import BUILTIN_WEIGHTS, FluxKontextConfig, lora
from rl_edit.editors.flux_kontext import FluxKontextEditor
from rl_edit.editors.lora import WEIGHTS_FILE
from rl_edit.errors import InputError
from rl_edit.method.rollout import denoise
from runs import command

Maker = Callable[[Path], Path]
Tensors = dict[str, Tensor]


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new, 1): t for name, t in tensors.items()}


def in_type(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t.to(dtype) for name, t in tensors.items()}


def old_names(tensors: Tensors) -> Tensors:
    return {
        n.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): t for n, t in tensors.items()
    }


PATTERNS: dict[str, Any] = {
    "rank_pattern": {"to_q": 8, "to_add_out": 2},
    "alpha_pattern": {r".*single.*to_k": 3, "to_v": 5},
}
LOADED: dict[str, Maker] = {
    "plain": written,
    "alpha-pattern": partial(written, alpha_pattern={"to_q": 32}),
    "rank-pattern": partial(written, rank_pattern={"to_q": 8}),
    "both-patterns": partial(written, **PATTERNS),
    "rslora": partial(written, use_rslora=True, lora_alpha=4),
    "rslora-with-patterns": partial(written, use_rslora=True, **PATTERNS),
    "regex-targets": partial(written, target_modules=r".*attn\.to_[qkv]"),
    "all-linear": partial(written, target_modules="all-linear"),
    "bias": partial(written, lora_bias=True),
    "dropout": partial(written, lora_dropout=0.3),
    "dora": partial(written, use_dora=True),
    "without-settings": partial(written, settings=False),
    "mixed-ranks-without-settings": partial(written, settings=False, rank_pattern={"to_q": 8}),
    "wide-targets-without-settings": partial(
        written, settings=False, target_modules=[*ATTENTION, "proj_mlp", "proj_out"]
    ),
    "few-targets-without-settings": partial(written, settings=False, target_modules=["to_v"]),
    "alpha-keys": partial(rewritten, change=files.with_alphas),
    "alpha-keys-in-16-bits": partial(
        rewritten,
        change=partial(files.with_alphas, dtype=torch.bfloat16),
        r=3,
        rank_pattern={"to_v": 5},
    ),
    "down-and-up": partial(rewritten, change=files.down_up),
    "down-and-up-with-alphas": partial(
        rewritten, change=lambda tensors: files.down_up(files.with_alphas(tensors))
    ),
    "bfloat16": partial(rewritten, change=in_type(torch.bfloat16)),
    "float16": partial(rewritten, change=in_type(torch.float16)),
    "early-diffusers": partial(rewritten, change=old_names),
    "kohya": lambda folder: stored(folder, bfl("lora_unet_", "_", alpha=2.0)),
    "comfyui": lambda folder: stored(folder, bfl("diffusion_model.", ".", alpha=2.0)),
    "lora-transformer": partial(rewritten, change=files.kohya_mixture),
}


@cache
def base_output() -> Tensor:
    return output(files.fresh().transformer)


@pytest.mark.parametrize("form", LOADED)
def test_a_form_acts_bitwise_as_in_stock_diffusers(form: str, tmp_path: Path) -> None:
    place = LOADED[form](tmp_path)
    assert torch.equal(ours(place), files.stock(place))
    assert not torch.equal(ours(place), base_output())


@pytest.mark.parametrize(
    "form",
    [
        "plain",
        "rslora-with-patterns",
        "regex-targets",
        "all-linear",
        "mixed-ranks-without-settings",
        "alpha-keys",
        "dora",
        "kohya",
    ],
)
def test_an_adapter_that_is_read_and_saved_acts_in_stock_diffusers_as_before(
    form: str, tmp_path: Path
) -> None:
    place = LOADED[form](tmp_path / "from")
    weights, config = lora.read(place)
    lora.save(tmp_path / "to", weights, config)
    again, same = lora.read(tmp_path / "to")
    assert again.id == weights.id and same.settings == config.settings
    assert torch.equal(files.stock(tmp_path / "to"), files.stock(place))


@pytest.mark.parametrize(
    "form", ["alpha-pattern", "rslora", "mixed-ranks-without-settings", "kohya", "comfyui"]
)
def test_a_form_makes_the_image_of_the_stock_pipeline_bitwise(form: str, tmp_path: Path) -> None:
    place = LOADED[form](tmp_path)
    settings = FluxKontextConfig(
        path="random",
        resolution=64,
        max_text_tokens=32,
        dtype="float32",
        device="cpu",
        micro_batch=1,
    )
    editor = FluxKontextEditor(files.fresh(), settings)
    conditioning = editor.encode(task_of())
    noise = noise_for(editor, conditioning, 1)
    base = denoise(
        lambda x, s: editor.velocity(x, s, conditioning), noise, editor.sigmas(3, conditioning)
    ).final
    weights, config = lora.read(place)
    lora.attach(editor.transformer, config, seed=0)
    lora.load(editor.transformer, weights)
    final = denoise(
        lambda x, s: editor.velocity(x, s, conditioning), noise, editor.sigmas(3, conditioning)
    ).final
    theirs = FluxKontextEditor(files.fresh(), settings)
    theirs.pipeline.load_lora_weights(str(place), weight_name=WEIGHTS_FILE)
    image = stock(theirs, task_of(), noise, 3, "np")
    pixels = (image * 255).round().astype(np.uint8)
    assert np.array_equal(editor.decode(final, conditioning).numpy(), pixels)
    assert not torch.equal(final, base)


@pytest.mark.parametrize(
    "config",
    [{}, {"use_rslora": True, **PATTERNS}, {"use_dora": True}],
    ids=["plain", "rslora-with-patterns", "dora"],
)
def test_a_peft_folder_acts_bitwise_as_in_peft(config: dict[str, Any], tmp_path: Path) -> None:
    place = files.peft_folder(tmp_path, **config)
    theirs = output(PeftModel.from_pretrained(files.fresh().transformer, str(place)).eval())
    assert torch.equal(ours(place), theirs)
    assert torch.equal(ours(place / "adapter_model.safetensors"), theirs)
    assert not torch.equal(theirs, base_output())


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_a_pickled_file_is_refused_unread_with_the_way_to_convert_it(
    suffix: str, tmp_path: Path
) -> None:
    file, ran = tmp_path / f"adapter{suffix}", tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (ran,)

    file.write_bytes(pickle.dumps({"transformer.lora": Evil()}))
    for place in (tmp_path, file):
        with pytest.raises(InputError, match=r"is a pickled file .*weights_only=True"):
            lora.read(place)
    assert not ran.exists()


# --- a property: any rank, alpha, patterns and rank-stabilised scale -----------------------------


@cache
def _small() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    ).requires_grad_(False)


NAMES = st.sampled_from(["to_q", "to_v", r".*single.*to_k", "to_out.0", r"attn\.to_.", "proj_out"])
CONFIGS = st.fixed_dictionaries(
    {
        "r": st.integers(1, 6),
        "lora_alpha": st.one_of(st.integers(1, 40), st.floats(0.1, 40)),
        "rank_pattern": st.dictionaries(NAMES, st.integers(1, 6), max_size=2),
        "alpha_pattern": st.dictionaries(NAMES, st.integers(1, 40), max_size=2),
        "use_rslora": st.booleans(),
        "target_modules": st.sampled_from(
            [["to_q", "to_v"], ATTENTION, ["proj_out", "to_k"], r".*to_.", "all-linear"]
        ),
    }
)


# Shrinking would take minutes; an example says enough as it is.
@settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(config=CONFIGS, with_settings=st.booleans(), alphas=st.booleans())
def test_any_rank_alpha_patterns_and_scale_act_as_in_stock_diffusers(
    config: dict[str, Any], with_settings: bool, alphas: bool, tmp_path_factory: Any
) -> None:
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    place = tmp_path_factory.mktemp("adapter")
    trained = copy.deepcopy(_small())
    trained.add_adapter(PeftLoraConfig(**config), adapter_name="default")
    files.fill(trained)
    metadata = _collate_lora_metadata({"transformer": trained}) if with_settings else {}
    FluxKontextPipeline.save_lora_weights(
        place, transformer_lora_layers=get_peft_model_state_dict(trained), **metadata
    )
    if alphas and not with_settings:
        save_file(files.with_alphas(load_file(place / WEIGHTS_FILE)), place / WEIGHTS_FILE)
    theirs = copy.deepcopy(_small())
    state, network_alphas, stored_settings = FluxKontextPipeline.lora_state_dict(
        str(place), weight_name=WEIGHTS_FILE, return_alphas=True, return_lora_metadata=True
    )
    mine = copy.deepcopy(_small())
    try:
        FluxKontextPipeline.load_lora_into_transformer(
            state, network_alphas, theirs, metadata=stored_settings
        )
    except RuntimeError:
        # Rank patterns that overlap: diffusers sorts them on saving and cannot load its own file.
        assert len(config["rank_pattern"]) == 2
        with pytest.raises(InputError, match=r"settings give \S+ rank"):
            lora.read(place)
        return
    weights, read = lora.read(place)
    lora.attach(mine, read, seed=0)
    lora.load(mine, weights)
    assert torch.equal(output(mine), output(theirs))
    # With its settings in the file, the adapter acts as it was trained. Of patterns that overlap
    # the first one counts, and diffusers sorts them when it saves.
    ordered = len(config["alpha_pattern"]) < 2 and len(config["rank_pattern"]) < 2
    assert not (with_settings and ordered) or torch.equal(output(mine), output(trained))


# --- what is said --------------------------------------------------------------------------------


def test_a_file_without_settings_says_which_alpha_is_taken(tmp_path: Path) -> None:
    (note,) = lora.read(written(tmp_path, settings=False))[1].notes
    assert "has no settings: alpha is taken as the rank, as diffusers does" in note


def test_alphas_that_diffusers_leaves_out_are_counted(tmp_path: Path) -> None:
    (note,) = lora.read(LOADED["down-and-up-with-alphas"](tmp_path))[1].notes
    assert "22 .alpha tensors that diffusers leaves out in this form" in note


def test_tensors_that_a_converter_leaves_out_are_said(tmp_path: Path) -> None:
    tensors = bfl("lora_unet_", "_", alpha=2.0)
    tensors["lora_unet_double_blocks_0_img_attn_proj.diff_b"] = torch.ones(128)
    notes = lora.read(stored(tmp_path, tensors))[1].notes
    assert any("diff_b" in note and "filter out" in note for note in notes)


@pytest.mark.parametrize("form", ["plain", "rslora", "alpha-keys", "kohya"])
def test_a_file_with_its_settings_is_read_without_a_word(form: str, tmp_path: Path) -> None:
    assert lora.read(LOADED[form](tmp_path))[1].notes == ()


def test_settings_are_those_of_the_file(tmp_path: Path) -> None:
    written(tmp_path, r=4, lora_alpha=6, use_rslora=True, target_modules=r".*to_[qk]", **PATTERNS)
    config = lora.read(tmp_path)[1]
    assert (config.rank, config.alpha, config.rslora) == (4, 6, True)
    assert config.rank_pattern == PATTERNS["rank_pattern"]
    assert config.alpha_pattern == PATTERNS["alpha_pattern"]
    assert config.targets == (".*to_[qk]",)


# --- what is refused -----------------------------------------------------------------------------


def one(name: str, *shape: int) -> Callable[[Path], Path]:
    return lambda folder: stored(folder, {name: torch.ones(shape or (4, 4))})


def with_text_encoder(folder: Path) -> Path:
    module = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    extra = {f"{module}.lora_A.weight": torch.ones(4, 32)}
    return rewritten(folder, lambda tensors: tensors | extra)


BLOCK = "transformer_blocks.0.attn.to_q"
REFUSED: dict[str, tuple[Maker, str]] = {
    "lokr": (one(f"transformer.{BLOCK}.lokr_w1"), r"LoKr .*peft\.save_as_lora"),
    "loha": (one("lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a"), r"LoHa .*extract_locon"),
    "oft": (one(f"base_model.model.{BLOCK}.oft_r"), r"OFT .*save_as_lora"),
    "ia3": (one(f"base_model.model.{BLOCK}.ia3_l"), r"IA3 .*train a LoRA"),
    "dora-of-kohya": (
        lambda folder: stored(
            folder,
            bfl("lora_unet_", "_", alpha=2.0)
            | {"lora_unet_double_blocks_0_img_attn_proj.dora_scale": torch.ones(128)},
        ),
        r"DoRA in kohya's .*flux_extract_lora",
    ),
    "text-encoder": (with_text_encoder, r"parts for a text encoder.*without them"),
    "text-encoder-of-kohya": (
        one("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"),
        r"parts for a text encoder",
    ),
    "sdxl": (
        one("lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight"),
        r"Stable Diffusion U-Net .*only the model it was trained on",
    ),
    "qwen-image": (one("transformer.transformer_blocks.3.img_mlp.net.2.lora_A.weight"), "Qwen"),
    "wan": (one("diffusion_model.blocks.0.self_attn.q.lora_A.weight"), "Wan or another video"),
    "flux-2": (
        one("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight"),
        r"FLUX\.2",
    ),
    "comfyui-with-peft-names": (
        partial(rewritten, change=renamed("transformer.", "diffusion_model.")),
        r"ComfyUI's naming .*rename diffusion_model\. to transformer\.",
    ),
    "kohya-with-diffusers-modules": (
        partial(
            rewritten,
            change=lambda tensors: renamed("lora_transformer_", "lora_unet_")(
                files.kohya_mixture(tensors)
            ),
        ),
        r"kohya's naming with module names.*convert_flux_lora",
    ),
    "without-prefix": (
        partial(rewritten, change=renamed("transformer.", "")),
        r"lack the prefix transformer\..*save_lora_weights",
    ),
    "peft-folder-without-settings": (
        partial(rewritten, change=renamed("transformer.", "base_model.model.")),
        r"PEFT folder without its settings.*adapter_config\.json",
    ),
    "control-lora": (
        partial(
            rewritten,
            change=lambda t: t | {f"transformer.{BLOCK[:-5]}.norm_q.weight": torch.ones(8)},
        ),
        r"control LoRA.*fuse_lora",
    ),
    "pissa": (partial(written, init_lora_weights="pissa"), r"begun with pissa"),
    "biases-of-the-editor": (partial(written, bias="all"), r"biases of the editor.*bias='none'"),
    "with-the-adapters-name": (
        partial(rewritten, change=renamed(".weight", ".default.weight")),
        r"the adapter's own name .*delete that name",
    ),
    "in-a-wrapper": (
        partial(rewritten, change=renamed("transformer.", "state_dict.transformer.")),
        r"a wrapper's prefix .*delete that prefix",
    ),
    "no-tensors": (partial(files.stored, tensors={}), r"holds no tensors at all"),
    # diffusers' conversion of a negative alpha never ends.
    "negative-alpha": (
        partial(files.stored, tensors=files.bfl("lora_unet_", "_", alpha=-2.0)),
        r"\.alpha is \[-2\.0\].*scales of at least 0",
    ),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_cannot_be_applied_is_refused_by_its_name_and_the_tool(
    form: str, tmp_path: Path
) -> None:
    make, words = REFUSED[form]
    place = make(tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        lora.read(place)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "run git lfs pull"),
        (b"<!DOCTYPE html><html>Sign in</html>", "a web page.*Download it again"),
    ],
)
def test_what_lies_in_place_of_an_adapter_is_named(
    content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(InputError, match=f"(?i){words}"):
        lora.read(tmp_path)


def test_an_adapter_that_changes_no_image_is_said(tmp_path: Path) -> None:
    files.stored(tmp_path / "alpha", files.bfl("lora_unet_", "_", alpha=0.0))
    rewritten(tmp_path / "zeros", change=lambda t: {n: v * ("lora_A" in n) for n, v in t.items()})
    for place in ("alpha", "zeros"):
        assert any("has no effect" in note for note in lora.read(tmp_path / place)[1].notes)


def test_alphas_beside_settings_are_refused_as_in_diffusers(tmp_path: Path) -> None:
    written(tmp_path)
    metadata = {"lora_adapter_metadata": json.dumps(files.settings_of(tmp_path))}
    tensors = files.with_alphas(load_file(tmp_path / WEIGHTS_FILE))
    save_file(tensors, tmp_path / WEIGHTS_FILE, metadata)
    with pytest.raises(InputError, match=r"\.alpha tensors and settings in its metadata"):
        lora.read(tmp_path)
    with pytest.raises(ValueError, match="alphas"):
        files.stock(tmp_path)


@pytest.mark.parametrize("wrong", ["module", "width"])
def test_an_adapter_of_another_editor_is_refused_by_what_differs(
    wrong: str, tmp_path: Path
) -> None:
    module = "transformer_blocks.40.attn.to_q" if wrong == "module" else BLOCK
    width = 128 if wrong == "module" else 3072
    place = stored(
        tmp_path,
        {
            f"transformer.{module}.lora_A.weight": torch.ones(4, width),
            f"transformer.{module}.lora_B.weight": torch.ones(width, 4),
        },
    )
    words = {
        "module": r"1 of its 1 modules are not there .*transformer_blocks\.40.*another editor",
        "width": r"takes 3072 numbers and gives 3072 in the adapter, 128 and 128 here",
    }
    with pytest.raises(InputError, match=words[wrong]):
        ours(place)


def test_several_files_in_a_directory_are_asked_about(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"2 files .*a\.safetensors, b\.safetensors.*name one"):
        lora.read(tmp_path)


def test_a_single_file_of_any_name_in_a_directory_is_the_adapter(tmp_path: Path) -> None:
    written(tmp_path)
    expected = ours(tmp_path)
    (tmp_path / WEIGHTS_FILE).rename(tmp_path / "my_style.safetensors")
    assert torch.equal(ours(tmp_path), expected)


# --- damaged files -------------------------------------------------------------------------------


def peft_with(text: str) -> Maker:
    def make(folder: Path) -> Path:
        files.peft_folder(folder)
        (folder / "adapter_config.json").write_text(text)
        return folder

    return make


def metadata_with(change: Callable[[dict[str, Any]], Any]) -> Maker:
    def make(folder: Path) -> Path:
        written(folder)
        settings = change(files.settings_of(folder))
        raw = settings if isinstance(settings, str) else json.dumps(settings)
        tensors = load_file(folder / WEIGHTS_FILE)
        save_file(tensors, folder / WEIGHTS_FILE, {"lora_adapter_metadata": raw})
        return folder

    return make


DAMAGED: dict[str, Maker] = {
    "metadata-no-json": metadata_with(lambda _: "{"),
    "metadata-a-list": metadata_with(lambda _: []),
    "metadata-empty": metadata_with(lambda _: {}),
    "metadata-unknown-field": metadata_with(lambda s: s | {"transformer.new_idea": 1}),
    "metadata-rank-a-word": metadata_with(lambda s: s | {"transformer.r": "four"}),
    "metadata-rank-zero": metadata_with(lambda s: s | {"transformer.r": 0}),
    "metadata-other-rank": metadata_with(lambda s: s | {"transformer.r": 7}),
    "metadata-alpha-null": metadata_with(lambda s: s | {"transformer.lora_alpha": None}),
    "metadata-alpha-nan": metadata_with(lambda s: s | {"transformer.lora_alpha": float("nan")}),
    "metadata-pattern-a-list": metadata_with(lambda s: s | {"transformer.rank_pattern": [1]}),
    "metadata-pattern-no-regex": metadata_with(
        lambda s: s | {"transformer.rank_pattern": {"(": 1}}
    ),
    "metadata-targets-no-regex": metadata_with(lambda s: s | {"transformer.target_modules": "("}),
    "metadata-targets-null": metadata_with(lambda s: s | {"transformer.target_modules": None}),
    "folder-no-json": peft_with("{"),
    "folder-a-list": peft_with("[]"),
    "folder-empty": peft_with(""),
    "folder-other-method": peft_with('{"peft_type": "LOHA"}'),
    "folder-unknown-method": peft_with('{"peft_type": 5}'),
    "folder-rank-a-word": peft_with('{"peft_type": "LORA", "r": "x", "target_modules": ["to_q"]}'),
    "half-a-pair": partial(
        rewritten,
        change=lambda t: {n: v for n, v in t.items() if n != f"transformer.{BLOCK}.lora_B.weight"},
    ),
    "no-numbers": partial(
        rewritten, change=lambda t: {n: torch.full_like(v, float("nan")) for n, v in t.items()}
    ),
    "one-dimension": partial(rewritten, change=lambda t: {n: v.flatten() for n, v in t.items()}),
    "integers": partial(rewritten, change=lambda t: {n: v.int() for n, v in t.items()}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_adapter_is_one_line_with_the_cause(damage: str, tmp_path: Path) -> None:
    place = DAMAGED[damage](tmp_path)
    with pytest.raises(InputError) as caught:
        ours(place)
    message = str(caught.value)
    assert (
        "\n" not in message
        and len(message) < 700
        and (str(tmp_path) in message or "adapter" in message)
    )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("metadata-other-rank", r"settings give \S+ rank 7, and its tensors have 4 and 4"),
        ("metadata-rank-a-word", r"settings without a rank \(r 'four'\)"),
        ("metadata-empty", r"settings without a rank .* or without target_modules"),
        ("half-a-pair", rf"only one matrix of the two of {BLOCK}"),
    ],
)
def test_settings_that_do_not_fit_the_tensors_are_refused_before_an_editor_is_loaded(
    damage: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        lora.read(DAMAGED[damage](tmp_path))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_changed_byte_of_a_header_is_read_or_refused_in_words(
    data: st.DataObject, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    tensors = {f"transformer.{BLOCK}.lora_{s}.weight": torch.ones(2, 2) for s in "AB"}
    metadata = {
        "lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 2})
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata)
    raw = bytearray((folder / WEIGHTS_FILE).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 40))] = data.draw(st.integers(32, 126))
    (folder / WEIGHTS_FILE).write_bytes(bytes(raw))
    try:
        lora.read(folder)
    except InputError as error:
        assert "\n" not in str(error)


# --- as a user meets it --------------------------------------------------------------------------


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64), (40, 90, 200)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_edit_uses_each_form_and_says_what_it_took(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    place = written(tmp_path / "adapter", settings=False, rank_pattern={"to_q": 8})
    edit = ("edit", photo, "--instruction", "remove the red circle", "--steps", 2)
    out = tmp_path / "edited.png"
    code, said, errors = command(monkeypatch, capsys, *edit, "--adapter", place, "--output", out)
    assert code == 0 and out.is_file() and not errors
    assert "note: pytorch_lora_weights.safetensors has no settings" in said


@pytest.mark.parametrize("form", ["lokr", "folder-no-json", "metadata-other-rank", "width"])
def test_edit_ends_with_one_line_for_an_adapter_that_cannot_be_used(
    form: str, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    wide = {f"transformer.{BLOCK}.lora_{s}.weight": torch.ones(3072, 3072) for s in "AB"}
    make = {"width": lambda folder: stored(folder, wide), "lokr": REFUSED["lokr"][0], **DAMAGED}
    place = make[form](tmp_path / "adapter")
    edit = ("edit", photo, "--instruction", "remove the red circle", "--steps", 2)
    out = tmp_path / "edited.png"
    code, _, errors = command(monkeypatch, capsys, *edit, "--adapter", place, "--output", out)
    assert code == 2 and len(errors) == 1 and not out.exists()


def test_the_skeleton_has_the_modules_and_sides_of_the_loaded_transformer() -> None:
    config = FluxKontextConfig(path=str(BUILTIN_WEIGHTS), device="cpu")

    def sides(module: nn.Module) -> dict[str, torch.Size]:
        return {name: p.shape for name, p in module.named_parameters()}

    assert sides(config.skeleton()) == sides(config.load().transformer)
