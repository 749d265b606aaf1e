"""What a run directory holds, read as it is: tolerant of a run that is still being written, strict about broken files.

It reads records and numbers; it decides nothing about how they look.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl_edit.errors import InputError

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its 95 % interval over ``n`` tasks; the ends are None where none was computed."""

    mean: float
    low: float | None
    high: float | None
    n: int | None

    @property
    def excludes_zero(self) -> bool:
        return (
            self.low is not None and self.high is not None and (self.low > 0.0 or self.high < 0.0)
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Base and trained editor on the same tasks and noises, by metric name. ``delta`` is trained minus base, paired."""

    base: dict[str, Interval]
    trained: dict[str, Interval]
    delta: dict[str, Interval]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.delta, *self.base, *self.trained)))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    overall: Comparison
    by_type: dict[str, Comparison]
    meta: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class JsonLines:
    """The objects of a JSON-lines file and how many complete lines were no object."""

    rows: tuple[dict[str, Any], ...]
    unreadable: int


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """One run directory. An absent file is an empty value here; ``evaluation`` is None before the first evaluation.

    ``heldout`` has the held-out evaluations made while training, ``best`` the one whose adapter was kept.
    """

    directory: Path
    run: dict[str, Any]
    config: str
    metrics: JsonLines
    events: JsonLines
    heldout: JsonLines
    best: dict[str, Any]
    evaluation: Evaluation | None
    examples: tuple[Path, ...]

    def metric_names(self) -> tuple[str, ...]:
        """Every key that has at least one finite number, in order of first appearance."""
        return tuple(
            dict.fromkeys(
                key
                for row in self.metrics.rows
                for key, value in row.items()
                if number(value) is not None
            )
        )

    def column(self, key: str) -> Points:
        """(update, value) for each update where ``key`` is a finite number."""
        return _column(self.metrics, key)

    def heldout_column(self, key: str) -> Points:
        """(update, value) for each evaluation on held-out tasks where ``key`` is a finite number."""
        return _column(self.heldout, key)


def _column(lines: JsonLines, key: str) -> Points:
    pairs = ((number(row["update"]), number(row.get(key))) for row in lines.rows)
    return tuple(
        (update, value) for update, value in pairs if update is not None and value is not None
    )


def number(value: object) -> float | None:
    """``value`` if it is a finite number; None for NaN, infinities, booleans and everything that is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def read_run(directory: Path) -> RunFiles:
    """Read ``directory``.

    Raises:
        InputError: there is no such directory, it holds nothing a report can show, or a JSON file in it is broken.
    """
    if not directory.is_dir():
        raise InputError(
            f"no run directory at {directory}: a report is made from the files a run wrote. Give the directory of a training run."
        )
    files = RunFiles(
        directory=directory,
        run=_read_object(directory / "run.json"),
        config=_read_text(directory / "config.yaml"),
        metrics=_by_update(_read_lines(directory / "metrics.jsonl")),
        events=_read_lines(directory / "events.jsonl"),
        heldout=_by_update(_read_lines(directory / "heldout.jsonl")),
        best=_read_object(directory / "best" / "best.json"),
        evaluation=_read_evaluation(directory / "evaluation.json"),
        examples=_example_directories(directory / "evaluation" / "images"),
    )
    if not (
        files.run or files.metrics.rows or files.events.rows or files.evaluation or files.examples
    ):
        raise InputError(
            f"{directory} has nothing to report: no run.json, metrics.jsonl, events.jsonl or evaluation/ with content in it. "
            "Give the directory of a training run that has started."
        )
    return files


def _read_text(path: Path) -> str:
    """The text of ``path``, "" if there is none. A live run may be cut inside a character, hence ``replace``."""
    if not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(
            f"cannot read {path} ({error.strerror}): the report needs it. Make it readable."
        ) from error


def _read_object(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(
            f"{path} is not JSON ({error}): the report would show wrong facts. Write it again or remove it."
        ) from error
    if not isinstance(value, dict):
        raise InputError(
            f"{path} holds a {type(value).__name__}, not an object: the report finds facts by name. Write it again or remove it."
        )
    return value


def _read_lines(path: Path) -> JsonLines:
    """The objects in a JSON-lines file. A last line without its end is being written and is no fault; others are counted."""
    rows: list[dict[str, Any]] = []
    unreadable = 0
    lines = _read_text(path).split("\n")
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            unreadable += index < len(lines) - 1
            continue
        if isinstance(value, dict):
            rows.append(value)
        else:
            unreadable += 1
    return JsonLines(rows=tuple(rows), unreadable=unreadable)


def _by_update(lines: JsonLines) -> JsonLines:
    """One row an update, ascending. A resumed run repeats the updates after its checkpoint; the later row is the one that counts."""
    latest: dict[float, dict[str, Any]] = {}
    unreadable = lines.unreadable
    for row in lines.rows:
        update = number(row.get("update"))
        if update is None:
            unreadable += 1
        else:
            latest[update] = row
    return JsonLines(rows=tuple(latest[update] for update in sorted(latest)), unreadable=unreadable)


def _interval(value: object) -> Interval | None:
    if not isinstance(value, Mapping):
        mean = number(value)
        return None if mean is None else Interval(mean=mean, low=None, high=None, n=None)
    mean = number(value.get("mean"))
    if mean is None:
        return None
    n = number(value.get("n"))
    return Interval(
        mean=mean,
        low=number(value.get("low")),
        high=number(value.get("high")),
        n=None if n is None else int(n),
    )


def _comparison(value: Mapping[str, Any]) -> Comparison:
    def side(name: str) -> dict[str, Interval]:
        entries = value.get(name)
        if not isinstance(entries, Mapping):
            return {}
        found = ((str(metric), _interval(entry)) for metric, entry in entries.items())
        return {metric: interval for metric, interval in found if interval is not None}

    return Comparison(base=side("base"), trained=side("trained"), delta=side("delta"))


def _read_evaluation(path: Path) -> Evaluation | None:
    value = _read_object(path)
    if not value:
        return None
    by_type, meta = value.get("by_type"), value.get("meta")
    return Evaluation(
        overall=_comparison(value),
        by_type={str(k): _comparison(v) for k, v in by_type.items() if isinstance(v, Mapping)}
        if isinstance(by_type, Mapping)
        else {},
        meta=dict(meta) if isinstance(meta, Mapping) else {},
    )


def _example_directories(images: Path) -> tuple[Path, ...]:
    return (
        tuple(sorted(path for path in images.iterdir() if path.is_dir())) if images.is_dir() else ()
    )
