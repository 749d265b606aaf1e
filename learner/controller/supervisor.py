"""Supervises workers: worker slots, incarnations, deadlines, retries.

A role has worker slots (rollout 0..R-1). A slot holds one incarnation of a worker at a time. A
worker that dies, misses its deadline or answers with the wrong weights is killed, and its slot gets
the next incarnation. A slot that needs this too often is closed. This file knows an executor, but
neither Ray nor a tensor.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from learner.controller.calls import pass_on, together
from learner.controller.deadlines import Deadlines
from learner.controller.executor import Executor, Worker
from rl_edit.config import ActorsConfig
from rl_edit.errors import (
    BlobLost,
    ResourcesInfeasible,
    WorkerLost,
    WorkerOutOfMemory,
    WorkFailed,
)
from rl_edit.method.update import TrainingFailed

QUARANTINE_WINDOW_S = 600.0
"""Losses of a worker slot count together within this time."""

Prepare = Callable[[Worker], Awaitable[None]]
Check = Callable[[Any], str]


class GivenUp(RuntimeError):
    """A piece of work spent its retries. The caller decides what that costs."""


@dataclass
class WorkerSlot:
    """One place of a role: mutable, private to the supervisor.

    Attributes:
        kills: times of recent losses, by the supervisor's clock.
        closed: True when the slot was lost too often and gets no worker any more.
        pending_broadcast: a call that the worker finishes before its next work.
    """

    index: int
    worker: Worker
    # Names of workers carry it, so that events and logs name one process.
    incarnation: int = 1
    kills: list[float] = field(default_factory=list)
    closed: bool = False
    pending_broadcast: asyncio.Future[None] | None = None

    def name(self, role: str) -> str:
        return f"{role}-{self.index}.{self.incarnation}"


@dataclass(frozen=True, kw_only=True)
class Pending:
    """A call under way: its work, its worker and its age in seconds."""

    what: str
    worker: str
    age_s: float


class Supervisor:
    """Makes calls on interchangeable workers.

    Args:
        on_event: called for every lost worker, replacement, retry and closed slot.
        judge_timeout_s: how long scoring may wait for another machine by its own timeouts and
            retries; it is not ended before.
        clock: monotonic seconds; tests bring their own.
    """

    def __init__(
        self,
        executor: Executor,
        config: ActorsConfig,
        *,
        on_event: Callable[..., None],
        clock: Callable[[], float] = time.monotonic,
        judge_timeout_s: float = 0.0,
    ) -> None:
        self.executor, self.config, self.event, self.clock = executor, config, on_event, clock
        self.deadlines = Deadlines(config, judge_timeout_s=judge_timeout_s)
        self.retries = {"infra": 0, "data": 0}
        self._slots: dict[str, list[WorkerSlot]] = {}
        # A queue per role: work goes to the worker that has been idle for longest.
        self._idle: dict[str, asyncio.Queue[WorkerSlot]] = {}
        self._prepare: dict[str, Prepare] = {}
        self._minimum = {"rollout": config.min_rollout, "reward": config.min_reward}
        self._under_way: dict[int, tuple[str, str, float]] = {}
        self._calls = 0
        # One replacement per slot at a time: a broadcast and a call may find the same worker lost.
        self._replacing: dict[tuple[str, int], asyncio.Lock] = {}
        # Filled when a role is given up; it ends every caller that still waits for a worker.
        self._too_few: dict[str, str] = {}

    def open(self, role: str, slots: int, *, prepare: Prepare | None = None) -> None:
        """Spawns a role's workers without waiting for them.

        Args:
            prepare: brings a later incarnation up to date before it works.
        """
        self._slots[role] = [
            WorkerSlot(index, self.executor.spawn(role, index)) for index in range(slots)
        ]
        self._idle[role] = asyncio.Queue()
        for slot in self._slots[role]:
            self._idle[role].put_nowait(slot)
            self._replacing[role, slot.index] = asyncio.Lock()
        if prepare is not None:
            self._prepare[role] = prepare

    async def ready(self) -> None:
        """Waits until every worker has been constructed.

        Loading models takes minutes, and must not count against the deadline of a first call.

        Raises:
            ResourcesInfeasible: when some worker could not be placed or did not load within
                ``actors.start_timeout_s``, or found too little memory.
            InputError, TrainingFailed: a worker's constructor raised; it is not tried again.
        """
        slots = self._all()
        waiting = together(
            self.timed("start", f"start of {role}-{slot.index}", slot, role, "ready")
            for role, slot in slots
        )
        try:
            await asyncio.wait_for(waiting, self.config.start_timeout_s)
        except TimeoutError as error:
            raise ResourcesInfeasible(
                f"not all of {len(slots)} actors were running after "
                f"{self.config.start_timeout_s:g} s (actors.start_timeout_s): "
                f"free are {self.executor.free()}. Lower actors.*, wait for other jobs, or allow "
                "more time for loading."
            ) from error
        except WorkerOutOfMemory as error:
            raise ResourcesInfeasible(
                f"{error}. Lower actors.num_* or editor.micro_batch, or give the run a larger "
                "machine or GPU."
            ) from error
        except WorkerLost as error:
            raise TrainingFailed(
                "an actor's process ended while it was starting, and left no message. The Ray "
                f"logs may have one; a machine that is out of memory does this too: {error}"
            ) from error
        except WorkFailed as error:
            raise TrainingFailed(f"an actor could not be started: {error}") from error

    def _all(self) -> list[tuple[str, WorkerSlot]]:
        return [
            (role, slot) for role, slots in self._slots.items() for slot in slots if not slot.closed
        ]

    def worker_slots(self, role: str) -> list[WorkerSlot]:
        """Returns the slots of a role that are in use."""
        return [slot for slot in self._slots[role] if not slot.closed]

    def pending(self) -> list[Pending]:
        """Returns every call under way, oldest first."""
        now = self.clock()
        calls = sorted(self._under_way.values(), key=lambda call: call[2])
        return [
            Pending(what=what, worker=worker, age_s=now - since) for what, worker, since in calls
        ]

    async def call(
        self,
        role: str,
        what: str,
        method: str,
        arguments: Callable[[], Sequence[Any]] = tuple,
        *,
        blobs: int = 0,
        kind: str = "",
        check: Check = lambda answer: "",
        late: Callable[[Any], object] = lambda answer: None,
        attempt: Callable[[str], None] = lambda worker: None,
    ) -> Any:
        """Runs a method on the next idle worker, and again on another when that fails.

        Args:
            arguments: makes the arguments, once a worker is idle: a packed item holds an image, and
                hundreds may be waiting.
            kind: the usual duration that its deadline follows; by default that of the method. The
                duration of a small piece of work says nothing about a large one.
            check: returns what is wrong with an answer, or "". A worker that answers wrongly counts
                as lost.
            late: called with an answer that arrives after its deadline.
            attempt: called with the worker's name before every try.

        Raises:
            GivenUp: the budget of infrastructure or data retries is spent.
            TrainingFailed: too few workers are left.
        """
        # Two budgets: a lost worker says nothing about the work, an exception in it does.
        lost = failed = 0
        while True:
            slot = await self._next_idle(role)
            worker = slot.worker
            attempt(slot.name(role))
            try:
                if slot.pending_broadcast is not None:
                    # Work must not overtake the weights that it names.
                    await slot.pending_broadcast
                answer = await self.timed(
                    kind or method, what, slot, role, method, *arguments(), blobs=blobs, late=late
                )
                if wrong := check(answer):
                    raise WorkerLost(wrong)
                return answer
            except WorkerLost as error:
                lost += 1
                self._report("actor_lost", role, slot.name(role), what, error, lost)
                await self._replace(role, slot, worker, str(error))
                budget = self.config.infra_retries
                self._spend("infra", lost, budget, f"{what} lost its worker", error)
                await asyncio.sleep(self.deadlines.backoff_s(lost))
            except WorkFailed as error:
                failed += 1
                self._report("work_failed", role, slot.name(role), what, error, failed)
                budget = self.config.data_retries
                self._spend("data", failed, budget, f"{what} failed", error)
            finally:
                # A closed slot goes back too: it wakes a caller, who then sees that it is closed.
                self._idle[role].put_nowait(slot)

    def _report(
        self, event: str, role: str, worker: str, during: str, error: BaseException, attempt: int
    ) -> None:
        details = {"role": role, "worker": worker, "during": during, "attempt": attempt}
        self.event(event, **details, reason=str(error))

    def _spend(self, kind: str, times: int, budget: int, words: str, error: Exception) -> None:
        """Counts a retry.

        Raises:
            GivenUp: the budget of retries of this kind is spent.
        """
        if times > budget:
            raise GivenUp(
                f"{words} {times} times (actors.{kind}_retries {budget}): {error}"
            ) from error
        self.retries[kind] += 1

    async def broadcast(
        self, role: str, what: str, method: str, *args: Any
    ) -> list[tuple[str, Any]]:
        """Runs a method on every worker of a role.

        A worker that is lost meanwhile is replaced. Its replacement is prepared instead.

        Returns:
            (worker, answer) of those that were not lost.
        """
        calls = (self._send(slot, role, what, method, *args) for slot in self.worker_slots(role))
        responses = await together(calls)
        return [response for of_worker in responses for response in of_worker]

    def broadcast_when_idle(self, role: str, what: str, method: str, *args: Any) -> None:
        """Broadcasts without waiting for the workers.

        Each worker runs the method after its present call and before any later one.
        """
        for slot in self.worker_slots(role):
            slot.pending_broadcast = asyncio.ensure_future(
                self._after(slot.pending_broadcast, slot, role, what, method, *args)
            )

    async def _after(
        self,
        before: asyncio.Future[None] | None,
        slot: WorkerSlot,
        role: str,
        what: str,
        method: str,
        *args: Any,
    ) -> None:
        # Broadcasts reach a worker in the order in which they were made: the newest weights last.
        if before is not None:
            await before
        try:
            await self._send(slot, role, what, method, *args)
        except WorkFailed as error:
            # Weights that no worker can load do not get better by another incarnation.
            raise TrainingFailed(
                f"{what} failed on {slot.name(role)} ({error}): see events.jsonl and the Ray logs, "
                "then continue with --resume"
            ) from error

    def broadcasts(self) -> list[asyncio.Future[None]]:
        """Returns the broadcasts that are waiting, or that failed and that no call has awaited."""
        return [
            slot.pending_broadcast for _, slot in self._all() if slot.pending_broadcast is not None
        ]

    async def _send(
        self, slot: WorkerSlot, role: str, what: str, method: str, *args: Any
    ) -> list[tuple[str, Any]]:
        worker, name = slot.worker, slot.name(role)
        try:
            return [(name, await self.timed(method, what, slot, role, method, *args))]
        except (WorkerLost, BlobLost) as error:
            # The driver holds what it sends: a worker that cannot pull it is the one cut off.
            self._report("actor_lost", role, name, what, error, 1)
            await self._replace(role, slot, worker, str(error))
            return []

    async def timed(
        self,
        kind: str,
        what: str,
        slot: WorkerSlot,
        role: str,
        method: str,
        *args: Any,
        blobs: int = 0,
        late: Callable[[Any], object] = lambda answer: None,
    ) -> Any:
        """Makes one call on one worker within its deadline.

        Raises:
            WorkerLost: also for a missed deadline.
        """
        self._calls += 1
        # Recorded before the call starts, so that the stall report never misses one.
        number, since, limit_s = self._calls, self.clock(), self.deadlines.limit_s(kind)
        self._under_way[number] = (what, slot.name(role), since)
        call = asyncio.ensure_future(slot.worker.call(method, *args, blobs=blobs))
        try:
            done, _ = await asyncio.wait({call}, timeout=limit_s)
            if not done:
                call.add_done_callback(lambda finished: pass_on(finished, late))
                # Killed, not cancelled: a hung CUDA call cannot be cancelled.
                slot.worker.kill()
                # Maybe it only waited for an argument, which no other worker would get either.
                await self.executor.require(args)
                raise WorkerLost(f"no answer within {limit_s:g} s, killed")
            if call.cancelled():
                # The executor dropped the call; this task was not cancelled. A CancelledError
                # raised here would look like the end of the run itself.
                raise WorkerLost("the call was dropped before it began")
            answer = call.result()
        except asyncio.CancelledError:
            call.cancel()
            raise
        finally:
            del self._under_way[number]
        self.deadlines.record(kind, self.clock() - since)
        return answer

    async def _next_idle(self, role: str) -> WorkerSlot:
        while True:
            slot = await self._idle[role].get()
            if not slot.closed:
                return slot
            if role in self._too_few:
                # Puts the closed slot back: it must wake the other callers that wait.
                self._idle[role].put_nowait(slot)
                raise TrainingFailed(self._too_few[role])

    async def _replace(self, role: str, slot: WorkerSlot, lost: Worker, reason: str) -> None:
        """Puts the next incarnation into a slot, unless ``lost`` has been replaced already.

        Raises:
            TrainingFailed: the slot is closed and too few are left.
        """
        async with self._replacing[role, slot.index]:
            # Asked under the lock: another caller may have replaced the worker meanwhile.
            if slot.worker is not lost or slot.closed:
                return
            while True:
                # Also when it seems dead: a process beyond its deadline may still hold a GPU.
                slot.worker.kill()
                now = self.clock()
                recent = [then for then in slot.kills if now - then < QUARANTINE_WINDOW_S]
                slot.kills = [*recent, now]
                if len(slot.kills) >= self.config.quarantine_after and role in self._minimum:
                    self._close(role, slot, reason)
                    return
                try:
                    await self._start_next(role, slot)
                    return
                except (WorkerLost, WorkFailed, BlobLost, TimeoutError) as error:
                    self._report("actor_lost", role, slot.name(role), "replacement", error, 1)
                    reason = str(error)
                    await asyncio.sleep(self.deadlines.backoff_s(len(slot.kills)))

    async def _start_next(self, role: str, slot: WorkerSlot) -> None:
        """Spawns a slot's next incarnation, and brings it up to date."""
        slot.worker = self.executor.spawn(role, slot.index)
        slot.incarnation += 1
        await self.timed("start", f"start of {slot.name(role)}", slot, role, "ready")
        if role in self._prepare:
            await asyncio.wait_for(self._prepare[role](slot.worker), self.config.deadline_s)
        self.event("actor_replaced", role=role, worker=slot.name(role))

    def _close(self, role: str, slot: WorkerSlot, reason: str) -> None:
        """Closes a slot for good.

        Raises:
            TrainingFailed: fewer slots than the minimum are left.
        """
        slot.closed = True
        left, minimum = len(self.worker_slots(role)), self._minimum[role]
        self.event(
            "seat_quarantined", role=role, worker=slot.name(role), kills=len(slot.kills), left=left
        )
        if left < minimum:
            self._too_few[role] = (
                f"{role} slot {slot.index} was lost {len(slot.kills)} times within "
                f"{QUARANTINE_WINDOW_S / 60:g} minutes ({reason}); {left} "
                f"of {len(self._slots[role])} {role} actors are left, fewer than actors.min_{role} "
                f"{minimum}: see actor_lost in events.jsonl and the Ray logs; a smaller group or a "
                "longer actors.deadline_s may help. Continue with --resume."
            )
            raise TrainingFailed(self._too_few[role])

    def kill_all(self, roles: Sequence[str] | None = None) -> None:
        """Ends every worker at once, or those of some roles."""
        for role, slot in self._all():
            if roles is None or role in roles:
                slot.worker.kill()
