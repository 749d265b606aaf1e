"""Errors that the command line turns into one line and an exit code."""

from __future__ import annotations

import errno
import signal
import traceback
from collections.abc import Iterable
from difflib import get_close_matches

# Documented in docs/usage.md; scripts rely on them. 75 is EX_TEMPFAIL of sysexits.h: another
# attempt holds the run directory, and repeating this one is no error.
BAD_INPUT, FAILED, INFEASIBLE, UNREACHABLE, FENCED = 2, 3, 4, 5, 75

MESSAGE_LENGTH = 500
"""Characters of a library's message that fit a line."""

NO_MEMORY = ("OutOfMemoryError", "MemoryError", "CUDA out of memory", "can't allocate memory")
"""Signs of a failed allocation, in the type's name or in the message."""


def brief(error: BaseException) -> str:
    """Returns an exception's type and message in one line.

    Example:
        ``"KeyError: 'alpha'"``
    """
    text = " ".join(str(error).split())[:MESSAGE_LENGTH]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def place(error: BaseException) -> str:
    """Returns ``FILE:LINE`` of the statement that raised; "" without a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def lacks_memory(error: BaseException) -> bool:
    """Tests for a failed allocation of memory, in the machine or in a GPU."""
    shown = brief(error)
    return any(sign in shown for sign in NO_MEMORY)


def lacks_space(error: BaseException) -> bool:
    """Tests for a disk that is full, or a quota that is reached."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


class ClusterUnreachable(RuntimeError):
    """No Ray cluster answers at the given address, or none could be started. Exit code 5."""

    exit_code = UNREACHABLE


class ClusterLost(RuntimeError):
    """Ray's own processes ended while the run went on. Exit code 3."""

    exit_code = FAILED


class ResourcesInfeasible(RuntimeError):
    """There is no room for what the run asks for: GPUs, memory or disk. Exit code 4."""

    exit_code = INFEASIBLE


class InputError(ValueError):
    """Bad input. Exit code 2.

    The message names the value, why it matters, and what to do instead.
    """

    exit_code = BAD_INPUT


class ModelUnusable(InputError):
    """The model of a reward cannot be loaded, so nothing would ever have a score.

    Unlike other errors of a reward it ends the run, where a lost score would be tried again.
    """


class Fenced(RuntimeError):
    """A newer attempt owns the run directory. Exit code 75.

    This process must not write there any more.
    """

    exit_code = FENCED


class Interrupted(RuntimeError):
    """A signal stopped the run. Exit code 128 plus the signal's number.

    Args:
        reported: True when a line about it has been shown already.
    """

    def __init__(self, number: int, *, reported: bool = False) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number, self.reported = number, reported
        self.exit_code = 128 + number


# The four below are not for the command line: the controller retries or replaces first.
class WorkerLost(RuntimeError):
    """A process or machine is gone, or did not answer in time.

    The same call on another worker may well succeed.
    """


class WorkerOutOfMemory(WorkerLost):
    """A worker ran out of memory while it was made.

    Another may get it, once the one before has given its own back.
    """


class WorkFailed(RuntimeError):
    """The work itself raised inside a healthy worker.

    The same work will most likely fail elsewhere too.
    """


class BlobLost(RuntimeError):
    """An array is gone with the machine that stored it.

    The work that made it can be repeated, and gives the same bytes.
    """


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Suggests the nearest known name, as the end of a sentence; "" where none is near."""
    near = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f", did you mean {near[0]!r}?" if near else ""
