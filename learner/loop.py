"""The dataflow of a run, and its only order.

::

    stage      consumes                         produces                 waits for                    unblocked by
    ---------  -------------------------------  -----------------------  ---------------------------  ----------------------
    plan       data cursor (update, slot)       WorkItem                 the adapter of its version   publish
    rollout    WorkItem                         group blob + its hash    a free rollout actor         a finished group
    score      group blob                       RewardTable              a free reward actor          a finished score
    learn      all groups of an update, in      adapter blob, metrics    every group of the update    the last score
               slot order
    publish    adapter blob                     acknowledgements         every rollout actor          -
    commit     learner state                    checkpoint directory     the disk                     -

Groups are bound to updates, slots and adapter versions by number: arrival order and the number of actors never change a
result. At most ``(max_lag + 1) * groups_per_update`` groups are in flight. The loop sees workers through a Protocol and
knows no Ray, no editor and no tensor.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from learner import checkpoint
from learner.learner import LearnReport, unpack_adapter
from rl_edit import telemetry, wire
from rl_edit.config import RunConfig
from rl_edit.data import Dataset
from rl_edit.data.canvas import fit
from rl_edit.errors import InputError
from rl_edit.exploration import keyed_seed
from rl_edit.types import AdapterId, AdapterWeights, EditTask, RewardTable, WorkItem
from rl_edit.update import TrainingFailed


@dataclass(frozen=True, kw_only=True)
class Rolled:
    """A finished group: small metadata here, the blob wherever the workers keep it (an object reference under Ray)."""

    work_id: str
    adapter: AdapterId
    blob: Any
    nbytes: int
    seconds: dict[str, float] = field(default_factory=dict)


class Workers(Protocol):
    """What the loop asks of the processes that do the work."""

    pixels_per_token: int

    async def start(self) -> None: ...
    async def rollout(self, item: WorkItem) -> Rolled: ...
    async def score(self, rolled: Rolled) -> np.ndarray: ...
    async def publish(self, adapter: np.ndarray) -> None: ...
    async def learn(self, update: int, groups: Sequence[Rolled], tables: Sequence[np.ndarray]) -> LearnReport: ...
    async def learner_state(self) -> dict[str, torch.Tensor]: ...
    async def restore_learner(self, state: dict[str, torch.Tensor], updates_done: int) -> None: ...
    async def export(self) -> np.ndarray: ...


class Observer(Protocol):
    """Whoever watches the run: progress on a terminal, or nobody."""

    def group_scored(self, update: int, done: int, total: int) -> None: ...
    def update_done(self, metrics: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: updates done and the adapter it made."""

    updates_done: int
    adapter: AdapterWeights


class TaskCursor:
    """Which task fills slot s of update u: shuffled epochs from keyed seeds, so that position is the whole state."""

    def __init__(self, dataset: Dataset, *, seed: int, groups_per_update: int) -> None:
        self._dataset, self._seed, self._per_update = dataset, seed, groups_per_update
        self._order: tuple[int, list[int]] = (-1, [])

    def at(self, update: int, slot: int) -> tuple[EditTask, int]:
        """The task and how often it was drawn before (its draw)."""
        epoch, position = divmod(update * self._per_update + slot, len(self._dataset))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(keyed_seed(self._seed, "order", epoch))
            self._order = (epoch, torch.randperm(len(self._dataset), generator=generator).tolist())
        return self._dataset[self._order[1][position]], epoch


