"""The attempt that holds a run directory, as ``LEASE.json`` names it.

:mod:`learner.controller.lease` writes the file; the report asks it whether a run still goes on.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

LEASE = "LEASE.json"

_CLOCK_S = 5.0
"""Seconds by which the start of a process may seem later than it was: clocks are corrected."""


class Holder(BaseModel):
    """The content of ``LEASE.json``.

    Attributes:
        taken, renewed, ended: seconds since 1970. ``ended`` is None while the attempt runs, and
            when it was killed.
    """

    model_config = ConfigDict(frozen=True)
    epoch: int
    attempt: str
    host: str
    pid: int
    taken: float
    renewed: float
    ended: float | None = None

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.taken, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return (
            f"attempt {self.attempt} (epoch {self.epoch}, pid {self.pid} on {self.host}, "
            f"since {since})"
        )

    def has_ended(self) -> bool:
        """Tests whether the attempt is over for certain: one of another machine may go on."""
        if self.ended is not None:
            return True
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        # Another user's.
        except PermissionError:
            pass
        # After a restart of the machine another process may have the number.
        return _started(self.pid) > self.taken + _CLOCK_S


def read_holder(run_dir: Path) -> Holder | None:
    """Reads ``LEASE.json``; None where it is missing or unreadable, which is not guessed at."""
    try:
        return Holder.model_validate_json((run_dir / LEASE).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _started(pid: int) -> float:
    """Returns the seconds since 1970 at which a process started, 0 where that is unknown."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        # The name, in brackets, may hold anything; the 20th field after it counts clock ticks.
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        up = time.clock_gettime(time.CLOCK_BOOTTIME)
        return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")
    return 0.0
