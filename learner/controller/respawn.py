"""Starts workers again that only work together, on what is left of the cluster."""

from __future__ import annotations

import asyncio

from learner.controller.calls import together
from learner.controller.supervisor import Supervisor, WorkerSlot
from rl_edit.errors import WorkerLost


async def respawn(supervisor: Supervisor, role: str, *, minimum: int) -> None:
    """Replaces every worker of a role at once.

    While more than ``minimum`` slots are left, one that cannot be started is closed for good: at
    once when it was not running within its deadline, else after ``actors.quarantine_after`` tries.

    Raises:
        WorkerLost: one of the last ``minimum`` did not start.
    """
    slots = supervisor.worker_slots(role)
    # All are killed first: a survivor of the old group would wait in a collective with the new.
    for slot in slots:
        slot.worker.kill()
    for slot in slots:
        _spawn(supervisor, role, slot)
    await together(_start(supervisor, role, slot, minimum) for slot in slots)


def _spawn(supervisor: Supervisor, role: str, slot: WorkerSlot) -> None:
    slot.worker = supervisor.executor.spawn(role, slot.index)
    slot.incarnation += 1


async def _start(supervisor: Supervisor, role: str, slot: WorkerSlot, minimum: int) -> None:
    """Waits until a slot's worker runs, or closes the slot."""
    config, failed = supervisor.config, 0
    while True:
        began, name = supervisor.clock(), slot.name(role)
        try:
            await supervisor.timed("start", f"start of {name}", slot, role, "ready")
            return
        except WorkerLost as error:
            slot.worker.kill()
            if len(supervisor.worker_slots(role)) <= minimum:
                raise
            failed += 1
            supervisor.event(
                "actor_lost",
                role=role,
                worker=name,
                during="replacement",
                attempt=failed,
                reason=str(error),
            )
            # One that waited for its whole deadline has no place: another try would wait as long.
            waited = supervisor.clock() - began >= config.start_timeout_s
            if waited or failed >= config.quarantine_after:
                slot.closed = True
                left = len(supervisor.worker_slots(role))
                supervisor.event(
                    "seat_quarantined", role=role, worker=name, kills=failed, left=left
                )
                return
            await asyncio.sleep(supervisor.deadlines.backoff_s(failed))
            _spawn(supervisor, role, slot)
