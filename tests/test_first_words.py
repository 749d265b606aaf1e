"""Misspelt runs, presets and files: the message says first what is not there and what is meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from commands import Command, assert_refused
from data_files import an_image, saved
from rl_edit.run_directory import no_run_at


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of runs, ``demo`` and ``photographs``, and one that holds none."""
    for name in ("demo", "photographs"):
        (tmp_path / "runs" / name / "adapter").mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text("name: x\n")
    (tmp_path / "runs" / "notes").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("runs/dmeo", "no run at runs/dmeo: there is no such directory. Did you mean runs/demo?"),
        ("rnus/demo", "no run at rnus/demo: there is no such directory. Did you mean runs/demo?"),
        ("rnus/dmeo", "no run at rnus/dmeo: there is no such directory. Did you mean runs/demo?"),
        ("runs/notes", "no run at runs/notes: the directory has no config.yaml"),
        ("runs/demo/adapter", "It lies in the run runs/demo: did you mean that?"),
        ("runs/demo/config.yaml", "it is a file, not a directory. It lies in the run runs/demo"),
        ("nowhere/at/all", "no run at nowhere/at/all: there is no such directory."),
    ],
)
def test_a_path_without_a_run_names_the_run_that_was_meant(
    runs: Path, path: str, words: str
) -> None:
    assert words in no_run_at(Path(path))


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("path", ["runs", "runs/completely-different"])
def test_where_no_name_is_near_the_runs_that_there_are_are_listed(path: str) -> None:
    message = no_run_at(Path(path))
    assert "Runs are in " in message and "runs/demo" in message and "runs/photographs" in message


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--resume", "--run-dir"),
        ("train", "--auto-resume", "--run-dir"),
        ("evaluate",),
        ("report",),
        ("compare",),
    ],
    ids=" ".join,
)
def test_every_verb_of_a_run_says_that_the_directory_is_not_there_and_names_the_nearest(
    rl_edit: Command, runs: Path, arguments: tuple[str, ...]
) -> None:
    outcome = rl_edit(*arguments, "runs/dmeo")
    assert_refused(outcome, runs / "dmeo", "no run at runs/dmeo", "Did you mean runs/demo?")
    (line,) = outcome[2]
    # The cause before the remedy, and no word of a preset before either.
    assert "preset" not in line.partition("runs/dmeo")[0]


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("nothing says what to run", "--preset tiny-rc-grpo", "rl-edit presets")),
        (("tiny-rc-grpo",), ("a preset has this name", "--preset tiny-rc-grpo")),
        (("--preset", "tiny-rc-gpro"), ("'tiny-rc-gpro'", "did you mean 'tiny-rc-grpo'?")),
        (("--preset", "photos.yaml"), ("photos.yaml is a file", "without --preset")),
        (("photo.yaml",), ("no config file at photo.yaml", "did you mean photos.yaml?")),
        (("runs/demo",), ("directory of a run", "--run-dir runs/demo --resume")),
        (("runs/notes",), ("no config file at runs/notes", "it is a directory")),
        (("--preset", "tiny-rc-grpo", "photos.yaml"), ("photos.yaml", "tiny-rc-grpo", "keep one")),
        (("absent.yaml",), ("no config file at absent.yaml", "rl-edit presets")),
    ],
)
def test_train_says_what_to_give_in_place_of_what_was_given(
    rl_edit: Command, tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    (tmp_path / "photos.yaml").write_text("name: photos\n")
    assert_refused(rl_edit("train", *arguments), tmp_path / "runs" / "run", *words)


def test_an_unreadable_directory_costs_the_suggestion_and_not_the_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    opened: Callable[..., object] = refuse
    monkeypatch.setattr(Path, "iterdir", opened)
    assert no_run_at(tmp_path / "absent").endswith(
        "no such directory. Run rl-edit train to make one."
    )


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ("runs/dmeo/adapter", "Did you mean runs/demo/adapter?"),
        ("runs/demo/adaptre", "Did you mean runs/demo/adapter?"),
        ("runs/demo", "Did you mean runs/demo/adapter?"),
        ("elsewhere/entirely", "Point --adapter at RUN/adapter."),
    ],
)
def test_a_path_without_an_adapter_names_the_adapter_that_was_meant(
    rl_edit: Command, runs: Path, adapter: str, words: str
) -> None:
    saved(runs / "photo.png", an_image(40, 40))
    outcome = rl_edit("edit", "runs/photo.png", "--instruction", "remove it", "--adapter", adapter)
    assert_refused(outcome, None, f"no adapter at {adapter}", words)
