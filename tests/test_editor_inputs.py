"""Inputs of the FLUX.1-Kontext editor, and places where there is no editor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kontext import shipped_editor, task_of
from rl_edit.editors import (
    BUILTIN,
    BUILTIN_WEIGHTS,
    EditorFamily,
    FluxKontextConfig,
    editor_identity,
    inspect_editor,
    load_editor,
    location,
)
from rl_edit.editors.flux_kontext import FluxKontextEditor
from rl_edit.errors import InputError

Find = Callable[[EditorFamily], object]


@pytest.fixture
def editor() -> FluxKontextEditor:
    return shipped_editor()


def test_encode_refuses_a_image_that_is_not_on_the_canvas(editor: FluxKontextEditor) -> None:
    with pytest.raises(
        ValueError, match="t0 is 60x64 px, not a multiple of 8: fit it to the canvas first"
    ):
        editor.encode(task_of(60, 64))


def test_encoding_and_loading_are_deterministic(editor: FluxKontextEditor) -> None:
    again = load_editor(editor.config)
    first, second = editor.encode(task_of()), again.encode(task_of())
    assert torch.equal(first.source_latents, second.source_latents)
    assert set(first.tensors) == {"prompt_embeds", "pooled", "text_rows"}
    for name, value in first.tensors.items():
        assert torch.equal(value, second.tensors[name]), name
    assert first.grid == (8, 8)


def test_a_loaded_editor_is_frozen(editor: FluxKontextEditor) -> None:
    models = (
        editor.pipeline.transformer,
        editor.pipeline.vae,
        editor.pipeline.text_encoder,
        editor.pipeline.text_encoder_2,
    )
    assert not any(
        parameter.requires_grad or module.training
        for module in models
        for parameter in module.parameters()
    )


def test_inspection_agrees_with_the_loaded_editor(editor: FluxKontextEditor) -> None:
    assert inspect_editor(editor.config).pixels_per_token == editor.pixels_per_token == 8


@pytest.mark.parametrize("find", [load_editor, inspect_editor])
def test_a_missing_built_in_editor_says_how_to_make_it(
    find: Find, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(location, "BUILTIN_WEIGHTS", tmp_path / "gone")
    with pytest.raises(
        InputError, match=r"built-in editor is missing at .*gone: .*rl-edit pretrain"
    ):
        find(FluxKontextConfig(path=BUILTIN))


@pytest.mark.parametrize("find", [load_editor, inspect_editor])
@pytest.mark.parametrize("path", ["/no/such/editor", "./nowhere", "kontext", "a/b/c"])
def test_a_path_that_is_nothing_says_what_an_editor_can_be(find: Find, path: str) -> None:
    with pytest.raises(
        InputError,
        match=rf"no editor at {path}: give a directory written by save_pretrained, a Hugging Face",
    ):
        find(FluxKontextConfig(path=path))


@pytest.mark.parametrize("find", [load_editor, inspect_editor])
def test_a_directory_that_is_no_editor_names_the_remedy(find: Find, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(
        InputError,
        match=r"(?s)cannot load the editor .*Is it a directory written by .*save_pretrained\?",
    ):
        find(FluxKontextConfig(path=str(tmp_path)))


@pytest.mark.parametrize("find", [load_editor, inspect_editor])
def test_an_editor_on_the_hub_that_cannot_be_reached_names_the_remedy(find: Find) -> None:
    with pytest.raises(
        InputError,
        match=r"cannot load the editor no-one/no-such-editor from the .*hub: .*Check the id and",
    ):
        find(FluxKontextConfig(path="no-one/no-such-editor"))


def test_another_kind_of_pipeline_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    for part in ("vae", "transformer"):
        (tmp_path / part).mkdir()
    (tmp_path / "transformer" / "config.json").write_text(
        json.dumps({"num_layers": 2, "num_single_layers": 2})
    )
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [8, 8]}))
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline"})
    )
    with pytest.raises(
        InputError, match="is a StableDiffusionPipeline, this version trains FluxKontextPipeline"
    ):
        inspect_editor(FluxKontextConfig(path=str(tmp_path)))


def test_an_editor_on_disk_is_what_its_files_hold_wherever_they_lie(
    tmp_path: Path,
) -> None:
    copy = Path(shutil.copytree(BUILTIN_WEIGHTS, tmp_path / "copy"))
    same = editor_identity(FluxKontextConfig(path=str(BUILTIN_WEIGHTS)))
    assert editor_identity(FluxKontextConfig(path=str(copy))) == same
    (weights,) = (copy / "transformer").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert editor_identity(FluxKontextConfig(path=str(copy))) != same


def test_an_editor_on_the_hub_is_its_repository_and_revision() -> None:
    assert editor_identity(FluxKontextConfig(path="someone/editor")) == "someone/editor@main"
    assert (
        editor_identity(FluxKontextConfig(path="someone/editor", revision="abc"))
        == "someone/editor@abc"
    )
