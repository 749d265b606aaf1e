"""Executors without a cluster: every worker in this process, called in turn or in threads.

The same plain classes run as on Ray: for debugging, benchmarks, and controller tests in
milliseconds. A thread cannot be ended from outside. A killed worker is forgotten, and its later
answers are dropped or shown as late.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.roles import ProcessTable, Roles, make_workers
from rl_edit.errors import InputError, WorkerLost, WorkFailed
from rl_edit.method.update import TrainingFailed

_CONSTRUCTION = threading.Lock()
"""Lock around constructors. While transformers or diffusers load weights, modules are made on the
meta device for every thread: a second load beside it would find its own there. A judge that loads
at its first call is not covered."""


class LocalProcess:
    """Holds plain objects in the place of a process.

    Args:
        threaded: gives them a thread of their own. Otherwise calls block the caller.
    """

    def __init__(self, roles: Roles, name: str, *, threaded: bool) -> None:
        self.name, self._roles = name, roles
        # Made by the first call, in the thread that will use them.
        self._workers: dict[str, Any] | None = None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=name) if threaded else None
        self.alive = True

    def worker(self, role: str) -> Any:
        """Returns a role's object. The first call makes the objects of the process."""
        if self._workers is None:
            with _CONSTRUCTION:
                self._workers = make_workers(self._roles)
        return self._workers[role]

    def run(self, role: str, method: str, args: tuple[Any, ...]) -> Any:
        """Runs a method of a role's object."""
        return getattr(self.worker(role), method)(*args)

    def kill(self) -> None:
        self.alive = False
        if self.thread is not None:
            # A call that has begun cannot be ended; those that wait for the thread are dropped.
            self.thread.shutdown(wait=False, cancel_futures=True)


class LocalWorker:
    """Calls one role of a local process."""

    def __init__(self, process: LocalProcess, role: str) -> None:
        self._process, self._role = process, role

    async def call(self, method: str, *args: Any, blobs: int = 0) -> Any:
        process = self._process
        if not process.alive:
            raise WorkerLost(f"{process.name} is gone")
        try:
            if process.thread is None:
                # No await between here and the result: inline calls run one after the other.
                return process.run(self._role, method, args)
            return await asyncio.get_running_loop().run_in_executor(
                process.thread, process.run, self._role, method, args
            )
        except (InputError, TrainingFailed, WorkerLost):
            # These mean the same on either side of a call.
            raise
        except asyncio.CancelledError as error:
            if process.alive:
                raise
            # Killed before its thread came to this call. It looks like a cancellation, which
            # would end the complete run.
            raise WorkerLost(f"{process.name} is gone") from error
        except Exception as error:
            # Whatever the work raised costs its item, as it would from another process.
            raise WorkFailed(f"{type(error).__name__}: {error}") from error

    def kill(self) -> None:
        self._process.kill()


class LocalExecutor:
    """Runs workers as objects of this process. Refs are the arrays themselves."""

    def __init__(self, roles: Roles, *, threaded: bool = False) -> None:
        self._threaded = threaded
        self._processes = ProcessTable(
            roles,
            lambda kind, served, worker_slot: LocalProcess(
                served, f"{kind}-{worker_slot}", threaded=threaded
            ),
        )

    def spawn(self, role: str, worker_slot: int) -> LocalWorker:
        return LocalWorker(self._processes.spawn(role, worker_slot), role)

    def direct(self, role: str) -> Any | None:
        """Returns a role's object, unless workers have threads."""
        if self._threaded:
            return None
        return self._processes.spawn(role, 0).worker(role)

    def put(self, blob: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return blob

    async def fetch(self, ref: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return ref

    async def keep(self, ref: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return ref

    async def require(self, arguments: Sequence[Any]) -> None:
        """Does nothing: arrays of this process are never lost."""

    def store_bytes(self) -> float:
        return math.inf

    def free(self) -> str:
        return "this process only"

    def problem(self) -> str:
        """Returns "": this process loses none of its own."""
        return ""

    def mirror(self, metrics: dict[str, Any]) -> None:
        """Does nothing: a single process has no metrics agent."""

    async def close(self) -> None:
        for process in self._processes.processes():
            process.kill()
