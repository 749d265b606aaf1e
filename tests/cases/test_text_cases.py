"""Instructions that an editor cannot read are counted and shown; defaults are the editor's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_files import saved, write_folder
from rl_edit.config import load_config
from rl_edit.data import DataConfig, Dataset, open_dataset
from rl_edit.editors import BUILTIN_WEIGHTS, editor_config
from rl_edit.errors import InputError
from runs import command

LONG = "remove the red circle and " * 8 + "paint the square blue"
BUILT_IN = editor_config({})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four rows that the built-in editor reads, but for one that is too long."""
    root = write_folder(tmp_path / "data", num_rows=4)
    for index in range(4):
        (root / f"p{index}.txt").write_text("remove the red circle")
    (root / "p1.txt").write_text(LONG)
    return root


def opened(root: Path, editor: Any = BUILT_IN, **options: Any) -> Dataset:
    config = DataConfig(heldout_path=str(root), **options)
    return open_dataset(config, "heldout", text=editor)


def kinds(dataset: Dataset) -> dict[str, int]:
    return {notice.kind: notice.count for notice in dataset.notices}


def test_an_instruction_that_is_cut_is_counted_with_the_words_that_are_lost(folder: Path) -> None:
    dataset = opened(folder)
    (notice,) = dataset.notices
    assert (notice.kind, notice.count, len(dataset)) == ("instructions-too-long", 1, 4)
    assert "1 of 4 instructions are longer than the 32 tokens" in notice.message
    # 31 of its words are read: six times five, and one; the end mark is the 32nd token.
    assert f"never sees '{' '.join(LONG.split()[31:])[:60]}" in notice.examples[0]
    assert notice.examples[0].startswith("p1.png")


def test_the_lost_end_is_exactly_what_the_tokenizer_leaves_out() -> None:
    from rl_edit.editors.location import locate
    from rl_edit.editors.text_reading import tokenizer_of

    (reading,) = BUILT_IN.read_text([LONG])
    tokenizer = tokenizer_of(locate(BUILT_IN.path), "tokenizer_2")
    ids = tokenizer(LONG, truncation=True, max_length=32)["input_ids"]
    read = tokenizer.decode(ids, skip_special_tokens=True)
    assert f"{read} {reading.lost}".split() == LONG.split()


def test_rows_that_are_too_long_are_left_out_or_refused_on_request(folder: Path) -> None:
    skipped = opened(folder, too_long="skip")
    assert len(skipped) == 3 and kinds(skipped) == {"instructions-too-long": 1}
    assert skipped.fingerprint != opened(folder).fingerprint
    with pytest.raises(InputError, match=r"1 problem in 4 rows.*never sees.*too_long=skip or cut"):
        opened(folder, too_long="error")
    for path in folder.glob("*.txt"):
        path.write_text(LONG)
    # Nothing would be left.
    with pytest.raises(InputError, match=r"4 problems in 4 rows.*data\.too_long=cut"):
        opened(folder, too_long="skip")
    with pytest.raises(InputError, match=r"data\.strict"):
        opened(folder, strict=True)


def test_words_of_other_languages_and_unlearnt_words_are_named(folder: Path) -> None:
    for index, text in enumerate(("entferne den roten Kreis", "把红色的圆去掉", "remove the disc")):
        (folder / f"p{index}.txt").write_text(text)
    (notice,) = opened(folder).notices
    assert (notice.kind, notice.count) == ("unknown-words", 3)
    shown = "; ".join(sorted(notice.examples))
    assert "entferne, roten, Kreis" in shown and "把红色的圆去掉" in shown and "disc" in shown
    assert "red" not in shown.replace("entferne", "")


def test_the_words_of_the_built_in_world_are_all_known() -> None:
    dataset = open_dataset(DataConfig(num_train=64), "train")
    readings = BUILT_IN.read_text([dataset[index].instruction for index in range(64)])
    assert not any(reading.unknown or reading.lost or reading.remark for reading in readings)


def test_the_second_encoder_is_named_when_only_it_is_exceeded(folder: Path) -> None:
    (folder / "p1.txt").write_text("remove the red circle and " * 20)
    (notice,) = opened(folder, editor_config({"max_text_tokens": 512})).notices
    assert notice.kind == "instructions-half-read"
    assert "1 of 4 instructions exceed the 77 tokens of the editor's CLIP encoder" in notice.message


def test_a_family_that_says_nothing_about_text_is_not_checked(folder: Path) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from own_editor import PatchConfig

    assert opened(folder, PatchConfig()).notices == ()
    assert PatchConfig().misfit(4000, 3000) == ""


