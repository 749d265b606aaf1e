"""Groups on their way to the learner: planned, dispatched, rolled out, scored, gathered.

Each group is a slot of an update. It is rolled out in chunks of its candidates, side by side, and
each chunk is scored as soon as it is there. A group is complete or lost, never partial.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from learner.controller.calls import together
from learner.controller.executor import Ref
from learner.controller.ledger import Ledger, Verdict
from learner.controller.stalls import Progress
from learner.controller.supervisor import GivenUp, Supervisor
from learner.controller.work import WorkPlan
from rl_edit import wire
from rl_edit.config import RunConfig
from rl_edit.errors import BlobLost, InputError, WorkFailed
from rl_edit.messages import LearnOrder, LearnSlot, RolloutResult
from rl_edit.method.rollout import joined
from rl_edit.method.update import TrainingFailed
from rl_edit.types import AdapterId, RewardTable, WorkItem

Events = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class ScoredChunk:
    """A work item that was rolled out and scored.

    Attributes:
        blob: reference to the packed group.
        packed: the table as the learner is sent it.
    """

    result: RolloutResult
    blob: Ref
    table: RewardTable
    packed: NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class ScoredGroup:
    """One slot of an update: its chunks in candidate order, or why there are none."""

    group_id: str
    task_type: str
    chunks: tuple[ScoredChunk, ...] = ()
    lost: str = ""

    def table(self) -> RewardTable:
        """Joins the tables of its chunks, in candidate order."""
        return joined([chunk.table for chunk in self.chunks])


class GroupCollector:
    """Makes the groups of updates.

    At most ``(max_lag + 1) * groups_per_update`` groups are in flight, so whatever is admitted can
    be trained on, and nothing is ever evicted.

    Args:
        plan: the work of each slot.
        version: name of the adapter that an update's groups are rolled out with.
        on_scored: called with (update, groups done, groups in all).
    """

    def __init__(
        self,
        config: RunConfig,
        supervisor: Supervisor,
        ledger: Ledger,
        plan: WorkPlan,
        *,
        version: Callable[[int], AdapterId],
        events: Events,
        progress: Progress,
        on_scored: Callable[[int, int, int], None],
    ) -> None:
        self.config, self.supervisor, self.ledger, self.plan = config, supervisor, ledger, plan
        self.version = version
        self.events, self.progress, self.on_scored = events, progress, on_scored
        # By update. Tasks are owned here: the loop cancels them through `tasks` when the run ends.
        self._in_flight: dict[int, list[asyncio.Task[ScoredGroup]]] = {}

    def tasks(self) -> list[asyncio.Task[ScoredGroup]]:
        """Returns the asyncio tasks of all groups in flight."""
        return [task for tasks in self._in_flight.values() for task in tasks]

    def items(self, update: int, slot: int, adapter: AdapterId) -> list[WorkItem]:
        """Returns the work of one slot: a group, in chunks."""
        group = self.plan.item(update, slot, adapter)
        return [replace(group, chunk=chunk) for chunk in self.config.rollout.chunks]

    def dispatch(self, update: int) -> None:
        """Starts an update's groups once, under the version that ``max_lag`` assigns to it."""
        if update not in self._in_flight:
            # Fixed at dispatch: a later broadcast cannot change the weights of a rollout.
            adapter = self.version(update)
            slots = range(self.config.train.groups_per_update)
            self._in_flight[update] = [
                asyncio.create_task(self.collect(self.items(update, slot, adapter)))
                for slot in slots
            ]

    async def gather(self, update: int) -> list[ScoredGroup]:
        """Returns every group of an update, in slot order.

        Raises:
            InputError: a reward broke its contract in more groups than may be dropped.
            TrainingFailed: more groups were lost or have an invalid reward than may be dropped.
        """
        train = self.config.train
        # The next updates within the lag start first, so that actors work while the learner learns.
        for ahead in range(update, min(update + train.max_lag, train.updates - 1) + 1):
            self.dispatch(ahead)
        tasks = self._in_flight[update]
        # In order of arrival for progress only; groups are returned in slot order below.
        waiting = set(tasks)
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # raises the first failure at once
            self.progress.moved()
            self.on_scored(update, len(tasks) - len(waiting), len(tasks))
        del self._in_flight[update]
        groups = [task.result() for task in tasks]
        # Before learning, because an update cannot be taken back.
        self._refuse_too_few(update, groups)
        return groups

    async def collect(self, items: Sequence[WorkItem], *, kind: str = "") -> ScoredGroup:
        """Rolls out and scores one group, its chunks side by side. The group is complete or lost.

        Args:
            kind: the usual duration that its calls' deadlines follow; by default the method's.
        """
        for item in items:
            self.ledger.plan(item)
        group_id, task_type = items[0].group_id, items[0].task.task_type
        try:
            # When one chunk is given up, the work of the others is of no use.
            done = tuple(await together(self._chunk(item, kind) for item in items))
            return ScoredGroup(group_id=group_id, task_type=task_type, chunks=done)
        except GivenUp as error:
            self.events("group_lost", group_id=group_id, update=items[0].update, reason=str(error))
            return ScoredGroup(group_id=group_id, task_type=task_type, lost=str(error))

    async def _chunk(self, item: WorkItem, kind: str) -> ScoredChunk:
        """Rolls out and scores one item, again when its blob is lost before it is scored."""
        lost = 0
        while True:
            result, blob = await self._rollout(item, kind)
            try:
                table, packed = await self._score(item, blob, kind)
            except BlobLost as error:
                lost += 1
                self.events(
                    "blob_lost", work_id=item.work_id, update=item.update, reason=str(error)
                )
                if lost > self.config.actors.infra_retries:
                    raise GivenUp(
                        f"the blob of {item.work_id} was lost {lost} times (actors.infra_retries): "
                        f"{error}"
                    ) from error
                # The seeds are the item's, so the repetition gives the blob that was lost.
                self.ledger.reopen(item.work_id)
                continue
            return ScoredChunk(result=result, blob=blob, table=table, packed=packed)

    async def _rollout(self, item: WorkItem, kind: str) -> tuple[RolloutResult, Ref]:
        """Returns the first valid result of an item."""

        def problem(answer: tuple[RolloutResult, Ref]) -> str:
            return self._problem(item, *answer)

        try:
            await self.supervisor.call(
                "rollout",
                f"rollout of {item.work_id}",
                "run",
                lambda: (wire.pack(item),),
                blobs=1,
                kind=kind,
                check=problem,
                # A late result is as good as any: the ledger takes whichever is valid first.
                late=problem,
            )
        except GivenUp:
            # A late answer of an earlier attempt may have been taken meanwhile.
            if self.ledger.open[item.work_id].result is None:
                raise
        taken = self.ledger.open[item.work_id].result
        assert taken is not None, "an accepted rollout has a result in the ledger"
        return taken

    def _problem(self, item: WorkItem, result: RolloutResult, blob: Ref) -> str:
        """Offers a result to the ledger; returns what is wrong with the worker that made it, or "".

        Raises:
            WorkFailed: the work itself went wrong; another worker would fail alike.
        """
        verdict = self.ledger.offer(item.work_id, result, blob)
        if verdict not in (Verdict.TAKEN, Verdict.DUPLICATE):
            details = {
                "work_id": item.work_id,
                "update": item.update,
                # Names in events.jsonl, which stay as they are.
                "wanted": str(item.adapter),
                "loaded": str(result.adapter),
                "sha256": result.sha256,
            }
            self.events(f"result_{verdict.value}", **details)
        # A conflict is no fault of this worker alone: the first result counts, and the run goes on.
        if verdict is Verdict.NOT_FINITE:
            raise WorkFailed("latents or velocities are not finite")
        return {
            Verdict.STALE: "a weight update did not reach it",
            Verdict.FOREIGN: "it answered about another item",
        }.get(verdict, "")

    async def _score(
        self, item: WorkItem, blob: Ref, kind: str
    ) -> tuple[RewardTable, NDArray[np.uint8]]:
        """Returns an item's reward table, read and packed."""
        tables: list[RewardTable] = []

        def problem(packed: NDArray[np.uint8]) -> str:
            # Read inside the check: a reply that cannot be read is retried like work that failed.
            tables.append(_read_table(item, packed))
            return ""

        packed = await self.supervisor.call(
            "reward",
            f"scoring of {item.work_id}",
            "score",
            lambda: (blob,),
            kind=kind,
            check=problem,
        )
        return tables[-1], packed

    def _refuse_too_few(self, update: int, groups: Sequence[ScoredGroup]) -> None:
        """Stops the run before it learns from an update with too few usable groups.

        Raises:
            InputError, TrainingFailed: as :meth:`gather`.
        """
        tables = [group.table() for group in groups if not group.lost]
        invalid = [
            reason
            for table in tables
            if not table.complete()
            for reason in table.reasons[:1] or ("no reason given",)
        ]
        bad = [group.lost for group in groups if group.lost] + invalid
        budget = self.config.train.max_dropped_groups
        if len(bad) <= budget:
            return
        message = (
            f"{len(bad)} of {len(groups)} groups of update {update} are lost or have an invalid "
            f"reward, train.max_dropped_groups is {budget}: {bad[0]}"
        )
        # A reward outside its declared range is the user's to mend; a judge that fails may recover.
        if any(table.out_of_contract for table in tables):
            raise InputError(f"{message}. Fix the reward function or its declared range.")
        raise TrainingFailed(
            f"{message}. Check the judge, or allow drops with train.max_dropped_groups."
        )


