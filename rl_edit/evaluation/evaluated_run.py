"""Run directories that were evaluated: read, checked, and checked against each other."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl_edit.config import RunConfig, load_config
from rl_edit.errors import InputError
from rl_edit.evaluation.record import EvaluationMeta, EvaluationRecord, Row
from rl_edit.files import METRICS, damage, read_json_lines, validated
from rl_edit.run_directory import holds_run, no_run_at
from rl_edit.run_record import RunRecord, read_run_record

PRESERVATION = "preservation"
"""Name under which every run's preservation term is compared, however its config calls it."""

PROTOCOL = {
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
"""Fields of :class:`EvaluationMeta` that two evaluations must share, each with its label.

Only then do their rows measure the same tasks under the same noises.
"""

Key = tuple[str, int]
"""A task id and the number of the noise it was evaluated under."""


@dataclass(frozen=True, kw_only=True)
class EvaluatedRun:
    """A run directory with its evaluation.

    Attributes:
        meta: how it was evaluated.
        data: fingerprint of its training data; "" when the run has none on record.
        rows: measurements of base and trained editor.
        seconds: duration of each update.
        stale: id of the adapter in the directory where another one was evaluated; else "".
        damage: how many lines of its metrics cannot be read, as a sentence; "" where all can.
    """

    directory: Path
    config: RunConfig
    meta: EvaluationMeta
    data: str
    rows: Mapping[Key, Row]
    seconds: tuple[float, ...]
    stale: str = ""
    damage: str = ""

    @property
    def updates(self) -> int:
        """Updates behind the evaluated adapter."""
        return self.meta.updates


def read_runs(directories: Sequence[Path]) -> list[EvaluatedRun]:
    """Reads the runs of these directories.

    Raises:
        InputError: a directory is no run, or runs were not evaluated (the message has the commands
            that do it), or a file is damaged.
    """
    for directory in directories:
        if not holds_run(directory):
            raise InputError(no_run_at(directory))
    runs = {directory: _read_checked(directory) for directory in directories}
    # All of them in one message: an evaluation takes minutes, and its command can be copied.
    missing = [directory for directory, run in runs.items() if run is None]
    if missing:
        commands = "; ".join(f"rl-edit evaluate {directory}" for directory in missing)
        raise InputError(
            f"not evaluated, or not by this version: {', '.join(map(str, missing))}. "
            f"Run: {commands}"
        )
    return [run for run in runs.values() if run is not None]


def require_alike(runs: Sequence[EvaluatedRun]) -> None:
    """Raises InputError, naming the differences, unless all runs were evaluated alike."""
    # Equality is transitive, so each run is compared with the first one only.
    first = runs[0]
    for run in runs[1:]:
        different = [key for key in PROTOCOL if getattr(run.meta, key) != getattr(first.meta, key)]
        # Fewer tasks have another digest in any case: their number alone says it better.
        if "num_tasks" in different:
            different = [key for key in different if key != "tasks"]
        if different:
            words = "; ".join(
                f"{PROTOCOL[key]} {_short(getattr(run.meta, key))} "
                f"against {_short(getattr(first.meta, key))}"
                for key in different
            )
            raise InputError(
                f"{run.directory} and {first.directory} cannot be compared, they were evaluated "
                f"under different settings: {words}. "
                "Evaluate both alike: rl-edit evaluate RUN KEY=VALUE"
            )


def _short(value: Any) -> str:
    """Shortens a hash."""
    # 64 characters are a sha256; twelve of them are enough to see that two differ.
    return str(value)[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def _read_checked(directory: Path) -> EvaluatedRun | None:
    """Reads a run; anything wrong in a file is one InputError."""
    try:
        return _read(directory)
    except InputError:
        raise
    # metrics.jsonl is read without a schema: damage shows as any of these.
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{directory}: a file of its evaluation is damaged ({type(error).__name__}: {error}). "
            f"Evaluate it again: rl-edit evaluate {directory}"
        ) from error


def _read(directory: Path) -> EvaluatedRun | None:
    """Returns None for a run without a complete evaluation that records how it was made."""
    summary, rows_file = directory / "evaluation.json", directory / "evaluation" / "rows.jsonl"
    if not (summary.is_file() and rows_file.is_file()):
        return None
    record = validated(EvaluationRecord, _json(summary, summary.read_text()))
    # An older evaluation lacks what decides comparability: it is made again, not guessed.
    meta = record.complete_meta()
    if meta is None:
        return None
    config = load_config(directory / "config.yaml")
    # Before the rows: other rewards have other columns.
    _require_same_rewards(directory, config, meta)
    rows = _read_rows(rows_file, config)
    if len(rows) != (expected := meta.num_tasks * meta.num_noises):
        raise InputError(
            f"{rows_file} has {len(rows)} rows of {expected}: it is cut. "
            f"Evaluate again: rl-edit evaluate {directory}"
        )
    # A run that is copied without its run.json can still be compared by its numbers.
    run = read_run_record(directory) or RunRecord()
    return EvaluatedRun(
        directory=directory,
        config=config,
        meta=meta,
        data=run.data_fingerprint,
        rows=rows,
        seconds=_update_seconds(directory),
        stale=run.adapter if run.adapter and run.adapter != meta.adapter else "",
        damage=damage(directory / METRICS),
    )


def _require_same_rewards(directory: Path, config: RunConfig, meta: EvaluationMeta) -> None:
    if meta.rewards is None:  # an older version did not record them
        return
    trained = {
        name: term.sha256() for name, term in config.rewards.items() if name not in meta.left_out
    }
    # Terms that differ in any setting, and terms that only one side has.
    if other := sorted({name for name, _ in trained.items() ^ meta.rewards.items()}):
        raise InputError(
            f"{directory} was evaluated with other rewards than it was trained on "
            f"({', '.join(other)}), so its numbers do not compare with another run's. "
            f"Evaluate it again: rl-edit evaluate {directory}"
        )


def _read_rows(path: Path, config: RunConfig) -> dict[Key, Row]:
    """Reads the rows by task and noise; the n-th row of a task belongs to its n-th noise."""
    term = next(
        (name for name, term in config.rewards.items() if term.kind == "preservation"), None
    )
    # ``evaluate`` writes all noises of a batch in order, so a task's rows are in order too.
    rows: dict[Key, Row] = {}
    num_noises: Counter[str] = Counter()
    for line in path.read_text().splitlines():
        row = validated(Row, _json(path, line))
        values = {
            side: {**measured, PRESERVATION: measured.get(f"reward/{term}", math.nan)}
            for side, measured in row.values.items()
        }
        key = (row.task_id, num_noises[row.task_id])
        rows[key] = row.model_copy(update={"values": values})
        num_noises[row.task_id] += 1
    return rows


def _update_seconds(directory: Path) -> tuple[float, ...]:
    """Reads the duration of each update; a resumed run repeats lines, and the last one counts."""
    lines = {
        line["update"]: line for line in read_json_lines(directory / METRICS) if "update" in line
    }
    return tuple(line["seconds/update"] for line in lines.values() if line.get("seconds/update"))


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(
            f"{path} is not JSON ({error}): its run cannot be compared. "
            "Evaluate it again: rl-edit evaluate RUN"
        ) from error