def test_every_verb_shows_the_findings_before_it_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    arguments = ("train", "--preset", "tiny-rc-grpo", "--dry-run", f"data.path={folder}")
    code, out, error = command(
        monkeypatch, capsys, *arguments, f"data.heldout_path={folder}", "actors.runtime=inline",
        "actors.num_learner=1", "train.allow_unrewarded_edit=true",
    )  # fmt: skip
    assert code == 0, error
    assert "1 of 4 instructions are longer than the 32 tokens" in out + "".join(error)


def test_an_edit_says_first_what_the_editor_cannot_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import numpy as np

    photograph = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    saved(tmp_path / "photo.png", photograph)
    code, out, _ = command(
        monkeypatch, capsys, "edit", tmp_path / "photo.png", "--instruction",
        "make the sky dramatic", "--output", tmp_path / "out.png", "--steps", "2",
    )  # fmt: skip
    purpose, words, result = out.splitlines()
    assert code == 0
    assert "drawn scenes of coloured shapes" in purpose and "400 x 300 px" in purpose
    assert "dramatic" in words and "does not know" in words
    assert result.startswith(str(tmp_path / "out.png"))
    # A scene of its own world needs no remark.
    saved(tmp_path / "scene.png", open_dataset(DataConfig(), "train")[0].source.numpy())
    code, out, _ = command(
        monkeypatch, capsys, "edit", tmp_path / "scene.png", "--instruction",
        "remove the red circle", "--output", tmp_path / "out.png", "--steps", "2",
    )  # fmt: skip
    assert code == 0 and len(out.splitlines()) == 1


def described_editor(root: Path, **files: dict[str, Any]) -> Path:
    """A directory with the configuration files of an editor, and no weights."""
    for name, content in files.items():
        path = root / name / ("tokenizer_config.json" if "tokenizer" in name else "config.json")
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    return root


def test_defaults_are_those_of_the_editor_and_not_of_the_built_in_one(tmp_path: Path) -> None:
    local = described_editor(
        tmp_path / "local",
        vae={"sample_size": 768},
        tokenizer_2={"model_max_length": 256},
        text_encoder_2={"torch_dtype": "float32"},
    )
    kontext = described_editor(
        tmp_path / "kontext",
        vae={"sample_size": 1024},
        tokenizer_2={"model_max_length": 512},
        text_encoder_2={"torch_dtype": "bfloat16", "relative_attention_max_distance": 128},
    )
    for path, expected, steps in (
        ("builtin:tiny-kontext", (64, 32, "float32"), 12),
        ("black-forest-labs/FLUX.1-Kontext-dev", (1024, 512, "bfloat16"), 28),
        (str(kontext), (1024, 512, "bfloat16"), 28),
        (str(local), (768, 256, "float32"), 28),
    ):
        config = editor_config({"path": path})
        assert (config.resolution, config.max_text_tokens, config.dtype) == expected, path
        assert config.edit_steps == steps
    assert editor_config({"path": str(kontext), "resolution": 512}).resolution == 512


def test_a_copy_of_the_built_in_editor_keeps_its_numbers(tmp_path: Path) -> None:
    shutil.copytree(BUILTIN_WEIGHTS, tmp_path / "copy")
    config = editor_config({"path": str(tmp_path / "copy")})
    assert config.model_dump(exclude={"path"}) == BUILT_IN.model_dump(exclude={"path"})


def test_a_preset_follows_the_editor_and_a_run_records_its_numbers(tmp_path: Path) -> None:
    built_in = load_config(None, preset="tiny-rc-grpo")
    assert (built_in.editor.resolution, built_in.editor.max_text_tokens) == (64, 32)
    other = load_config(None, preset="tiny-rc-grpo", overrides=["editor.path=ORG/NAME"])
    assert (other.editor.resolution, other.editor.dtype) == (1024, "bfloat16")
    # What a run directory holds is complete: later defaults do not change it.
    (tmp_path / "config.yaml").write_text(other.to_yaml())
    assert "resolution: 1024" in other.to_yaml()
    assert load_config(tmp_path / "config.yaml") == other


def test_the_policy_of_long_texts_is_no_part_of_a_runs_identity() -> None:
    one, other = (
        load_config(None, preset="tiny-rc-grpo", overrides=[f"data.too_long={policy}"])
        for policy in ("cut", "error")
    )
    assert one.sha256() == other.sha256()
