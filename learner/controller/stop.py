"""Requests to commit and end a run: from a caller, or from a signal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from rl_edit.errors import Interrupted


class Stop:
    """Asks a run to commit and end. Thread- and signal-safe; a second request changes nothing."""

    def __init__(self) -> None:
        self.requested = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event: asyncio.Event | None = None

    def request(self) -> None:
        """Requests the end, from any thread or from a signal handler."""
        # The flag comes first: a request before `wait` has no event to set.
        self.requested = True
        if self._loop is not None and self._event is not None:
            # An asyncio event may be set by its own loop's thread only.
            # It is closed while the final adapter is saved: nothing waits for the event any more.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        """Returns once the end is requested."""
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()
        if self.requested:
            return
        await self._event.wait()


class Signals:
    """Turns the first signal into a request to commit and end; a second ends at once.

    The signals are SIGINT, SIGTERM, SIGQUIT (Ctrl-\\), and SIGHUP of a terminal that is closed. A
    SIGHUP that is ignored at the start stays ignored: ``nohup`` asks for that. So does a SIGQUIT: a
    shell ignores it for what a script runs in the background.
    """

    def __init__(self, stop: Stop) -> None:
        self.received = 0
        self._stop = stop
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        # Python takes signals in the main thread only.
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            numbers += [
                number
                for number in (signal.SIGHUP, signal.SIGQUIT)
                if signal.getsignal(number) != signal.SIG_IGN
            ]
            self._before = {number: signal.signal(number, self._received) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        # A handler that was not installed from Python reads as None and cannot be put back.
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def check(self) -> None:
        """Ends work that comes before anything could be saved.

        Raises:
            Interrupted: a signal has come.
        """
        if self.received:
            raise Interrupted(self.received)

    @contextlib.contextmanager
    def kept_from_children(self) -> Iterator[None]:
        """Starts processes that signals of a terminal do not end: the commit needs them.

        A blocked signal is inherited. This process takes it in another thread, or afterwards.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGQUIT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _received(self, number: int, _frame: object) -> None:
        if self.received:
            # Not sys.exit: clean-up may be what hangs.
            os._exit(128 + number)
        self.received = number
        self._stop.request()
