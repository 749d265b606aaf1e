"""Waits for several calls at once, and for the late answer of one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from rl_edit.errors import InputError, WorkerLost, WorkFailed
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
            failures = [error for task in done if (error := task.exception()) is not None]
            if failures:
                # A refusal says more than the loss of the worker beside it.
                raise min(failures, key=lambda error: isinstance(error, WorkerLost))
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def pass_on(finished: asyncio.Future[Any], late: Callable[[Any], object]) -> None:
    """Passes a late answer on. The error of a worker that was killed no longer matters."""
    with contextlib.suppress(
        asyncio.CancelledError, WorkerLost, WorkFailed, InputError, TrainingFailed
    ):
        late(finished.result())
