"""One run as one HTML file: headline numbers, curves, before/after strips, settings. No script, no outside resource.

This file decides what is shown, in which order and under which name; ``page.html.j2`` decides how it looks.
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
from markupsafe import Markup

from rl_edit.errors import InputError
from rl_edit.files import write_result
from rl_edit.report.charts import interval_bar, plain, signed, smoothing_span
from rl_edit.report.curves import chart_groups, spaced
from rl_edit.report.run_files import Comparison, Evaluation, Interval, RunFiles, number, read_run
from rl_edit.report.strips import DIFFERENCE_GAIN, Strip, read_strip

OPEN_STRIPS = 16
NUM_LAST_EVENTS = 40
NOTABLE = re.compile(
    r"warn|drop|declin|refus|reject|stale|invalid|error|fail|retr|restart|resum|timeout|interrupt|lost|died|alarm|evaluation_",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a measured quantity reads. ``better`` is +1 if more is better, -1 if less is, 0 if neither."""

    name: str
    label: str
    unit: str
    digits: int
    better: int


METRICS = {
    metric.name: metric
    for metric in (
        Metric(name="reward", label="Training reward", unit="", digits=3, better=1),
        Metric(name="instruction", label="Instruction score", unit="", digits=3, better=1),
        Metric(
            name="background_psnr_masked", label="Background PSNR", unit="dB", digits=2, better=1
        ),
        Metric(
            name="background_psnr_zero_filled",
            label="Background PSNR, zero-filled",
            unit="dB",
            digits=2,
            better=1,
        ),
        Metric(name="background_ssim", label="Background SSIM", unit="", digits=4, better=1),
        Metric(name="background_lpips", label="Background LPIPS", unit="", digits=4, better=-1),
        Metric(name="concentration", label="Attention concentration", unit="", digits=3, better=0),
        Metric(name="inside_change", label="Change inside the mask", unit="", digits=3, better=0),
    )
}
HEADLINES = ("reward", "instruction", "background_psnr_masked")
STRIP_METRICS = ("instruction", "background_psnr_masked", "reward")
VERDICTS = {"better": "better", "worse": "worse", "moved": "changed", "unclear": "no clear change"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a comparison table, as text. ``verdict`` is a CSS class and a key of ``VERDICTS``."""

    label: str
    unit: str
    base: str
    trained: str
    delta: str
    span: str
    n: str
    verdict: str
    verdict_text: str
    bar: Markup


@dataclass(frozen=True, kw_only=True)
class TypeTable:
    metric: Metric
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class Event:
    time: str
    name: str
    details: str


def render_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html`` from the files in ``run_dir`` and return its path. The same files give the same bytes.

    A part without data says so in its place; an example that cannot be drawn is named with the reason.

    Raises:
        InputError: no such directory, nothing in it to show, a broken JSON file, or the page cannot be written.
    """
    files = read_run(run_dir)
    page = templates().get_template("page.html.j2").render(_context(files))
    return write_result(run_dir / "report.html", page, remedy="Make the run directory writable.")


def templates() -> Environment:
    """The templates of this package: whatever a page is told is escaped, and a name it lacks is an error."""
    return Environment(
        loader=PackageLoader("rl_edit.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _context(files: RunFiles) -> dict[str, Any]:
    run, evaluation = files.run, files.evaluation
    strips, undrawn = _strips(files.examples)
    groups = chart_groups(files)
    counts, notable, num_notable = _events(files)
    return {
        "title": str(run.get("name") or files.directory.resolve().name),
        "status": str(run.get("status") or "unknown"),
        "facts": _facts(files),
        "left_out": [_words(item) for item in _sequence(run.get("left_out_rewards"))],
        "has_evaluation": evaluation is not None,
        "headlines": _headlines(evaluation.overall) if evaluation else (),
        "table": _table(evaluation.overall) if evaluation else (),
        "type_tables": _type_tables(evaluation) if evaluation else (),
        "protocol": _protocol(evaluation.meta) if evaluation else "",
        "notes": _notes(evaluation.meta) if evaluation else (),
        "groups": groups,
        "span": smoothing_span(len(files.metrics.rows)),
        "num_updates": len(files.metrics.rows),
        "unreadable_metrics": files.metrics.unreadable,
        "strips": strips[:OPEN_STRIPS],
        "more_strips": strips[OPEN_STRIPS:],
        "undrawn": undrawn,
        "gain": DIFFERENCE_GAIN,
        "strip_numbers": _strip_numbers,
        "config": files.config,
        "environment": _environment(run),
        "event_counts": counts,
        "events": notable,
        "num_notable": num_notable,
        "has_events": bool(files.events.rows),
        "unreadable_events": files.events.unreadable,
    }


def _facts(files: RunFiles) -> list[tuple[str, str]]:
    run, rows = files.run, files.metrics.rows
    planned = number(run.get("updates"))
    facts = [
        (label, _words(run[key]))
        for label, key in (("Method", "method"), ("Editor", "editor"), ("Seed", "seed"))
        if key in run
    ]
    facts.append(("Updates", f"{len(rows)} of {'?' if planned is None else plain(planned)}"))
    trained = _words(rows[-1].get("adapter")) if rows else ""
    evaluated = _words(files.evaluation.meta.get("adapter")) if files.evaluation else ""
    if trained and evaluated and trained != evaluated:
        facts += [("Adapter, evaluated", evaluated), ("Adapter, last update", trained)]
    elif trained or evaluated:
        facts.append(("Adapter", evaluated or trained))
    facts += [
        (label, _time(run[key]))
        for label, key in (("Started", "started"), ("Finished", "finished"))
        if run.get(key)
    ]
    return facts


def _metric(name: str) -> Metric:
    return METRICS.get(name) or Metric(name=name, label=spaced(name), unit="", digits=3, better=0)


def _ordered(names: Iterable[str]) -> list[str]:
    """Known metrics first, in the order they are declared; the rest as they come."""
    present = list(names)
    return [name for name in METRICS if name in present] + [
        name for name in present if name not in METRICS
    ]


def _row(
    label: str, metric: Metric, comparison: Comparison, limit: float, *, bar_width: int = 120
) -> Row:
    base, trained, delta = (
        side.get(metric.name) for side in (comparison.base, comparison.trained, comparison.delta)
    )
    verdict = _verdict(metric, delta)
    span = ""
    if delta is not None and delta.low is not None and delta.high is not None:
        span = f"{signed(delta.low, metric.digits)} to {signed(delta.high, metric.digits)}"
    sizes = [side.n for side in (delta, trained, base) if side is not None and side.n is not None]
    return Row(
        label=label,
        unit=metric.unit,
        base="\u2014" if base is None else plain(base.mean, metric.digits),
        trained="\u2014" if trained is None else plain(trained.mean, metric.digits),
        delta="\u2014" if delta is None else signed(delta.mean, metric.digits),
        span=span,
        n=str(sizes[0]) if sizes else "\u2014",
        verdict=verdict,
        verdict_text=VERDICTS[verdict] if span else "no interval",
        bar=Markup("")
        if delta is None
        else interval_bar(delta, limit=limit, verdict=verdict, width=bar_width),
    )


def _verdict(metric: Metric, delta: Interval | None) -> str:
    if delta is None or not delta.excludes_zero:
        return "unclear"
    direction = metric.better * (1 if delta.mean > 0 else -1)
    return {1: "better", -1: "worse", 0: "moved"}[direction]


def _reach(deltas: Iterable[Interval | None]) -> float:
    """Half-width of an axis around zero on which every interval fits."""
    ends = [
        abs(end)
        for delta in deltas
        if delta is not None
        for end in (delta.mean, delta.low, delta.high)
        if end is not None
    ]
    return max(ends, default=0.0) * 1.08


def _headlines(overall: Comparison) -> list[Row]:
    return [
        _row(
            METRICS[name].label,
            METRICS[name],
            overall,
            _reach([overall.delta.get(name)]),
            bar_width=300,
        )
        for name in HEADLINES
    ]


def _table(overall: Comparison) -> list[Row]:
    return [
        _row(_metric(name).label, _metric(name), overall, _reach([overall.delta.get(name)]))
        for name in _ordered(overall.names)
    ]


def _type_tables(evaluation: Evaluation) -> list[TypeTable]:
    present = dict.fromkeys(
        name for comparison in evaluation.by_type.values() for name in comparison.names
    )
    tables = []
    for name in _ordered(present):
        kinds = {
            kind: comparison
            for kind, comparison in sorted(evaluation.by_type.items())
            if name in comparison.names
        }
        limit = _reach(
            comparison.delta.get(name) for comparison in (*kinds.values(), evaluation.overall)
        )
        rows = [_row(kind, _metric(name), comparison, limit) for kind, comparison in kinds.items()]
        if name in evaluation.overall.names:
            rows.append(_row("all", _metric(name), evaluation.overall, limit))
        tables.append(TypeTable(metric=_metric(name), rows=tuple(rows)))
    return tables


_PROTOCOL = {
    "num_tasks": "{} tasks",
    "num_noises": "{} noises a task",
    "steps": "{} denoising steps",
    "seed": "seed {}",
    "adapter": "adapter {}",
}


def _notes(meta: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What else is known of how it was measured; settings that are empty say nothing."""
    return [
        (spaced(key), _words(value))
        for key, value in meta.items()
        if key not in _PROTOCOL and value != ""
    ]


def _protocol(meta: Mapping[str, Any]) -> str:
    return ", ".join(
        form.format(_words(meta[key])) for key, form in _PROTOCOL.items() if key in meta
    )


def _strips(examples: Iterable[Path]) -> tuple[list[Strip], list[tuple[str, str]]]:
    drawn: list[Strip] = []
    undrawn: list[tuple[str, str]] = []
    for directory in examples:
        try:
            drawn.append(read_strip(directory))
        except InputError as error:
            undrawn.append((directory.name, str(error)))
    return drawn, undrawn


def _strip_numbers(strip: Strip) -> list[tuple[str, str, str, str]]:
    """(label, base, trained, difference) for the metrics a caption has room for."""
    rows = []
    for name in STRIP_METRICS:
        if name in strip.base and name in strip.trained:
            metric, base, trained = METRICS[name], strip.base[name], strip.trained[name]
            unit = f" {metric.unit}" if metric.unit else ""
            rows.append(
                (
                    metric.label,
                    plain(base, metric.digits),
                    plain(trained, metric.digits) + unit,
                    signed(trained - base, metric.digits),
                )
            )
    return rows


def _environment(run: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    tables = []
    for title, key in (("Versions", "versions"), ("Hardware", "hardware")):
        value = run.get(key)
        if isinstance(value, Mapping) and value:
            tables.append((title, [(str(name), _words(entry)) for name, entry in value.items()]))
        elif value:
            tables.append((title, [("", _words(value))]))
    if run.get("command"):
        command = run["command"]
        tables.append(
            (
                "Command",
                [("", " ".join(map(str, command)) if isinstance(command, list) else str(command))],
            )
        )
    return tables


def _events(files: RunFiles) -> tuple[list[tuple[str, int]], list[Event], int]:
    """How often each event happened, and the last notable ones in full."""
    named = [(str(row.get("event", "event")), row) for row in files.events.rows]
    counts = Counter(name for name, _ in named).most_common()
    notable = [
        (name, row) for name, row in named if NOTABLE.search(f"{name} {row.get('level', '')}")
    ]
    shown = [
        Event(
            time=_time(row.get("time")),
            name=name,
            details=", ".join(
                f"{key}: {_words(value)}"
                for key, value in row.items()
                if key not in ("time", "event")
            ),
        )
        for name, row in notable[-NUM_LAST_EVENTS:]
    ]
    return counts, shown, len(notable)


def _sequence(value: object) -> list[object]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _words(value: object) -> str:
    """Any JSON value as one line of text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return plain(value) if number(value) is not None else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_words(entry)}" for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_words, value))
    return str(value)


def _time(value: object) -> str:
    """Seconds since the epoch as UTC; text as it is."""
    seconds = number(value)
    if seconds is None:
        return _words(value)
    try:
        return datetime.fromtimestamp(seconds, tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, OSError, ValueError):
        return plain(seconds)
