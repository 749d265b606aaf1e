"""Executors without a cluster: every worker in this process, called in turn (inline) or with a thread of its own.

The same plain classes as on Ray, for debugging, benchmarks, and tests of the controller in milliseconds. A thread cannot be
ended from outside: a killed worker is forgotten, and what it still returns is thrown away or shown as late.
"""

from __future__ import annotations

import asyncio
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from actors.roles import Roles, WorkerSpec
from rl_edit.errors import InputError, WorkerLost, WorkFailed
from rl_edit.method.update import TrainingFailed

_CONSTRUCTION = threading.Lock()
"""LearnerSnapshot by constructors. While transformers or diffusers load weights, modules are made on the meta device for the whole process: a
second load beside it would find its own there. A judge that loads when first asked is not covered."""


class LocalWorker:
    """A plain object behind the executor's ``Worker``."""

    def __init__(self, post: WorkerSpec, name: str, *, threaded: bool) -> None:
        self._post, self._name = post, name
        self._instance: Any = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name) if threaded else None
        self.alive = True

    async def call(self, method: str, *args: Any, blobs: int = 0) -> Any:
        if not self.alive:
            raise WorkerLost(f"{self._name} is gone")
        try:
            if self._thread is None:
                return self._run(method, args)
            return await asyncio.get_running_loop().run_in_executor(
                self._thread, self._run, method, args
            )
        except (InputError, TrainingFailed, WorkerLost):
            raise
        except asyncio.CancelledError as error:
            if self.alive:
                raise
            # Killed before its thread came to this call, which looks like a cancellation and would end the whole run.
            raise WorkerLost(f"{self._name} is gone") from error
        except Exception as error:
            raise WorkFailed(f"{type(error).__name__}: {error}") from error

    def _run(self, method: str, args: tuple[Any, ...]) -> Any:
        if self._instance is None:
            with _CONSTRUCTION:
                self._instance = self._post.make(*self._post.arguments)
        return getattr(self._instance, method)(*args)

    def kill(self) -> None:
        self.alive = False
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)


class LocalExecutor:
    """Workers as objects of this process. Refs are the arrays themselves."""

    def __init__(self, crew: Roles, *, threaded: bool = False) -> None:
        self._crew, self._threaded = crew, threaded
        self._workers: dict[tuple[str, int], LocalWorker] = {}

    def spawn(self, role: str, seat: int) -> LocalWorker:
        post = self._crew[role]
        worker = self._workers.get((post.process, seat))
        if worker is None or not worker.alive or post.process == role:
            worker = self._workers[post.process, seat] = LocalWorker(
                post, f"{post.process}-{seat}", threaded=self._threaded
            )
        return worker

    def put(self, blob: np.ndarray) -> np.ndarray:
        return blob

    async def fetch(self, ref: np.ndarray) -> np.ndarray:
        return ref

    def store_bytes(self) -> float:
        return math.inf

    def free(self) -> str:
        return "this process only"

    def mirror(self, metrics: dict[str, Any]) -> None:
        """Nobody monitors a process of one's own."""

    async def close(self) -> None:
        for worker in self._workers.values():
            worker.kill()
