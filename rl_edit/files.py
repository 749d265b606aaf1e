"""Files and directories that appear complete or not at all, and append-only JSON lines.

Every writer of the project uses these functions. A reader, or a process killed at any point, sees
the old content or the new one. This file knows no record and no tensor.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from rl_edit.errors import InputError

Model = TypeVar("Model", bound=BaseModel)

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
HELDOUT = "heldout.jsonl"
"""Names in a run directory, which writer and readers share."""


def write_new(path: Path, content: bytes | memoryview) -> None:
    """Writes a new file and waits until its bytes are on the disk.

    Raises:
        FileExistsError: the file is there. Of several callers exactly one succeeds.
    """
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Puts the names in a directory on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(
    path: Path,
    content: str | bytes | memoryview,
    *,
    durable: bool = False,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Replaces a file, or creates it: the old content or the new one, never part of one.

    Args:
        content: text is written as UTF-8.
        durable: wait until content and name are on the disk, so that a power cut keeps them.
        check: called right before the rename; where it raises, the old content stays.

    Raises:
        OSError: the directory is missing, full or read-only; the old content is still there.
    """
    data = content.encode() if isinstance(content, str) else content
    # Next to the target, because a rename is atomic within one file system only.
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        if durable:
            write_new(partial, data)
        else:
            partial.write_bytes(data)
        check()
        os.replace(partial, path)
    finally:
        # After the rename the name is gone; after a failure the rest must go.
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    if durable:
        sync_directory(path.parent)


def overwrite_file(path: Path, text: str) -> None:
    """Writes into a file's own place on a disk that is full, where a second copy has none.

    Raises:
        OSError: there is no such file, or the text needs more than the blocks that it has.
    """
    data = text.encode()
    with path.open("r+b", buffering=0) as file:
        if os.fstat(file.fileno()).st_blocks * 512 < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        file.write(data)
        file.truncate()


def replace_json(path: Path, value: object, *, durable: bool = False) -> None:
    """Replaces a file with indented JSON. NaN and infinity are refused: no other reader takes
    them."""
    replace_file(path, json.dumps(value, indent=2, allow_nan=False) + "\n", durable=durable)


def write_result(path: Path, text: str, *, remedy: str = "Give a writable --out.") -> Path:
    """Writes a file that a user asked for, making its directory; returns the path.

    Raises:
        InputError: it cannot be written there. ``remedy`` says what to do instead.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            # A device or a pipe, such as /dev/null. A rename would put a file in its place.
            path.write_text(text, encoding="utf-8")
        else:
            replace_file(path, text)
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error.strerror}), so the result would be lost. {remedy}"
        ) from error
    return path


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yields a directory to fill, which takes the name ``path`` at the end of the block.

    When the block raises, nothing is left. ``path`` must be absent or an empty directory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def replace_directory(path: Path, partial: Path, fill: Callable[[Path], None]) -> None:
    """Replaces a directory with one that ``fill`` writes into ``partial``; everything is synced.

    Killed between the two renames, the old copy is left as ``.old-NAME``: a name cannot be
    exchanged portably. What ``fill`` raises leaves ``path`` as it was.

    Args:
        partial: a sibling of ``path``; what an earlier attempt left there is removed.
        fill: writes the files, and may refuse at its end.
    """
    old = path.with_name(f".old-{path.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        fill(partial)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)
        os.rename(partial, path)
        sync_directory(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


class JsonLines:
    """An append-only file of JSON objects, flushed line by line. A crash costs at most the last
    line."""

    def __init__(self, path: Path, *, note: Callable[[str], None] = lambda text: None) -> None:
        self.path, self._note = path, note
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size:
            with path.open("a") as file:  # a torn last line must not swallow the next one
                file.write("\n")

    def append(self, record: dict[str, Any]) -> None:
        """Writes one line. Numbers are rounded to 12 digits; NaN and infinity become null.

        Raises:
            OSError: the disk is full, for instance; the file is as it was.
        """
        line = without_nan({key: _rounded(value) for key, value in record.items()})
        text = json.dumps(line).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:
            before, written = file.seek(0, os.SEEK_END), 0
            try:
                written = file.write(text)
            finally:
                # Part of a line would swallow the next one.
                if written < len(text):
                    file.truncate(before)
        if written < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def rewind(
        self,
        keep: int,
        *,
        key: str = "update",
        is_whole: Callable[[dict[str, Any]], bool] = lambda record: True,
    ) -> None:
        """Drops lines whose ``key`` is ``keep`` or more: a resumed run writes them again.

        Lines without the key stay. Lines that cannot be read are set aside in a file beside it.

        Args:
            is_whole: tests an object that was read; one that lacks fields is damaged too.
        """
        read, damaged = _parse_lines(self.path, is_whole)
        if damaged:
            aside = self.path.with_name(f"{self.path.name}.unreadable")
            with aside.open("ab") as file:
                file.writelines(line + b"\n" for line in damaged)
            self._note(f"{_left_out(len(damaged), self.path.name)}; they are kept in {aside}")
        lines = [line for line in read if not line.get(key, keep - 1) >= keep]
        replace_file(self.path, "".join(json.dumps(line) + "\n" for line in lines))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a file that may be missing or still being written; unreadable lines are left out."""
    return _parse_lines(path)[0]


