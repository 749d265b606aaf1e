"""The dataflow of a run, and its only order.

::

    stage      consumes                    produces                waits for       unblocked by
    ---------  --------------------------  ----------------------  --------------  ----------------
    plan       task cursor (update, slot)  WorkItems of a group    its adapter     broadcast
    rollout    WorkItem                    chunk blob, its hash    rollout actor   a free actor
    score      chunk blob                  RewardTable             reward actor    a free actor
    learn      groups in slot order        LearnerSnapshot         every group     last score
    commit     LearnerSnapshot             checkpoint directory    the disk        -
    broadcast  packed adapter              -                       -               next item
    evaluate   adapter, held-out tasks     line of heldout.jsonl   every task      last score

The plan waits for the adapter version that its update names. A LearnerSnapshot is packed adapter
and state. An evaluation takes place only when it is due.

Groups belong to updates, slots and adapter versions by number: arrival order and the number of
actors never change a result. A snapshot is taken (or committed) before its weights are broadcast,
so weights that any actor has seen can always be made again. The controller moves references and
small records. It knows no Ray, no editor and no large tensor.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from dataclasses import asdict
from functools import partial
from typing import Any

from learner.controller import checkpoint, heldout, preflight, silent
from learner.controller.cluster_loss import T, unless_lost
from learner.controller.commits import Commits
from learner.controller.executor import Executor, Ref
from learner.controller.groups import GroupCollector, ScoredGroup, learn_order, shards
from learner.controller.learner_port import InProcessLearner, LearnerPort
from learner.controller.learner_ranks import LearnerRanks, LearnerSnapshot
from learner.controller.lease import Lease
from learner.controller.ledger import Ledger
from learner.controller.run import Observer, Outcome, Run
from learner.controller.run_log import Events, UpdateLog, UpdateTimes, group_cost
from learner.controller.same_run import require_same_run
from learner.controller.stalls import End, Progress, report_stalls
from learner.controller.stop import Stop
from learner.controller.supervisor import Supervisor
from learner.controller.work import WorkPlan
from rl_edit import wire
from rl_edit.errors import (
    BlobLost,
    InputError,
    ResourcesInfeasible,
    WorkerLost,
    WorkerOutOfMemory,
    WorkFailed,
)
from rl_edit.messages import LearnReport
from rl_edit.method.update import TrainingFailed
from rl_edit.types import AdapterId, AdapterWeights


class TrainingLoop:
    """Drives one run from its first or resumed update to its last: the controller.

    Attributes:
        acting: acting weights in use, by their update: the newest, and those the lag still needs.
        snapshot: the newest of the learner; None until the learner has started.
    """

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
        config = run.config
        self.of, self.config, self.executor, self.lease = run, config, executor, lease
        self.events, self.observer, self.stop = events, observer, stop or Stop()
        self.progress, self.ledger = Progress(), Ledger()
        self.acting: dict[int, tuple[AdapterId, Ref]] = {}
        self.snapshot: LearnerSnapshot | None = None
        self._commit_s = 0.0
        self._applying = False
        self.supervisor = Supervisor(
            executor, config.actors, on_event=events, judge_timeout_s=config.judge_timeout_s()
        )
        # Created before anything that counts on workers: this is where they are spawned.
        self.learners = self._learner_port()
        self.supervisor.open("rollout", config.actors.num_rollout, prepare=self._hand_over)
        self.supervisor.open("reward", config.actors.num_reward)
        self.groups = self._group_collector()
        self.commits = self._commits()
        self.log = UpdateLog(run, executor, events=events, observer=observer)
        self.heldout = heldout.HeldoutMonitor(
            run.probes,
            config,
            run.directory,
            pixels_per_token=run.pixels_per_token,
            lease=lease,
            events=events,
            note=observer.note,
        )

    def _group_collector(self) -> GroupCollector:
        run = self.of
        return GroupCollector(
            self.config,
            self.supervisor,
            self.ledger,
            WorkPlan(self.config, run.dataset, pixels_per_token=run.pixels_per_token),
            version=self._version,
            events=self.events,
            progress=self.progress,
            on_scored=self.observer.group_scored,
        )

    def _commits(self) -> Commits:
        return Commits(
            self.config,
            self.of.directory / "checkpoints",
            identity=(self.of.settings, self.of.code_version),
            executor=self.executor,
            ledger=self.ledger,
            lease=self.lease,
            events=self.events,
            note=self.observer.note,
        )

    def _learner_port(self) -> LearnerPort:
        try:
            direct = self.executor.direct("learner")
        except WorkerOutOfMemory as error:
            raise ResourcesInfeasible(str(error)) from error
        if direct is not None:
            return InProcessLearner(direct, on_event=self.events)
        return LearnerRanks(self.supervisor, on_event=self.events)

    async def run(self, *, resume: bool) -> Outcome:
        """Runs to ``train.updates`` or until asked to stop; commits at the end either way.

        Raises:
            InputError: a checkpoint of other settings, or a reward that breaks its contract.
            TrainingFailed: too many groups were dropped, a ratio was not 1 on-policy, losses were
                not finite, or workers cannot be kept alive.
            ResourcesInfeasible: no room for the actors, their groups, or a checkpoint.
            ClusterLost: the cluster that the workers are on has ended.
            Fenced: a newer attempt owns the run directory.
        """
        if self.stop.requested:
            # While the learner of this process was made. Nothing has begun, so nothing is saved.
            return Outcome(updates_done=0, adapter=None)
        return await self._unless_lost(self._to_the_end(resume))

    async def _unless_lost(self, work: Coroutine[Any, Any, T]) -> T:
        return await unless_lost(work, self.executor, lambda: self.commits.updates_done)

    async def _to_the_end(self, resume: bool) -> Outcome:
        # The work, a request to stop, and the stall report run side by side on one thread.
        work = asyncio.create_task(self._run(resume))
        stopped = asyncio.create_task(self.stop.wait())
        stalls = asyncio.create_task(
            report_stalls(
                self.supervisor,
                self.progress,
                limit_s=self.config.actors.stall_s,
                # Two deadlines: a call that missed its own once may still be repeated.
                end=End(
                    times=self.config.actors.max_stalls,
                    at_least_s=2 * self.config.actors.deadline_s,
                ),
                events=self.events,
                note=self.observer.note,
            )
        )
        try:
            await asyncio.wait({work, stopped, stalls}, return_when=asyncio.FIRST_COMPLETED)
            if stalls.done():
                work.cancel()
                # What it writes must be written before the commit of the rest begins.
                await asyncio.wait({work}, timeout=self.config.train.grace_s)
                return await self._outcome(stalls)
            if not work.done():
                # An update that is being applied is worth its grace. Rollouts under way are not: a
                # resumed run makes them again.
                grace_s = self.config.train.grace_s if self._applying else 0
                await asyncio.wait({work}, timeout=grace_s)
                # Has no effect on work that has ended within its grace.
                work.cancel()
            return await self._outcome(work)
        finally:
            tasks: list[asyncio.Future[Any]] = [
                work,
                stopped,
                stalls,
                *self.supervisor.broadcasts(),
                *self.groups.tasks(),
            ]
            # Cancelled and awaited, so that no task writes after the lease is released.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _outcome(self, work: asyncio.Task[None]) -> Outcome:
        """Waits for the work and commits the rest, also when the workers are gone."""
        try:
            await work
        except asyncio.CancelledError:
            if not self.stop.requested:
                raise
            if self.snapshot is None:
                return Outcome(updates_done=0, adapter=None)
        except Exception as error:
            # The snapshot's blobs may be lost as well; then the newest checkpoint is what is left.
            with contextlib.suppress(BlobLost):
                await self.keep()
            if not isinstance(error, WorkerLost | WorkFailed | BlobLost):
                raise
            raise TrainingFailed(
                f"the workers cannot go on ({error}): see events.jsonl and the Ray logs, then "
                f"continue with --resume from update {self.commits.updates_done}"
            ) from error
        await self._commit_newest()
        newest = self._newest()
        weights: AdapterWeights = wire.unpack(await self.executor.fetch(newest.result))
        done = newest.updates_done
        return Outcome(updates_done=done, adapter=weights, early=self.heldout.stop_reason(done))

    async def _run(self, resume: bool) -> None:
        await self.supervisor.ready()
        await self.learners.start()
        await self._begin(resume)
        updates = self.config.train.updates
        if self.config.actors.preflight and self._newest().updates_done < updates:
            await self._preflight()
        # A resumed run may have been killed between a commit and its evaluation.
        await self._evaluate_heldout()
        while self._newest().updates_done < updates and not self.stop.requested:
            if self.heldout.stop_reason(self._newest().updates_done):
                break
            await self._update(self._newest().updates_done)
            await self._evaluate_heldout()
            silent.watch(self.of, events=self.events, note=self.observer.note)

    def _newest(self) -> LearnerSnapshot:
        assert self.snapshot is not None, "there is no snapshot before the learner has started"
        return self.snapshot

    def _version(self, update: int) -> AdapterId:
        """Names the weights that an update's groups are rolled out with."""
        return self.acting[max(update - self.config.train.max_lag, 0)][0]

    async def _preflight(self) -> None:
        """Proves on one small group that weights arrive and that the ratio is 1."""
        done = self._newest().updates_done
        item = self.groups.items(done, 0, self._version(done))[0]
        proof = await preflight.prove(
            self.executor,
            self.supervisor,
            self.learners,
            item,
            self.config,
            on_policy=item.adapter == self._newest().id,
        )
        self.events("preflight", **asdict(proof))
        await self.commits.require_space(self._newest())

    async def _begin(self, resume: bool) -> None:
        """Restores the newest checkpoint that verifies, or starts from the base.

        Either way the actors have the adapters that they may be asked for.
        """
        directory = self.commits.directory
        # The workers took minutes to start: the directory may be another attempt's by now.
        self.lease.check()
        stored = checkpoint.newest(directory, on_corrupt=self.events) if resume else None
        if stored is not None:
            require_same_run(stored, self.of.settings, directory, allow=self.of.allow_drift)
            await self.learners.restore(self.executor.put(stored.learner))
            self.acting = {
                named.step: (named, self.executor.put(blob))
                for named, blob in stored.acting.items()
            }
            self.ledger.restore(stored.ledger)
            self.snapshot = await self.learners.export(stored.updates_done)
        else:
            if resume and (corrupt := [path.name for path in directory.glob(".corrupt-*")]):
                raise InputError(
                    f"no sound checkpoint is left in {directory} ({', '.join(sorted(corrupt))} did "
                    "not verify): starting over here would erase the run's curves. Restore a copy, "
                    "or start a new --run-dir."
                )
            self.snapshot = await self.learners.export(0)
            self.acting = {0: (self.snapshot.id, self.snapshot.adapter)}
        # What a checkpoint holds is committed; without one this is 0.
        done = self.commits.updates_done = self.snapshot.updates_done
        # Lines of updates that will be done again are dropped, so that each update has one.
        self.lease.check()
        self.log.metrics.rewind(done)
        self.events.rewind(done)
        self.heldout.rewind(done)
        event = "started" if stored is None else "resumed"
        self.events(event, updates_done=done, adapter=str(self.snapshot.id))
        for named, adapter in self.acting.values():
            await self.supervisor.broadcast("rollout", f"publishing {named}", "load", adapter)

    async def _hand_over(self, worker: Any) -> None:
        """Gives a new rollout actor the adapters in use.

        One that is broadcast meanwhile reaches it like every other actor.
        """
        # A copy: a broadcast may change the adapters in use while this one waits.
        for _, adapter in list(self.acting.values()):
            await worker.call("load", adapter)
        if self.snapshot is not None and self.snapshot.result_id != self.snapshot.id:
            await worker.call("load", self.snapshot.result)

    async def _update(self, update: int) -> None:
        """Does one update: gather, learn, write its line, commit, broadcast."""
        began = time.perf_counter()
        retries = dict(self.supervisor.retries)
        groups = await self.groups.gather(update)
        gathered = time.perf_counter()
        # The groups may be others than those gathered: lost ones were made again.
        report, groups = await self._learn(update, groups)
        times = UpdateTimes(
            wait=gathered - began,
            learn=time.perf_counter() - gathered,
            commit=self._commit_s,
            ranks=self.learners.ranks,
        )
        self.lease.check()  # a newer attempt may have reported this update already
        # The line precedes the commit: a resumed run rewinds lines of updates that it does again,
        # but could never write one that was left out.
        spent = {kind: n - retries[kind] for kind, n in self.supervisor.retries.items()}
        await self.log.write(update, groups, report, times, spent)
        written = time.perf_counter()
        newest = self._newest()
        if self.commits.is_due(newest.updates_done):
            await self.commits.commit(newest, self.acting)
        self._broadcast(newest)
        self._commit_s = time.perf_counter() - written
        self.log.advise(group_cost(groups, report, times))

    def _broadcast(self, newest: LearnerSnapshot) -> None:
        """Puts the new acting weights into use and sends them, unless no rollout follows."""
        done, train = newest.updates_done, self.config.train
        # A group in flight may still name weights as old as the lag; older ones are dropped.
        self.acting[done] = (newest.id, newest.adapter)
        for old in [step for step in self.acting if step < done - train.max_lag]:
            del self.acting[old]
        needed = done < train.updates or self.heldout.is_due(done)
        if needed and not self.stop.requested:
            self.supervisor.broadcast_when_idle(
                "rollout", f"publishing {newest.id}", "load", newest.adapter
            )

    async def _learn(
        self, update: int, groups: list[ScoredGroup]
    ) -> tuple[LearnReport, list[ScoredGroup]]:
        """Applies an update. Groups whose blobs are gone by then are made again.

        Returns:
            the report, and the groups that were learnt from.
        """
        lost, actors = 0, self.config.actors
        while True:
            # Made anew in each try: a group that was made again has other blobs.
            order = learn_order(update, groups)
            # Read by `run`: only an update under way is given its grace when a stop is requested.
            self._applying = True
            try:
                report, self.snapshot = await self.learners.apply(
                    order, partial(shards, groups), self._newest()
                )
                break
            except BlobLost as error:
                lost += 1
                work_ids = [chunk.result.work_id for group in groups for chunk in group.chunks]
                self.events("blob_lost", work_id=work_ids, update=update, reason=str(error))
                if lost > actors.infra_retries:
                    raise TrainingFailed(
                        f"groups of update {update} were lost {lost} times before they were learnt "
                        f"from (actors.infra_retries): {error}. The object store or a node does "
                        "not hold them; see ray memory. Continue with --resume."
                    ) from error
                # All groups of the update are made again: their seeds give the same bytes.
                self.ledger.close(update)
                groups = await self.groups.gather(update)
            finally:
                self._applying = False
        self.progress.moved()
        self.ledger.consume(update, [group.group_id for group in groups])
        return report, groups

    async def _evaluate_heldout(self) -> None:
        """Evaluates the newest weights on held-out tasks, when that is due."""
        newest = self._newest()
        if self.stop.requested or not self.heldout.is_due(newest.updates_done):
            return
        if newest.result_id != newest.id:
            self.supervisor.broadcast_when_idle(
                "rollout", f"publishing {newest.result_id} to evaluate", "load", newest.result
            )
        await heldout.evaluate(self.heldout, self.groups, newest, self.executor)

    async def keep(self) -> None:
        """Commits the newest update of a run that ends by an error, unless the disk refuses.

        Raises:
            ClusterLost: what it would commit is gone with the cluster that stored it.
        """
        if self.commits.failed_in_a_row == 0:
            await self._unless_lost(self._commit_newest())

    async def _commit_newest(self) -> None:
        if self.snapshot is not None and self.snapshot.updates_done > self.commits.updates_done:
            await self.commits.commit(self.snapshot, self.acting)
