"""Ends a command: one line on stderr, an exit code, a traceback on request.

Nothing here imports a library: it must work when an import is what failed.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import sysconfig
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NoReturn

from rl_edit.cli import output
from rl_edit.errors import (
    BAD_INPUT,
    FAILED,
    INFEASIBLE,
    ClusterLost,
    InputError,
    Interrupted,
    brief,
    lacks_memory,
    lacks_space,
    place,
)

INTERNAL = 1
"""Exit code of an unexpected error. Within a run it is that of a failed training."""

RUN_FILE = "run.json"
"""As in :mod:`rl_edit.run_record`, which imports pydantic."""

LIBRARIES = r"(ray|torch|transformers|diffusers|peft|huggingface_hub|accelerate|safetensors)\b"


class Unexpected(Exception):
    """An error that is not the user's, within a run. Its cause is the error itself."""

    def __init__(self, directory: Path) -> None:
        super().__init__(f"unexpected error of the run in {directory}")
        self.directory = directory


class NotImportable(Exception):
    """The verbs cannot be imported: the installation or its surroundings are at fault."""

    exit_code = BAD_INPUT

    def __init__(self, error: Exception) -> None:
        super().__init__(f"cannot start ({brief(error)}). {_import_remedy(error)}")
        self.__cause__ = error


def require_directory() -> None:
    """Checks that the current directory is there.

    Raises:
        InputError: it was removed, as those of jobs and of temporary folders are.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise InputError(
            f"the current directory is gone ({error.strerror}): cd to another one, then run the "
            "command again."
        ) from None


def without_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Takes ``--debug`` out, wherever it stands before a bare ``--``."""
    words = list(arguments)
    end = words.index("--") if "--" in words else len(words)
    remaining = [word for word in words[:end] if word != "--debug"]
    debug = len(remaining) < end or os.environ.get("RL_EDIT_DEBUG", "0") not in ("", "0")
    return remaining + words[end:], debug


def quiet(*, debug: bool) -> None:
    """Keeps the libraries' advice to programmers off the terminal.

    Warnings about what the user brings stay, and Python's own -W and PYTHONWARNINGS decide first.
    """
    if debug or sys.warnoptions:
        return
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.simplefilter("ignore", category)
    # PEFT's patterns that fit no module are RuntimeWarnings; lora files' own notes say the same.
    for kind in (UserWarning, RuntimeWarning):
        warnings.filterwarnings("ignore", category=kind, module=LIBRARIES)


def show_any_letter() -> None:
    """Lets a terminal without Unicode show other letters as escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        # A stream of a test or a host program may be of another kind.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def within_run(directory: Path) -> Iterator[None]:
    """Marks an error that was not expected as one of a run, with its directory."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "exit_code"):
            raise
        raise Unexpected(directory) from error


def leave(error: BaseException, *, debug: bool) -> NoReturn:
    """Prints one line on stderr and ends the process."""
    directory = error.directory if isinstance(error, Unexpected) else None
    # Ray wraps an error of an actor; its cause is what the user has to read.
    cause = error.__cause__ if isinstance(error, Unexpected) else getattr(error, "cause", None)
    line, code = _line(cause or error, within_run=directory is not None)
    # Python's own place for what is to be said beside an error.
    notes = [*getattr(error, "__notes__", ()), *getattr(error.__cause__, "__notes__", ())]
    line = " ".join([line, *notes]).strip()
    if debug:
        output.show("".join(traceback.format_exception(error)).rstrip())
    elif not (hasattr(error, "exit_code") or isinstance(error, _QUIET)):
        line += f" The traceback is in {_saved(error, directory)}; --debug shows it."
    if line:
        output.show(f"rl-edit: {line}")
    if isinstance(error, ClusterLost):
        # Ray's C++ part may crash at the end of a process whose cluster is gone.
        output.flush()
        os._exit(code)
    sys.exit(code)


# Their cause is known without a traceback.
_QUIET = (KeyboardInterrupt, BrokenPipeError)