def damage(path: Path) -> str:
    """Says how many lines of a log ``read_json_lines`` leaves out; "" where it reads all."""
    damaged = _parse_lines(path)[1]
    # A last line without its end is still being written, and is no fault.
    if damaged and path.read_bytes().endswith(damaged[-1]):
        damaged.pop()
    return _left_out(len(damaged), str(path)) if damaged else ""


def _left_out(number: int, name: str) -> str:
    lines, are = ("line", "is") if number == 1 else ("lines", "are")
    return f"{number} {lines} of {name} cannot be read (damaged) and {are} left out"


def _parse_lines(
    path: Path, is_whole: Callable[[dict[str, Any]], bool] = lambda record: True
) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Returns the objects of a file, and its damaged lines."""
    records, damaged = [], []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        if not line.strip():
            continue
        try:
            # A torn last line of a run that goes on is no error; the next read has it.
            record = json.loads(line)
        # Not UTF-8, not JSON, or nested beyond what can be read.
        except (ValueError, RecursionError):
            record = None
        complete = isinstance(record, dict) and isinstance(record.get("update", 0), int)
        if complete and is_whole(record):
            records.append(record)
        else:
            damaged.append(line)
    return records, damaged


def validated(model: type[Model], content: object) -> Model:
    """Reads a record from decoded JSON.

    Raises:
        ValueError: naming the first field that is wrong, in one line.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        # pydantic's message has a line and a link for every problem; one is enough to act on.
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise ValueError(f"{place}: {problem['msg']}" if place else problem["msg"]) from error


def without_nan(value: Any) -> Any:
    """Replaces numbers that JSON cannot hold by None, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return value


def _rounded(value: Any) -> Any:
    # A NaN rounds to itself.
    return float(f"{value:.12g}") if isinstance(value, float) else value


def nearest_path(path: Path) -> Path | None:
    """Finds what a missing path may mean: one name on the way may be misspelt."""
    missing = [part for part in (path, *path.parents) if not part.exists()]
    if not missing:
        return None
    # The outermost name that is wrong; those below it may be right.
    wrong = missing[-1]
    try:
        names = sorted(entry.name for entry in wrong.parent.iterdir())
    # A suggestion may be missing; the message it belongs to must not.
    except OSError:
        return None
    near = [
        wrong.parent / name / path.relative_to(wrong)
        for name in get_close_matches(wrong.name, names, n=3)
    ]
    return next((place for place in near if place.exists()), None)
