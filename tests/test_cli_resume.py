"""Run directories on the command line: new, finished, stopped, resumed, or of another run."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from commands import Command, assert_refused
from rl_edit.data import shapes
from rl_edit.data.compbench import write_compbench
from rl_edit.editors import lora
from rl_edit.training import train
from runs import events_of, metrics_of, read_json, small_config

ROOT = Path(__file__).parent.parent


def test_an_existing_run_is_not_overwritten_without_resume(rl_edit: Command, trained: Path) -> None:
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert_refused(
        rl_edit("train", trained / "config.yaml", "--run-dir", trained),
        None,
        str(trained),
        "--resume",
        "another --run-dir",
    )
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_resuming_with_other_settings_is_refused_and_changes_nothing(
    rl_edit: Command, trained: Path
) -> None:
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    outcome = rl_edit(
        "train",
        trained / "config.yaml",
        "--run-dir",
        trained,
        "--resume",
        "train.learning_rate=0.2",
    )
    assert_refused(outcome, None, "belongs to another run", "new --run-dir")
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def on_disk(small_editor: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The run directory of one update on tasks that lie on the disk, and these tasks."""
    directory = tmp_path_factory.mktemp("on_disk")
    write_compbench((shapes.task("train", index) for index in range(4)), directory / "tasks")
    train(
        small_config(small_editor, "train.updates=1", f"data.path={directory / 'tasks'}"),
        directory / "run",
        resume=False,
    )
    return directory / "run", directory / "tasks"


