"""Every way in which a run can end, done for real: a full disk, a read-only one, a closed pipe, a
terminal that is closed, a signal, a newer attempt. docs/reliability.md has the table."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from forked import Ended, Forks, Moment, small_disk, until
from rl_edit.editors import lora
from runs import metrics_of, read_json, small_config

ENDLESS = ("train.updates=100000", "train.checkpoint_every=100000")
UPDATES = "train.updates=2"


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def settings(small_editor: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings")
    small_config(small_editor, directory=folder)
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def undisturbed(settings: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = forks.run("train", settings, "--run-dir", folder / "run", UPDATES, folder=folder)
    no_error(ended, 0)
    return adapter(folder / "run")


def adapter(run: Path) -> bytes:
    return (run / "adapter" / lora.WEIGHTS_FILE).read_bytes()


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def writable(disk: Path, really: bool) -> None:
    subprocess.run(["mount", "-o", f"remount,{'rw' if really else 'ro'}", disk], check=True)


def one_line(ended: Ended, code: int) -> str:
    """The line of a run that ended by an error."""
    assert ended.code == code, (ended.code, ended.err)
    assert "Traceback" not in ended.out + ended.err
    (line,) = ended.err.splitlines()
    assert line.startswith("rl-edit: ")
    return line


def no_error(ended: Ended, code: int, *, stopped: bool = False) -> None:
    """Checks that a run which ended without an error says so once, and nothing on stderr."""
    assert (ended.code, ended.err) == (code, "")
    assert "Traceback" not in ended.out and "rl-edit: " not in ended.out
    ends = [line for line in ended.out.splitlines() if "stopped after update" in line]
    assert len(ends) == stopped


def goes_on(forks: Forks, settings: Path, run: Path, folder: Path, adapter_then: bytes) -> None:
    """The same command again ends with the adapter of a run that nothing disturbed."""
    again = ("train", settings, "--run-dir", run, UPDATES, "--auto-resume")
    no_error(forks.run(*again, folder=folder), 0)
    assert adapter(run) == adapter_then
    assert read_json(run / "run.json")["status"] == "done"


# --- the disk -------------------------------------------------------------------------------------

FULL = {
    "claim": (Moment(path="/.lease-1", action="fill"), 4, None),
    "lease": (Moment(path=".LEASE.json.", action="fill"), 4, None),
    "settings": (Moment(path=".config.yaml.", action="fill"), 4, None),
    "record": (Moment(path=".run.json.", action="fill"), 4, None),
    "event": (Moment(path="/events.jsonl", action="fill"), 4, "failed"),
    "metrics": (Moment(path="/metrics.jsonl", action="fill"), 4, "failed"),
    "checkpoint": (Moment(path="step_000002/learner", action="fill"), 4, "failed"),
    "adapter": (Moment(path="/adapter/.", action="fill"), 4, "failed"),
    "last record": (Moment(path=".run.json.", action="fill", nth=2), 0, "done"),
}


@pytest.mark.parametrize("at", FULL)
def test_a_disk_that_fills_up_ends_a_run_with_one_line_and_it_goes_on_when_there_is_space(
    forks: Forks, settings: Path, undisturbed: bytes, tmp_path: Path, at: str
) -> None:
    moment, code, status = FULL[at]
    with small_disk(tmp_path / "disk") as disk:
        run, moment = disk / "run", on(moment, disk)
        command = ("train", settings, "--run-dir", run, UPDATES)
        ended = forks.run(*command, folder=tmp_path, moment=moment)
        assert (disk / "filler").exists()
        if code:
            assert "space" in one_line(ended, code)
        else:
            no_error(ended, code)
        assert (read_json(run / "run.json")["status"] if run.exists() else None) == status
        (disk / "filler").unlink()
        goes_on(forks, settings, run, tmp_path, undisturbed)


def test_a_disk_that_stays_full_ends_a_run_after_three_checkpoints_and_starts_none(
    forks: Forks, settings: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk") as disk:
        run, moment = disk / "run", on(Moment(path="step_000002/learner", action="fill"), disk)
        more = ("train.updates=9", "train.checkpoint_every=1")
        command = ("train", settings, "--run-dir", run, *more)
        line = one_line(forks.run(*command, folder=tmp_path, moment=moment), 4)
        assert "3 checkpoints in a row" in line and "free space" in line
        assert line.endswith("--resume from update 1")
        assert read_json(run / "run.json")["status"] == "failed"
        before = contents(run)
        for other in (("--resume",), ("--run-dir", disk / "other")):
            refused = forks.run(*command, *other, folder=tmp_path)
            assert "refuses a file of 1 MiB (No space left" in one_line(refused, 4)
        assert contents(run) == before and not (disk / "other").exists()
        (disk / "filler").unlink()
        goes_on(forks, settings, run, tmp_path, undisturbed)


def on(moment: Moment, target: Path) -> Moment:
    return Moment(path=moment.path, action=f"{moment.action} {target}", nth=moment.nth)


@pytest.mark.parametrize("path", ["metrics.jsonl", "/adapter/."])
def test_a_disk_that_becomes_read_only_ends_a_run_with_one_line_and_it_goes_on_when_it_is_not(
    forks: Forks, settings: Path, undisturbed: bytes, tmp_path: Path, path: str
) -> None:
    with small_disk(tmp_path / "disk") as disk:
        run, moment = disk / "run", on(Moment(path=path, action="read-only"), disk)
        command = ("train", settings, "--run-dir", run, UPDATES)
        line = one_line(forks.run(*command, folder=tmp_path, moment=moment), 3)
        assert "Read-only file system" in line and "--resume" in line
        assert "run.json cannot be written" in line and line.endswith('still says "running".')
        assert read_json(run / "run.json")["status"] == "running"
        writable(disk, True)
        no_error(forks.run("report", run, folder=tmp_path), 0)
        assert ">ended without a record<" in (run / "report.html").read_text()
        (run / "report.html").unlink()
        goes_on(forks, settings, run, tmp_path, undisturbed)
        before = contents(run)
        writable(disk, False)
        again = forks.run("train", "--run-dir", run, "--resume", folder=tmp_path)
        assert "Read-only" in one_line(again, 2)
        writable(disk, True)
        assert contents(run) == before


def test_a_run_that_is_refused_before_its_first_update_leaves_nothing_behind(
    forks: Forks, settings: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", kilobytes=1100) as disk:
        command = ("train", settings, "--run-dir", disk / "run", "actors.preflight=true")
        line = one_line(forks.run(*command, "lora.rank=64", folder=tmp_path), 4)
        assert "but a checkpoint takes" in line
        assert list(disk.iterdir()) == []


def test_a_directory_that_is_a_mount_point_stays_one_and_is_empty_when_nothing_has_begun(
    forks: Forks, settings: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "run") as run:
        command = ("train", settings, "--run-dir", run, UPDATES)
        moment = Moment(path="/.run.json.", action="raise")
        assert "a fault of the program" in one_line(
            forks.run(*command, folder=tmp_path, moment=moment), 3
        )
        assert run.is_mount() and list(run.iterdir()) == []
        no_error(forks.run(*command, folder=tmp_path), 0)
        assert adapter(run) == undisturbed


# --- the output -----------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["full", "no reader", "closed"])
def test_output_that_cannot_be_written_never_ends_a_run(
    forks: Forks, settings: Path, undisturbed: bytes, tmp_path: Path, output: str
) -> None:
    run = tmp_path / "run"
    command = ("train", settings, "--run-dir", run, UPDATES)
    reader, writer = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    streams: Sequence[int | None] = {
        "full": (full, full, full),
        "no reader": (writer, writer, writer),
        "closed": (None, None, None),
    }[output]
    try:
        assert forks.wait(forks.start(*command, streams=streams)) == 0
        assert read_json(run / "run.json")["status"] == "done" and adapter(run) == undisturbed
        # An error that nobody can read has its exit code nevertheless.
        assert forks.wait(forks.start(*command, streams=streams)) == 2
    finally:
        os.close(writer)
        os.close(full)


def test_a_result_that_cannot_be_printed_is_an_error_with_one_line(
    forks: Forks, tmp_path: Path
) -> None:
    with (tmp_path / "err").open("w") as err, open("/dev/full", "w") as full:
        streams = (full.fileno(), full.fileno(), err.fileno())
        code = forks.wait(forks.start("presets", streams=streams))
    (line,) = (tmp_path / "err").read_text().splitlines()
    assert code == 4 and "no space is left for the output" in line


# --- signals --------------------------------------------------------------------------------------


def test_a_terminal_that_is_closed_stops_a_run_and_its_newest_update_is_saved(
    forks: Forks, settings: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    terminal, theirs = pty.openpty()
    command = ("train", settings, "--run-dir", run, *ENDLESS)
    pid = forks.start(*command, streams=(theirs, theirs, theirs), terminal=True)
    os.close(theirs)
    until(lambda: bool(metrics_of(run)) or not os.read(terminal, 65536))
    os.close(terminal)
    assert forks.wait(pid) == 128 + signal.SIGHUP
    assert read_json(run / "run.json")["status"] == "stopped"
    (saved,) = (run / "checkpoints").glob("step_*")
    assert saved.name == f"step_{len(metrics_of(run)):06d}" and (run / "adapter").is_dir()


@pytest.mark.parametrize(
    ("key", "code"), [(b"\x03", 130), (b"\x1c", 131)], ids=["Ctrl-C", "Ctrl-\\"]
)
def test_a_key_of_the_terminal_stops_a_run_and_its_newest_update_is_saved(
    forks: Forks, settings: Path, tmp_path: Path, key: bytes, code: int
) -> None:
    run = tmp_path / "run"
    terminal, theirs = pty.openpty()
    try:
        command = ("train", settings, "--run-dir", run, *ENDLESS)
        with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
            streams = (theirs, out.fileno(), err.fileno())
            pid = forks.start(*command, streams=streams, terminal=True)
        until(lambda: bool(metrics_of(run)))
        os.write(terminal, key)
        code_seen = forks.wait(pid)
    finally:
        os.close(terminal)
        os.close(theirs)
    texts = [(tmp_path / name).read_text() for name in ("out", "err")]
    no_error(Ended(code=code_seen, out=texts[0], err=texts[1]), code, stopped=True)
    assert read_json(run / "run.json")["status"] == "stopped"
    (saved,) = (run / "checkpoints").glob("step_*")
    assert saved.name == f"step_{len(metrics_of(run)):06d}" and (run / "adapter").is_dir()


@pytest.mark.parametrize(
    ("path", "action", "code", "status"),
    [
        ("/.run.json.", "signal 15", 143, "stopped"),
        ("metrics.jsonl", "signal 1", 129, "stopped"),
        ("metrics.jsonl", "signal 3", 131, "stopped"),
        ("/adapter/.", "signal 15", 0, "done"),
        ("metrics.jsonl", "signal 15;signal 3", 131, "running"),
    ],
    ids=["before the first state", "in an update", "SIGQUIT", "at the end", "twice"],
)
def test_a_signal_at_any_moment_ends_a_run_with_its_exit_code_and_it_goes_on(
    forks: Forks,
    settings: Path,
    undisturbed: bytes,
    tmp_path: Path,
    path: str,
    action: str,
    code: int,
    status: str,
) -> None:
    run = tmp_path / "run"
    command = ("train", settings, "--run-dir", run, UPDATES)
    moment = Moment(path=path, action=action)
    ended = forks.run(*command, folder=tmp_path, moment=moment)
    no_error(ended, code, stopped=status == "stopped")
    assert read_json(run / "run.json")["status"] == status
    goes_on(forks, settings, run, tmp_path, undisturbed)


def test_a_run_below_nohup_does_not_hear_that_its_terminal_is_closed(
    forks: Forks, settings: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ("train", settings, "--run-dir", run, UPDATES)
    moment = Moment(path="metrics.jsonl", action=f"signal {int(signal.SIGHUP)}")
    ended = forks.run(*command, folder=tmp_path, moment=moment, ignored=[signal.SIGHUP])
    no_error(ended, 0)
    assert adapter(run) == undisturbed


# --- other attempts, and faults -------------------------------------------------------------------


@pytest.mark.parametrize("then", ["raise", "signal 15"])
@pytest.mark.parametrize("nth", [2, 4, 12])
def test_an_attempt_that_was_overtaken_writes_and_removes_nothing_however_it_ends(
    forks: Forks, settings: Path, tmp_path: Path, nth: int, then: str
) -> None:
    run = tmp_path / "run"
    moment = Moment(path="/LEASE.json", action=f"overtake {run};{then}", nth=nth)
    command = ("train", settings, "--run-dir", run, UPDATES)
    line = one_line(forks.run(*command, folder=tmp_path, moment=moment), 75)
    assert "belongs to attempt" in line
    for name in ("run.json", "config.yaml", "events.jsonl"):
        assert read_json(run / name) == {"of": "the newer attempt"}
    assert not (run / "adapter").exists() and not list(run.glob("*traceback*"))


def test_an_attempt_that_is_refused_after_it_was_overtaken_leaves_the_directory_to_the_newer_one(
    forks: Forks, settings: Path, tmp_path: Path
) -> None:
    # A checkpoint does not fit, so this attempt would remove what it has made.
    with small_disk(tmp_path / "disk", kilobytes=1100) as disk:
        run, more = disk / "run", ("actors.preflight=true", "lora.rank=64")
        moment = Moment(path="/.run.json.", action=f"overtake {run}")
        command = ("train", settings, "--run-dir", run, *more)
        line = one_line(forks.run(*command, folder=tmp_path, moment=moment), 75)
        assert "belongs to attempt" in line
        for name in ("run.json", "config.yaml", "events.jsonl"):
            assert read_json(run / name) == {"of": "the newer attempt"}
        assert read_json(run / "LEASE.json")["epoch"] == 2


def test_a_fault_of_the_program_leaves_the_newest_update_and_one_line(
    forks: Forks, settings: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ("train", settings, "--run-dir", run, UPDATES, "train.checkpoint_every=9")
    moment = Moment(path="metrics.jsonl", action="raise", nth=3)
    line = one_line(forks.run(*command, folder=tmp_path, moment=moment), 3)
    assert "a fault of the program" in line and f"The traceback is in {run}" in line
    assert read_json(run / "run.json")["status"] == "failed"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000002"]
    ended = forks.run("train", "--run-dir", run, "--resume", folder=tmp_path)
    no_error(ended, 0)
    assert adapter(run) == undisturbed


def test_damaged_lines_are_set_aside_counted_and_said_and_the_run_goes_on(
    forks: Forks, settings: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ("train", settings, "--run-dir", run)
    assert forks.run(*command, "train.updates=1", folder=tmp_path).code == 0
    for name in ("metrics.jsonl", "events.jsonl"):
        with (run / name).open("ab") as file:
            file.write(b'{"update": \xff}\n' + b"\0" * 4096 + b"\n" + b"[" * 100_000 + b"\n{\n")
    ended = forks.run("report", run, folder=tmp_path)
    assert (ended.code, ended.out) == (0, f"{run / 'report.html'}\n")
    assert ended.err == "".join(
        f"note: 4 lines of {run / name} cannot be read (damaged) and are left out\n"
        for name in ("metrics.jsonl", "events.jsonl")
    )
    ended = forks.run(*command, "--resume", UPDATES, folder=tmp_path)
    no_error(ended, 0)
    assert adapter(run) == undisturbed
    for name in ("metrics.jsonl", "events.jsonl"):
        assert f"4 lines of {name} cannot be read" in ended.out
    assert [line["update"] for line in metrics_of(run)] == [0, 1]
