"""The command line: bad input is exit code 2, one line with value and remedy, and no files."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commands import Command, assert_refused
from rl_edit.types import Candidates
from runs import PRESERVATION, small_config

ROOT = Path(__file__).parent.parent


def not_a_number(candidates: Candidates) -> list[float]:
    return [0.5, math.nan, 0.25, 0.125][: len(candidates.images)]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.udpates=5", ("'train.udpates'", "did you mean 'updates'?")),
        ("optimiser.lr=5", ("'optimiser'",)),
        (
            "rollout.group_size=4",
            ("num_anchors 4", "group_size 4", "lower the anchors or raise the group"),
        ),
        ("rollout.group_size=1", ("group_size is 1", "Raise rollout.group_size")),
        ("rewards.judge.weight=-0.5", ("weight(-0.5)", "Use 0")),
        ("data.path=no/such/folder", ("no/such/folder", "does not exist", "builtin:shapes")),
        ("editor.path=/no/such/editor", ("/no/such/editor", "save_pretrained")),
    ],
)
def test_bad_settings_are_refused(
    rl_edit: Command, small_editor: str, tmp_path: Path, override: str, words: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    outcome = rl_edit(
        "train",
        "--preset",
        "tiny-rc-grpo",
        "--run-dir",
        run,
        f"editor.path={small_editor}",
        "actors.runtime=inline",
        override,
    )
    assert_refused(outcome, run, *words)


def image(path: Path, *, height: int = 20, width: int = 30) -> Path:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def mask(path: Path, value: int | None = None, *, height: int = 20, width: int = 30) -> None:
    pixels = (
        np.zeros((height, width), dtype=np.uint8)
        if value is None
        else np.full((height, width), value, dtype=np.uint8)
    )
    if value is None:
        pixels[4:9, 5:15] = 255
    Image.fromarray(pixels).save(path)


def no_mask(data: Path) -> None:
    (data / "a_mask.png").unlink()


def no_instruction(data: Path) -> None:
    (data / "a.txt").unlink()


def other_size(data: Path) -> None:
    mask(data / "a_mask.png", height=21)


def empty_mask(data: Path) -> None:
    mask(data / "a_mask.png", 0)


def full_mask(data: Path) -> None:
    mask(data / "a_mask.png", 255)


def no_image(data: Path) -> None:
    (data / "a.png").write_text("this is a letter, not an image")


def missing_row(data: Path) -> None:
    (data / "metadata.jsonl").write_text(
        '{"source": "gone.png", "instruction": "remove it", "mask": "a_mask.png"}\n'
    )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_mask, ("a.png", "has no mask", "a_mask.png")),
        (no_instruction, ("a.png", "has no instruction", "a.txt")),
        (other_size, ("a_mask.png is 30x21", "a.png is 30x20", "same width and height")),
        (empty_mask, ("a_mask.png is empty or full", "data.empty_mask=skip")),
        (full_mask, ("a_mask.png is empty or full", "data.mask_polarity")),
        (no_image, ("a.png",)),
        (missing_row, ("metadata.jsonl line 1", "gone.png", "not found")),
    ],
)
def test_bad_data_is_refused(
    rl_edit: Command,
    small_editor: str,
    tmp_path: Path,
    damage: Callable[[Path], None],
    words: tuple[str, ...],
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    for name in ("a", "b"):
        image(data / f"{name}.png")
        mask(data / f"{name}_mask.png")
        (data / f"{name}.txt").write_text("remove the scratch")
    damage(data)
    settings = (f"editor.path={small_editor}", "actors.runtime=inline", f"data.path={data}")
    assert_refused(
        rl_edit("train", "--preset", "tiny-rc-grpo", "--run-dir", run, *settings), run, *words
    )


def test_a_reward_that_gives_nan_is_refused_and_leaves_no_run(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    term = {"kind": "python", "function": f"{__name__}:not_a_number", "low": 0.0, "high": 1.0}
    small_config(
        small_editor, rewards={"preservation": PRESERVATION, "own": term}, directory=tmp_path
    )
    run = tmp_path / "run"
    assert_refused(
        rl_edit("train", tmp_path / "run.yaml", "--run-dir", run),
        run,
        "own: gave nan",
        "not a finite number",
        "Fix the reward function",
    )


def test_a_file_cannot_be_a_run_directory(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    config = small_config(small_editor, directory=tmp_path)
    assert config.name == "small"
    path = tmp_path / "run.yaml"
    before = path.read_bytes()
    assert_refused(rl_edit("train", path, "--run-dir", path), None, "is a file")
    assert path.read_bytes() == before


def test_a_dry_run_writes_nothing(rl_edit: Command, small_editor: str, tmp_path: Path) -> None:
    small_config(small_editor, directory=tmp_path)
    code, out, err = rl_edit(
        "train", tmp_path / "run.yaml", "--run-dir", tmp_path / "run", "--dry-run"
    )
    assert (code, list(err)) == (0, [])
    assert "3 updates x 2 groups x 4 candidates" in " ".join(out.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere.png", "--instruction", "remove it"), ("nowhere.png",)),
        (("photo.png", "--instruction", "  "), ("--instruction is empty",)),
        (
            ("photo.png", "--instruction", "remove it", "--adapter", "nowhere"),
            ("no adapter at nowhere",),
        ),
        (("photo.png", "--instruction", "remove it", "--output", "out.xyz"), ("out.xyz", ".png")),
        (
            ("photo.png", "--instruction", "remove it", "--output", "no/such/out.png"),
            ("no/such", "not a directory"),
        ),
        (("letter.png", "--instruction", "remove it"), ("letter.png",)),
    ],
)
def test_edit_refuses_what_it_cannot_read_or_write(
    rl_edit: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    image(tmp_path / "photo.png")
    (tmp_path / "letter.png").write_text("dear reader")
    assert_refused(rl_edit("edit", *arguments), None, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letter.png", "photo.png"]


def test_the_lists_name_every_preset_and_method(rl_edit: Command) -> None:
    from rl_edit.config import presets
    from rl_edit.method.algorithms import METHODS

    assert all(name in rl_edit("presets")[1] for name in presets())
    assert all(name in rl_edit("methods")[1] for name in METHODS)


def test_make_shapes_writes_what_train_reads(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    code, _, _ = rl_edit("dataset", "make-shapes", tmp_path / "shapes", "--count", "4")
    assert code == 0
    small_config(small_editor, directory=tmp_path)
    code, out, _ = rl_edit(
        "train",
        tmp_path / "run.yaml",
        "--run-dir",
        tmp_path / "run",
        "--dry-run",
        f"data.path={tmp_path / 'shapes'}",
    )
    assert code == 0
    assert "from 3 tasks" in " ".join(out.split())


def test_a_process_says_one_line_without_a_trace_and_loads_no_model_library_to_do_so(
    tmp_path: Path,
) -> None:
    program = (
        "import sys\nfrom rl_edit.cli import main\n"
        "try:\n    main()\nfinally:\n"
        "    libraries = {'diffusers', 'transformers', 'peft', 'ray', 'accelerate'}\n"
        "    print(sorted(libraries & set(sys.modules)))\n"
    )
    arguments = [
        sys.executable,
        "-c",
        program,
        "train",
        "--preset",
        "tiny-rc-grpo",
        "train.udpates=5",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        arguments,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "did you mean 'updates'?" in line
    assert done.stdout.strip() == "[]"
    assert list(tmp_path.iterdir()) == []
