"""Several evaluated runs in one table: every number a paired difference, on the same held-out tasks, noises and editor.

Runs that share everything but the seed are one arm: what they measured on a task under a noise is averaged over them before anything
is resampled, so an interval speaks of tasks and not of seeds; ``by_seed`` shows what seeds do.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rl_edit.config import RunConfig, load_config
from rl_edit.errors import InputError
from rl_edit.evaluation.effort import Effort, effort
from rl_edit.evaluation.evaluate import Row
from rl_edit.files import METRICS, read_json_lines
from rl_edit.measures.intervals import Interval, bootstrap

TOTAL, PRESERVATION = "total", "preservation"


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A column of the table; more of it is better."""

    name: str
    label: str
    unit: str
    digits: int

    @property
    def heading(self) -> str:
        return self.label + (f", {self.unit}" if self.unit else "")


MEASURES = (
    Measure(name="reward", label="training reward", unit="", digits=3),
    Measure(name=TOTAL, label="total reward", unit="", digits=3),
    Measure(name="instruction", label="inside: instruction", unit="", digits=3),
    Measure(name="background_psnr_masked", label="outside: PSNR", unit="dB", digits=3),
    Measure(name="background_ssim", label="outside: SSIM", unit="", digits=4),
    Measure(name=PRESERVATION, label="outside: preservation", unit="", digits=4),
)
"""``reward`` is a run's own weighted sum, what it was trained to raise; ``total`` is weighed alike for all runs."""
COMMON_MEASURES = tuple(measure for measure in MEASURES if measure.name != "reward")
"""Those that mean the same in every run, so that runs can be subtracted from each other."""

_PROTOCOL = {
    "editor": "editor",
    "num_tasks": "evaluation.num_tasks",
    "num_noises": "evaluation.num_noises",
    "seed": "evaluation.seed",
    "num_steps": "solver steps",
    "guidance": "editor.guidance",
    "true_cfg": "editor.true_cfg",
    "negative_prompt": "editor.negative_prompt",
    "dtype": "editor.dtype",
    "max_text_tokens": "editor.max_text_tokens",
    "tasks": "held-out tasks",
}
"""What two evaluations must share, by its key in ``meta``: only then are their rows of the same pictures."""

Key = tuple[str, int]
"""A task and the number of the noise it was evaluated under."""


