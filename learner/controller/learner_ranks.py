"""The learner as the controller sees it: one to N ranks that apply an update together, exactly
once.

A dead rank makes the others wait in a collective, so the group stands and falls as one: it is
killed, rebuilt from the state before the update, and the update is replayed. Nobody saw the new
weights meanwhile, for they are published afterwards.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from learner.controller.executor import Ref
from learner.controller.supervisor import Supervisor
from rl_edit.errors import BlobLost, WorkerLost, WorkFailed
from rl_edit.messages import LearnAnswer, LearnOrder, LearnReport
from rl_edit.method.update import TrainingFailed
from rl_edit.types import AdapterId

T = TypeVar("T")

ROLE = "learner"


@dataclass(frozen=True, kw_only=True)
class LearnerSnapshot:
    """What the driver holds of the learner after an update, so that losing the learner loses
    nothing.

    Attributes:
        id, adapter: the acting weights, named and packed, for actors.
        state: packed adapter and optimizer, for a rebuilt learner and checkpoints.
        result_id, result: the weights that are evaluated and saved, named and packed; the acting
            ones where they are the same.
    """

    updates_done: int
    id: AdapterId
    adapter: Ref
    state: Ref
    result_id: AdapterId
    result: Ref

    @staticmethod
    def of(updates_done: int, answer: LearnAnswer) -> LearnerSnapshot:
        """What rank 0 answered after an update."""
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
    """Ranks 0 to N - 1. Rank 0 answers with the new weights; all ranks hold the same."""

    def __init__(
        self, supervisor: Supervisor, ranks: int, *, on_event: Callable[..., None]
    ) -> None:
        self.supervisor, self.ranks, self.event = supervisor, ranks, on_event
        supervisor.open(ROLE, ranks)

    async def start(self) -> None:
        """Joins the ranks, once they are constructed."""
        if self.ranks > 1:
            slots = self.supervisor.worker_slots(ROLE)
            address = await self.supervisor.timed("join", "rendezvous", slots[0], ROLE, "address")
            await self._everyone(
                "join",
                "joining the ranks",
                [(rank, self.ranks, address) for rank in range(self.ranks)],
            )

    async def export(self, updates_done: int) -> LearnerSnapshot:
        """The weights and state of a learner that has just been started or restored."""

        async def ask() -> LearnerSnapshot:
            slot = self.supervisor.worker_slots(ROLE)[0]
            answer = await self.supervisor.timed(
                "export", "export of the learner's state", slot, ROLE, "export", blobs=3
            )
            return LearnerSnapshot.of(updates_done, LearnAnswer(*answer))

        return await self._anew("export", ask)

    async def restore(self, state: Ref) -> None:
        """Brings a learner that has just been started to a state."""
        await self._anew("restore", lambda: self._restore(state))

    async def _restore(self, state: Ref) -> None:
        await self._everyone("restore", "restoring the learner", [(state,)] * self.ranks)

    async def _anew(self, what: str, call: Callable[[], Awaitable[T]]) -> T:
        """A call before the first update, when a lost learner has nothing to lose: it is started
        again."""
        lost = 0
        while True:
            try:
                if lost:
                    await self.supervisor.respawn(ROLE)
                    await self.start()
                return await call()
            except WorkerLost as error:
                lost += 1
                self.event("learner_lost", during=what, attempt=lost, reason=str(error))
                if lost > self.supervisor.config.infra_retries:
                    raise
                self.supervisor.retries["infra"] += 1

    async def ratio(self, group: Ref) -> float:
        """Largest |ratio - 1| at the present weights on a group: the preflight's question. Every
        rank answers, for a sharded base."""
        deviations = await self._everyone("ratio", "the ratio check", [(group,)] * self.ranks)
        return float(max(deviations))

    async def apply(
        self, order: LearnOrder, shards: Sequence[Sequence[Ref]], snapshot: LearnerSnapshot
    ) -> tuple[LearnReport, LearnerSnapshot]:
        """One update, applied once whatever dies: ``snapshot`` is the state it starts from.

        Raises:
            TrainingFailed: when the learner cannot be kept alive, or refuses.
            BlobLost: a group is gone; it must be made again.
        """
        lost = failed = 0
        while True:
            try:
                if lost or failed:
                    await self._rebuild(snapshot)
                arguments = [(order, *shard) for shard in shards]
                answers = await self._everyone(
                    "learn", f"update {order.update}", arguments, blobs=3
                )
                answer = LearnAnswer(*answers[0])
                return answer.report, LearnerSnapshot.of(order.update + 1, answer)
            except WorkerLost as error:
                lost += 1
                self.event(
                    "learner_lost", during=f"update {order.update}", attempt=lost, reason=str(error)
                )
                if lost > self.supervisor.config.infra_retries:
                    raise TrainingFailed(
                        f"the learner was lost {lost} times in update {order.update} "
                        f"(actors.infra_retries): {error}. See the Ray logs; "
                        "if it was slow rather than dead, raise actors.deadline_s. Continue with "
                        "--resume."
                    ) from error
                self.supervisor.retries["infra"] += 1
            except WorkFailed as error:
                # Beside a dead rank the survivors fail too, maybe first: with several ranks a
                # failure is worth a replay.
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

    async def _rebuild(self, snapshot: LearnerSnapshot) -> None:
        await self.supervisor.respawn(ROLE)
        await self.start()
        try:
            await self._restore(snapshot.state)
        except BlobLost as error:
            raise TrainingFailed(
                f"the learner and its state after update {snapshot.updates_done} were lost "
                f"together ({error}): continue with --resume from "
                "the newest checkpoint"
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
        """A call on every rank at once. The first failure ends all of them: a rank without its
        peers would wait for ever."""
        slots = self.supervisor.worker_slots(ROLE)
        calls = [
            asyncio.ensure_future(
                self.supervisor.timed(
                    method, f"{what}, {slot.name(ROLE)}", slot, ROLE, method, *given, blobs=blobs
                )
            )
            for slot, given in zip(slots, arguments, strict=True)
        ]
        try:
            await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
            failures = [
                error for call in calls if call.done() and (error := call.exception()) is not None
            ]
            if failures:
                if self.ranks > 1 or any(
                    isinstance(error, WorkerLost | WorkFailed) for error in failures
                ):
                    self.supervisor.kill_all([ROLE])
                raise next(
                    (error for error in failures if isinstance(error, WorkerLost)), failures[0]
                )
            return [call.result() for call in calls]
        finally:
            for call in calls:
                if not call.done():
                    call.cancel()
