"""The interface between the controller and the processes that work for it.

Implementations: inline and thread (``actors/local_executor.py``), Ray (``actors/ray_executor.py``).
The controller's promises (deadlines, retries, incarnations, the first valid result) rest on these
few calls only. They are therefore tested without Ray and hold with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

Ref = Any
"""A blob wherever the executor keeps it: an array in this process, an object reference under Ray.

The driver owns it, so it outlives the worker that made it (but not that worker's machine).
"""


class Worker(Protocol):
    """One incarnation of a worker process. It serves one or more roles."""

    # Calls on one worker queue. The controller relies on it: "load" before "run" needs no lock.
    async def call(self, method: str, *args: Any, blobs: int = 0) -> Any:
        """Runs a method. Calls on one worker run one after the other.

        Args:
            args: small values, or refs, which the worker receives as arrays.
            blobs: how many arrays the method returns after its first value. They stay where they
                are, as refs.

        Returns:
            the value; with ``blobs``, a tuple of the value and that many refs.

        Raises:
            WorkerLost: the process is gone (also when it was killed meanwhile).
            BlobLost: an array among the arguments is gone.
            WorkFailed: the method raised. ``InputError`` and ``TrainingFailed`` pass unchanged.
        """

    def kill(self) -> None:
        """Ends the process at once, whatever it is doing."""


class Executor(Protocol):
    """Starts workers and stores blobs."""

    def spawn(self, role: str, worker_slot: int) -> Worker:
        """Starts a worker for a role's worker slot, without waiting for it (``ready`` does that).

        Where one process serves several roles (the colocated placement), this returns the process
        that is alive.
        """

    def direct(self, role: str) -> Any | None:
        """Returns a role's object in this process, to be called without a worker.

        None where workers are processes or threads, which can be lost and must be supervised.
        """

    def put(self, blob: np.ndarray) -> Ref:
        """Stores an array for any number of workers."""

    async def fetch(self, ref: Ref) -> np.ndarray:
        """Returns the array of a ref, within a limited time.

        Raises:
            BlobLost: the machine that stored it is gone, or does not send it.
        """

    async def keep(self, ref: Ref) -> Ref:
        """Copies an array to the driver's machine, where it outlives every other machine.

        Raises:
            BlobLost: as :meth:`fetch`.
        """

    async def require(self, arguments: Sequence[Any]) -> None:
        """Checks that the arrays among some arguments can still be had.

        Raises:
            BlobLost: one of them cannot.
        """

    def store_bytes(self) -> float:
        """Returns the bytes that all blobs together may fill."""

    def free(self) -> str:
        """Describes the free resources in words, for messages."""

    # Asked several times a second, and after every failure: it must answer at once.
    def problem(self) -> str:
        """Returns why no worker can be reached any more, for a message; "" while they can be."""

    # Called in the update loop: a monitor that is slow or absent must not cost an update.
    def mirror(self, metrics: dict[str, Any]) -> None:
        """Shows metrics in the cluster's monitoring. Never raises, never waits."""

    async def close(self) -> None:
        """Ends every worker."""