@dataclass(frozen=True, kw_only=True)
class EvaluatedRun:
    """A run directory that was evaluated.

    Attributes:
        meta: how it was evaluated.
        updates: behind the adapter that was evaluated.
        data: fingerprint of what it was trained on; "" when the run does not say.
        rows: what was measured, as base and as trained.
        seconds: of every update.
        stale: the adapter that the run has now, where it is not the evaluated one; else "".
    """

    directory: Path
    config: RunConfig
    meta: Mapping[str, Any]
    updates: int
    data: str
    rows: Mapping[Key, Row]
    seconds: tuple[float, ...]
    stale: str = ""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Runs that share everything but the seed.

    Attributes:
        weights: of the reward terms in the total.
    """

    label: str
    runs: tuple[EvaluatedRun, ...]
    weights: Mapping[str, float]

    @property
    def effort(self) -> Effort:
        return effort(self.runs[0].config)

    @property
    def updates(self) -> int:
        return self.runs[0].updates

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.config.seed for run in self.runs)

    @property
    def seconds_per_update(self) -> float | None:
        """Median over all updates of all runs."""
        every = [seconds for run in self.runs for seconds in run.seconds]
        return statistics.median(every) if every else None

    def task_types(self) -> tuple[str, ...]:
        return tuple(sorted({row.task_type for row in self.runs[0].rows.values()}))

    def base(self, measure: str) -> dict[Key, float]:
        """The base editor's value on every task under every noise, mean over seeds."""
        return self._means(measure, lambda values: self._value(values["base"], measure))

    def trained(self, measure: str) -> dict[Key, float]:
        """The trained editor's, mean over seeds."""
        return self._means(measure, lambda values: self._value(values["trained"], measure))

    def gain(self, measure: str, *, task_type: str | None = None) -> Interval | None:
        """Trained minus base, paired by task, noise and seed; None where nothing was measured."""
        return _interval(self._of_type(self._gains(measure), task_type))

    def over(self, other: Arm, measure: str, *, task_type: str | None = None) -> Interval | None:
        """This arm's trained editor minus the other's, paired by task and noise; None where nothing was measured."""
        here, there = self.trained(measure), other.trained(measure)
        differences = {key: here[key] - there[key] for key in here if key in there}
        return _interval(self._of_type(differences, task_type))

    def by_seed(self, measure: str) -> dict[int, float | None]:
        """Mean gain of each run by itself."""
        alone = {
            run.config.seed: replace(self, runs=(run,))._gains(measure).values()
            for run in self.runs
        }
        return {seed: statistics.fmean(gains) if gains else None for seed, gains in alone.items()}

    def _gains(self, measure: str) -> dict[Key, float]:
        return self._means(
            measure,
            lambda values: (
                self._value(values["trained"], measure) - self._value(values["base"], measure)
            ),
        )

    def _means(
        self, measure: str, of: Callable[[Mapping[str, Mapping[str, float]]], float]
    ) -> dict[Key, float]:
        """A number of each row, mean over the runs in which it is one."""
        found: dict[Key, list[float]] = defaultdict(list)
        for run in self.runs:
            for key, row in run.rows.items():
                if math.isfinite(value := of(row.values)):
                    found[key].append(value)
        return {key: statistics.fmean(values) for key, values in found.items()}

    def _value(self, values: Mapping[str, float], measure: str) -> float:
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


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Arms under one protocol.

    Attributes:
        meta: the protocol that all evaluations share.
        weights: of the total.
        against: the arm that ``over`` subtracts from each of the others; None subtracts none.
        notes: what a reader of the numbers should know, a sentence each.
    """

    meta: Mapping[str, Any]
    arms: tuple[Arm, ...]
    weights: Mapping[str, float]
    against: Arm | None
    notes: tuple[str, ...]

    def base(self, measure: str) -> Interval | None:
        """The base editor itself, where all arms agree on how it is measured: each has a training reward of its own."""
        found = [_interval(arm.base(measure)) for arm in self.arms]
        means = [interval.mean for interval in found if interval is not None]
        alike = len(means) == len(found) and all(
            math.isclose(mean, means[0], rel_tol=1e-9) for mean in means
        )
        return found[0] if alike else None

    def record(self) -> dict[str, Any]:
        """The comparison as JSON; an interval's end that is not known (one task) is null."""
        others = (
            ()
            if self.against is None
            else tuple(arm for arm in self.arms if arm is not self.against)
        )
        return {
            "protocol": {key: self.meta[key] for key in _PROTOCOL},
            "total_weights": dict(self.weights),
            "base": {m.name: plain(self.base(m.name)) for m in MEASURES},
            "arms": [_described(arm) for arm in self.arms],
            "against": self.against.label if self.against else None,
            "over": {
                arm.label: {m.name: plain(arm.over(self.against, m.name)) for m in COMMON_MEASURES}
                for arm in others
                if self.against
            },
            "notes": list(self.notes),
        }


def plain(interval: Interval | None) -> dict[str, float | None] | None:
    """An interval as JSON."""
    return (
        None
        if interval is None
        else {
            key: value if math.isfinite(value) else None for key, value in asdict(interval).items()
        }
    )


def compare(directories: Sequence[Path], *, against: Path | None = None) -> Comparison:
    """Reads, checks and groups runs. The total weighs terms as the first run does, those that every run measured alike.

    Raises:
        InputError: no such run, one that was not evaluated, or evaluations that are not of the same tasks, noises and editor.
    """
    places: dict[Path, Path] = {}
    for directory in [*directories, *([against] if against else [])]:
        places.setdefault(directory.resolve(), directory)
    runs = read_runs(list(places.values()))
    require_alike(runs)
    weights, notes = shared_weights(runs)
    arms = grouped(runs, weights)
    chosen = None
    if against is not None:
        chosen = next(
            arm for arm in arms if places[against.resolve()] in [run.directory for run in arm.runs]
        )
    notes += [
        f"{run.directory} now has adapter {run.stale}, and {run.meta['adapter']} was evaluated: rl-edit evaluate {run.directory}"
        for run in runs
        if run.stale
    ]
    notes += [
        f"{run.directory} was evaluated after {run.updates} of its {run.config.train.updates} updates"
        for run in runs
        if run.updates < run.config.train.updates
    ]
    return Comparison(
        meta=runs[0].meta, arms=arms, weights=weights, against=chosen, notes=tuple(notes)
    )


