"""Ends the processes of a local Ray cluster, however the process that started it ends.

Each process that Ray starts inherits a random mark in its environment, and so does what it starts
itself. By this mark a process is known as ours, never by its name. Run as a program, this file
waits until its parent is gone and then ends what is left (it therefore imports no package).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MARK = "RL_EDIT_CLUSTER"
"""Environment variable with the mark of a cluster's processes."""

KEEP_ENVIRONMENT = "SPT_NOENV"
"""Keeps Ray's workers from writing their titles over the environment that ``/proc`` shows."""

POLL_S = 0.1
PARENT_POLL_S = 1.0
ENDING_S = 10.0
"""Seconds in which processes end after SIGKILL, unless the kernel holds them."""


def marked(mark: str) -> Iterator[int]:
    """Yields the processes with a mark. Those that have ended and were not waited for are none."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            # Of another user, or gone meanwhile.
            with contextlib.suppress(OSError):
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state not in "ZX" and _has(int(entry.name), mark):
                    yield int(entry.name)


def end(mark: str, *, grace_s: float = 0.0) -> int:
    """Ends every process with a mark.

    Args:
        grace_s: seconds in which they may end by themselves.

    Returns:
        how many had to be killed.
    """
    began, killed = time.monotonic(), set[int]()
    while remaining := list(marked(mark)):
        waited = time.monotonic() - began
        if waited >= grace_s + ENDING_S:
            break
        if waited >= grace_s:
            killed.update(pid for pid in remaining if _kill(pid, mark))
        time.sleep(POLL_S)
    return len(killed)


def _kill(pid: int, mark: str) -> bool:
    """Kills a process, and never another one that has taken its number meanwhile."""
    with contextlib.suppress(OSError):
        try:
            # The descriptor stays with the process in which the mark is then looked for.
            descriptor = os.pidfd_open(pid)
        except OSError as error:
            if error.errno != errno.ENOSYS:
                return False
            os.kill(pid, signal.SIGKILL)  # a kernel without such descriptors
            return True
        try:
            if _has(pid, mark):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                return True
        finally:
            os.close(descriptor)
    return False


def _has(pid: int, mark: str) -> bool:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return f"{MARK}={mark}".encode() in environment


class Reaper:
    """A small process that ends a cluster's processes once this process is gone.

    It notices by a pipe that closes whatever ended this process, ``kill -9`` included.
    """

    def __init__(self) -> None:
        self.mark = secrets.token_hex(16)
        self._process: subprocess.Popen[bytes] | None = None
        # Processes are found in /proc, which other systems do not have.
        if sys.platform.startswith("linux"):
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, self.mark],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                # Ctrl-C and a closed terminal end the run's process group, and must not end this.
                start_new_session=True,
            )

    @contextlib.contextmanager
    def marking(self) -> Iterator[None]:
        """Marks the processes that are started meanwhile."""
        names = {MARK: self.mark, KEEP_ENVIRONMENT: "1"}
        before = {name: os.environ.get(name) for name in names}
        os.environ.update(names)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def end(self, *, grace_s: float) -> None:
        """Ends the cluster's processes, and then the reaper."""
        if self._process is None:
            return
        end(self.mark, grace_s=grace_s)
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(ENDING_S)


def wait_for_parent(pipe: int) -> None:
    """Returns once the parent is gone."""
    parent = os.getppid()
    # A process that the parent forked may hold the pipe open, so its number is looked at too.
    while os.getppid() == parent:
        if select.select([pipe], [], [], PARENT_POLL_S)[0]:
            return


def main() -> None:
    """Waits for the parent's end and ends the processes with the mark of the first argument."""
    # Signals to everything of a session or a machine are for the run; this process comes after it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    wait_for_parent(sys.stdin.fileno())
    end(sys.argv[1])


if __name__ == "__main__":
    main()
