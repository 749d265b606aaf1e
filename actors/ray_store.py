"""Keeps this process alive when the object store of its machine is gone.

Ray's C++ part ends a driver at once, without Python, when a message to or from the store fails:
even one that gives back an array. A run would end so before it has recorded why. So a process of
its own stands between: it passes messages on while the store lives, and then says nothing.

Run as a program, this file is that process (it therefore imports no package).
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import selectors
import signal
import socket
import subprocess
import sys
from pathlib import Path

PIECE = 1 << 16
"""Bytes passed on at a time. Arrays are in shared memory: only orders pass."""

DESCRIPTORS = 64
"""Descriptors that one message may carry. The store sends one for each piece of shared memory."""

PARENT_POLL_S = 1.0
ENDING_S = 5.0


class StoreRelay:
    """Puts a process between this one and the object store, for connections that are open.

    Attributes:
        connections: how many there are.
    """

    def __init__(self, path: str) -> None:
        numbers = _connections(path)
        self.connections = len(numbers)
        self._process: subprocess.Popen[bytes] | None = None
        # Open until this process ends. No copy of the other end closes before, so Ray never reads
        # the end of a connection, whatever becomes of the store and of the relay.
        self._ends: list[int] = []
        if numbers:
            self._begin(numbers)

    def problem(self) -> str:
        """Says that the relay has ended; "" while it lives."""
        if self._process is None or (code := self._process.poll()) is None:
            return ""
        return f"the process between this one and Ray's object store ended (exit code {code})"

    def close(self) -> None:
        """Ends the relay. Ray may write to the connections until this process ends."""
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDING_S)
            self._process = None

    def _begin(self, numbers: list[int]) -> None:
        stores = [os.dup(number) for number in numbers]
        pairs = [socket.socketpair() for _ in numbers]
        self._ends = [far.fileno() for _, far in pairs]
        ends = [str(end) for pair in zip(stores, self._ends, strict=True) for end in pair]
        # It runs before the connections are exchanged: otherwise a failure here would cut them.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(os.getpid()), *ends],
            pass_fds=[*stores, *self._ends],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            # Ctrl-C and a closed terminal are for the run, which says its last words to the store.
            start_new_session=True,
        )
        for number, store, (near, far) in zip(numbers, stores, pairs, strict=True):
            fcntl.fcntl(near, fcntl.F_SETFL, fcntl.fcntl(store, fcntl.F_GETFL))
            # Ray goes on to use the number, and does not see the exchange.
            os.dup2(near.fileno(), number, inheritable=False)
            near.close()
            far.detach()
            os.close(store)


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


def pass_on(source: socket.socket, target: socket.socket) -> bool:
    """Passes one piece on, with its descriptors; returns False at the end of the connection."""
    data, ancillary, _, _ = source.recvmsg(PIECE, socket.CMSG_SPACE(DESCRIPTORS * 4))
    carried = array.array("i")
    for _, _, value in ancillary:
        carried.frombytes(value[: len(value) - len(value) % carried.itemsize])
    if not data:
        return False
    try:
        if not carried:
            target.sendall(data)
            return True
        # A piece that carries descriptors ends with the byte that they came with. The receiver
        # reads the bytes before it without asking for descriptors, and would drop them.
        target.sendall(data[:-1])
        socket.send_fds(target, [data[-1:]], list(carried))
    finally:
        for number in carried:
            os.close(number)
    return True


def main() -> None:
    """Passes messages between the pairs of descriptors given, until the parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    parent, *numbers = map(int, sys.argv[1:])
    ends = [socket.socket(fileno=number) for number in numbers]
    # Not select(), which takes no number above 1023: these are those of a driver with many files.
    waiting = selectors.DefaultSelector()
    for store, driver in zip(ends[::2], ends[1::2], strict=True):
        # Ray may have made its connection one that never waits.
        store.setblocking(True)
        waiting.register(store, selectors.EVENT_READ, driver)
        waiting.register(driver, selectors.EVENT_READ, store)
    while os.getppid() == parent:
        for key, _ in waiting.select(PARENT_POLL_S):
            source, target = key.fileobj, key.data
            # Its pair may have ended a moment ago.
            if not isinstance(source, socket.socket) or source not in waiting.get_map():
                continue
            try:
                alive = pass_on(source, target)
            except OSError:
                alive = False
            if not alive:
                # Nothing is closed: the other side reads silence, not an end.
                waiting.unregister(source)
                waiting.unregister(target)


if __name__ == "__main__":
    main()
