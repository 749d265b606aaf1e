"""One run as one HTML file: headline numbers, curves, examples, settings.

No script, no outside resource. This file decides what is shown and in which order;
``page.html.j2`` decides how it looks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rl_edit.errors import InputError
from rl_edit.files import write_result
from rl_edit.measures.silence import silence
from rl_edit.report.charts import smoothing_span
from rl_edit.report.curves import chart_groups
from rl_edit.report.metric_charts import spaced
from rl_edit.report.numbers import format_number
from rl_edit.report.run_files import RunFiles, number, read_run
from rl_edit.report.strips import DIFFERENCE_GAIN, Strip, read_strip
from rl_edit.report.tables import example_numbers, headlines, metric_table, type_tables

# More examples are folded, and older events left out: the page must open at once.
OPEN_STRIPS = 16
NUM_LAST_EVENTS = 40
# Events with such a word are shown in full; the others are only counted.
NOTABLE = re.compile(
    r"warn|drop|declin|refus|reject|stale|invalid|error|fail|retr|restart|resum|timeout"
    r"|interrupt|lost|died|alarm|silent|evaluation_",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of events.jsonl as text."""

    time: str
    name: str
    details: str


def render_report(run_dir: Path) -> Path:
    """Writes ``run_dir/report.html`` from the files beside it and returns its path.

    The same files of a run that has ended give the same bytes. A part without data says so in its
    place; an example that cannot be drawn is named with the reason.

    Raises:
        InputError: no such directory, nothing in it to show, a broken JSON file, or the page
            cannot be written.
    """
    files = read_run(run_dir)
    page = templates().get_template("page.html.j2").render(_context(files))
    return write_result(run_dir / "report.html", page, remedy="Make the run directory writable.")


