"""The logs of a run: events, the metrics of each update, and evidence of skipped steps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from learner.controller.capacity import Capacity
from learner.controller.executor import Executor
from learner.controller.groups import ScoredGroup, evidence
from learner.controller.lease import Lease
from learner.controller.placement import GroupCost, WorkerCounts, recommend
from learner.controller.run import Observer, Run
from rl_edit.config import RunConfig
from rl_edit.errors import BlobLost, Fenced
from rl_edit.files import METRICS, JsonLines, replace_file
from rl_edit.measures.reward_metrics import count_reasons, reward_metrics
from rl_edit.messages import LearnReport


class Events:
    """Appends state changes worth knowing, with their wall time, to ``events.jsonl``.

    Args:
        lease: asked before each write; None where no other attempt can come.
        note: called with what a person should know.
    """

    def __init__(
        self,
        path: Path,
        *,
        lease: Lease | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._file, self._lease, self._note = JsonLines(path, note=note), lease, note
        self._lost = False

    def rewind(self, update: int) -> None:
        """Drops events of updates that a resumed run will do again.

        Raises:
            Fenced: a newer attempt owns the run directory.
        """
        self.require_owner()
        self._file.rewind(update)

    def require_owner(self) -> None:
        """Returns when this attempt may write in the run directory.

        Raises:
            Fenced: a newer attempt owns it.
        """
        if self._lease is not None:
            self._lease.check()

    def __call__(self, event: str, **details: Any) -> None:
        """Writes one event. A full disk costs the line, not the run.

        A fenced attempt writes none: the file is the newer one's. What ends it is its next commit.
        """
        try:
            self.require_owner()
            # Wall time, because events of several machines and attempts are read together.
            self._file.append({"time": round(time.time(), 3), "event": event, **details})
        except Fenced:
            return
        except OSError as error:
            # Said once: a disk that is full stays so for many lines.
            if not self._lost:
                self._lost = True
                self._note(f"event {event} could not be written ({error}), maybe more are lost")


@dataclass(frozen=True, kw_only=True)
class UpdateTimes:
    """Seconds of one update, by what the controller waited for.

    Attributes:
        wait: until all groups were scored.
        learn: until the learner had answered.
        commit: from the line of the update before to this one's start. The commit follows its line,
            so its seconds stand in the next line.
        ranks: learner ranks that learnt together. Lost ones may have been given up.
    """

    wait: float
    learn: float
    commit: float
    ranks: int

    @property
    def total(self) -> float:
        """Seconds of the update."""
        return self.commit + self.wait + self.learn


def group_cost(groups: Sequence[ScoredGroup], report: LearnReport, times: UpdateTimes) -> GroupCost:
    """Returns the mean worker seconds of a group, by role."""
    chunks = [chunk for group in groups for chunk in group.chunks]
    # Worker seconds, not waiting time: ranks learn together, so theirs are multiplied.
    return GroupCost(
        rollout_s=sum(sum(chunk.result.seconds.values()) for chunk in chunks) / len(groups),
        reward_s=sum(group.table().seconds for group in groups if not group.lost) / len(groups),
        learn_s=report.seconds * times.ranks / len(groups),
        step_s=times.commit,
    )


def update_metrics(
    update: int,
    groups: Sequence[ScoredGroup],
    report: LearnReport,
    *,
    config: RunConfig,
    capacity: Capacity,
    times: UpdateTimes,
    retries: dict[str, int],
) -> dict[str, Any]:
    """Returns an update's line of ``metrics.jsonl``.

    Args:
        retries: repeated calls within this update, by kind.
    """
    chunks = [chunk for group in groups for chunk in group.chunks]
    tables = [group.table() for group in groups if not group.lost]
    cost = group_cost(groups, report, times)
    # Staleness is that of the oldest chunk: it decides how far off-policy the update is.
    oldest = min((chunk.result.adapter.step for chunk in chunks), default=update)
    return {
        "update": update,
        **reward_metrics(tables, normalise=config.algorithm.credit.normalise),
        **report.metrics,
        "groups/used": report.used,
        "groups/dropped": len(groups) - report.used,
        "groups/dropped_reasons": {
            kind: count_reasons(reasons) for kind, reasons in report.declined.items()
        },
        "step/skipped": int(bool(report.skipped)),
        "adapter": str(report.adapter),
        "policy_version": report.adapter.step,
        "staleness": update - oldest,
        "retries/infra": retries["infra"],
        "retries/data": retries["data"],
        "bytes/groups": sum(chunk.result.nbytes for chunk in chunks),
        "seconds/rollout": cost.rollout_s * len(groups),
        "seconds/reward": cost.reward_s * len(groups),
        "seconds/wait": times.wait,
        "seconds/learn": times.learn,
        "seconds/commit": times.commit,
        "seconds/update": times.total,
        "efficiency": capacity.efficiency(cost, len(groups), times.total),
    }


class UpdateLog:
    """Writes what an update did: events, its line of metrics, evidence of a skipped step.

    Attributes:
        metrics: the file ``metrics.jsonl``.
        updates_reported: updates of this attempt whose metrics were written.
    """

    def __init__(self, run: Run, executor: Executor, *, events: Events, observer: Observer) -> None:
        self.run, self.executor, self.events, self.observer = run, executor, events, observer
        self.metrics = JsonLines(run.directory / METRICS, note=observer.note)
        self.updates_reported = 0
        self._costs: list[GroupCost] = []
        self._notes: set[str] = set()

    async def write(
        self,
        update: int,
        groups: Sequence[ScoredGroup],
        report: LearnReport,
        times: UpdateTimes,
        retries: dict[str, int],
    ) -> None:
        """Writes one update.

        Args:
            retries: repeated calls within this update, by kind.
        """
        self.events(
            "update_applied",
            update=update,
            adapter=str(report.adapter),
            used=report.used,
            consumed=[group.group_id for group in groups],
        )
        self._write_notes(groups)
        for kind, reasons in report.declined.items():
            self.events("groups_dropped", update=update, kind=kind, reasons=count_reasons(reasons))
        if report.skipped:
            in_a_row = report.skipped_in_a_row
            self.events("step_skipped", update=update, reason=report.skipped, in_a_row=in_a_row)
            try:
                await write_evidence(self.run.directory, update, groups, report, self.executor)
            except (OSError, BlobLost) as error:
                self.observer.note(f"the evidence of update {update} is incomplete ({error})")
        metrics = update_metrics(
            update,
            groups,
            report,
            config=self.run.config,
            capacity=self.run.capacity,
            times=times,
            retries=retries,
        )
        # Between the event above and this line a newer attempt may have come.
        self.events.require_owner()
        try:
            self.metrics.append(metrics)
        except OSError as error:
            # A full disk costs the line; the checkpoint decides whether the run can go on.
            self.observer.note(f"the metrics of update {update} could not be written ({error})")
        # Counted before an observer is called: one that raises does not undo the update.
        self.updates_reported += 1
        # After the file: the cluster's monitoring is a copy and may be missing.
        self.executor.mirror(metrics)
        self.observer.update_done(metrics)

    def _write_notes(self, groups: Sequence[ScoredGroup]) -> None:
        """Shows every note of the rewards once."""
        for note in (note for group in groups if not group.lost for note in group.table().notes):
            if note not in self._notes:
                self._notes.add(note)
                self.events("reward_note", note=note)
                self.observer.note(note)

    def advise(self, cost: GroupCost) -> None:
        """Says after two updates how the workers would best be divided among the roles."""
        # The first update also pays for warm-up; the second one is typical.
        self._costs.append(cost)
        config = self.run.config
        actors, train = config.actors, config.train
        if len(self._costs) != 2 or actors.placement == "colocated":
            return
        if not self.run.capacity.divisible:
            return
        present = WorkerCounts(
            rollout=actors.num_rollout, reward=actors.num_reward, learner=actors.num_learner
        )
        advice = recommend(
            cost,
            present.total,
            train.groups_per_update,
            train.max_lag,
            len(config.rollout.chunks),
            present=present,
        )
        best = advice.counts
        self.events("placement_advice", now=asdict(present), best=asdict(best), words=advice.words)
        self.observer.note(advice.words)


async def write_evidence(
    directory: Path,
    update: int,
    groups: Sequence[ScoredGroup],
    report: LearnReport,
    executor: Executor,
) -> None:
    """Writes what led to a skipped step: the groups as on the wire, and facts."""
    folder = directory / "diagnostics" / f"update_{update:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    for group in groups:
        for chunk in group.chunks:
            packed = bytes(await executor.fetch(chunk.blob))
            replace_file(folder / f"{chunk.result.work_id}.safetensors", packed)
    facts = {
        "update": update,
        "reason": report.skipped,
        "metrics": report.metrics,
        "groups": evidence(groups),
    }
    # Rewards may be NaN here, which replace_json refuses: this file is for people.
    replace_file(folder / "facts.json", json.dumps(facts, indent=2) + "\n")
