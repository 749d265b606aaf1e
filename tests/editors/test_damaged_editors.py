"""Directories of editors that were changed or lost a part are refused, for every family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conformance import Family
from safetensors.torch import load_file, save_file

from rl_edit.editors import editor_config, inspect_editor, load_editor
from rl_edit.errors import InputError


@pytest.fixture
def copied(directory: Path, tmp_path: Path) -> Path:
    """A copy of the tiny editor, to be damaged."""
    return Path(shutil.copytree(directory, tmp_path / "an editor, copied"))


def test_a_text_encoder_that_lacks_a_tensor_is_refused_and_not_filled_at_random(
    family: Family, copied: Path
) -> None:
    encoders = [part for part in ("text_encoder", "mllm") if (copied / part).is_dir()]
    (weights,) = (copied / encoders[0]).glob("*.safetensors")
    tensors = load_file(weights)
    lost = next(name for name in sorted(tensors) if "layers" in name and name.endswith("weight"))
    del tensors[lost]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{encoders[0]}/ of .* lacks 1 tensors .*{lost[-20:]}"):
        load_editor(editor_config({"path": str(copied), **family.settings}))


def test_a_transformer_of_fewer_layers_than_its_configuration_is_refused(
    family: Family, copied: Path
) -> None:
    file = copied / "transformer" / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "num_layers": settings["num_layers"] + 1}))
    with pytest.raises(InputError, match=r"transformer/ of .* tensors of its own configuration"):
        load_editor(editor_config({"path": str(copied), **family.settings}))


def test_an_index_without_a_vae_or_with_another_scheduler_is_refused_before_weights(
    family: Family, copied: Path
) -> None:
    file = copied / "model_index.json"
    index = json.loads(file.read_text())
    config = editor_config({"path": str(copied), **family.settings})
    file.write_text(json.dumps({name: value for name, value in index.items() if name != "vae"}))
    with pytest.raises(InputError, match=r"model_index\.json names no vae"):
        inspect_editor(config)
    file.write_text(json.dumps({**index, "scheduler": ["diffusers", "DDIMScheduler"]}))
    with pytest.raises(InputError, match="its scheduler is a DDIMScheduler"):
        inspect_editor(config)


def test_an_editor_without_the_vocabulary_of_its_tokenizer_is_refused_before_weights(
    family: Family, copied: Path
) -> None:
    for name in ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model", "vocab.txt"):
        for file in copied.rglob(name):
            file.unlink()
    with pytest.raises(InputError, match=r"has no vocabulary \(tokenizer\.json\)"):
        inspect_editor(editor_config({"path": str(copied), **family.settings}))
