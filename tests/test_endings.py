"""Every verb ends with one line and an exit code, whatever happened; a traceback is for --debug."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ValidationError

from commands import Command
from rl_edit.cli import ending
from rl_edit.errors import ClusterUnreachable, InputError, Interrupted
from rl_edit.method.update import TrainingFailed

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def tracebacks_go_with_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))


class Strict(BaseModel):
    rank: int


def refused_by_pydantic() -> ValidationError:
    with pytest.raises(ValidationError) as refused:
        Strict.model_validate({"rank": "many"})
    return refused.value


def ended(
    error: BaseException, capsys: pytest.CaptureFixture[str], *, debug: bool = False
) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exited:
        try:
            raise error
        except BaseException as caught:
            ending.leave(caught, debug=debug)
    assert isinstance(exited.value.code, int)
    return exited.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("no\nsuch key"), 2, "no such key"),
        (TrainingFailed("nothing was learnt"), 3, "nothing was learnt"),
        (ClusterUnreachable("no answer"), 5, "no answer"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
        (Interrupted(signal.SIGTERM), 143, "stopped by SIGTERM"),
        (MemoryError(), 4, "memory did not suffice (MemoryError)"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"), 4, "editor.micro_batch"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 4, "no space is left for /x/y"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 2, "/x/y: Permission denied"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/x"), 2, "a file where a file"),
        (refused_by_pydantic(), 2, "rank cannot be used: Input should be a valid integer"),
        (KeyError("alpha"), 1, "internal error (KeyError: 'alpha') in "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_is_one_line_with_its_exit_code(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    number, text = ended(error, capsys)
    assert number == code
    (line,) = text.splitlines()
    assert line.startswith("rl-edit: ") and words in line


def test_the_traceback_of_an_unexpected_error_is_in_the_file_that_the_line_names(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ending.Unexpected) as unexpected, ending.within_run(tmp_path):
        raise KeyError("alpha")
    code, text = ended(unexpected.value, capsys)
    (file,) = tmp_path.glob("*.txt")
    assert code == 3 and str(file) in text and "--debug" in text
    assert "KeyError: 'alpha'" in file.read_text() and "Traceback" in file.read_text()


def test_a_known_error_of_a_run_keeps_its_exit_code(tmp_path: Path) -> None:
    with pytest.raises(InputError), ending.within_run(tmp_path):
        raise InputError("no")


def test_a_reader_that_went_away_is_no_error_to_speak_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ended(BrokenPipeError(errno.EPIPE, "Broken pipe"), capsys) == (1, "")


def test_debug_shows_the_traceback_and_is_accepted_before_and_after_the_verb(
    rl_edit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in (("--debug", "show-config", "nowhere"), ("show-config", "nowhere", "--debug")):
        code, _, err = rl_edit(*arguments)
        assert code == 2 and err[0].startswith("Traceback") and err[-1].startswith("rl-edit: ")
    assert rl_edit("show-config", "nowhere")[2][0].startswith("rl-edit: ")
    monkeypatch.setenv("RL_EDIT_DEBUG", "1")
    assert rl_edit("show-config", "nowhere")[2][0].startswith("Traceback")
    assert ending.without_debug(["edit", "--", "--debug"])[0] == ["edit", "--", "--debug"]


def unparsable(folder: Path) -> Path:
    path = folder / "bad.yaml"
    path.write_text("a: [1,\n")
    return path


def binary(folder: Path) -> Path:
    path = folder / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00a")
    return path


def directory(folder: Path) -> Path:
    path = folder / "directory.yaml"
    path.mkdir()
    return path


def dangling(folder: Path) -> Path:
    path = folder / "link.yaml"
    path.symlink_to(folder / "nowhere")
    return path


def run_of_directories(folder: Path) -> Path:
    run = folder / "run"
    for name in ("run.json", "config.yaml", "evaluation.json"):
        (run / name).mkdir(parents=True)
    return run


def torn_run(folder: Path) -> Path:
    run = folder / "run"
    run.mkdir()
    for name in ("run.json", "evaluation.json", "metrics.jsonl"):
        (run / name).write_bytes(b"{oops \xff")
    (run / "config.yaml").write_bytes(b"\xff\xfe")
    return run


VERBS: dict[str, Callable[[Path], list[Any]]] = {
    "train": lambda bad: ["train", bad, "--dry-run"],
    "resume": lambda bad: ["train", "--run-dir", bad, "--resume"],
    "evaluate": lambda bad: ["evaluate", bad],
    "report": lambda bad: ["report", bad],
    "compare": lambda bad: ["compare", bad, bad, "--against", bad],
    "edit": lambda bad: ["edit", bad, "--instruction", "x"],
    "audit-reward": lambda bad: ["audit-reward", bad],
    "bench-reward": lambda bad: ["bench-reward", bad],
    "show-config": lambda bad: ["show-config", bad],
    "find-masks": lambda bad: ["find-masks", bad, "--out", bad.parent / "out"],
    "make-shapes": lambda bad: ["dataset", "make-shapes", bad / "below"],
    "export": lambda bad: ["export", bad, "--out", bad.parent / "out"],
    "make-tiny": lambda bad: ["editors", "make-tiny", "flux_kontext", bad / "below"],
    "structure": lambda bad: ["structure", "--out", bad / "below" / "x.svg"],
}


@pytest.mark.parametrize(
    "make", [unparsable, binary, directory, dangling, run_of_directories, torn_run]
)
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_answers_a_bad_argument_with_one_line(
    rl_edit: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    make: Callable[[Path], Path],
) -> None:
    bad = make(tmp_path)
    # Where a directory is what the verb wants, it can do its work.
    if verb in ("make-shapes", "make-tiny", "structure") and make not in (unparsable, binary):
        pytest.skip("a place to write to")
    monkeypatch.chdir(tmp_path)
    code, out, err = rl_edit(*VERBS[verb](bad))
    text = "\n".join(err)
    assert code == 2, text
    assert "Traceback" not in text + out and "internal error" not in text
    assert len([line for line in err if line.startswith("rl-edit: ")]) == 1


# A shell that starts the tests in the background has them ignore Ctrl-C; processes inherit that.
INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "rl_edit.cli.verbs":
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Finder)
from rl_edit.cli import main
main()
"""


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGTERM, "stopped by SIGTERM"), (signal.SIGINT, "Ctrl-C")]
)
def test_a_signal_during_the_imports_is_one_line_and_its_exit_code(
    number: signal.Signals, words: str
) -> None:
    done = python("-c", INTERRUPTED.format(number=int(number)))
    assert done.returncode == 128 + number
    (line,) = done.stderr.splitlines()
    assert line.startswith("rl-edit: ") and words in line


