"""Editor directories as they are in the wild: what is missing or damaged is said before loading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxKontextPipeline
from safetensors.torch import load_file, save_file

from kontext import random_pipeline
from rl_edit.editors import FluxKontextConfig, editor_config, inspect_editor, load_editor
from rl_edit.errors import InputError

Break = Callable[[Path], None]


@pytest.fixture(scope="module")
def pipeline() -> FluxKontextPipeline:
    return random_pipeline()


def settings(path: Path | str, **more: object) -> FluxKontextConfig:
    return editor_config({"path": str(path), "device": "cpu", **more})


def rename_weights(folder: Path, variant: str) -> None:
    (weights,) = folder.glob("*.safetensors")
    weights.rename(weights.with_name(weights.name.replace(".safe", f".{variant}.safe")))


def only_pickled(root: Path) -> None:
    (weights,) = (root / "vae").glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))


def quantised(root: Path) -> None:
    (weights,) = (root / "transformer").glob("*.safetensors")
    tensors = {name: value.to(torch.float8_e4m3fn) for name, value in load_file(weights).items()}
    save_file(tensors, weights)


def only_gguf(root: Path) -> None:
    (weights,) = (root / "transformer").glob("*.safetensors")
    weights.rename(weights.with_suffix(".gguf"))


def cut_short(root: Path) -> None:
    (weights,) = (root / "text_encoder_2").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])


def left_as_pointer(root: Path) -> None:
    (weights,) = (root / "transformer").glob("*.safetensors")
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def without_a_shard(root: Path) -> None:
    (weights,) = (root / "transformer").glob("*.safetensors")
    weights.unlink()
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    (root / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps(index)
    )


def shards_without_index(root: Path) -> None:
    (weights,) = (root / "vae").glob("*.safetensors")
    weights.rename(weights.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))


def two_variants(root: Path) -> None:
    rename_weights(root / "vae", "fp16")
    rename_weights(root / "transformer", "bf16")


def damaged_tokenizer(root: Path) -> None:
    (root / "tokenizer_2" / "tokenizer.json").write_text('{"version": "1.0", "trunc')


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda root: shutil.rmtree(root / "vae"), ("the folder vae/ is missing",)),
        (lambda root: shutil.rmtree(root / "tokenizer"), ("the folder tokenizer/ is missing",)),
        (
            lambda root: (root / "scheduler" / "scheduler_config.json").unlink(),
            ("the folder scheduler/ is missing or empty",),
        ),
        (
            lambda root: (root / "transformer" / "config.json").unlink(),
            ("transformer/config.json is missing",),
        ),
        (
            lambda root: (root / "tokenizer_2" / "tokenizer.json").unlink(),
            ("tokenizer_2/ has no vocabulary",),
        ),
        (
            lambda root: next((root / "text_encoder").glob("*.safetensors")).unlink(),
            ("text_encoder/ has no weights: model.safetensors is missing",),
        ),
        (only_pickled, ("vae/ has no weights: only pickled ones", "safe_serialization=True")),
        (only_gguf, ("transformer/ has no weights: only quantised ones (.gguf)", "bf16")),
        (quantised, ("transformer/", "is quantised (F8_E4M3), which no adapter can be trained on")),
        (cut_short, ("text_encoder_2/model.safetensors is damaged or cut short",)),
        (left_as_pointer, ("transformer/", "a Git LFS pointer: run git lfs pull")),
        (without_a_shard, ("names 2 files, of which 2 are missing (first: part-1.safetensors)",)),
        (shards_without_index, ("its parts lie there without", ".safetensors.index.json")),
        (two_variants, ("transformer: bf16; vae: fp16", "no one of them loads every component")),
        (damaged_tokenizer, ("tokenizer_2/tokenizer.json is no JSON",)),
        (
            lambda root: (root / "vae" / "config.json").write_text("[]"),
            ("config.json of vae or transformer", "is none of a FluxKontextPipeline"),
        ),
    ],
)
def test_an_editor_that_would_not_load_is_refused_before_it_is_loaded(
    small_editor: str, tmp_path: Path, break_it: Break, words: tuple[str, ...]
) -> None:
    root = Path(shutil.copytree(small_editor, tmp_path / "editor"))
    break_it(root)
    with pytest.raises(InputError) as refusal:
        inspect_editor(settings(root))
    message = str(refusal.value)
    assert [word for word in words if word not in message] == []
    assert str(root) in message
    with pytest.raises(InputError):
        load_editor(settings(root))


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_an_editor_of_only_one_variant_is_loaded_with_it_and_a_note_says_so(
    pipeline: FluxKontextPipeline, tmp_path: Path, max_shard_size: str
) -> None:
    pipeline.save_pretrained(tmp_path, variant="fp16", max_shard_size=max_shard_size)
    (note,) = inspect_editor(settings(tmp_path)).notes
    assert "exist only as variant fp16" in note and "transformer" in note
    loaded = load_editor(settings(tmp_path)).transformer.state_dict()
    plain = pipeline.transformer.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in plain.items())


def test_of_two_variants_the_one_of_the_number_format_is_loaded(
    pipeline: FluxKontextPipeline, tmp_path: Path
) -> None:
    for variant in ("bf16", "fp16"):
        pipeline.save_pretrained(tmp_path, variant=variant)
    (note,) = inspect_editor(settings(tmp_path, dtype="bfloat16")).notes
    assert "only as variant bf16" in note


def test_a_variant_of_one_component_is_loaded_beside_plain_weights_of_the_others(
    small_editor: str, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(small_editor, tmp_path / "editor"))
    rename_weights(root / "vae", "fp16")
    (note,) = inspect_editor(settings(root)).notes
    assert note.startswith("vae of the editor")
    assert load_editor(settings(root)).transformer is not None


def test_a_complete_editor_in_parts_needs_no_note(
    pipeline: FluxKontextPipeline, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path, max_shard_size="20KB")
    assert inspect_editor(settings(tmp_path)).notes == ()


def test_a_part_that_lacks_tensors_of_its_index_is_refused(
    pipeline: FluxKontextPipeline, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path, max_shard_size="20KB")
    first, second, *_ = sorted((tmp_path / "vae").glob("*.safetensors"))
    shutil.copy(first, second)
    with pytest.raises(InputError, match=r"vae/.*00002.*lacks \d+ tensors that its index names"):
        inspect_editor(settings(tmp_path))


def test_a_revision_of_a_directory_is_refused(small_editor: str) -> None:
    with pytest.raises(InputError, match=r"revision is 'v2'.* has no revisions"):
        inspect_editor(settings(small_editor, revision="v2"))


def test_an_index_without_a_class_is_refused(small_editor: str, tmp_path: Path) -> None:
    root = Path(shutil.copytree(small_editor, tmp_path / "editor"))
    (root / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match=r"names no pipeline in its model_index\.json"):
        inspect_editor(settings(root))


def test_a_half_downloaded_editor_of_the_hub_is_refused_offline_with_the_command(
    small_editor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache as huggingface_hub lays it out, without the folder of one component."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--some--editor", "a" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = Path(shutil.copytree(small_editor, repository / "snapshots" / commit))
    assert inspect_editor(settings("some/editor")).pixels_per_token == 8
    shutil.rmtree(snapshot / "text_encoder_2")
    with pytest.raises(InputError, match=r"text_encoder_2/ is missing .* hf download some/editor"):
        inspect_editor(settings("some/editor"))
