"""The learner as the controller sees it: ranks that apply each update once, together.

A dead rank makes the others wait in a collective, so the ranks are lost together: all are killed
and rebuilt from the state before the update, and the update is replayed. No actor has seen the new
weights meanwhile, because they are published afterwards. Ranks that cannot be started again are
given up, down to ``actors.min_learner``: any number of ranks gives the same bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from learner.controller.executor import Ref
from learner.controller.respawn import respawn
from learner.controller.supervisor import Supervisor
from rl_edit.errors import BlobLost, WorkerLost, WorkFailed
from rl_edit.messages import LearnAnswer, LearnOrder, LearnReport
from rl_edit.method.update import TrainingFailed
from rl_edit.types import AdapterId

T = TypeVar("T")

ROLE = "learner"

Shards = Callable[[int], Sequence[Sequence[Ref]]]
"""Divides an update's group blobs over a number of ranks."""


@dataclass(frozen=True, kw_only=True)
class LearnerSnapshot:
    """The learner's weights and state after an update.

    The driver keeps the newest one, so that losing the learner loses nothing.

    Attributes:
        id, adapter: the acting weights, named and packed, for actors.
        state: packed adapter and optimizer, for a rebuilt learner and for checkpoints.
        result_id, result: the weights that are evaluated and saved, named and packed. They are the
            acting ones unless the method separates them.
    """

    updates_done: int
    id: AdapterId
    adapter: Ref
    state: Ref
    result_id: AdapterId
    result: Ref

    @staticmethod
    def of(updates_done: int, answer: LearnAnswer) -> LearnerSnapshot:
        """Takes the snapshot from rank 0's answer after an update."""
        report = answer.report
        return LearnerSnapshot(
            updates_done=updates_done,
            id=report.adapter,
            adapter=answer.adapter,
            state=answer.state,
            result_id=report.result,
            result=answer.result if report.separate_result else answer.adapter,
        )


