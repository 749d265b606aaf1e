"""The stall report: what is pending when nothing has finished for a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from learner.controller.supervisor import Supervisor
from rl_edit.method.update import TrainingFailed

POLL_S = 5.0


class Progress:
    """Stores the moment when something last finished."""

    def __init__(self) -> None:
        self.moved_at = time.monotonic()

    def moved(self) -> None:
        """Notes that something has just finished."""
        self.moved_at = time.monotonic()


@dataclass(frozen=True, kw_only=True)
class End:
    """The silence that ends a run: so many reports in a row, and so many seconds."""

    times: int
    at_least_s: float


async def report_stalls(
    supervisor: Supervisor,
    progress: Progress,
    *,
    limit_s: float,
    end: End | None = None,
    events: Callable[..., None],
    note: Callable[[str], None],
) -> None:
    """Reports pending calls whenever nothing has finished for ``limit_s``.

    Runs until it is cancelled.

    Raises:
        TrainingFailed: after ``end.times`` reports without progress between them, and not before
            ``end.at_least_s``. A start of actors has its own, longer deadline and is not ended.
    """
    reported_at, times, since = time.monotonic(), 0, progress.moved_at
    while True:
        # A quarter, so that a short limit is not overshot by a whole poll.
        await asyncio.sleep(min(POLL_S, limit_s / 4))
        now = time.monotonic()
        pending, moved_at = supervisor.pending(), progress.moved_at
        if moved_at != since:
            times, since = 0, moved_at
        # A stall is reported once per limit, not at every poll.
        if not pending or now - max(moved_at, reported_at) < limit_s:
            continue
        reported_at = now
        oldest = [
            {"what": call.what, "worker": call.worker, "age_s": round(call.age_s, 1)}
            for call in pending[:5]
        ]
        silent_s = round(now - moved_at, 1)
        events("stall", silent_s=silent_s, pending=len(pending), oldest=oldest)
        words = "; ".join(
            f"{call['what']} on {call['worker']} for {call['age_s']:.0f} s" for call in oldest
        )
        note(f"nothing has finished for {silent_s:.0f} s; pending: {words}")
        if any(call.what.startswith("start of ") for call in pending):
            # Not counted: loading weights may take half an hour.
            progress.moved()
            continue
        times += 1
        if end is not None and times >= end.times and silent_s >= end.at_least_s:
            raise TrainingFailed(
                f"nothing has finished for {silent_s:.0f} s (actors.max_stalls {end.times} x "
                f"actors.stall_s {limit_s:g}); waited for: {words}. See events.jsonl and the Ray "
                "logs of that worker's node, then continue with --resume"
            )
