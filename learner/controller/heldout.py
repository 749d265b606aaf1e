"""Held-out evaluation during training: the trusted reward against the trained one.

A reward that is optimised for long enough is eventually hacked. The trained reward then rises while
the trusted one (gold) falls. Every ``evaluation.every`` updates one candidate of each probe is
rolled out and scored like any group. This file says which tasks are evaluated, records the results
and raises the alarm. Nothing stays in memory: the history is ``heldout.jsonl``, the best adapter by
gold is ``best/``, and a resumed run reads both.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from learner.controller.alarm import Alarm, Evaluation, alarm
from learner.controller.executor import Executor
from learner.controller.groups import GroupCollector
from learner.controller.learner_ranks import LearnerSnapshot
from learner.controller.lease import Lease
from rl_edit import wire
from rl_edit.config import RunConfig
from rl_edit.data import Dataset, open_dataset
from rl_edit.data.canvas import fit
from rl_edit.errors import InputError
from rl_edit.files import HELDOUT, METRICS, JsonLines, read_json_lines, replace_file
from rl_edit.method.exploration import keyed_seed
from rl_edit.rewards import Reward
from rl_edit.rewards.shapes_judge import ShapesJudge
from rl_edit.rewards.vlm.judge_reward import JudgeReward
from rl_edit.types import AdapterId, AdapterWeights, RewardTable, WorkItem

BEST, RECORD = "best", "best.json"


@dataclass(frozen=True, kw_only=True)
class Probes:
    """The held-out tasks to evaluate.

    Attributes:
        number: of tasks, from the first.
        gold: name of the reward term that is trusted.
    """

    dataset: Dataset
    number: int
    gold: str


class Best(BaseModel):
    """The evaluation with the highest gold: ``best/best.json``.

    Attributes:
        file: of the packed adapter, named by the hash of its bytes.
    """

    model_config = ConfigDict(frozen=True)
    update: int
    gold: float
    adapter: str
    protocol: str
    file: str


def probes(config: RunConfig, terms: Sequence[Reward], *, pixels_per_token: int) -> Probes | None:
    """Returns the probes of a run; None when ``evaluation.every`` is 0.

    Args:
        terms: the reward terms that the data can feed.

    Raises:
        InputError: ``evaluation.gold`` is no term of the run, or the held-out tasks cannot feed
            every term.
    """
    evaluation = config.evaluation
    if not evaluation.every:
        return None
    names = [term.name for term in terms]
    # A judge of the instruction is the natural gold: measures of preservation favour no change.
    gold = evaluation.gold or next(
        (term.name for term in terms if isinstance(term, ShapesJudge | JudgeReward)), names[0]
    )
    if gold not in names:
        raise InputError(
            f"evaluation.gold {gold!r} is no reward of this run, so held-out tasks could not be "
            f"scored by it. Name one of {', '.join(names)}, or add it to rewards with weight 0."
        )
    dataset = open_dataset(
        config.data,
        "heldout",
        resolution=config.editor.resolution,
        multiple=pixels_per_token,
        text=config.editor,
    )
    for term in terms:
        if missing := sorted(term.requires - dataset.fields):
            raise InputError(
                f"reward {term.name!r} needs the field {' and '.join(missing)} of every held-out "
                "task and the data does not have it, so "
                f"evaluation.every({evaluation.every}) could compare nothing. Add it, change "
                "data.heldout_path, or set evaluation.every=0."
            )
    return Probes(dataset=dataset, number=min(evaluation.probe_tasks, len(dataset)), gold=gold)


def read_best(directory: Path) -> tuple[Best, AdapterWeights] | None:
    """Reads the best adapter from ``RUN/best``; None when nothing was evaluated.

    Raises:
        InputError: the adapter's bytes are not those that were written.
    """
    best = _stored_best(directory)
    if best is None:
        return None
    file = directory / best.file
    packed = np.fromfile(file, dtype=np.uint8) if file.is_file() else np.empty(0, np.uint8)
    # The name is the hash, so a torn or exchanged file cannot pass for the best adapter.
    if best.file != _name(packed):
        raise InputError(
            f"{file} is not the adapter that {RECORD} names, so it is not used. Remove "
            f"{directory}; the next evaluation makes it."
        )
    return best, wire.unpack(packed)


class HeldoutMonitor:
    """Plans, records and compares the held-out evaluations of a run.

    Args:
        probes: None evaluates nothing.
        note: called with what a person should know.
    """

    def __init__(
        self,
        probes: Probes | None,
        config: RunConfig,
        directory: Path,
        *,
        pixels_per_token: int,
        lease: Lease,
        events: Callable[..., None],
        note: Callable[[str], None],
    ) -> None:
        self.probes, self.config, self.directory = probes, config, directory
        self.pixels_per_token = pixels_per_token
        self.lease, self.event, self.note = lease, events, note
        self.file = JsonLines(directory / HELDOUT, note=note)

    def rewind(self, updates_done: int) -> None:
        """Drops evaluations that a resumed run will do again."""
        if self.file.path.is_file():
            self.file.rewind(updates_done, is_whole=_is_evaluation)

    def history(self) -> list[Evaluation]:
        """Returns the evaluations that the next one is comparable with, oldest first."""
        # Read anew each time: a resumed run and a running one take the same way.
        lines = filter(_is_evaluation, read_json_lines(self.file.path))
        seen = map(Evaluation.model_validate, lines)
        return [line for line in seen if line.protocol == self._protocol()]

    def is_due(self, updates_done: int) -> bool:
        """Returns True when the weights after so many updates are still to be evaluated."""
        if self.probes is None or not updates_done or updates_done % self.config.evaluation.every:
            return False
        # A run that was killed between the evaluation and the commit finds its line already there.
        return all(seen.update != updates_done - 1 for seen in self.history())

    def items(self, updates_done: int, adapter: AdapterId) -> list[WorkItem]:
        """Returns the work: candidate 0 of every probe.

        Noise and ODE are the same at every evaluation, so that only the adapter differs.
        """
        assert self.probes is not None
        seed, resolution = self.config.evaluation.seed, self.config.editor.resolution
        return [
            WorkItem(
                group_id=f"{keyed_seed(seed, 'probe', updates_done, index):016x}",
                chunk=(0, 1),
                task=fit(
                    self.probes.dataset[index],
                    resolution=resolution,
                    multiple=self.pixels_per_token,
                ),
                epoch=0,
                update=updates_done - 1,
                num_candidates=self.config.rollout.group_size,
                run_seed=seed,
                adapter=adapter,
                explores=False,
            )
            for index in range(self.probes.number)
        ]

    def record(
        self,
        adapter: AdapterId,
        packed: np.ndarray,
        tables: Sequence[RewardTable],
        *,
        seconds: float,
    ) -> None:
        """Records an evaluation, saves the best adapter and raises the alarm.

        Args:
            packed: the adapter, as published.
            tables: one per probe.
        """
        assert self.probes is not None
        update = adapter.step - 1
        valid = [table for table in tables if table.complete(self.probes.gold)]
        if not valid:
            reason = next(
                (reason for table in tables for reason in table.reasons), "no reason given"
            )
            self.event(
                "evaluation_skipped",
                update=update,
                reason=f"no probe has a valid score of every term that counts: {reason}",
            )
            return
        before = self.history()
        seen = self._evaluation(update, valid, before, seconds=seconds)
        # Before anything is written: `best/` belongs to the attempt that owns the directory.
        self.lease.check()
        try:
            # The line comes last: an evaluation without it is done again, and then finds the rest
            # as it would write it.
            self._save_if_best(seen, adapter, packed)
            # Reported once, when it is reached, not again while it lasts.
            raised = alarm([*before, seen], self.config.evaluation.patience)
            if raised is not None and raised.in_a_row == self.config.evaluation.patience:
                self._raise(raised)
            self.file.append(seen.model_dump())
        except OSError as error:
            self.event("evaluation_unwritten", update=update, reason=str(error))
            self.note(f"the evaluation after update {update + 1} could not be written ({error})")

    def _evaluation(
        self,
        update: int,
        valid: Sequence[RewardTable],
        before: Sequence[Evaluation],
        *,
        seconds: float,
    ) -> Evaluation:
        """Averages the tables of an evaluation, each of one candidate."""
        assert self.probes is not None
        gold = self.probes.gold
        return Evaluation(
            update=update,
            gold=fmean(float(table.values[0, table.names.index(gold)]) for table in valid),
            # Terms of weight 0 are measured only; their values may be missing.
            total=fmean(
                sum(
                    w * float(v)
                    for w, v in zip(table.weights, table.values[0], strict=True)
                    if w > 0
                )
                for table in valid
            ),
            training=self._training(before[-1].update if before else -1, update),
            n=len(valid),
            background_psnr=_mean(
                table.measures.background["psnr"][0]
                for table in valid
                if table.measures is not None
            ),
            seconds=seconds,
            protocol=self._protocol(),
        )

    def stop_reason(self, updates_done: int) -> str:
        """Says why the run should end here, with ``evaluation.stop_on_alarm``; else ""."""
        if self.probes is None or not self.config.evaluation.stop_on_alarm:
            return ""
        history = self.history()
        stands = alarm(history, self.config.evaluation.patience)
        return str(stands) if stands is not None and stands.last.update == updates_done - 1 else ""

    def _protocol(self) -> str:
        assert self.probes is not None
        return (
            f"{self.probes.gold} on {self.probes.number} tasks, seed {self.config.evaluation.seed}"
        )

    def _training(self, after: int, upto: int) -> float | None:
        """Averages the training reward of the updates between two evaluations."""
        lines = read_json_lines(self.directory / METRICS)
        return _mean(
            line.get("reward/total/mean")
            for line in lines
            if after < line.get("update", after) <= upto
        )

    def _save_if_best(self, seen: Evaluation, adapter: AdapterId, packed: np.ndarray) -> None:
        """Saves an adapter whose gold is higher than any before, or under another protocol."""
        folder = self.directory / BEST
        best_before = _stored_best(folder)
        comparable = best_before is not None and best_before.protocol == seen.protocol
        # Of equals the earlier one stays: it was trained for a shorter time.
        if best_before is not None and comparable and best_before.gold >= seen.gold:
            return
        best = Best(
            update=seen.update,
            gold=seen.gold,
            adapter=str(adapter),
            protocol=seen.protocol,
            file=_name(packed),
        )
        folder.mkdir(exist_ok=True)
        # The weights precede the record: a record never names a file that is not there.
        replace_file(folder / best.file, packed.data, durable=True)
        replace_file(folder / RECORD, best.model_dump_json(indent=2) + "\n", durable=True)
        # Earlier adapters, and what a killed writer left beside them.
        for other in folder.glob("*.safetensors*"):
            if other.name != best.file:
                other.unlink(missing_ok=True)

    def _raise(self, raised: Alarm) -> None:
        best = _stored_best(self.directory / BEST)
        remedy = (
            f"the best adapter by gold, after update {best.update + 1}, is kept in {BEST}/"
            if best is not None
            else "no adapter was kept"
        )
        self.event(
            "gold_alarm",
            update=raised.last.update,
            since=raised.before.update,
            in_a_row=raised.in_a_row,
            training=[raised.before.training, raised.last.training],
            gold=[raised.before.gold, raised.last.gold],
        )
        self.note(f"{raised}: what is trained on may no longer be what is wanted; {remedy}")


def _stored_best(directory: Path) -> Best | None:
    try:
        return Best.model_validate_json((directory / RECORD).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _name(packed: np.ndarray) -> str:
    return f"{hashlib.sha256(packed.data).hexdigest()}.safetensors"


def _mean(values: Iterable[float | None]) -> float | None:
    """Averages the values that were measured; None when none was."""
    measured = [value for value in values if value is not None and math.isfinite(value)]
    return fmean(measured) if measured else None


def _is_evaluation(line: dict[str, Any]) -> bool:
    """Tests whether a line of ``heldout.jsonl`` has all that an evaluation needs."""
    try:
        Evaluation.model_validate(line)
    except ValidationError:
        return False
    return True


async def evaluate(
    monitor: HeldoutMonitor,
    collector: GroupCollector,
    snapshot: LearnerSnapshot,
    executor: Executor,
) -> None:
    """Rolls out and scores the held-out tasks under a snapshot's resulting weights.

    The calls and checks are those of every group. An evaluation that lost a task is skipped, and an
    event says so.
    """
    began, done = time.perf_counter(), snapshot.updates_done
    tasks = [
        asyncio.ensure_future(collector.collect([item], kind="probe"))
        for item in monitor.items(done, snapshot.result_id)
    ]
    try:
        for task in asyncio.as_completed(tasks):
            await task
            collector.progress.moved()
    finally:
        # Probes are no part of the run's story: their items are forgotten, not consumed.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        collector.ledger.close(done - 1)
    groups = [task.result() for task in tasks]
    if lost := [group.lost for group in groups if group.lost]:
        monitor.event("evaluation_skipped", update=done - 1, reason=lost[0])
        return
    packed = await executor.fetch(snapshot.result)
    seconds = time.perf_counter() - began
    monitor.record(snapshot.result_id, packed, [group.table() for group in groups], seconds=seconds)
