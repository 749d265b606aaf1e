"""Who runs what: slots, incarnations, deadlines, retries. Knows an executor, no Ray and no tensor.

A role has slots (rollout 0..R-1); a slot holds one incarnation of a worker at a time. A worker that
dies, misses its deadline or answers with the wrong weights is killed and its slot gets the next
incarnation; a slot that needs this too often is given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from learner.controller.executor import Executor, Worker
from rl_edit.config import ActorsConfig
from rl_edit.errors import BlobLost, InputError, ResourcesInfeasible, WorkerLost, WorkFailed
from rl_edit.method.update import TrainingFailed

QUARANTINE_WINDOW_S = 600.0
LONGEST_BACKOFF_S = 30.0
SHORTEST_DEADLINE_S = 60.0
DEADLINE_FACTOR = 5.0

Prepare = Callable[[Worker], Awaitable[None]]
Check = Callable[[Any], str]


class GivenUp(RuntimeError):
    """A piece of work spent its retries. What that costs is for the caller to decide."""


@dataclass
class WorkerSlot:
    """One place of a role: mutable, private to the supervisor."""

    index: int
    worker: Worker
    incarnation: int = 1
    kills: list[float] = field(default_factory=list)
    closed: bool = False
    pending_broadcast: asyncio.Future[None] | None = None

    def name(self, role: str) -> str:
        return f"{role}-{self.index}.{self.incarnation}"


@dataclass(frozen=True, kw_only=True)
class Pending:
    """A call under way: what, on whom, since when (seconds)."""

    what: str
    worker: str
    age_s: float


class Supervisor:
    """Calls on interchangeable workers.

    Args:
        on_event: told of every lost worker, replacement, retry and closed slot.
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
        self._judge_timeout_s = judge_timeout_s
        self.retries = {"infra": 0, "data": 0}
        self._slots: dict[str, list[WorkerSlot]] = {}
        self._idle: dict[str, asyncio.Queue[WorkerSlot]] = {}
        self._prepare: dict[str, Prepare] = {}
        self._minimum = {"rollout": config.min_rollout, "reward": config.min_reward}
        self._usual_s: dict[str, float] = {}
        self._under_way: dict[int, tuple[str, str, float]] = {}
        self._calls = 0
        self._replacing: dict[tuple[str, int], asyncio.Lock] = {}
        self._too_few: dict[str, str] = {}

    def open(self, role: str, slots: int, *, prepare: Prepare | None = None) -> None:
        """Spawns a role's workers without waiting for them. ``prepare`` brings a later incarnation
        up to date."""
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
        """Waits until every worker has been constructed, so that deadlines of work start when work
        starts.

        Raises:
            ResourcesInfeasible: when some worker could not be placed or did not load within
                ``actors.start_timeout_s``.
        """
        slots = [slot for slots in self._slots.values() for slot in slots]
        waiting = asyncio.gather(
            *(
                self.timed("start", f"start of {role}-{s.index}", s, role, "ready")
                for role, s in self._all()
            )
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
        except WorkerLost as error:
            raise TrainingFailed(
                f"an actor died while it was starting ({error}): see the Ray logs; it may lack "
                "memory"
            ) from error

    def _all(self) -> list[tuple[str, WorkerSlot]]:
        return [
            (role, slot) for role, slots in self._slots.items() for slot in slots if not slot.closed
        ]

    def worker_slots(self, role: str) -> list[WorkerSlot]:
        """The slots of a role that are in use."""
        return [slot for slot in self._slots[role] if not slot.closed]

    def pending(self) -> list[Pending]:
        """Every call under way, oldest first."""
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
        given: Callable[[], Sequence[Any]] = tuple,
        *,
        blobs: int = 0,
        kind: str = "",
        check: Check = lambda answer: "",
        late: Callable[[Any], object] = lambda answer: None,
        attempt: Callable[[str], None] = lambda worker: None,
    ) -> Any:
        """Runs a method on the next idle worker, again on another one when that fails.

        Args:
            given: makes the arguments, once a worker is idle: a packed item holds a picture, and
                hundreds may be waiting.
            kind: of what usual duration it is; the method's unless given. A small piece of work
                says nothing about a large one.
            check: says what is wrong with an answer ("" when nothing is). A worker that answers
                wrongly counts as lost.
            late: is shown an answer that arrives after its deadline.
            attempt: is told of every try.

        Raises:
            GivenUp: when the budget of infrastructure or data retries is spent.
            TrainingFailed: when too few workers are left.
        """
        infra = data = 0
        while True:
            slot = await self._next_idle(role)
            worker = slot.worker
            attempt(slot.name(role))
            try:
                if slot.pending_broadcast is not None:
                    await slot.pending_broadcast
                answer = await self.timed(
                    kind or method, what, slot, role, method, *given(), blobs=blobs, late=late
                )
                if wrong := check(answer):
                    raise WorkerLost(wrong)
                return answer
            except WorkerLost as error:
                infra += 1
                self.event(
                    "actor_lost",
                    role=role,
                    worker=slot.name(role),
                    during=what,
                    attempt=infra,
                    reason=str(error),
                )
                await self._replace(role, slot, worker, str(error))
                if infra > self.config.infra_retries:
                    raise GivenUp(
                        f"{what} lost its worker {infra} times (actors.infra_retries "
                        f"{self.config.infra_retries}): {error}"
                    ) from error
                self.retries["infra"] += 1
                await asyncio.sleep(self._backoff(infra))
            except WorkFailed as error:
                data += 1
                self.event(
                    "work_failed",
                    role=role,
                    worker=slot.name(role),
                    during=what,
                    attempt=data,
                    reason=str(error),
                )
                if data > self.config.data_retries:
                    raise GivenUp(
                        f"{what} failed {data} times (actors.data_retries "
                        f"{self.config.data_retries}): {error}"
                    ) from error
                self.retries["data"] += 1
            finally:
                self._idle[role].put_nowait(slot)

    async def broadcast(
        self, role: str, what: str, method: str, *args: Any
    ) -> list[tuple[str, Any]]:
        """Runs a method on every worker of a role; one that is lost meanwhile is replaced, and
        prepared, instead.

        Returns:
            (worker, answer) of those that were not lost.
        """

        calls = (self._send(slot, role, what, method, *args) for slot in self.worker_slots(role))
        return [answer for answers in await asyncio.gather(*calls) for answer in answers]

    def broadcast_when_idle(self, role: str, what: str, method: str, *args: Any) -> None:
        """As :meth:`broadcast`, without waiting: each worker hears it after what it is doing now
        and before anything it is called for later."""
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
        if before is not None:
            await before
        try:
            await self._send(slot, role, what, method, *args)
        except (WorkFailed, BlobLost) as error:
            raise TrainingFailed(
                f"{what} failed on {slot.name(role)} ({error}): see events.jsonl and the Ray logs, "
                "then continue with --resume"
            ) from error

    def broadcasts(self) -> list[asyncio.Future[None]]:
        """Those not heard yet, and those that failed where nobody was called afterwards."""
        return [
            slot.pending_broadcast for _, slot in self._all() if slot.pending_broadcast is not None
        ]

    async def _send(
        self, slot: WorkerSlot, role: str, what: str, method: str, *args: Any
    ) -> list[tuple[str, Any]]:
        worker, name = slot.worker, slot.name(role)
        try:
            return [(name, await self.timed(method, what, slot, role, method, *args))]
        except WorkerLost as error:
            self.event(
                "actor_lost", role=role, worker=name, during=what, attempt=1, reason=str(error)
            )
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
        """One call on one worker within its deadline. Past it the worker is killed: a hung CUDA
        call cannot be cancelled.

        Raises:
            WorkerLost: also for a missed deadline.
        """
        self._calls += 1
        number, since, limit = self._calls, self.clock(), self.deadline_s(kind)
        self._under_way[number] = (what, slot.name(role), since)
        call = asyncio.ensure_future(slot.worker.call(method, *args, blobs=blobs))
        try:
            done, _ = await asyncio.wait({call}, timeout=limit)
            if not done:
                call.add_done_callback(lambda finished: _show(finished, late))
                slot.worker.kill()
                raise WorkerLost(f"no answer within {limit:g} s, killed")
            if call.cancelled():
                # Not us: whoever ran it dropped it. Left alone, this would look like the end of the
                # run itself.
                raise WorkerLost("the call was dropped before it began")
            answer = call.result()
        except asyncio.CancelledError:
            call.cancel()
            raise
        finally:
            del self._under_way[number]
        spent = self.clock() - since
        self._usual_s[kind] = (
            spent if kind not in self._usual_s else 0.8 * self._usual_s[kind] + 0.2 * spent
        )
        return answer

    def deadline_s(self, kind: str) -> float:
        """Longest wait for a call of this kind: what was configured until some have been timed,
        then five times the usual."""
        if kind == "start":
            return self.config.start_timeout_s
        # What may queue behind another call on the same worker has no usual duration.
        queues = kind not in ("run", "score", "learn") or self.config.placement == "colocated"
        if queues or kind not in self._usual_s:
            return self.config.deadline_s
        # A judge that hangs now and then has a usual duration that says nothing of how long it is
        # waited for.
        waits = self._judge_timeout_s if kind == "score" else 0.0
        return min(
            self.config.deadline_s,
            max(SHORTEST_DEADLINE_S + waits, DEADLINE_FACTOR * self._usual_s[kind]),
        )

    def _backoff(self, failures: int) -> float:
        return (
            min(LONGEST_BACKOFF_S, self.config.backoff_s * 2 ** (failures - 2))
            if failures > 1
            else 0.0
        )

    async def _next_idle(self, role: str) -> WorkerSlot:
        while True:
            slot = await self._idle[role].get()
            if not slot.closed:
                return slot
            if role in self._too_few:
                # Nobody may be left who would wake the others that wait.
                self._idle[role].put_nowait(slot)
                raise TrainingFailed(self._too_few[role])

    async def _replace(self, role: str, slot: WorkerSlot, lost: Worker, reason: str) -> None:
        """The next incarnation in a slot; nothing when somebody else has already replaced ``lost``.

        Raises:
            TrainingFailed: when the slot is given up and too few are left.
        """
        async with self._replacing[role, slot.index]:
            if slot.worker is not lost or slot.closed:
                return
            while True:
                slot.worker.kill()
                now = self.clock()
                slot.kills = [then for then in slot.kills if now - then < QUARANTINE_WINDOW_S] + [
                    now
                ]
                if len(slot.kills) >= self.config.quarantine_after and role in self._minimum:
                    self._close(role, slot, reason)
                    return
                slot.worker = self.executor.spawn(role, slot.index)
                slot.incarnation += 1
                try:
                    await self.timed("start", f"start of {slot.name(role)}", slot, role, "ready")
                    if role in self._prepare:
                        await asyncio.wait_for(
                            self._prepare[role](slot.worker), self.config.deadline_s
                        )
                    self.event("actor_replaced", role=role, worker=slot.name(role))
                    return
                except (WorkerLost, WorkFailed, TimeoutError) as error:
                    self.event(
                        "actor_lost",
                        role=role,
                        worker=slot.name(role),
                        during="replacement",
                        attempt=1,
                        reason=str(error),
                    )
                    reason = str(error)
                    await asyncio.sleep(self._backoff(len(slot.kills)))

    def _close(self, role: str, slot: WorkerSlot, reason: str) -> None:
        slot.closed = True
        left, least = len(self.worker_slots(role)), self._minimum[role]
        self.event(
            "seat_quarantined", role=role, worker=slot.name(role), kills=len(slot.kills), left=left
        )
        if left < least:
            self._too_few[role] = (
                f"{role} slot {slot.index} was lost {len(slot.kills)} times within "
                f"{QUARANTINE_WINDOW_S / 60:g} minutes ({reason}); {left} "
                f"of {len(self._slots[role])} {role} actors are left, fewer than actors.min_{role} "
                f"{least}: see actor_lost in events.jsonl "
                "and the Ray logs; a smaller group or a longer actors.deadline_s may help. "
                "Continue with --resume."
            )
            raise TrainingFailed(self._too_few[role])

    async def respawn(self, role: str) -> None:
        """The next incarnation in every slot of a role at once: for workers that only work
        together.

        Raises:
            WorkerLost: one of them did not come up.
        """
        for slot in self.worker_slots(role):
            slot.worker.kill()
        for slot in self.worker_slots(role):
            slot.worker = self.executor.spawn(role, slot.index)
            slot.incarnation += 1
        await asyncio.gather(
            *(
                self.timed("start", f"start of {s.name(role)}", s, role, "ready")
                for s in self.worker_slots(role)
            )
        )

    def kill_all(self, roles: Sequence[str] | None = None) -> None:
        """Ends every worker (of some roles) at once."""
        for role, slot in self._all():
            if roles is None or role in roles:
                slot.worker.kill()


def _show(finished: asyncio.Future[Any], late: Callable[[Any], object]) -> None:
    """A late answer, if it is one; the error of a killed worker is nobody's business any more."""
    with contextlib.suppress(
        asyncio.CancelledError, WorkerLost, WorkFailed, InputError, TrainingFailed
    ):
        late(finished.result())