class LearnerRanks:
    """Calls ranks 0 to N - 1 together. Rank 0 answers with the weights, which all ranks share."""

    def __init__(self, supervisor: Supervisor, *, on_event: Callable[..., None]) -> None:
        self.supervisor, self.event = supervisor, on_event
        self._restored: Ref | None = None
        supervisor.open(ROLE, supervisor.config.num_learner)

    @property
    def ranks(self) -> int:
        """Ranks that are left."""
        return len(self.supervisor.worker_slots(ROLE))

    async def start(self) -> None:
        """Joins the ranks, once they are constructed."""
        if self.ranks > 1:
            # Asked anew at every start: a rebuilt rank 0 may run on another machine.
            slots = self.supervisor.worker_slots(ROLE)
            address = await self.supervisor.timed("join", "rendezvous", slots[0], ROLE, "address")
            await self._everyone(
                "join",
                "joining the ranks",
                [(rank, self.ranks, address) for rank in range(self.ranks)],
            )

    async def export(self, updates_done: int) -> LearnerSnapshot:
        """Returns the weights and state of a learner just started or restored."""

        async def ask() -> LearnerSnapshot:
            slot = self.supervisor.worker_slots(ROLE)[0]
            answer = await self.supervisor.timed(
                "export", "export of the learner's state", slot, ROLE, "export", blobs=3
            )
            return await self._on_driver(LearnerSnapshot.of(updates_done, LearnAnswer(*answer)))

        return await self._anew("export", ask)

    async def restore(self, state: Ref) -> None:
        """Restores a state in a learner that has just been started."""
        await self._anew("restore", lambda: self._restore(state))
        self._restored = state

    async def _respawn(self) -> None:
        minimum = self.supervisor.config.fewest_ranks
        await respawn(self.supervisor, ROLE, minimum=minimum)

    async def _restore(self, state: Ref) -> None:
        await self._everyone("restore", "restoring the learner", [(state,)] * self.ranks)

    async def _anew(self, what: str, call: Callable[[], Awaitable[T]]) -> T:
        """Makes a call before the first update, and starts a lost learner again.

        It gets the state that was restored before, if any.
        """
        lost = 0
        while True:
            try:
                if lost:
                    await self._respawn()
                    await self.start()
                    if self._restored is not None:
                        await self._restore(self._restored)
                return await call()
            except WorkerLost as error:
                lost += 1
                self.event("learner_lost", during=what, attempt=lost, reason=str(error))
                if lost > self.supervisor.config.infra_retries:
                    raise
                self.supervisor.retries["infra"] += 1

    async def ratio(self, group: Ref) -> float:
        """Returns the largest |ratio - 1| of a group at the present weights, for the preflight."""

        async def ask() -> float:
            # Every rank is called: with a sharded base, one alone would wait for the others.
            deviations = await self._everyone("ratio", "the ratio check", [(group,)] * self.ranks)
            return float(max(deviations))

        return await self._anew("the ratio check", ask)

    async def apply(
        self, order: LearnOrder, shards: Shards, snapshot: LearnerSnapshot
    ) -> tuple[LearnReport, LearnerSnapshot]:
        """Applies one update exactly once, whatever is lost meanwhile.

        Args:
            shards: the group blobs of each rank, for any number of ranks.
            snapshot: the state that the update starts from, and that a replay starts from again.

        Raises:
            TrainingFailed: the learner cannot be kept alive, or refuses.
            BlobLost: a group is gone; it must be made again.
        """
        lost = failed = 0
        while True:
            try:
                if lost or failed:
                    await self._rebuild(snapshot)
                # Asked anew in each try: a rebuilt learner may have fewer ranks.
                arguments = [(order, *shard) for shard in shards(self.ranks)]
                responses = await self._everyone(
                    "learn", f"update {order.update}", arguments, blobs=3
                )
                # Rank 0 carries the weights; the ranks hold the same after their all-reduce.
                answer = LearnAnswer(*responses[0])
                made = LearnerSnapshot.of(order.update + 1, answer)
                return answer.report, await self._on_driver(made)
            except WorkerLost as error:
                lost += 1
                self.event(
                    "learner_lost", during=f"update {order.update}", attempt=lost, reason=str(error)
                )
                if lost > self.supervisor.config.infra_retries:
                    raise TrainingFailed(
                        f"the learner was lost {lost} times in update {order.update} "
                        f"(actors.infra_retries): {error}. See the Ray logs; if it was slow rather "
                        "than dead, raise actors.deadline_s. Continue with --resume."
                    ) from error
                self.supervisor.retries["infra"] += 1
            except WorkFailed as error:
                # When a rank dies, a survivor may be the first to fail. Only with several ranks can
                # a failure be of that kind, so only then is the update replayed.
                failed += 1
                self.event(
                    "learner_failed",
                    during=f"update {order.update}",
                    attempt=failed,
                    reason=str(error),
                )
                if self.ranks == 1 or failed > self.supervisor.config.data_retries:
                    raise TrainingFailed(
                        f"the learner failed in update {order.update}: {error}"
                    ) from error
                self.supervisor.retries["data"] += 1

    async def _on_driver(self, snapshot: LearnerSnapshot) -> LearnerSnapshot:
        """Copies a snapshot to the driver's machine: that of the learner may be lost with it.

        Raises:
            WorkerLost: it is lost already, so the learner must make it again.
        """
        executor = self.supervisor.executor
        try:
            adapter = await executor.keep(snapshot.adapter)
            state = await executor.keep(snapshot.state)
            separate = snapshot.result_id != snapshot.id
            result = await executor.keep(snapshot.result) if separate else adapter
        except BlobLost as error:
            raise WorkerLost(f"its answer was lost with its machine ({error})") from error
        return replace(snapshot, adapter=adapter, state=state, result=result)

    async def _rebuild(self, snapshot: LearnerSnapshot) -> None:
        """Starts all ranks again, at the state before the update."""
        await self._respawn()
        await self.start()
        try:
            await self._restore(snapshot.state)
        except BlobLost as error:
            raise TrainingFailed(
                f"the learner and its state after update {snapshot.updates_done} were lost "
                f"together ({error}): continue with --resume from the newest checkpoint"
            ) from error
        self.event(
            "learner_rebuilt",
            ranks=self.ranks,
            updates_done=snapshot.updates_done,
            adapter=str(snapshot.id),
        )

    async def _everyone(
        self, method: str, what: str, arguments: Sequence[Sequence[Any]], *, blobs: int = 0
    ) -> list[Any]:
        """Calls every rank at once. The first failure ends all ranks.

        A rank without its peers would wait for ever.

        Args:
            arguments: of each rank.

        Returns:
            the answer of each rank.
        """
        slots = self.supervisor.worker_slots(ROLE)
        calls = [
            asyncio.ensure_future(
                self.supervisor.timed(
                    method, f"{what}, {slot.name(ROLE)}", slot, ROLE, method, *args, blobs=blobs
                )
            )
            for slot, args in zip(slots, arguments, strict=True)
        ]
        try:
            await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
            failures = [
                error for call in calls if call.done() and (error := call.exception()) is not None
            ]
            if failures:
                # A single rank that refused its input is alive and may be asked again.
                if self.ranks > 1 or any(
                    isinstance(error, WorkerLost | WorkFailed) for error in failures
                ):
                    self.supervisor.kill_all([ROLE])
                # A lost worker is the cause; what the others raise beside it is the consequence.
                raise next(
                    (error for error in failures if isinstance(error, WorkerLost)), failures[0]
                )
            return [call.result() for call in calls]
        finally:
            for call in calls:
                if not call.done():
                    # No call outlives this one: a late answer is not that of the replay.
                    call.cancel()
