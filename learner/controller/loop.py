"""The dataflow of a run, and its only order.

::

    stage      consumes                         produces                 waits for                    unblocked by
    ---------  -------------------------------  -----------------------  ---------------------------  ----------------------
    plan       data cursor (update, slot)       WorkItems of a group     the adapter of its version   publish
    rollout    WorkItem                         chunk blob + its hash    an idle rollout actor        a finished chunk
    score      chunk blob                       RewardTable              an idle reward actor         a finished score
    learn      all groups of an update, in      adapter and state        every group of the update    the last score
               slot order                       blobs, held
    commit     held blobs                       checkpoint directory     the disk                     -
    publish    adapter blob                     -                        -                            an actor's next item
    look       adapter, held-out tasks          line of heldout.jsonl    every probe, when it is due  the last score

Groups are bound to updates, slots and adapter versions by number: arrival order and the number of actors never change a
result. At most ``(max_lag + 1) * groups_per_update`` groups are in flight, so whatever is admitted can be trained on and
nothing is ever evicted. State is held (or committed) before its weights are published, so weights that anybody has seen can
always be made again. The controller moves references and small records: it knows no Ray, no editor and no large tensor.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from learner.controller import checkpoint, heldout, placement, preflight
from learner.controller.capacity import Capacity
from learner.controller.executor import Executor, Ref
from learner.controller.learner_ranks import LearnerRanks, LearnerSnapshot
from learner.controller.lease import Lease
from learner.controller.ledger import Ledger, Verdict
from learner.controller.run_log import Events
from learner.controller.supervisor import GivenUp, Supervisor
from learner.controller.work import WorkPlan
from rl_edit import wire
from rl_edit.config import RunConfig
from rl_edit.data import Dataset
from rl_edit.errors import BlobLost, InputError, WorkerLost, WorkFailed
from rl_edit.files import METRICS, JsonLines
from rl_edit.measures.reward_metrics import count_reasons, reward_metrics
from rl_edit.messages import LearnOrder, LearnReport, LearnSlot, RolloutResult
from rl_edit.method.rollout import joined
from rl_edit.method.update import TrainingFailed
from rl_edit.types import AdapterId, AdapterWeights, RewardTable, WorkItem

WATCH_EVERY_S = 5.0


class Observer(Protocol):
    """Whoever watches the run: progress on a terminal, or nobody."""

    def group_scored(self, update: int, done: int, total: int) -> None: ...
    def update_done(self, metrics: dict[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: updates done and the adapter it made; None when it was stopped before there was one.

    Attributes:
        early: why the run itself ended before its last update; "" when it did not.
    """

    updates_done: int
    adapter: AdapterWeights | None
    early: str = ""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What identifies a run, beside its config.

    Attributes:
        settings: everything that decides results: settings and the content of data and editor. A checkpoint of others is refused.
        pixels_per_token: edge of an image token, to which tasks are fitted.
        capacity: what the workers occupy, for the efficiency.
        allow_drift: dotted settings that may differ from a checkpoint's.
        probes: the held-out tasks to look at while training; None looks at none.
    """

    config: RunConfig
    dataset: Dataset
    directory: Path
    settings: dict[str, Any]
    pixels_per_token: int
    code_version: str = ""
    capacity: Capacity = field(default_factory=Capacity)
    allow_drift: frozenset[str] = frozenset()
    probes: heldout.Probes | None = None


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A work item that was rolled out and scored. ``packed`` is the table as the learner is sent it."""

    rolled: RolloutResult
    blob: Ref
    table: RewardTable
    packed: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Group:
    """A slot of an update: its chunks in candidate order, or why there are none."""

    group_id: str
    task_type: str
    chunks: tuple[Chunk, ...] = ()
    lost: str = ""


class Stop:
    """Asks a run to commit and end. Thread- and signal-safe; asked twice is asked once."""

    def __init__(self) -> None:
        self.requested = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event: asyncio.Event | None = None

    def request(self) -> None:
        self.requested = True
        if self._loop is not None and self._event is not None:
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()
        if self.requested:
            return
        await self._event.wait()


