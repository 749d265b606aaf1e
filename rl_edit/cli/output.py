"""Output that may be lost: a closed terminal, a full disk, a reader that is gone.

A verb whose output is its result ends with an error then. A run goes on: its results are files.
Nothing here imports a library.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO


def open_closed() -> None:
    """Opens standard streams that were closed at the start (``>&-``), to nowhere.

    The next file opened would otherwise take their number, and a library that writes to "stderr"
    would write into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is this one.
            os.open(os.devnull, os.O_RDWR)
    # Python has no stream at all then, which not every library expects.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def to_nowhere(number: int) -> None:
    """Drops what is left of a stream: the interpreter flushes it once more and would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def show(line: str) -> None:
    """Prints a line on stderr, where that is possible."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        to_nowhere(2)


def flush() -> OSError | None:
    """Writes what is left of the output. Returns why that is impossible.

    A reader that is gone has read what it wanted, which is no error.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        to_nowhere(1)
        return None if error.errno == errno.EPIPE else error
    return None


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Lets the block go on without its output where that cannot be written, and says so once."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _lasting(sys.stdout, _say_lost), _lasting(sys.stderr, lambda _: None)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


class _Lasting(io.FileIO):
    """A file that takes what cannot be written as written."""

    def __init__(self, number: int, on_lost: Callable[[OSError], None]) -> None:
        super().__init__(number, "w", closefd=False)
        self._on_lost, self._lost = on_lost, False

    def write(self, data: Any, /) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            if not self._lost:
                self._lost = True
                self._on_lost(error)
            written = None
        # None also of a pipe that does not block and is full.
        return memoryview(data).nbytes if written is None else written


def _lasting(stream: TextIO, on_lost: Callable[[OSError], None]) -> TextIO:
    # A stream of a test or a host program may be of another kind.
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    try:
        number = stream.fileno()
        stream.flush()
    except io.UnsupportedOperation:
        return stream
    except OSError:
        pass
    return io.TextIOWrapper(
        io.BufferedWriter(_Lasting(number, on_lost)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _say_lost(error: OSError) -> None:
    cause = (
        "the reader of the output is gone"
        if error.errno == errno.EPIPE
        else f"the output cannot be written ({error.strerror})"
    )
    show(f"rl-edit: {cause}; the run goes on, and its numbers are in its run directory.")
