"""``rl_edit.training``: a run from the library, and the path from the command to the optimizer's
step."""

from __future__ import annotations

import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.controller import run_log
from learner.controller.lease import Lease
from learner.learner import Learner
from rl_edit.cli import main
from rl_edit.errors import Fenced, Interrupted, ResourcesInfeasible
from rl_edit.method.update import TrainingFailed
from rl_edit.training import Silent, train
from runs import events_of, metrics_of, read_json, small_config

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("rl_edit", "actors", "learner")


def project_files(frames: traceback.StackSummary) -> list[str]:
    """The project's own frames as ``file function``, outermost first."""
    project_frames = []
    for frame in frames:
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ROOMS:
            project_frames.append(f"{path.relative_to(ROOT).as_posix()} {frame.name}")
    return project_frames


def test_seven_files_lead_from_the_command_to_the_optimizer_step(
    small_editor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts the frames of a real run. Awaited coroutines stand on the same stack as the
    command."""
    seen: list[list[str]] = []
    step = torch.optim.AdamW.step

    def recorded(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        seen.append(project_files(traceback.extract_stack()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    config = small_config(small_editor, "train.updates=1", "actors.runtime=inline")
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    arguments = ["train", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["rl-edit", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    (frames,) = seen
    files = {frame.split()[0] for frame in frames}
    assert {"rl_edit/cli/train.py", "rl_edit/training.py", "rl_edit/method/update.py"} <= files
    assert len(files) <= 7, "\n".join(frames)
    assert len(frames) <= 15, "\n".join(frames)


def test_a_run_is_trained_from_the_library_and_its_observer_sees_every_update(
    small_editor: str, tmp_path: Path
) -> None:
    class Watcher(Silent):
        def __init__(self) -> None:
            self.lines: list[str] = []
            self.updates: list[int] = []
            self.calls: list[str] = []

        def starting(self, config: Any) -> None:
            self.calls.append("starting")

        def ended(self) -> None:
            self.calls.append("ended")

        def say(self, text: str) -> None:
            self.lines.append(text)

        def update_done(self, metrics: dict[str, Any]) -> None:
            self.updates.append(metrics["update"])

    watcher = Watcher()
    config = small_config(small_editor, "train.updates=2")
    weights = train(config, tmp_path / "run", observer=watcher)
    assert weights is not None and weights.id.step == 2
    assert watcher.updates == [0, 1] == [line["update"] for line in metrics_of(tmp_path / "run")]
    assert watcher.calls[0] == "starting" and watcher.calls[-1] == "ended"
    assert "2 updates x" in watcher.lines[0] and str(weights.id) in watcher.lines[-1]


def test_a_dry_run_returns_nothing_and_writes_nothing(small_editor: str, tmp_path: Path) -> None:
    assert train(small_config(small_editor), tmp_path / "run", dry_run=True) is None
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "at", "words", "checkpoints"),
    [
        ("__init__", 0, "the learner could not be made: RuntimeError: out of memory", []),
        ("export", 0, "the workers cannot go on", []),
        ("ratio", 0, "the workers cannot go on", []),
        ("learn", 2, "the learner failed in update 2", ["step_000002"]),
    ],
)
def test_a_learner_in_this_process_that_raises_fails_the_run_with_a_sentence(
    small_editor: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    at: int,
    words: str,
    checkpoints: list[str],
) -> None:
    sound = getattr(Learner, method)

    def raising(self: Learner, *args: Any, **kwargs: Any) -> Any:
        if at and self.policy.updates_done < at:
            return sound(self, *args, **kwargs)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Learner, method, raising)
    run = tmp_path / "run"
    more = ("actors.preflight=true", "train.checkpoint_every=3")
    with pytest.raises(TrainingFailed, match=words):
        train(small_config(small_editor, *more), run)
    record = read_json(run / "run.json")
    assert record["status"] == "failed" and words in record["reason"]
    # What was done before is saved, and an event names the update.
    assert [path.name for path in (run / "checkpoints").glob("*")] == checkpoints
    failed = [event["during"] for event in events_of(run, "learner_failed")]
    assert failed == (["update 2"] if method == "learn" else [])
    assert read_json(run / "LEASE.json")["ended"] is not None


def test_a_run_without_memory_for_its_learner_leaves_nothing_and_needs_no_resume_the_next_time(
    small_editor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(self: Learner, *args: Any, **kwargs: Any) -> None:
        torch.empty(1 << 60)

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(Learner, "__init__", too_large)
        with pytest.raises(ResourcesInfeasible, match="can't allocate memory"):
            train(small_config(small_editor), run)
    assert not run.exists()
    train(small_config(small_editor, "train.updates=1"), run)
    # Of a run that has begun a refusal removes nothing.
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*.json")}
    with monkeypatch.context() as patched:
        patched.setattr(Learner, "__init__", too_large)
        with pytest.raises(ResourcesInfeasible):
            train(small_config(small_editor, "train.updates=2"), run, resume=True)
    assert before and all(path.read_bytes() == content for path, content in before.items())
    assert read_json(run / "run.json")["status"] == "done" and len(metrics_of(run)) == 1


def test_a_signal_while_the_learner_is_made_ends_the_run_before_anything_begins(
    small_editor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = Learner.__init__

    def interrupted(self: Learner, *args: Any, **kwargs: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        sound(self, *args, **kwargs)

    monkeypatch.setattr(Learner, "__init__", interrupted)
    run = tmp_path / "run"
    with pytest.raises(Interrupted) as stopped:
        train(small_config(small_editor), run)
    assert stopped.value.number == signal.SIGINT and read_json(run / "run.json")["adapter"] is None
    assert not events_of(run, "started") and events_of(run, "finished")[0]["status"] == "stopped"
    assert not (run / "adapter").exists()


def test_an_observer_that_raises_does_not_undo_the_record_of_an_update(
    small_editor: str, tmp_path: Path
) -> None:
    class Faulty(Silent):
        def __init__(self, method: str) -> None:
            setattr(self, method, self._raise)

        def _raise(self, *_: Any) -> None:
            raise KeyError("column")

    run = tmp_path / "run"
    train(small_config(small_editor, "train.updates=1"), run)
    for method, updates in (("starting", 1), ("update_done", 2)):
        more = small_config(small_editor, "train.updates=2")
        with pytest.raises(KeyError):
            train(more, run, resume=True, observer=Faulty(method))
        # An attempt that added nothing leaves the record as it was, another describes itself.
        record = read_json(run / "run.json")
        assert (record["status"], record["updates"]) == (
            ("done", 1) if method == "starting" else ("failed", 2)
        )
        assert len(metrics_of(run)) == updates
        assert read_json(run / "LEASE.json")["ended"] is not None


def test_an_attempt_overtaken_between_an_event_and_its_metrics_writes_no_line_of_them(
    small_editor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = run_log.update_metrics

    def overtaken(update: int, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if update == 1:
            Lease.take(tmp_path / "run")
        return measure(update, *args, **kwargs)

    monkeypatch.setattr(run_log, "update_metrics", overtaken)
    with pytest.raises(Fenced, match="writes nothing more there"):
        train(small_config(small_editor), tmp_path / "run")
    assert [line["update"] for line in metrics_of(tmp_path / "run")] == [0]
