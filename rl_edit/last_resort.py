"""The end of a run whose main thread waits for a cluster that is gone.

Without its object store Ray's C++ part may hold the main thread for ever, where no exception and no
signal reaches it. Another thread then writes the record, and ends the process.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rl_edit.errors import FAILED, ClusterLost, Fenced

if TYPE_CHECKING:
    from rl_edit.run_end import Attempt

LIMIT_S = 60.0
"""Seconds that the main thread has, from the loss of the cluster to the end of the process."""

POLL_S = 0.5


class LastResort:
    """Watches the end of an attempt from a thread.

    Args:
        problem: what of the cluster has ended; "" while it is there.
        end_processes: ends what the attempt started, without asking Ray.
    """

    def __init__(
        self, attempt: Attempt, *, problem: Callable[[], str], end_processes: Callable[[], None]
    ) -> None:
        self._attempt, self._problem, self._end_processes = attempt, problem, end_processes
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="last-resort", daemon=True).start()

    def close(self) -> None:
        """Leaves the end to the main thread, which has come to it."""
        self._closed.set()

    def _watch(self) -> None:
        lost: float | None = None
        while not self._closed.wait(POLL_S):
            reason = self._problem()
            if not reason:
                continue
            if lost is None:
                lost = time.monotonic()
            elif time.monotonic() - lost >= LIMIT_S:
                self._end(reason)

    def _end(self, reason: str) -> None:
        line, code = self._recorded(reason)
        with contextlib.suppress(Exception):
            self._end_processes()
        # Not by print: the main thread may hold the stream.
        with contextlib.suppress(OSError):
            os.write(2, f"rl-edit: {line}\n".encode())
        os._exit(code)

    def _recorded(self, reason: str) -> tuple[str, int]:
        """Records the end, unless it is recorded already; returns its line and exit code."""
        attempt = self._attempt
        if (end := attempt.recorded_end()) is not None:
            line, code = end
            # A failure is the loss itself, or came before it; a good end needs the reason.
            return (f"could not leave Ray ({reason}); {line}" if attempt.saved else line), code
        updates = attempt.loop.commits.updates_done if attempt.loop is not None else 0
        error: Exception = ClusterLost(
            f"{reason}, and this process has waited for it for {LIMIT_S:.0f} s. Continue with "
            f"--resume from update {updates}."
        )
        try:
            attempt.record_failure(error)
        except Fenced as fenced:
            error = fenced
        except OSError:
            pass  # what cannot be written stays as it is; the line says why the run ended
        return " ".join(str(error).split()), getattr(error, "exit_code", FAILED)
