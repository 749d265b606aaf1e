"""Arms of a comparison: runs that share everything but the seed, and their paired differences.

Measurements of a task under a noise are averaged over the runs of an arm before anything is
resampled, so an interval is over tasks and not over seeds. ``by_seed`` shows the spread of seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rl_edit.errors import InputError
from rl_edit.evaluation.effort import Effort, effort
from rl_edit.evaluation.evaluated_run import PRESERVATION, EvaluatedRun, Key
from rl_edit.measures.intervals import Interval, bootstrap

TOTAL = "total"


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A column of the table; more of it is better."""

    name: str
    label: str
    unit: str
    digits: int

    @property
    def heading(self) -> str:
        """Label with unit."""
        return self.label + (f", {self.unit}" if self.unit else "")


MEASURES = (
    Measure(name="reward", label="training reward", unit="", digits=3),
    Measure(name=TOTAL, label="total reward", unit="", digits=3),
    Measure(name="instruction", label="inside: instruction", unit="", digits=3),
    Measure(name="background_psnr_masked", label="outside: PSNR", unit="dB", digits=3),
    Measure(name="background_ssim", label="outside: SSIM", unit="", digits=4),
    Measure(name=PRESERVATION, label="outside: preservation", unit="", digits=4),
)
"""``reward`` is a run's weighted sum, what it was trained to raise; ``total`` has the same weights
for all runs."""
COMMON_MEASURES = tuple(measure for measure in MEASURES if measure.name != "reward")
"""Measures that mean the same in every run, so that runs can be subtracted from each other."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Runs that share everything but the seed.

    Attributes:
        weights: of the reward terms in the total.
    """

    label: str
    # At least one; ``grouped`` has checked that they differ in nothing but the seed, so that the
    # first one answers for all where a property depends on settings or tasks.
    runs: tuple[EvaluatedRun, ...]
    weights: Mapping[str, float]

    @property
    def effort(self) -> Effort:
        """Model evaluations of one update."""
        return effort(self.runs[0].config)

    @property
    def updates(self) -> int:
        """Updates behind each adapter."""
        return self.runs[0].updates

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seed of each run."""
        return tuple(run.config.seed for run in self.runs)

    @property
    def seconds_per_update(self) -> float | None:
        """Median over all updates of all runs."""
        # A median: the first update warms up, and a shared machine stalls now and then.
        durations = [seconds for run in self.runs for seconds in run.seconds]
        return statistics.median(durations) if durations else None

    def task_types(self) -> tuple[str, ...]:
        """All task types, sorted."""
        return tuple(sorted({row.task_type for row in self.runs[0].rows.values()}))

    def base(self, measure: str) -> dict[Key, float]:
        """Values of the base editor for each task and noise, mean over seeds."""
        return self._means(measure, lambda values: self._value(values["base"], measure))

    def trained(self, measure: str) -> dict[Key, float]:
        """Values of the trained editor for each task and noise, mean over seeds."""
        return self._means(measure, lambda values: self._value(values["trained"], measure))

    def gain(self, measure: str, *, task_type: str | None = None) -> Interval | None:
        """Trained minus base, paired by task, noise and seed; None where nothing was measured."""
        return task_interval(self._of_type(self._gains(measure), task_type))

    def minus(self, other: Arm, measure: str, *, task_type: str | None = None) -> Interval | None:
        """This trained editor minus the other's, paired by task and noise.

        None where nothing was measured.
        """
        # Seeds of two arms are no pairs: each arm is averaged over its seeds first.
        here, there = self.trained(measure), other.trained(measure)
        differences = {key: here[key] - there[key] for key in here if key in there}
        return task_interval(self._of_type(differences, task_type))

    def by_seed(self, measure: str) -> dict[int, float | None]:
        """Mean gain of each run."""
        gains = {
            run.config.seed: replace(self, runs=(run,))._gains(measure).values()
            for run in self.runs
        }
        return {seed: statistics.fmean(of) if of else None for seed, of in gains.items()}

    def _gains(self, measure: str) -> dict[Key, float]:
        # Subtracted within a run: a row in which either side is invalid leaves that run out.
        return self._means(
            measure,
            lambda values: (
                self._value(values["trained"], measure) - self._value(values["base"], measure)
            ),
        )

    def _means(
        self, measure: str, of: Callable[[Mapping[str, Mapping[str, float]]], float]
    ) -> dict[Key, float]:
        """Averages a number of each row over the runs where it is finite."""
        values: dict[Key, list[float]] = defaultdict(list)
        for run in self.runs:
            for key, row in run.rows.items():
                if math.isfinite(value := of(row.values)):
                    values[key].append(value)
        return {key: statistics.fmean(of_key) for key, of_key in values.items()}

    def _value(self, values: Mapping[str, float], measure: str) -> float:
        # total = sum_k w_k r_k with the weights that all arms share; NaN as soon as one term is.
        if measure != TOTAL:
            return values.get(measure, math.nan)
        terms = [
            weight * values.get(f"reward/{name}", math.nan) for name, weight in self.weights.items()
        ]
        return math.fsum(terms) if terms else math.nan

    def _of_type(self, values: Mapping[Key, float], task_type: str | None) -> dict[Key, float]:
        rows = self.runs[0].rows
        return {
            key: value
            for key, value in values.items()
            if task_type is None or rows[key].task_type == task_type
        }


def task_interval(values: Mapping[Key, float]) -> Interval | None:
    """Bootstraps a mean over tasks, where all noises of one task are one unit."""
    # NaN was left out before, so nothing may be left.
    if not values:
        return None
    # A fixed seed: the same files give the same table.
    return bootstrap(np.array(list(values.values())), seed=0, groups=[task for task, _ in values])


def shared_weights(runs: Sequence[EvaluatedRun]) -> tuple[dict[str, float], list[str]]:
    """Returns the weights of the total, and notes on it.

    The weights are the first run's, of those terms that all runs measured alike.
    """
    weights: dict[str, float] = {}
    left_out: list[str] = []
    for name, term in runs[0].config.rewards.items():
        if term.weight <= 0:
            continue
        terms = [run.config.rewards.get(name) for run in runs]
        # A term may be configured everywhere and still be left out for data without its fields.
        measured = all(
            f"reward/{name}" in next(iter(run.rows.values())).values["base"] for run in runs
        )
        if measured and all(
            other is not None and other.fingerprint() == term.fingerprint() for other in terms
        ):
            # A fingerprint covers the settings that change a value, not the weight.
            weights[name] = term.weight
        else:
            left_out.append(name)
    formula = " + ".join(f"{weight:g} {name}" for name, weight in weights.items())
    notes = [
        f"total reward is {formula} for every run"
        if weights
        else "no reward term was measured alike by all runs: there is no total"
    ]
    if left_out:
        notes.append(
            f"not in the total, because not every run measured it alike: {', '.join(left_out)}"
        )
    return weights, notes


def grouped(runs: Iterable[EvaluatedRun], weights: Mapping[str, float]) -> tuple[Arm, ...]:
    """Groups runs to arms, in order of first appearance, each with a distinct label.

    Raises:
        InputError: two runs have the same settings and the same seed.
    """
    arms: dict[str, list[EvaluatedRun]] = {}
    for run in runs:
        # What decides the adapter: settings, data, and the updates done.
        settings = {
            **run.config.identity(),
            "seed": None,
            "updates": run.updates,
            "content": run.data,
        }
        arms.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    for members in arms.values():
        _require_distinct_seeds(members)
    names = [members[0].config.name for members in arms.values()]
    return tuple(
        Arm(
            label=name if names.count(name) == 1 else f"{name} ({members[0].directory})",
            runs=tuple(sorted(members, key=lambda run: run.config.seed)),
            weights=weights,
        )
        for name, members in zip(names, arms.values(), strict=True)
    )


def _require_distinct_seeds(runs: Sequence[EvaluatedRun]) -> None:
    for seed, count in Counter(run.config.seed for run in runs).items():
        if count > 1:
            same = " and ".join(str(run.directory) for run in runs if run.config.seed == seed)
            raise InputError(
                f"{same} have the same settings and the same seed {seed}: give one of them."
            )