@pytest.mark.parametrize("other", ["data", "editor"])
def test_resuming_on_other_data_or_another_editor_is_refused_and_changes_nothing(
    rl_edit: Command, on_disk: tuple[Path, Path], tmp_path: Path, other: str
) -> None:
    run, _ = on_disk
    write_compbench((shapes.task("train", index, seed=1) for index in range(4)), tmp_path / "tasks")
    override = {
        "data": f"data.path={tmp_path / 'tasks'}",
        "editor": "editor.path=builtin:tiny-kontext",
    }[other]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    outcome = rl_edit("train", "--run-dir", run, "--resume", "train.updates=2", override)
    assert_refused(outcome, None, "belongs to another run", f"content.{other}")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train.updates=1",), ("has done 2 updates", "train.updates is 1")),
        (
            ("train.updates=3", "train.ema_decay=0.9", "--allow-config-drift", "train.ema_decay"),
            ("no average of result", "ema_decay"),
        ),
        (
            ("train.updates=3", "lora.rank=2", "--allow-config-drift", "lora.rank"),
            ("lora settings",),
        ),
    ],
)
def test_a_resume_that_cannot_go_on_leaves_what_the_run_says_of_itself(
    rl_edit: Command,
    small_editor: str,
    tmp_path: Path,
    arguments: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    run = tmp_path / "run"
    train(small_config(small_editor, "train.updates=2"), run, resume=False)
    before = {name: (run / name).read_bytes() for name in ("config.yaml", "run.json")}
    outcome = rl_edit("train", "--run-dir", run, "--resume", *arguments)
    assert_refused(outcome, None, *words)
    assert {name: (run / name).read_bytes() for name in before} == before
    assert rl_edit("train", "--run-dir", run, "--resume", "train.updates=3")[0] == 0
    assert [line["update"] for line in metrics_of(run)] == [0, 1, 2]


def test_a_run_that_learnt_nothing_is_a_failure_that_says_why(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    small_config(
        small_editor, "train.updates=2", "algorithm.credit.min_spread=10", directory=tmp_path
    )
    arguments = ("train.updates=2", "algorithm.credit.min_spread=10")
    code, _, (line,) = rl_edit(
        "train", tmp_path / "run.yaml", "--run-dir", tmp_path / "run", *arguments
    )
    assert (
        code == 3
        and "nothing was learnt in 2 updates" in line
        and "4 times spread: no reward term differs" in line
    )
    assert read_json(tmp_path / "run" / "run.json")["status"] == "failed"
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_run_goes_on_where_its_data_and_its_editor_have_moved_to(
    rl_edit: Command, on_disk: tuple[Path, Path], small_editor: str, tmp_path: Path
) -> None:
    run, tasks = (Path(shutil.copytree(path, tmp_path / path.name)) for path in on_disk)
    editor = shutil.copytree(small_editor, tmp_path / "editor")
    places = (f"data.path={tasks}", f"editor.path={editor}")
    assert rl_edit("train", "--run-dir", run, "--resume", "train.updates=2", *places)[0] == 0
    assert [line["update"] for line in metrics_of(run)] == [0, 1]


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_run_that_is_stopped_saves_what_it_did_and_resumes_to_the_bytes_of_one_that_was_not(
    rl_edit: Command, small_editor: str, tmp_path: Path, number: signal.Signals
) -> None:
    run, complete = tmp_path / "run", tmp_path / "complete"
    small_config(small_editor, "train.updates=1", directory=tmp_path)
    arguments = [
        sys.executable,
        "-m",
        "rl_edit",
        "train",
        str(tmp_path / "run.yaml"),
        "--run-dir",
        str(run),
    ]
    endless = ["train.updates=100000", "train.checkpoint_every=100000"]
    process = subprocess.Popen(
        [*arguments, *endless], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not metrics_of(run):
            assert process.poll() is None and time.monotonic() < deadline, "no update was done"
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (128 + number, "")
    assert out.endswith(f"rl-edit train --run-dir {run} --resume\n")
    record, done = read_json(run / "run.json"), len(metrics_of(run))
    assert record["status"] == "stopped"
    assert [path.name for path in run.glob("checkpoints/step_*")] == [f"step_{done:06d}"]
    assert (
        str(lora.read(run / "adapter")[0].id) == record["adapter"] == metrics_of(run)[-1]["adapter"]
    )
    assert rl_edit("train", "--run-dir", run, "--resume", f"train.updates={done + 1}")[0] == 0
    assert (
        rl_edit("train", tmp_path / "run.yaml", "--run-dir", complete, f"train.updates={done + 1}")[
            0
        ]
        == 0
    )
    files = [directory / "adapter" / lora.WEIGHTS_FILE for directory in (run, complete)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [line["adapter"] for line in metrics_of(run)] == [
        line["adapter"] for line in metrics_of(complete)
    ]


def test_there_must_be_something_to_resume(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    small_config(small_editor, directory=tmp_path)
    run = tmp_path / "run"
    assert_refused(
        rl_edit("train", tmp_path / "run.yaml", "--run-dir", run, "--resume"),
        run,
        "nothing to resume",
        "drop --resume",
    )


def test_resume_without_a_run_says_how_to_name_one(rl_edit: Command) -> None:
    for option in ("--resume", "--auto-resume"):
        assert_refused(rl_edit("train", option), None, "nothing to continue", "--run-dir")


def test_the_same_command_with_auto_resume_starts_a_run_and_then_continues_it(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    small_config(small_editor, directory=tmp_path)
    again = (
        "train",
        tmp_path / "run.yaml",
        "--run-dir",
        tmp_path / "run",
        "--auto-resume",
        "train.updates=2",
    )
    assert rl_edit(*again)[0] == 0
    begun = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert rl_edit(*again)[0] == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == begun
    assert [
        e["updates_done"]
        for e in events_of(tmp_path / "run", "started") + events_of(tmp_path / "run", "resumed")
    ] == [0, 2]


def test_a_run_leaves_its_settings_its_record_its_metrics_and_a_stock_adapter(
    trained: Path, small_editor: str
) -> None:
    record = read_json(trained / "run.json")
    assert record["status"] == "done"
    assert record["config_sha256"] == small_config(small_editor, "train.learning_rate=0.1").sha256()
    assert {"torch", "diffusers", "ray", "python"} <= set(record["versions"])
    weights, lora_config = lora.read(trained / "adapter")
    assert str(weights.id) == record["adapter"] == metrics_of(trained)[-1]["adapter"]
    assert (lora_config.rank, lora_config.alpha) == (4, 8)
    assert [path.name for path in trained.glob("checkpoints/step_*")] == ["step_000001"]


def test_more_updates_continue_a_finished_run(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    small_config(small_editor, "train.updates=1", directory=tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(
            yaml.safe_dump(yaml.safe_load((tmp_path / "run.yaml").read_text()))
        )
    assert (
        rl_edit("train", tmp_path / "one.yaml", "--run-dir", tmp_path / "one", "train.updates=2")[0]
        == 0
    )
    assert (
        rl_edit("train", tmp_path / "two.yaml", "--run-dir", tmp_path / "two", "train.updates=1")[0]
        == 0
    )
    assert rl_edit("train", "--run-dir", tmp_path / "two", "--resume", "train.updates=2")[0] == 0
    assert (
        lora.read(tmp_path / "one" / "adapter")[0].id
        == lora.read(tmp_path / "two" / "adapter")[0].id
    )
