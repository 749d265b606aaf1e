"""Keeps this process alive when the object store of its machine is gone.

Ray's C++ part ends a process, with exit code 0 and without a word, when it writes to a store that
has ended: even to give back an array that Python no longer needs. A run would end so while it
records why it ends.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from pathlib import Path

POLL_MS = 500


class StoreGuard:
    """Replaces connections to an object store, once it has ended, by ones that nothing answers.

    Attributes:
        replaced: how many there were.
    """

    def __init__(self, path: str) -> None:
        # A copy of a descriptor reports the end of the connection, whatever becomes of the number.
        self._copies = {number: os.dup(number) for number in _connections(path)}
        self.replaced = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ray-store-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops watching. What was replaced stays: Ray may write to it until the process ends."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        poll, numbers = select.poll(), {copy: number for number, copy in self._copies.items()}
        for copy in numbers:
            poll.register(copy, 0)  # the end of a connection is always reported
        while numbers and not self._ended.is_set():
            for copy, _ in poll.poll(POLL_MS):
                self._replace(numbers.pop(copy), copy)
                poll.unregister(copy)
        for copy in self._copies.values():
            os.close(copy)

    def _replace(self, number: int, copy: int) -> None:
        with contextlib.suppress(OSError):
            # Ray may have closed it, and another file may have the number now.
            if os.fstat(number).st_ino != os.fstat(copy).st_ino:
                return
            taken, other = socket.socketpair()
            with taken:
                os.dup2(taken.fileno(), number, inheritable=False)
            # Left open until the process ends: its closing would be the end of a connection again.
            other.detach()
            self.replaced += 1


def _connections(path: str) -> list[int]:
    """Returns the descriptors of this process that are connected to a socket's path."""
    connected: list[int] = []
    if not os.path.isdir("/proc/self/fd"):
        return connected
    for number in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as connection:
            if connection.family == socket.AF_UNIX and connection.getpeername() == path:
                connected.append(number)
    return connected
