"""The seam of editors: a family is chosen by kind, and no other room knows one."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from torch import nn

from rl_edit.config import RunConfig, load_config
from rl_edit.editors import (
    BUILTIN_WEIGHTS,
    FAMILIES,
    EditorFacts,
    EditorSettings,
    FluxKontextConfig,
    editor_config,
    inspect_editor,
    load_editor,
    lora,
)
from rl_edit.errors import InputError
from test_walls import PRODUCT, name_of, words_of

FAMILY_WORDS = re.compile(
    r"flux|kontext|klein|(?<![a-z0-9])t5(?![a-z0-9])|prompt_embeds|pooled_proj|qwen_?image",
    re.IGNORECASE,
)
NAMES_OF_EDITORS = ("builtin:tiny-kontext", "tiny-kontext", "kontext-rc-grpo")
"""Values that a user writes: an editor and a preset."""


class Incomplete(EditorSettings):
    """Cannot be loaded."""

    kind: Literal["test_editor_seam:Incomplete"] = "test_editor_seam:Incomplete"

    def inspect(self) -> EditorFacts:
        return EditorFacts(pixels_per_token=8)


def citations(tree: ast.Module) -> set[str]:
    """Notes of the methods: they cite the configurations that papers released, by model."""
    return {
        part.value
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "note"
        for part in ast.walk(node.value)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    }


@pytest.mark.parametrize(
    "path",
    [path for path in PRODUCT if not name_of(path).startswith("rl_edit/editors/")],
    ids=name_of,
)
def test_no_other_room_knows_a_family_of_editors(path: Path) -> None:
    tree = ast.parse(path.read_text())
    cited = citations(tree) if name_of(path) == "rl_edit/method/algorithms.py" else set()
    assert [
        f"{name_of(path)}:{line} says {word!r}"
        for line, word in words_of(tree)
        if word not in cited and word not in NAMES_OF_EDITORS and FAMILY_WORDS.search(word)
    ] == []


def test_a_configuration_needs_no_model_library() -> None:
    code = (
        "import sys; from rl_edit.config import load_config; load_config(preset='tiny-rc-grpo');"
        "print([m for m in ('diffusers', 'transformers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_kind_is_found_from_the_index_and_stands_in_the_written_configuration() -> None:
    config = load_config(preset="tiny-rc-grpo")
    assert isinstance(config.editor, FluxKontextConfig) and config.editor.kind == "flux_kontext"
    assert "kind: flux_kontext" in config.to_yaml()
    named = load_config(preset="tiny-rc-grpo", overrides=["editor.kind=flux_kontext"])
    assert named == config


def test_the_kind_of_a_built_in_family_is_no_part_of_a_run_s_identity() -> None:
    """Runs of the version before have none; the files of their editor name the family."""
    assert "kind" not in load_config(preset="tiny-rc-grpo").identity()["editor"]


def test_an_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(
        InputError, match=r"editor\.kind: .*'flux_contexts', did you mean 'flux_kontext'"
    ):
        load_config(preset="tiny-rc-grpo", overrides=["editor.kind=flux_contexts"])


@pytest.mark.parametrize("find", [load_editor, inspect_editor])
def test_a_directory_of_an_unknown_class_is_refused_with_what_can_be_trained(
    find, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "editor"
    shutil.copytree(BUILTIN_WEIGHTS, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "LongCatImageEditPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    config = editor_config({"path": str(folder)})
    with pytest.raises(
        InputError,
        match=r"is a LongCatImageEditPipeline, this version trains FluxKontextPipeline, .*:Class",
    ):
        find(config)


def test_a_released_checkpoint_on_the_hub_is_known_by_its_id_without_a_network() -> None:
    for family in FAMILIES:
        for name in family.released:
            config = editor_config({"path": name})
            assert isinstance(config, family) and config.resolution == 1024
    base, distilled = (
        editor_config({"path": f"black-forest-labs/FLUX.2-klein-{size}"})
        for size in ("base-4B", "4B")
    )
    assert base.guided and not distilled.guided


def test_a_directory_of_another_family_is_refused_with_the_kind_to_set() -> None:
    config = editor_config({"path": str(BUILTIN_WEIGHTS), "kind": "flux2_klein"})
    with pytest.raises(
        InputError,
        match=r"is a FluxKontextPipeline, and editor\.kind is flux2_klein, which runs a "
        r"Flux2KleinPipeline: set editor\.kind=flux_kontext",
    ):
        inspect_editor(config)


def test_a_family_that_lacks_a_method_is_refused_with_its_name() -> None:
    settings = {
        "editor": {"kind": "test_editor_seam:Incomplete"},
        "rewards": {"p": {"kind": "psnr"}},
    }
    with pytest.raises(ValueError, match="lacks load, which editor asks for"):
        RunConfig.model_validate(settings)


def test_targets_that_fit_no_module_are_refused_with_the_names_that_there_are() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(InputError, match=r"lora\.targets .*fit no module .*\(0, 2\)"):
        lora.attach(module, lora.LoraConfig(), seed=0)
    assert not lora.parameters(module)