class TrainingLoop:
    """Drives one run from its first or resumed update to its last.

    Args:
        identity: hash of everything that decides results (settings, data, editor); a checkpoint of another is refused.
        should_stop: asked between updates; when it says so the run commits and ends.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        workers: Workers,
        run_dir: Path,
        *,
        identity: str,
        events: telemetry.Events,
        observer: Observer,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.workers, self.events, self.observer, self.should_stop = config, workers, events, observer, should_stop
        self.identity = identity
        self.cursor = TaskCursor(dataset, seed=config.seed, groups_per_update=config.train.groups_per_update)
        self.metrics = telemetry.JsonlFile(run_dir / telemetry.METRICS)
        self.checkpoints = run_dir / "checkpoints"
        self.acting: dict[int, AdapterWeights] = {}
        self.in_flight: dict[int, list[asyncio.Task[tuple[Rolled, np.ndarray]]]] = {}

    async def run(self, *, resume: bool) -> Outcome:
        """Runs to ``train.updates`` or until asked to stop; commits at the end either way.

        Raises:
            InputError: a checkpoint of other settings, or a reward that breaks its contract.
            TrainingFailed: too many groups were dropped, a ratio was not 1 on-policy, or a loss was not finite.
        """
        await self.workers.start()
        start = await self._begin(resume)
        update = start
        try:
            while update < self.config.train.updates and not self.should_stop():
                await self._update(update)
                update += 1
                if update % self.config.train.checkpoint_every == 0 or update == self.config.train.updates:
                    await self._commit(update)
        finally:
            for task in [task for tasks in self.in_flight.values() for task in tasks]:
                task.cancel()
        if update % self.config.train.checkpoint_every and update not in (start, self.config.train.updates):
            await self._commit(update)
        return Outcome(updates_done=update, adapter=self.acting[update])

    async def _begin(self, resume: bool) -> int:
        """Restores the newest sound checkpoint, or starts from the base; either way actors hold what they may be asked for."""
        found = checkpoint.newest(self.checkpoints, on_corrupt=self.events) if resume else None
        if found is not None:
            checkpoint.require_same_run(found, self.identity, self.checkpoints)
            await self.workers.restore_learner(found.learner, found.updates_done)
            self.acting = {weights.id.step: weights for weights in found.acting}
            start = found.updates_done
            self.events("resumed", updates_done=start, adapter=str(self.acting[start].id))
        else:
            if resume and (lost := [path.name for path in self.checkpoints.glob(".corrupt-*")]):
                raise InputError(
                    f"no sound checkpoint is left in {self.checkpoints} ({', '.join(sorted(lost))} did not verify): "
                    "starting over here would erase the run's curves. Restore a copy, or start a new --run-dir."
                )
            weights = unpack_adapter(await self.workers.export())
            self.acting = {0: weights}
            start = 0
            self.events("started", adapter=str(weights.id))
        self.metrics.rewind(start)
        self.events.rewind(start)
        for weights in self.acting.values():
            await self.workers.publish(wire.pack(weights))
        return start

    async def _update(self, update: int) -> None:
        started = time.perf_counter()
        train = self.config.train
        for ahead in range(update, min(update + train.max_lag, train.updates - 1) + 1):
            self._dispatch(ahead)
        results = await self._gather(update)
        gathered = time.perf_counter()
        groups, packed = [rolled for rolled, _ in results], [table for _, table in results]
        report = await self.workers.learn(update, groups, packed)
        learned = time.perf_counter()
        tables: list[RewardTable] = [wire.unpack(table) for table in packed]
        self._check_drops(update, report, tables)
        weights = unpack_adapter(report.adapter)
        self.acting[update + 1] = weights
        for old in [step for step in self.acting if step < update + 1 - train.max_lag]:
            del self.acting[old]
        await self.workers.publish(report.adapter)
        published = time.perf_counter()
        rollout_seconds = sum(sum(rolled.seconds.values()) for rolled in groups)
        record = {
            "update": update,
            **telemetry.reward_metrics(tables),
            **report.metrics,
            "groups/used": report.used,
            "groups/dropped": len(groups) - report.used,
            "groups/dropped_reasons": {kind: telemetry.count_reasons(reasons) for kind, reasons in report.declined.items()},
            "adapter": str(weights.id),
            "policy_version": weights.id.step,
            "staleness": update - groups[0].adapter.step,
            "bytes/groups": sum(rolled.nbytes for rolled in groups),
            "seconds/rollout": rollout_seconds,
            "seconds/reward": sum(table.seconds for table in tables),
            "seconds/wait": gathered - started,
            "seconds/learn": learned - gathered,
            "seconds/publish": published - learned,
            "seconds/update": time.perf_counter() - started,
        }
        self.metrics.append(record)
        self.observer.update_done(record)

    def _dispatch(self, update: int) -> None:
        """Starts an update's groups once, under the version that ``max_lag`` assigns to it."""
        if update in self.in_flight:
            return
        version = max(update - self.config.train.max_lag, 0)
        self.in_flight[update] = [
            asyncio.create_task(self._group(self._item(update, slot, self.acting[version].id)))
            for slot in range(self.config.train.groups_per_update)
        ]

    def _item(self, update: int, slot: int, adapter: AdapterId) -> WorkItem:
        task, draw = self.cursor.at(update, slot)
        task = fit(task, resolution=self.config.editor.resolution, multiple=self.workers.pixels_per_token)
        return WorkItem(
            work_id=f"{keyed_seed(self.config.seed, 'work', update, slot, task.task_id, draw):016x}",
            task=task,
            draw=draw,
            update=update,
            num_candidates=self.config.rollout.group_size,
            run_seed=self.config.seed,
            adapter=adapter,
        )

    async def _group(self, item: WorkItem) -> tuple[Rolled, np.ndarray]:
        """One group, rolled out and scored; refused when it does not come from the weights it names."""
        rolled = await self.workers.rollout(item)
        if rolled.adapter != item.adapter:
            self.events("stale_adapter", work_id=item.work_id, wanted=str(item.adapter), loaded=str(rolled.adapter))
            raise TrainingFailed(
                f"group {item.work_id} was rolled out with adapter {rolled.adapter}, but {item.adapter} is published: "
                "a weight update did not reach its actor. Refusing to train on it."
            )
        return rolled, await self.workers.score(rolled)

    async def _gather(self, update: int) -> list[tuple[Rolled, np.ndarray]]:
        """Every group of an update, in slot order; progress as they arrive, the first failure at once."""
        tasks = self.in_flight.pop(update)
        waiting = set(tasks)
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            failures = [error for task in done if (error := task.exception()) is not None]
            if failures:
                for task in waiting:
                    task.cancel()
                raise failures[0]
            self.observer.group_scored(update, len(tasks) - len(waiting), len(tasks))
        return [task.result() for task in tasks]

    def _check_drops(self, update: int, report: LearnReport, tables: Sequence[RewardTable]) -> None:
        """Counts what was not trained, and stops when invalid rewards exceed their budget."""
        for kind, reasons in report.declined.items():
            self.events("groups_dropped", update=update, kind=kind, reasons=telemetry.count_reasons(reasons))
        invalid = report.declined.get("invalid", [])
        if len(invalid) <= self.config.train.max_dropped_groups:
            return
        message = (
            f"{len(invalid)} of {len(tables)} groups of update {update} have an invalid reward, train.max_dropped_groups is "
            f"{self.config.train.max_dropped_groups}: {invalid[0]}"
        )
        if any(table.contract_broken for table in tables):
            raise InputError(f"{message}. Fix the reward function or its declared range.")
        raise TrainingFailed(f"{message}. Check the judge, or allow drops with train.max_dropped_groups.")

    async def _commit(self, updates_done: int) -> None:
        state = await self.workers.learner_state()
        acting = tuple(self.acting[step] for step in sorted(self.acting))
        path = checkpoint.write(
            self.checkpoints,
            checkpoint.Checkpoint(updates_done=updates_done, identity=self.identity, learner=state, acting=acting),
        )
        checkpoint.prune(self.checkpoints, self.config.train.keep_checkpoints)
        self.events("checkpoint", path=path.name, adapter=str(self.acting[updates_done].id))
