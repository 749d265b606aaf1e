"""What the controller asks of whoever runs processes. Implementations: inline, thread
(``actors/local_executor.py``) and Ray (``actors/ray_executor.py``).

The controller's promises (deadlines, retries, incarnations, first-valid-wins) rest on these few
calls only, so they are tested without Ray and hold with it.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

Ref = Any
"""A blob wherever the executor keeps it: an array in this process, an object reference under Ray.
Owned by the driver."""


class Worker(Protocol):
    """One incarnation of a worker process, serving one or more roles."""

    async def call(self, method: str, *args: Any, blobs: int = 0) -> Any:
        """Runs a method; calls on one worker run one after the other.

        Args:
            args: small values, or refs, which the worker receives as arrays.
            blobs: how many arrays the method returns after its first value; they stay where they
                are, as refs.

        Returns:
            the value; with ``blobs``, a tuple of the value and that many refs.

        Raises:
            WorkerLost: the process is gone (also when it was killed meanwhile).
            BlobLost: an array among the arguments is gone.
            WorkFailed: the method raised. ``InputError`` and ``TrainingFailed`` come through as
                themselves.
        """

    def kill(self) -> None:
        """Ends the process at once, whatever it is doing."""


class Executor(Protocol):
    """Where workers run."""

    def spawn(self, role: str, worker_slot: int) -> Worker:
        """Starts a worker for a role's worker slot, without waiting for it (``ready`` does that).

        Where one process serves several roles (the colocated placement), its living process is
        returned.
        """

    def direct(self, role: str) -> Any | None:
        """Returns a role's object in this process, to be called without a worker.

        None where workers are processes or threads, which can be lost and must be supervised.
        """

    def put(self, blob: np.ndarray) -> Ref:
        """Keeps an array for any number of workers."""

    async def fetch(self, ref: Ref) -> np.ndarray:
        """The array of a ref.

        Raises:
            BlobLost: the machine that held it is gone.
        """

    def store_bytes(self) -> float:
        """Bytes that blobs may fill in all."""

    def free(self) -> str:
        """What is free, in words, for messages."""

    def mirror(self, metrics: dict[str, Any]) -> None:
        """Shows numbers to whoever monitors the cluster. Never raises, never waits."""

    async def close(self) -> None:
        """Ends every worker."""