def read_runs(directories: Sequence[Path]) -> list[EvaluatedRun]:
    """The runs of these directories.

    Raises:
        InputError: a directory is no run, or runs were not evaluated; the message has the commands that do it.
    """
    for directory in directories:
        if not (directory / "config.yaml").is_file():
            raise InputError(
                f"no run at {directory}: expected {directory / 'config.yaml'}, written by rl-edit train"
            )
    found = {directory: _whole(directory) for directory in directories}
    missing = [directory for directory, run in found.items() if run is None]
    if missing:
        commands = "; ".join(f"rl-edit evaluate {directory}" for directory in missing)
        raise InputError(
            f"not evaluated, or not by this version: {', '.join(map(str, missing))}. Run: {commands}"
        )
    return [run for run in found.values() if run is not None]


def _whole(directory: Path) -> EvaluatedRun | None:
    """A run whose files are what they should be."""
    try:
        return _read(directory)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{directory}: a file of its evaluation is damaged ({type(error).__name__}: {error}). Evaluate it again: rl-edit evaluate "
            f"{directory}"
        ) from error


def _read(directory: Path) -> EvaluatedRun | None:
    """None for a run without a whole evaluation that says what it was made on."""
    summary, rows_file = directory / "evaluation.json", directory / "evaluation" / "rows.jsonl"
    if not (summary.is_file() and rows_file.is_file()):
        return None
    meta = _json(summary, summary.read_text())["meta"]
    if any(key not in meta for key in (*_PROTOCOL, "adapter")):
        return None
    config = load_config(directory / "config.yaml")
    if "rewards" in meta:
        asked = {
            name: term.sha256()
            for name, term in config.rewards.items()
            if name not in meta["left_out"]
        }
        if other := sorted({name for name, _ in asked.items() ^ meta["rewards"].items()}):
            raise InputError(
                f"{directory} was evaluated with other rewards than it was trained on ({', '.join(other)}), so its numbers stand beside no "
                f"other run's. Evaluate it again: rl-edit evaluate {directory}"
            )
    keeps = next(
        (name for name, term in config.rewards.items() if term.kind == "preservation"), None
    )
    rows: dict[Key, Row] = {}
    seen: Counter[str] = Counter()
    for line in rows_file.read_text().splitlines():
        raw = _json(rows_file, line)
        values = {
            side: {**v, PRESERVATION: v.get(f"reward/{keeps}", math.nan)}
            for side, v in raw["values"].items()
        }
        row = Row(task_id=raw["task_id"], task_type=raw["task_type"], values=values)
        rows[row.task_id, seen[row.task_id]] = row
        seen[row.task_id] += 1
    if len(rows) != (expected := meta["num_tasks"] * meta["num_noises"]):
        raise InputError(
            f"{rows_file} has {len(rows)} rows of {expected}: it is cut. Evaluate again: rl-edit evaluate {directory}"
        )
    record = directory / "run.json"
    facts = _json(record, record.read_text()) if record.is_file() else {}
    now = facts.get("adapter")
    lines = {
        line["update"]: line for line in read_json_lines(directory / METRICS) if "update" in line
    }
    return EvaluatedRun(
        directory=directory,
        config=config,
        meta=meta,
        updates=int(meta["adapter"].split(":")[0]),
        data=facts.get("data_fingerprint", ""),
        rows=rows,
        seconds=tuple(
            line["seconds/update"] for line in lines.values() if line.get("seconds/update")
        ),
        stale=now if now and now != meta["adapter"] else "",
    )


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(
            f"{path} is not JSON ({error}): its run cannot be compared. Evaluate it again: rl-edit evaluate RUN"
        ) from error


