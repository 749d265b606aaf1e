"""The end of a run whose cluster is gone: at once, and with what the run knows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar

from learner.controller.executor import Executor
from rl_edit.errors import ClusterLost, Fenced

POLL_S = 0.25
ENDING_S, ATTEMPTS = 1.0, 3
"""Seconds for the work to end once it is cancelled, and how often it is."""

T = TypeVar("T")


async def unless_lost(
    work: Coroutine[Any, Any, T], executor: Executor, committed: Callable[[], int]
) -> T:
    """Awaits the work of a run, unless the cluster ends before.

    Args:
        committed: updates in the newest checkpoint.

    Raises:
        ClusterLost: naming what ended, and the update that ``--resume`` continues from.
    """
    task, lost = asyncio.ensure_future(work), asyncio.create_task(_lost(executor))
    try:
        await asyncio.wait({task, lost}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            await _end(task)
            _raise(lost.result(), committed())
        try:
            return task.result()
        except Fenced:
            raise
        except Exception as error:
            # What was lost may have failed the work before anyone looked for it.
            if reason := executor.problem():
                _raise(reason, committed(), error)
            raise
    finally:
        lost.cancel()
        if not lost.done() and not task.done():
            # Cancelled from outside: the work ends as it would without this wrapper.
            task.cancel()
            await asyncio.wait({task})


async def _lost(executor: Executor) -> str:
    while not (reason := executor.problem()):
        await asyncio.sleep(POLL_S)
    return reason


async def _end(task: asyncio.Future[Any]) -> None:
    """Ends the work. It may be waiting, even while it ends, for what cannot come any more."""
    for _ in range(ATTEMPTS):
        task.cancel()
        await asyncio.wait({task}, timeout=ENDING_S)
        if task.done():
            return


def _raise(reason: str, updates_done: int, cause: Exception | None = None) -> NoReturn:
    raise ClusterLost(f"{reason}. Continue with --resume from update {updates_done}.") from cause