@pytest.mark.parametrize("text", ["raise RuntimeError('of the user')", "x = 1"])
def test_a_users_module_in_the_place_of_an_installed_one_is_named(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "typer.py").write_text(text)
    done = python("-m", "rl_edit", "presets", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"{tmp_path / 'typer.py'} comes before the installed package" in line
    assert "env -u PYTHONPATH" in line


def test_output_without_a_reader_neither_ends_a_run_nor_fills_the_terminal() -> None:
    program = (
        "import sys\nfrom rl_edit.cli import output\n"
        "with output.lasting():\n"
        "    for _ in range(3): print('x', flush=True)\n"
        "    print('the end', file=sys.stderr)\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as nowhere:
        done = python("-c", program, stdout=nowhere)
    first, last = done.stderr.splitlines()
    assert done.returncode == 0 and last == "the end" and "the run goes on" in first


def python(
    *arguments: str, stdout: Any = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )


def test_letters_that_a_terminal_cannot_show_become_escapes() -> None:
    program = "from rl_edit.cli import ending\nending.show_any_letter()\nprint('把 red')\n"
    done = python("-c", program, PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "\\u628a red\n")


def test_a_closed_output_ends_without_a_traceback() -> None:
    import subprocess
    import sys

    ended = subprocess.run(
        f"{sys.executable} -m rl_edit presets >&-", shell=True, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (0, "")