def _line(error: BaseException, *, within_run: bool) -> tuple[str, int]:
    """Returns the line and the exit code of an error."""
    if isinstance(error, Interrupted):
        return "" if error.reported else str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "stopped by Ctrl-C", 130  # as a shell reports a process that SIGINT ended
    code: int | None = getattr(error, "exit_code", None)
    if code is not None:
        return " ".join(str(error).split()), code
    if lacks_memory(error):
        return (
            f"memory did not suffice ({brief(error)}). Lower editor.micro_batch or "
            "editor.resolution, end other programs, or use a larger machine or GPU.",
            INFEASIBLE,
        )
    if isinstance(error, ImportError) and (remedy := _shadow_remedy(error)):
        # Ray is imported when a run starts, not before.
        return f"cannot go on ({brief(error)}). {remedy}", BAD_INPUT
    if isinstance(error, OSError) and (known := _of_the_system(error)):
        return known
    if isinstance(error, ValueError) and callable(problems := getattr(error, "errors", None)):
        # pydantic's own text has a line and a link for every problem.
        first = problems()[0]
        name = ".".join(str(part) for part in first["loc"])
        return f"{name or type(error).__name__} cannot be used: {first['msg']}.", BAD_INPUT
    return (
        f"internal error ({brief(error)}) in {place(error) or 'no known place'}; this is a fault "
        "of rl-edit or of a library, please report it.",
        FAILED if within_run else INTERNAL,
    )


def _of_the_system(error: OSError) -> tuple[str, int] | None:
    """Returns line and exit code of what the operating system refused; None for anything else."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    where, reason = " and ".join(names), error.strerror or str(error)
    if lacks_space(error):
        place = (
            f" for {where}"
            if where
            else f" for the output or for temporary files in {_temporary()}"
        )
        return f"no space is left{place} ({reason}): free some, or write elsewhere.", INFEASIBLE
    # No reader, or a terminal that was closed: the line would not be seen.
    if error.errno in (errno.EPIPE, errno.EIO) and not where:
        return "", INTERNAL
    if not where:
        return None
    return (
        f"{where}: {reason}. Check that it is there, that it is a file where a file is meant, and "
        "that you may read and write it.",
        BAD_INPUT,
    )


def _temporary() -> str:
    with contextlib.suppress(OSError):
        return tempfile.gettempdir()
    return "no directory that can be written to"


def _saved(error: BaseException, directory: Path | None) -> str:
    """Writes the traceback to a new file of the run directory, or of the temporary one."""
    text = "".join(traceback.format_exception(error))
    # Where no run is left, a file would keep the next one from starting there.
    for folder in (directory if directory and (directory / RUN_FILE).is_file() else None, None):
        try:
            number, name = tempfile.mkstemp(prefix="rl-edit-traceback-", suffix=".txt", dir=folder)
            with os.fdopen(number, "w", encoding="utf-8") as file:
                file.write(text)
            return name
        except OSError:
            continue
    return "no file, for want of a place to write one"


def _import_remedy(error: Exception) -> str:
    """Says what stands in the way of an import."""
    text = str(error)
    if remedy := _shadow_remedy(error):
        return remedy
    if any(sign in text for sign in ("GLIBC", "cannot open shared object", "undefined symbol")):
        path = os.environ.get("LD_LIBRARY_PATH", "not set")
        return (
            f"A library of another environment was loaded (LD_LIBRARY_PATH is {path}): unset "
            "LD_LIBRARY_PATH, and use one of conda and venv, not both."
        )
    return f"Install the project again into {sys.prefix}: pip install -e . -c constraints.txt."


def _shadow_remedy(error: Exception) -> str:
    """Names files that were imported in the place of others; "" where there are none."""
    files = _shadows(error)
    if not files:
        return ""
    here = Path.cwd().resolve()
    remedy = (
        "run the command rl-edit in place of python -m rl_edit, which searches the current "
        "directory first"
        if any(Path(file).parent == here for file in files) and "PYTHONPATH" not in os.environ
        else "unset PYTHONPATH (env -u PYTHONPATH rl-edit ...)"
    )
    return (
        f"{', '.join(files)} comes before the installed package of that name: {remedy}, or "
        "rename it."
    )


def _shadows(error: Exception) -> list[str]:
    """Finds files that are imported in the place of installed or built-in modules."""
    ends = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib")]
    # Packages of another environment may stand behind: uv run --with, system site packages.
    first = next((place for place, entry in enumerate(sys.path) if entry in ends), 0)
    installed = [*sys.path[first:], *ends]
    ours = Path(__file__).resolve().parent.parent.parent
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    files += [getattr(error, "path", None) or "", *map(_file, list(sys.modules))]
    shadows: dict[str, None] = {}
    for entry in sys.path:
        folder = Path(entry or ".").resolve()
        # Everything from here on is the interpreter's own.
        if str(folder) in ends:
            break
        for file in map(Path, filter(None, files)):
            if folder == ours or folder not in file.resolve().parents:
                continue
            name = file.resolve().relative_to(folder).parts[0]
            if PathFinder.find_spec(name.removesuffix(".py"), installed):
                shadows[str(folder / name)] = None
    return list(shadows)


def _file(name: str) -> str:
    return getattr(sys.modules.get(name), "__file__", None) or ""
