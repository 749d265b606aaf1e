"""Several evaluated runs in one table: paired differences on the same tasks, noises and editor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rl_edit.evaluation.arms import (
    COMMON_MEASURES,
    MEASURES,
    Arm,
    grouped,
    shared_weights,
    task_interval,
)
from rl_edit.evaluation.evaluated_run import PROTOCOL, EvaluatedRun, read_runs, require_alike
from rl_edit.evaluation.record import EvaluationMeta, interval_json
from rl_edit.measures.intervals import Interval


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Arms under one protocol.

    Attributes:
        meta: the protocol, which all evaluations share.
        weights: of the total.
        against: the arm that is subtracted from each of the others; None subtracts none.
        notes: caveats for a reader of the numbers, a sentence each.
    """

    meta: EvaluationMeta
    arms: tuple[Arm, ...]
    weights: Mapping[str, float]
    against: Arm | None
    notes: tuple[str, ...]

    def base(self, measure: str) -> Interval | None:
        """The base editor's interval; None unless all arms agree on it.

        Arms with different training rewards measure the base differently.
        """
        intervals = [task_interval(arm.base(measure)) for arm in self.arms]
        means = [interval.mean for interval in intervals if interval is not None]
        # Not bitwise: two machines may differ in the last digit.
        agree = len(means) == len(intervals) and all(
            math.isclose(mean, means[0], rel_tol=1e-9) for mean in means
        )
        return intervals[0] if agree else None

    def record(self) -> dict[str, Any]:
        """The comparison as JSON."""
        against = self.against
        # Compared by identity: two arms may have equal numbers.
        others = () if against is None else tuple(arm for arm in self.arms if arm is not against)
        return {
            # Keys of this record are a file format: scripts read it.
            "protocol": {key: getattr(self.meta, key) for key in PROTOCOL},
            "total_weights": dict(self.weights),
            "base": {m.name: optional_json(self.base(m.name)) for m in MEASURES},
            "arms": [_arm_json(arm) for arm in self.arms],
            "against": against.label if against else None,
            "over": {
                arm.label: {
                    m.name: optional_json(arm.minus(against, m.name)) for m in COMMON_MEASURES
                }
                for arm in others
                if against
            },
            "notes": list(self.notes),
        }


def compare(directories: Sequence[Path], *, against: Path | None = None) -> Comparison:
    """Reads, checks and groups runs.

    The total has the first run's weights, of those terms that every run measured alike.

    Raises:
        InputError: no such run, one that was not evaluated, or evaluations that differ in tasks,
            noises or editor.
    """
    # The same directory under two names is one run.
    places: dict[Path, Path] = {}
    for directory in [*directories, *([against] if against else [])]:
        places.setdefault(directory.resolve(), directory)
    runs = read_runs(list(places.values()))
    # Before anything is averaged: means over different tasks would look comparable.
    require_alike(runs)
    weights, notes = shared_weights(runs)
    arms = grouped(runs, weights)
    other = None
    if against is not None:
        directory = places[against.resolve()]
        other = next(arm for arm in arms if directory in [run.directory for run in arm.runs])
    return Comparison(
        meta=runs[0].meta,
        arms=arms,
        weights=weights,
        against=other,
        notes=(*notes, *_caveats(runs)),
    )


def _caveats(runs: Sequence[EvaluatedRun]) -> list[str]:
    """Notes runs whose evaluation is of fewer updates than they have, or is not all readable."""
    # A run that was trained on since: its numbers are right, of an older adapter.
    stale = [
        f"{run.directory} now has adapter {run.stale}, and {run.meta.adapter} was evaluated: "
        f"rl-edit evaluate {run.directory}"
        for run in runs
        if run.stale
    ]
    # A run that was stopped or ended early: fewer updates than its settings say.
    unfinished = [
        f"{run.directory} was evaluated after {run.updates} "
        f"of its {run.config.train.updates} updates"
        for run in runs
        if run.updates < run.config.train.updates
    ]
    damaged = [f"{run.damage} of the seconds per update" for run in runs if run.damage]
    return [*stale, *unfinished, *damaged]


def optional_json(interval: Interval | None) -> dict[str, int | float | None] | None:
    """Writes an interval as JSON, null where nothing was measured."""
    # null says "not measured", which is not the same as an interval around zero.
    return None if interval is None else interval_json(interval)


def _arm_json(arm: Arm) -> dict[str, Any]:
    return {
        "label": arm.label,
        "method": arm.runs[0].config.algorithm.name,
        "runs": [str(run.directory) for run in arm.runs],
        "seeds": list(arm.seeds),
        "updates": arm.updates,
        "seconds_per_update": arm.seconds_per_update,
        "evaluations_per_update": {**asdict(arm.effort), "total": arm.effort.total},
        "gain": {m.name: optional_json(arm.gain(m.name)) for m in MEASURES},
        "by_type": {
            kind: {m.name: optional_json(arm.gain(m.name, task_type=kind)) for m in MEASURES}
            for kind in arm.task_types()
        },
        "by_seed": {
            m.name: {str(seed): mean for seed, mean in arm.by_seed(m.name).items()}
            for m in MEASURES
        },
    }