def _read_table(item: WorkItem, packed: NDArray[np.uint8]) -> RewardTable:
    """Unpacks a reward actor's reply and checks that it answers the item.

    Raises:
        WorkFailed: the reply is no table of this item.
    """
    try:
        table = wire.unpack(packed)
    except Exception as error:  # bytes of another process can be anything, and cost their item only
        raise WorkFailed(f"the reply is no reward table ({type(error).__name__})") from error
    if not isinstance(table, RewardTable):
        raise WorkFailed(f"the reply is no reward table but {type(table).__name__}")
    if table.group_id != item.group_id or len(table.values) != item.chunk[1] - item.chunk[0]:
        raise WorkFailed(f"the table is of group {table.group_id} with {len(table.values)} rows")
    if not torch.equal(table.valid, table.values.isfinite()):
        raise WorkFailed("a valid score is not finite, or an invalid one has a number")
    return table


def learn_order(update: int, groups: Sequence[ScoredGroup]) -> LearnOrder:
    """Returns the learner's order, named by its content in canonical order."""
    # Slot order, not arrival order: the same update has the same name in every attempt.
    content = hashlib.sha256(str(update).encode())
    for group in groups:
        content.update(f"{group.group_id} {group.lost}".encode())
        for chunk in group.chunks:
            table = hashlib.sha256(chunk.packed.tobytes()).digest()
            content.update(chunk.result.sha256.encode() + table)
    slots = tuple(
        LearnSlot(
            task_type=group.task_type,
            areas=group.chunks[0].result.areas if group.chunks else None,
            tables=tuple(chunk.packed for chunk in group.chunks),
            lost=group.lost,
        )
        for group in groups
    )
    return LearnOrder(update=update, plan=content.hexdigest(), slots=slots)


def shards(groups: Sequence[ScoredGroup], num_ranks: int) -> list[list[Ref]]:
    """Returns the group blobs of each learner rank: slot s goes to rank s modulo the ranks."""
    return [
        [
            chunk.blob
            for slot, group in enumerate(groups)
            if slot % num_ranks == rank
            for chunk in group.chunks
        ]
        for rank in range(num_ranks)
    ]


def evidence(groups: Sequence[ScoredGroup]) -> dict[str, Any]:
    """Returns names, values and reasons of every chunk's rewards, by work id, as JSON."""
    return {
        chunk.result.work_id: {
            "names": chunk.table.names,
            "values": chunk.table.values.tolist(),
            "reasons": chunk.table.reasons,
        }
        for group in groups
        for chunk in group.chunks
    }