def require_alike(runs: Sequence[EvaluatedRun]) -> None:
    """Raises InputError, naming what differs, for evaluations that are not of the same tasks and noises on the same editor."""
    first = runs[0]
    for run in runs[1:]:
        different = [key for key in _PROTOCOL if run.meta[key] != first.meta[key]]
        if "num_tasks" in different:
            different = [key for key in different if key != "tasks"]
        if different:
            words = "; ".join(
                f"{_PROTOCOL[key]} {_short(run.meta[key])} against {_short(first.meta[key])}"
                for key in different
            )
            raise InputError(
                f"{run.directory} and {first.directory} cannot be compared, they were evaluated under different settings: {words}. "
                "Evaluate both alike: rl-edit evaluate RUN KEY=VALUE"
            )


def _short(value: Any) -> str:
    return str(value)[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def shared_weights(runs: Sequence[EvaluatedRun]) -> tuple[dict[str, float], list[str]]:
    """The first run's weights of the terms that all runs measured alike, and notes on those that are left out."""
    first = runs[0]
    weights: dict[str, float] = {}
    left_out: list[str] = []
    for name, term in first.config.rewards.items():
        if term.weight <= 0:
            continue
        terms = [run.config.rewards.get(name) for run in runs]
        measured = all(
            f"reward/{name}" in next(iter(run.rows.values())).values["base"] for run in runs
        )
        if measured and all(
            other is not None and other.fingerprint() == term.fingerprint() for other in terms
        ):
            weights[name] = term.weight
        else:
            left_out.append(name)
    shown = " + ".join(f"{weight:g} {name}" for name, weight in weights.items())
    notes = [
        f"total reward is {shown} for every run"
        if weights
        else "no reward term was measured alike by all runs: there is no total"
    ]
    if left_out:
        notes.append(
            f"not in the total, because not every run measured it alike: {', '.join(left_out)}"
        )
    return weights, notes


def grouped(runs: Iterable[EvaluatedRun], weights: Mapping[str, float]) -> tuple[Arm, ...]:
    """Runs as arms, in order of first appearance, each with a label of its own.

    Raises:
        InputError: two runs are of the same settings and the same seed.
    """
    arms: dict[str, list[EvaluatedRun]] = {}
    for run in runs:
        settings = {
            **run.config.identity(),
            "seed": None,
            "updates": run.updates,
            "content": run.data,
        }
        arms.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    for members in arms.values():
        seeds = Counter(run.config.seed for run in members)
        for seed, number in seeds.items():
            if number > 1:
                same = " and ".join(
                    str(run.directory) for run in members if run.config.seed == seed
                )
                raise InputError(
                    f"{same} have the same settings and the same seed {seed}: give one of them."
                )
    names = [members[0].config.name for members in arms.values()]
    return tuple(
        Arm(
            label=name if names.count(name) == 1 else f"{name} ({members[0].directory})",
            runs=tuple(sorted(members, key=lambda run: run.config.seed)),
            weights=weights,
        )
        for name, members in zip(names, arms.values(), strict=True)
    )


def _interval(values: Mapping[Key, float]) -> Interval | None:
    """Over tasks: the noises of one are one unit."""
    if not values:
        return None
    return bootstrap(np.array(list(values.values())), seed=0, groups=[task for task, _ in values])


def _described(arm: Arm) -> dict[str, Any]:
    return {
        "label": arm.label,
        "method": arm.runs[0].config.algorithm.name,
        "runs": [str(run.directory) for run in arm.runs],
        "seeds": list(arm.seeds),
        "updates": arm.updates,
        "seconds_per_update": arm.seconds_per_update,
        "evaluations_per_update": {**asdict(arm.effort), "total": arm.effort.total},
        "gain": {m.name: plain(arm.gain(m.name)) for m in MEASURES},
        "by_type": {
            kind: {m.name: plain(arm.gain(m.name, task_type=kind)) for m in MEASURES}
            for kind in arm.task_types()
        },
        "by_seed": {
            m.name: {str(seed): mean for seed, mean in arm.by_seed(m.name).items()}
            for m in MEASURES
        },
    }