class TrainingLoop:
    """Drives one run from its first or resumed update to its last: the controller."""

    def __init__(
        self,
        run: Run,
        executor: Executor,
        *,
        lease: Lease,
        events: Events,
        observer: Observer,
        stop: Stop | None = None,
    ) -> None:
        self.of, self.config, self.executor, self.lease = run, run.config, executor, lease
        self.events, self.observer, self.stop = events, observer, stop or Stop()
        actors = self.config.actors
        self.supervisor = Supervisor(
            executor, actors, on_event=events, patience_s=self.config.patience_s()
        )
        self.learners = LearnerRanks(self.supervisor, actors.num_learner, on_event=events)
        self.supervisor.open("rollout", actors.num_rollout, prepare=self._hand_over)
        self.supervisor.open("reward", actors.num_reward)
        self.ledger = Ledger()
        self.plan = WorkPlan(self.config, run.dataset, pixels_per_token=run.pixels_per_token)
        self.metrics = JsonLines(run.directory / METRICS)
        self.gold = heldout.Watch(
            run.probes,
            self.config,
            run.directory,
            pixels_per_token=run.pixels_per_token,
            lease=lease,
            events=events,
            note=observer.note,
        )
        self.checkpoints = run.directory / "checkpoints"
        self.acting: dict[int, tuple[AdapterId, Ref]] = {}
        self.held: LearnerSnapshot | None = None
        self.committed = 0
        self.failed_commits = 0
        self.in_flight: dict[int, list[asyncio.Task[Group]]] = {}
        self.costs: list[placement.GroupCost] = []
        self._commit_s = 0.0
        self._applying = False
        self._progress = time.monotonic()

    async def run(self, *, resume: bool) -> Outcome:
        """Runs to ``train.updates`` or until asked to stop; commits at the end either way.

        Raises:
            InputError: a checkpoint of other settings, or a reward that breaks its contract.
            TrainingFailed: too many groups were dropped, a ratio was not 1 on-policy, losses were not finite, or workers cannot be
                kept alive.
            Fenced: a newer attempt holds the run directory.
        """
        work = asyncio.create_task(self._run(resume))
        stopped = asyncio.create_task(self.stop.wait())
        watch = asyncio.create_task(self._watch())
        try:
            await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                # An update that is being applied is worth its grace; rollouts under way are not: they are made again on resume.
                await asyncio.wait(
                    {work}, timeout=self.config.train.grace_s if self._applying else 0
                )
                work.cancel()
            try:
                await work
            except asyncio.CancelledError:
                if not self.stop.requested:
                    raise
                if self.held is None:
                    return Outcome(updates_done=0, adapter=None)
            except (TrainingFailed, WorkerLost, WorkFailed, BlobLost) as error:
                with contextlib.suppress(BlobLost):
                    if self.failed_commits == 0:
                        await self._commit_newest()
                if isinstance(error, TrainingFailed):
                    raise
                raise TrainingFailed(
                    f"the workers cannot go on ({error}): see events.jsonl and the Ray logs, then continue with --resume from update "
                    f"{self.committed}"
                ) from error
            await self._commit_newest()
            weights: AdapterWeights = wire.unpack(await self.executor.fetch(self._held().result))
            done = self._held().updates_done
            return Outcome(updates_done=done, adapter=weights, early=self.gold.over(done))
        finally:
            tasks: list[asyncio.Future[Any]] = [
                work,
                stopped,
                watch,
                *self.supervisor.announcements(),
                *(task for tasks in self.in_flight.values() for task in tasks),
            ]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, resume: bool) -> None:
        await self.supervisor.ready()
        await self.learners.start()
        await self._begin(resume)
        if self.config.actors.preflight and self._held().updates_done < self.config.train.updates:
            item = self._items(
                self._held().updates_done, 0, self._version(self._held().updates_done)
            )[0]
            proof = await preflight.prove(
                self.executor,
                self.supervisor,
                self.learners,
                item,
                self.config,
                on_policy=item.adapter == self._held().id,
            )
            self.events("preflight", **asdict(proof))
            await self._require_room()
        await self._look()
        while self._held().updates_done < self.config.train.updates and not self.stop.requested:
            if self.gold.over(self._held().updates_done):
                break
            await self._update(self._held().updates_done)
            await self._look()

    def _held(self) -> LearnerSnapshot:
        assert self.held is not None, "nothing is held before the actors have started"
        return self.held

    async def _require_room(self) -> None:
        """Raises InputError when the disk cannot take a checkpoint, before an hour is spent on what could not be kept."""
        held = self._held()
        nbytes = (await self.executor.fetch(held.state)).nbytes + (
            await self.executor.fetch(held.adapter)
        ).nbytes
        if problem := checkpoint.room_for(self.checkpoints.parent, nbytes):
            raise InputError(f"{problem} Free space, or give another --run-dir.")

    async def _begin(self, resume: bool) -> None:
        """Restores the newest sound checkpoint, or starts from the base; either way actors hold what they may be asked for."""
        found = checkpoint.newest(self.checkpoints, on_corrupt=self.events) if resume else None
        if found is not None:
            checkpoint.require_same_run(
                found, self.of.settings, self.checkpoints, allow=self.of.allow_drift
            )
            state = self.executor.put(found.learner)
            await self.learners.restore(state)
            self.acting = {
                named.step: (named, self.executor.put(blob)) for named, blob in found.acting.items()
            }
            self.ledger.restore(found.ledger)
            self.held = await self.learners.export(found.updates_done)
        else:
            if resume and (lost := [path.name for path in self.checkpoints.glob(".corrupt-*")]):
                raise InputError(
                    f"no sound checkpoint is left in {self.checkpoints} ({', '.join(sorted(lost))} did not verify): "
                    "starting over here would erase the run's curves. Restore a copy, or start a new --run-dir."
                )
            self.held = await self.learners.export(0)
            self.acting = {0: (self.held.id, self.held.adapter)}
        self.committed = self.held.updates_done
        self.metrics.rewind(self.committed)
        self.events.rewind(self.committed)
        self.gold.rewind(self.committed)
        self.events(
            "started" if found is None else "resumed",
            updates_done=self.committed,
            adapter=str(self.held.id),
        )
        for named, adapter in self.acting.values():
            await self.supervisor.tell("rollout", f"publishing {named}", "load", adapter)

    async def _hand_over(self, worker: Any) -> None:
        """A new rollout actor gets the adapters in use. One that is published meanwhile it is told of like every other actor."""
        for _, adapter in list(self.acting.values()):
            await worker.call("load", adapter)
        if self.held is not None and self.held.result_id != self.held.id:
            await worker.call("load", self.held.result)

    async def _update(self, update: int) -> None:
        began = time.perf_counter()
        retries = dict(self.supervisor.retries)
        groups = await self._gather(update)
        gathered = time.perf_counter()
        report, groups = await self._learn(update, groups)
        learned = time.perf_counter()
        self.lease.check()  # a newer attempt may have told of this update already
        self.events(
            "update_applied",
            update=update,
            adapter=str(report.adapter),
            used=report.used,
            consumed=[group.group_id for group in groups],
        )
        for kind, reasons in report.declined.items():
            self.events("groups_dropped", update=update, kind=kind, reasons=count_reasons(reasons))
        if report.skipped:
            self.events(
                "step_skipped",
                update=update,
                reason=report.skipped,
                in_a_row=report.skipped_in_a_row,
            )
            await self._keep_evidence(update, groups, report)
        # Before the commit: a resumed run rewinds lines of updates it does again, but could never write one that was left out.
        cost = self._tell(
            update,
            groups,
            report,
            wait_s=gathered - began,
            learn_s=learned - gathered,
            retries=retries,
        )
        told = time.perf_counter()
        held = self._held()
        if (
            held.updates_done % self.config.train.checkpoint_every == 0
            or held.updates_done == self.config.train.updates
        ):
            await self._commit(held)
        self.acting[held.updates_done] = (held.id, held.adapter)
        for old in [
            step for step in self.acting if step < held.updates_done - self.config.train.max_lag
        ]:
            del self.acting[old]
        wanted = held.updates_done < self.config.train.updates or self.gold.due(held.updates_done)
        if wanted and not self.stop.requested:
            self.supervisor.announce("rollout", f"publishing {held.id}", "load", held.adapter)
        self._commit_s = time.perf_counter() - told
        self._advise(cost)

    def _tell(
        self,
        update: int,
        groups: Sequence[Group],
        report: LearnReport,
        *,
        wait_s: float,
        learn_s: float,
        retries: dict[str, int],
    ) -> placement.GroupCost:
        """The update's line in metrics.jsonl. The commit follows it, so its seconds stand in the next line."""
        tables = [_table(group) for group in groups if not group.lost]
        chunks = [chunk for group in groups for chunk in group.chunks]
        cost = placement.GroupCost(
            rollout_s=sum(sum(chunk.rolled.seconds.values()) for chunk in chunks) / len(groups),
            reward_s=sum(table.seconds for table in tables) / len(groups),
            learn_s=report.seconds * self.config.actors.num_learner / len(groups),
            step_s=self._commit_s,
        )
        total_s = self._commit_s + wait_s + learn_s
        record = {
            "update": update,
            **reward_metrics(tables, normalise=self.config.algorithm.credit.normalise),
            **report.metrics,
            "groups/used": report.used,
            "groups/dropped": len(groups) - report.used,
            "groups/dropped_reasons": {
                kind: count_reasons(reasons) for kind, reasons in report.declined.items()
            },
            "step/skipped": int(bool(report.skipped)),
            "adapter": str(report.adapter),
            "policy_version": report.adapter.step,
            "staleness": update
            - min((chunk.rolled.adapter.step for chunk in chunks), default=update),
            "retries/infra": self.supervisor.retries["infra"] - retries["infra"],
            "retries/data": self.supervisor.retries["data"] - retries["data"],
            "bytes/groups": sum(chunk.rolled.nbytes for chunk in chunks),
            "seconds/rollout": cost.rollout_s * len(groups),
            "seconds/reward": cost.reward_s * len(groups),
            "seconds/wait": wait_s,
            "seconds/learn": learn_s,
            "seconds/commit": self._commit_s,
            "seconds/update": total_s,
            "efficiency": self.of.capacity.efficiency(cost, len(groups), total_s),
        }
        try:
            self.metrics.append(record)
        except OSError as error:
            self.observer.note(f"the metrics of update {update} could not be written ({error})")
        self.executor.mirror(record)
        self.observer.update_done(record)
        return cost

    async def _look(self) -> None:
        """Rolls out and scores the held-out probes under the newest weights, when they are due: with any group's calls and checks."""
        held = self._held()
        if self.stop.requested or not self.gold.due(held.updates_done):
            return
        began = time.perf_counter()
        if held.result_id != held.id:
            self.supervisor.announce(
                "rollout", f"publishing {held.result_id} to look at", "load", held.result
            )
        probes = [
            asyncio.ensure_future(self._group([item], kind="probe"))
            for item in self.gold.items(held.updates_done, held.result_id)
        ]
        try:
            for probe in asyncio.as_completed(probes):
                await probe
                self._progress = time.monotonic()
        finally:
            for probe in probes:
                probe.cancel()
            await asyncio.gather(*probes, return_exceptions=True)
            self.ledger.close(held.updates_done - 1)
        groups = [probe.result() for probe in probes]
        if lost := [group.lost for group in groups if group.lost]:
            self.events("evaluation_skipped", update=held.updates_done - 1, reason=lost[0])
            return
        packed = await self.executor.fetch(held.result)
        self.gold.saw(
            held.result_id,
            packed,
            [_table(group) for group in groups],
            seconds=time.perf_counter() - began,
        )

    def _dispatch(self, update: int) -> None:
        """Starts an update's groups once, under the version that ``max_lag`` assigns to it."""
        if update not in self.in_flight:
            adapter = self._version(update)
            slots = range(self.config.train.groups_per_update)
            self.in_flight[update] = [
                asyncio.create_task(self._group(self._items(update, slot, adapter)))
                for slot in slots
            ]

    def _version(self, update: int) -> AdapterId:
        return self.acting[max(update - self.config.train.max_lag, 0)][0]

    def _items(self, update: int, slot: int, adapter: AdapterId) -> list[WorkItem]:
        """The work of one slot: a group, in chunks."""
        group = self.plan.item(update, slot, adapter)
        return [replace(group, chunk=chunk) for chunk in self.config.rollout.chunks]

    async def _group(self, items: Sequence[WorkItem], *, kind: str = "") -> Group:
        """One group: its chunks side by side, each scored as soon as it is rolled out. Whole or lost. ``kind``: of usual duration."""
        for item in items:
            self.ledger.plan(item)
        chunks = [asyncio.ensure_future(self._chunk(item, kind)) for item in items]
        try:
            return Group(
                group_id=items[0].group_id,
                task_type=items[0].task.task_type,
                chunks=tuple(await asyncio.gather(*chunks)),
            )
        except GivenUp as error:
            self.events(
                "group_lost", group_id=items[0].group_id, update=items[0].update, reason=str(error)
            )
            return Group(
                group_id=items[0].group_id, task_type=items[0].task.task_type, lost=str(error)
            )
        finally:
            for chunk in chunks:
                chunk.cancel()

    async def _chunk(self, item: WorkItem, kind: str) -> Chunk:
        lost = 0
        while True:
            rolled, blob = await self._rollout(item, kind)
            try:
                table, packed = await self._score(item, blob, kind)
            except BlobLost as error:
                lost += 1
                self.events(
                    "blob_lost", work_id=item.work_id, update=item.update, reason=str(error)
                )
                if lost > self.config.actors.infra_retries:
                    raise GivenUp(
                        f"the blob of {item.work_id} was lost {lost} times (actors.infra_retries): {error}"
                    ) from error
                self.ledger.reopen(item.work_id)
                continue
            self.ledger.scored(item.work_id)
            return Chunk(rolled=rolled, blob=blob, table=table, packed=packed)

    async def _rollout(self, item: WorkItem, kind: str) -> tuple[RolloutResult, Ref]:
        """The first valid result of an item."""

        def judged(answer: tuple[RolloutResult, Ref]) -> str:
            verdict = self.ledger.offer(item.work_id, *answer)
            if verdict not in (Verdict.TAKEN, Verdict.DUPLICATE):
                seen = {
                    "wanted": str(item.adapter),
                    "loaded": str(answer[0].adapter),
                    "sha256": answer[0].sha256,
                }
                self.events(
                    f"result_{verdict.value}", work_id=item.work_id, update=item.update, **seen
                )
            if verdict is Verdict.NOT_FINITE:
                raise WorkFailed("latents or velocities are not finite")
            return {
                Verdict.STALE: "a weight update did not reach it",
                Verdict.FOREIGN: "it answered about another item",
            }.get(verdict, "")

        def attempt(worker: str) -> None:
            self.ledger.failed(item.work_id)
            self.ledger.dispatched(item.work_id)

        what = f"rollout of {item.work_id}"
        try:
            await self.supervisor.call(
                "rollout",
                what,
                "run",
                lambda: (wire.pack(item),),
                blobs=1,
                kind=kind,
                check=judged,
                late=judged,
                attempt=attempt,
            )
        except GivenUp:
            if self.ledger.open[item.work_id].result is None:
                raise
        result: tuple[RolloutResult, Ref] = self.ledger.open[item.work_id].result
        return result

    async def _score(self, item: WorkItem, blob: Ref, kind: str) -> tuple[RewardTable, np.ndarray]:
        sound: list[RewardTable] = []

        def problem(packed: np.ndarray) -> str:
            try:
                table = wire.unpack(packed)
            except (
                Exception
            ) as error:  # bytes of another process can be anything, and cost their item only
                raise WorkFailed(
                    f"the reply is no reward table ({type(error).__name__})"
                ) from error
            if not isinstance(table, RewardTable):
                raise WorkFailed(f"the reply is no reward table but {type(table).__name__}")
            if (
                table.group_id != item.group_id
                or len(table.values) != item.chunk[1] - item.chunk[0]
            ):
                raise WorkFailed(
                    f"the table is of group {table.group_id} with {len(table.values)} rows"
                )
            if not torch.equal(table.valid, table.values.isfinite()):
                raise WorkFailed("a valid score is not finite, or an invalid one has a number")
            sound.append(table)
            return ""

        packed = await self.supervisor.call(
            "reward",
            f"scoring of {item.work_id}",
            "score",
            lambda: (blob,),
            kind=kind,
            check=problem,
        )
        return sound[-1], packed

    async def _gather(self, update: int) -> list[Group]:
        """Every group of an update, in slot order; progress as they arrive, the first failure at once."""
        train = self.config.train
        for ahead in range(update, min(update + train.max_lag, train.updates - 1) + 1):
            self._dispatch(ahead)
        tasks = self.in_flight[update]
        waiting = set(tasks)
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            self._progress = time.monotonic()
            self.observer.group_scored(update, len(tasks) - len(waiting), len(tasks))
        del self.in_flight[update]
        groups = [task.result() for task in tasks]
        self._refuse_too_few(update, groups)
        return groups

    def _refuse_too_few(self, update: int, groups: Sequence[Group]) -> None:
        """Stops before anything is learnt when more groups than allowed were lost or have an invalid reward."""
        tables = [_table(group) for group in groups if not group.lost]
        invalid = [
            reason
            for table in tables
            if not table.complete()
            for reason in table.reasons[:1] or ("no reason given",)
        ]
        bad = [group.lost for group in groups if group.lost] + invalid
        if len(bad) <= self.config.train.max_dropped_groups:
            return
        message = (
            f"{len(bad)} of {len(groups)} groups of update {update} are lost or have an invalid reward, train.max_dropped_groups is "
            f"{self.config.train.max_dropped_groups}: {bad[0]}"
        )
        if any(table.contract_broken for table in tables):
            raise InputError(f"{message}. Fix the reward function or its declared range.")
        raise TrainingFailed(
            f"{message}. Check the judge, or allow drops with train.max_dropped_groups."
        )

    async def _learn(self, update: int, groups: list[Group]) -> tuple[LearnReport, list[Group]]:
        """Applies an update and holds its result. Groups whose blobs are gone by then are made again."""
        lost = 0
        while True:
            order = _order(update, groups)
            ranks = self.config.actors.num_learner
            shards = [
                [
                    c.blob
                    for slot, group in enumerate(groups)
                    if slot % ranks == rank
                    for c in group.chunks
                ]
                for rank in range(ranks)
            ]
            self._applying = True
            try:
                report, self.held = await self.learners.apply(order, shards, self._held())
                break
            except BlobLost as error:
                work_ids = [chunk.rolled.work_id for group in groups for chunk in group.chunks]
                lost += 1
                self.events("blob_lost", work_id=work_ids, update=update, reason=str(error))
                if lost > self.config.actors.infra_retries:
                    raise TrainingFailed(
                        f"groups of update {update} were lost {lost} times before they were learnt from (actors.infra_retries): {error}. "
                        "The object store or a node does not hold them; see ray memory. Continue with --resume."
                    ) from error
                self.ledger.close(update)
                groups = await self._gather(update)
            finally:
                self._applying = False
        self._progress = time.monotonic()
        self.ledger.consume(update, [group.group_id for group in groups])
        return report, groups

    async def _commit_newest(self) -> None:
        if self.held is not None and self.held.updates_done > self.committed:
            await self._commit(self.held)

    async def _commit(self, held: LearnerSnapshot) -> None:
        """Writes a checkpoint. A full disk costs a warning and is tried again at the next one, a few times."""
        acting = {
            **{named.step: (named, ref) for named, ref in self.acting.values()},
            held.updates_done: (held.id, held.adapter),
        }
        needed = sorted(
            step for step in acting if step >= held.updates_done - self.config.train.max_lag
        )
        content = checkpoint.Checkpoint(
            updates_done=held.updates_done,
            settings=self.of.settings,
            code_version=self.of.code_version,
            ledger=self.ledger.state(),
            learner=await self.executor.fetch(held.state),
            acting={acting[step][0]: await self.executor.fetch(acting[step][1]) for step in needed},
        )
        writing = asyncio.ensure_future(
            asyncio.to_thread(checkpoint.write, self.checkpoints, content, lease=self.lease)
        )
        try:
            path = await asyncio.shield(writing)
        except asyncio.CancelledError:
            # A thread cannot be cancelled, and the commit at the end must not write beside it.
            await asyncio.wait({writing})
            raise
        except OSError as error:
            self.failed_commits += 1
            self.events(
                "commit_failed",
                updates_done=held.updates_done,
                in_a_row=self.failed_commits,
                reason=str(error),
            )
            self.observer.note(
                f"checkpoint of update {held.updates_done} could not be written ({error}); the one before is intact"
            )
            if (
                self.failed_commits >= self.config.train.max_failed_commits
                or held.updates_done == self.config.train.updates
            ):
                raise TrainingFailed(
                    f"{self.failed_commits} checkpoints in a row could not be written to {self.checkpoints} ({error}): free space or "
                    f"give another --run-dir, then continue with --resume from update {self.committed}"
                ) from error
            return
        self.failed_commits, self.committed = 0, held.updates_done
        try:
            checkpoint.prune(self.checkpoints, self.config.train.keep_checkpoints, lease=self.lease)
        except OSError as error:
            self.events("prune_failed", reason=str(error))
        self.lease.renew()
        self.events("checkpoint", path=path.name, adapter=str(held.id), chain=self.ledger.chain)

    async def _keep_evidence(
        self, update: int, groups: Sequence[Group], report: LearnReport
    ) -> None:
        """What led to a skipped step, for whoever has to find out why: the groups as they are on the wire, tables and metrics."""
        folder = self.of.directory / "diagnostics" / f"update_{update:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        facts: dict[str, Any] = {
            "update": update,
            "reason": report.skipped,
            "metrics": report.metrics,
            "groups": {},
        }
        for group in groups:
            for chunk in group.chunks:
                table = chunk.table
                facts["groups"][chunk.rolled.work_id] = {
                    "names": table.names,
                    "values": table.values.tolist(),
                    "reasons": table.reasons,
                }
                (folder / f"{chunk.rolled.work_id}.safetensors").write_bytes(
                    bytes(await self.executor.fetch(chunk.blob))
                )
        (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")

    def _advise(self, cost: placement.GroupCost) -> None:
        """After two updates: how the workers seen so far would best be divided."""
        self.costs.append(cost)
        actors = self.config.actors
        if (
            len(self.costs) != 2
            or actors.placement == "colocated"
            or not self.of.capacity.divisible
        ):
            return
        seats = placement.WorkerCounts(
            rollout=actors.num_rollout, reward=actors.num_reward, learner=actors.num_learner
        )
        total, chunks = (
            actors.num_rollout + actors.num_reward + actors.num_learner,
            len(self.config.rollout.chunks),
        )
        groups, lag = self.config.train.groups_per_update, self.config.train.max_lag
        advice = placement.recommend(cost, total, groups, lag, chunks, present=seats)
        self.events(
            "placement_advice", now=asdict(seats), best=asdict(advice.seats), words=advice.words
        )
        self.observer.note(advice.words)

    async def _watch(self) -> None:
        """Says what is pending when nothing has moved for ``actors.stall_s``."""
        limit = self.config.actors.stall_s
        said = time.monotonic()
        while True:
            await asyncio.sleep(min(WATCH_EVERY_S, limit / 4))
            now = time.monotonic()
            pending = self.supervisor.pending()
            if not pending or now - max(self._progress, said) < limit:
                continue
            said = now
            oldest = [
                {"what": call.what, "worker": call.worker, "age_s": round(call.age_s, 1)}
                for call in pending[:5]
            ]
            self.events(
                "stall",
                silent_s=round(now - self._progress, 1),
                pending=len(pending),
                oldest=oldest,
            )
            words = "; ".join(
                f"{call['what']} on {call['worker']} for {call['age_s']:.0f} s" for call in oldest
            )
            self.observer.note(
                f"nothing has finished for {now - self._progress:.0f} s; pending: {words}"
            )


def _table(group: Group) -> RewardTable:
    """A group's rewards: the tables of its chunks in candidate order."""
    return joined([chunk.table for chunk in group.chunks])


def _order(update: int, groups: Sequence[Group]) -> LearnOrder:
    """What the learner is to apply, named by its content in canonical order."""
    content = hashlib.sha256(str(update).encode())
    for group in groups:
        content.update(f"{group.group_id} {group.lost}".encode())
        for chunk in group.chunks:
            content.update(
                chunk.rolled.sha256.encode() + hashlib.sha256(chunk.packed.tobytes()).digest()
            )
    slots = tuple(
        LearnSlot(
            task_type=group.task_type,
            areas=group.chunks[0].rolled.areas if group.chunks else None,
            tables=tuple(chunk.packed for chunk in group.chunks),
            lost=group.lost,
        )
        for group in groups
    )
    return LearnOrder(update=update, plan=content.hexdigest(), slots=slots)
