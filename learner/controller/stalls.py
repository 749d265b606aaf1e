"""The stall report: what is pending when nothing has finished for a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from learner.controller.supervisor import Supervisor

POLL_S = 5.0


class Progress:
    """Stores the moment when something last finished."""

    def __init__(self) -> None:
        self.moved_at = time.monotonic()

    def moved(self) -> None:
        """Notes that something has just finished."""
        self.moved_at = time.monotonic()


async def report_stalls(
    supervisor: Supervisor,
    progress: Progress,
    *,
    limit_s: float,
    events: Callable[..., None],
    note: Callable[[str], None],
) -> None:
    """Reports pending calls whenever nothing has finished for ``limit_s``.

    Runs until it is cancelled.
    """
    reported_at = time.monotonic()
    while True:
        # A quarter, so that a short limit is not overshot by a whole poll.
        await asyncio.sleep(min(POLL_S, limit_s / 4))
        now = time.monotonic()
        pending, moved_at = supervisor.pending(), progress.moved_at
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
