"""``rl-edit find-masks --editor DIR`` takes an editor of any family."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from commands import Command
from rl_edit.cli.find_masks import _editor_override
from rl_edit.config import load_config


def test_find_masks_edits_by_an_editor_of_another_family_than_the_presets(
    rl_edit: Command, directory: Path, tmp_path: Path
) -> None:
    """A tiny editor is untrained: its edits change the whole image, and the command says so."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    row = {"source": "a.png", "instruction": "make it green"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    code, _, errors = rl_edit(
        *("find-masks", tmp_path / "data.jsonl", "--out", tmp_path / "found"),
        *("--editor", directory, "--samples", 1, "--steps", 2),
    )
    assert code == 2 and "no region was found in any of 1 rows" in errors[0]
    assert not (tmp_path / "found").exists()


def test_a_copy_of_the_presets_editor_keeps_the_presets_settings() -> None:
    path = "somewhere/a-copy, of it"
    override = _editor_override("kontext-rc-grpo", path)
    copied = load_config(preset="kontext-rc-grpo", overrides=[override]).editor
    preset = load_config(preset="kontext-rc-grpo").editor
    assert copied == preset.model_copy(update={"path": path})
