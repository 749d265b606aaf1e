"""The files of a run directory, read as they are.

Tolerant of a run that is still being written, strict about broken files. It reads records and
numbers; it decides nothing about how they look.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl_edit.errors import InputError
from rl_edit.evaluation.record import EvaluationRecord
from rl_edit.files import EVENTS, HELDOUT, METRICS, Model, validated
from rl_edit.run_directory import holds_run, no_run_at
from rl_edit.run_record import RUN_FILE, RunRecord

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class JsonLines:
    """The objects of a JSON-lines file, and the count of complete lines that are no object."""

    rows: tuple[dict[str, Any], ...]
    unreadable: int


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """One run directory; an absent file is an empty value.

    Attributes:
        heldout: held-out evaluations made while training.
        best: the one of them whose adapter is saved in ``best/``.
        evaluation: None before the first evaluation.
        examples: a directory for each evaluated example.
    """

    directory: Path
    run: RunRecord
    config: str
    metrics: JsonLines
    events: JsonLines
    heldout: JsonLines
    best: dict[str, Any]
    evaluation: EvaluationRecord | None
    examples: tuple[Path, ...]

    def metric_names(self) -> tuple[str, ...]:
        """Keys that have at least one finite number, in order of first appearance."""
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
        """(update, value) for each held-out evaluation where ``key`` is a finite number."""
        return _column(self.heldout, key)


def number(value: object) -> float | None:
    """Returns ``value`` if it is a finite number, else None; a boolean is no number."""
    # JSON's true would be 1.0. Python's reader also takes NaN and Infinity, which are no numbers.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def read_run(directory: Path) -> RunFiles:
    """Reads a run directory.

    Raises:
        InputError: there is no such directory, it holds nothing a report can show, or a JSON file
            in it is broken.
    """
    if not directory.is_dir():
        raise InputError(no_run_at(directory))
    run = _read_record(directory / RUN_FILE, RunRecord) or RunRecord()
    # Each file is read once, here: the page shows one state of a run that goes on.
    files = RunFiles(
        directory=directory,
        run=run.seen_in(directory),
        config=_read_text(directory / "config.yaml"),
        metrics=_by_update(_read_lines(directory / METRICS)),
        events=_read_lines(directory / EVENTS),
        heldout=_by_update(_read_lines(directory / HELDOUT)),
        best=_read_object(directory / "best" / "best.json"),
        evaluation=_read_record(directory / "evaluation.json", EvaluationRecord),
        examples=_example_directories(directory / "evaluation" / "images"),
    )
    # config.yaml alone is no run: it is written before anything happens.
    if not (
        files.run.model_fields_set
        or files.metrics.rows
        or files.events.rows
        or files.evaluation
        or files.examples
    ):
        reason = (
            "the run has done nothing yet. Start it, or give the directory of one that has begun."
            if holds_run(directory)
            else no_run_at(directory)
        )
        raise InputError(
            f"{directory} has nothing to report: it has no run.json, metrics.jsonl, events.jsonl "
            f"or evaluation/ with content; {reason}"
        )
    return files


def _column(lines: JsonLines, key: str) -> Points:
    # ``_by_update`` has sorted the rows, so the points are in order.
    pairs = ((number(row["update"]), number(row.get(key))) for row in lines.rows)
    return tuple(
        (update, value) for update, value in pairs if update is not None and value is not None
    )


def _read_text(path: Path) -> str:
    """Reads a file, "" if there is none."""
    if not path.is_file():
        return ""
    try:
        # A live run's file may end inside a character, hence ``replace``.
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(
            f"cannot read {path} ({error.strerror}): the report needs it. Make it readable."
        ) from error


def _read_object(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    if not text:
        return {}
    # Unlike lines of a log these files are replaced as a whole, so half of one is damage.
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(
            f"{path} is not JSON ({error}): the report would show wrong facts. "
            "Write it again or remove it."
        ) from error
    if not isinstance(value, dict):
        raise InputError(
            f"{path} holds a {type(value).__name__}, not an object: the report finds facts by "
            "name. Write it again or remove it."
        )
    return value


def _read_lines(path: Path) -> JsonLines:
    """Reads a JSON-lines file, and counts complete lines that are no object."""
    rows: list[dict[str, Any]] = []
    unreadable = 0
    lines = _read_text(path).split("\n")
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            # A last line without its end is still being written, and is no fault.
            unreadable += index < len(lines) - 1
            continue
        # A number or a list is valid JSON, and no row.
        if isinstance(value, dict):
            rows.append(value)
        else:
            unreadable += 1
    return JsonLines(rows=tuple(rows), unreadable=unreadable)


def _by_update(lines: JsonLines) -> JsonLines:
    """Sorts rows by update, one row each.

    A resumed run repeats the updates after its checkpoint; the later row is the one that counts.
    """
    # By number and not by position: 3 and 3.0 are one update.
    latest: dict[float, dict[str, Any]] = {}
    unreadable = lines.unreadable
    for row in lines.rows:
        update = number(row.get("update"))
        if update is None:
            unreadable += 1
        else:
            latest[update] = row
    return JsonLines(rows=tuple(latest[update] for update in sorted(latest)), unreadable=unreadable)


def _read_record(path: Path, model: type[Model]) -> Model | None:
    """Reads a JSON file as a record; None where it is missing or an empty object."""
    content = _read_object(path)
    if not content:
        return None
    try:
        return validated(model, content)
    except ValueError as error:
        raise InputError(
            f"{path} is damaged ({error}): the report would show wrong facts. "
            "Write it again or remove it."
        ) from error


def _example_directories(images: Path) -> tuple[Path, ...]:
    return (
        tuple(sorted(path for path in images.iterdir() if path.is_dir())) if images.is_dir() else ()
    )
