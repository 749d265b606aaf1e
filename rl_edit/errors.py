"""Errors that the command line turns into one line and an exit code."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ClusterUnreachable(RuntimeError):
    """No Ray cluster answers at the given address. Exit code 5."""


class ResourcesInfeasible(RuntimeError):
    """The cluster can never place what the run asks for. Exit code 4."""


class InputError(ValueError):
    """Bad input. Exit code 2.

    The message names the value, why it matters, and what to do instead.
    """


class Fenced(RuntimeError):
    """A newer attempt owns the run directory. Exit code 75.

    This process must not write there any more.
    """


class Interrupted(RuntimeError):
    """A signal stopped the run, and everything is saved. Exit code 128 plus the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.number = number


# The three below are not for the command line: the controller retries or replaces first.
class WorkerLost(RuntimeError):
    """A process or machine is gone, or did not answer in time.

    The same call on another worker may well succeed.
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
