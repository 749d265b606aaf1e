"""Waits for several calls at once, and for the late answer of one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from rl_edit.errors import InputError, WorkerLost, WorkerOutOfMemory, WorkFailed
from rl_edit.method.update import TrainingFailed

T = TypeVar("T")


async def together(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Runs calls side by side and returns their answers in order.

    The first error ends all of them, and so does a cancellation. Every error is looked at: a
    future of ``asyncio.gather`` that is cancelled while its calls fail complains on the terminal.
    """
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        if tasks:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            # In the order of the calls, for a set has another one each time.
            ended = [task for task in tasks if task in done]
            failures = [error for task in ended if (error := task.exception()) is not None]
            if failures:
                raise min(failures, key=_says_little)
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _says_little(error: BaseException) -> tuple[bool, bool]:
    """Orders errors of one instant: refusals first, then a lack of memory, then losses."""
    return isinstance(error, WorkerLost), not isinstance(error, WorkerOutOfMemory)


def pass_on(finished: asyncio.Future[Any], late: Callable[[Any], object]) -> None:
    """Passes a late answer on. The error of a worker that was killed no longer matters."""
    with contextlib.suppress(
        asyncio.CancelledError, WorkerLost, WorkFailed, InputError, TrainingFailed
    ):
        late(finished.result())