def templates() -> Environment:
    """Opens the templates of this package: values are escaped, and a missing name is an error."""
    return Environment(
        loader=PackageLoader("rl_edit.report", "."),
        # Instructions, names and commands come from users and data.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _context(files: RunFiles) -> dict[str, Any]:
    run, evaluation = files.run, files.evaluation
    # Every name that page.html.j2 uses; a missing one is an error there (StrictUndefined).
    strips, undrawn = _strips(files.examples)
    return {
        "title": run.name or files.directory.resolve().name,
        "status": run.status,
        "facts": _facts(files),
        "left_out": run.left_out_rewards,
        "unrewarded": run.unrewarded_edit,
        "silent": _silent(files),
        "has_evaluation": evaluation is not None,
        "headlines": headlines(evaluation) if evaluation else (),
        "table": metric_table(evaluation) if evaluation else (),
        "type_tables": type_tables(evaluation) if evaluation else (),
        "protocol": _protocol(evaluation.meta) if evaluation else "",
        "notes": _notes(evaluation.meta) if evaluation else (),
        "groups": chart_groups(files),
        "span": smoothing_span(len(files.metrics.rows)),
        "num_updates": len(files.metrics.rows),
        "unreadable_metrics": files.metrics.unreadable,
        "unreadable_heldout": files.heldout.unreadable,
        "strips": strips[:OPEN_STRIPS],
        "more_strips": strips[OPEN_STRIPS:],
        "undrawn": undrawn,
        "gain": DIFFERENCE_GAIN,
        "strip_numbers": lambda strip: example_numbers(strip.base, strip.trained),
        "config": files.config,
        "environment": _environment(run),
        **_events(files),
    }


def _silent(files: RunFiles) -> list[str]:
    """Describes each reward that an event calls silent, as the metrics stand at the end."""
    named = dict.fromkeys(
        str(row.get("reward")) for row in files.events.rows if row.get("event") == "silent_reward"
    )
    rows = files.metrics.rows
    return [
        str(silence(rows, name))
        if silence(rows, name)
        else f"reward {name!r} gave all candidates of every group the same score for some updates, "
        "and varied again later"
        for name in named
    ]


def _facts(files: RunFiles) -> list[tuple[str, str]]:
    run, rows = files.run, files.metrics.rows
    # run.json is there from the start; what it does not have yet is left out.
    facts = [
        (label, _text(value))
        for label, value in (("Method", run.method), ("Editor", run.editor), ("Seed", run.seed))
        if value is not None
    ]
    facts.append(("Updates", f"{len(rows)} of {'?' if run.updates is None else run.updates}"))
    # A run that was trained on after its evaluation has numbers of an older adapter: show both.
    trained = _text(rows[-1].get("adapter")) if rows else ""
    evaluated = _text(files.evaluation.meta.get("adapter")) if files.evaluation else ""
    if trained and evaluated and trained != evaluated:
        facts += [("Adapter, evaluated", evaluated), ("Adapter, last update", trained)]
    elif trained or evaluated:
        facts.append(("Adapter", evaluated or trained))
    facts += [
        (label, _time(seconds))
        for label, seconds in (("Started", run.started), ("Finished", run.finished))
        if seconds
    ]
    return facts


# Keys of an evaluation's ``meta`` that the headline line names; the notes list the others.
_PROTOCOL = {
    "num_tasks": "{} tasks",
    "num_noises": "{} noises a task",
    "steps": "{} denoising steps",
    "seed": "seed {}",
    "adapter": "adapter {}",
}


def _notes(meta: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Lists the other settings of the evaluation; empty ones are left out."""
    return [
        (spaced(key), _text(value))
        for key, value in meta.items()
        if key not in _PROTOCOL and value != ""
    ]


def _protocol(meta: Mapping[str, Any]) -> str:
    return ", ".join(
        form.format(_text(meta[key])) for key, form in _PROTOCOL.items() if key in meta
    )


def _strips(examples: Iterable[Path]) -> tuple[list[Strip], list[tuple[str, str]]]:
    """Returns the strips, and (name, reason) of each example that cannot be drawn."""
    drawn: list[Strip] = []
    undrawn: list[tuple[str, str]] = []
    for directory in examples:
        # One broken example must not hide the others, nor vanish silently.
        try:
            drawn.append(read_strip(directory))
        except InputError as error:
            undrawn.append((directory.name, str(error)))
    return drawn, undrawn


def _environment(run: RunRecord) -> list[tuple[str, list[tuple[str, str]]]]:
    """Returns (title, rows) of what the run was made with."""
    tables = [
        (title, [(name, _text(entry)) for name, entry in values.items()])
        for title, values in (("Versions", run.versions), ("Hardware", run.hardware))
        if values
    ]
    if run.command:
        tables.append(("Command", [("", run.command)]))
    return tables


def _events(files: RunFiles) -> dict[str, Any]:
    """Counts each event, and writes the last notable ones in full."""
    # Ordinary events are thousands; their counts are enough.
    named = [(str(row.get("event", "event")), row) for row in files.events.rows]
    notable = [
        (name, row) for name, row in named if NOTABLE.search(f"{name} {row.get('level', '')}")
    ]
    shown = [
        Event(
            time=_time(row.get("time")),
            name=name,
            details=", ".join(
                f"{key}: {_text(value)}"
                for key, value in row.items()
                if key not in ("time", "event")
            ),
        )
        for name, row in notable[-NUM_LAST_EVENTS:]
    ]
    return {
        "event_counts": Counter(name for name, _ in named).most_common(),
        "events": shown,
        "num_notable": len(notable),
        "has_events": bool(files.events.rows),
        "unreadable_events": files.events.unreadable,
    }


def _text(value: object) -> str:
    """Writes any JSON value as one line of text."""
    if value is None:
        return ""
    # Before the numbers: a boolean is an int.
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return format_number(value) if number(value) is not None else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return str(value)


def _time(value: object) -> str:
    """Writes seconds since the epoch as UTC; text stays as it is."""
    seconds = number(value)
    if seconds is None:
        return _text(value)
    try:
        return datetime.fromtimestamp(seconds, tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    # Beyond the years that datetime knows; the number is shown as it is.
    except (OverflowError, OSError, ValueError):
        return format_number(seconds)
