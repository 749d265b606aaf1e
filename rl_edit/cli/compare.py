"""``rl-edit compare``: evaluated runs side by side, with paired differences.

It prints a table, and writes a page and JSON on request.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rl_edit.evaluation.arms import COMMON_MEASURES, MEASURES, Arm, Measure
from rl_edit.evaluation.comparison import Comparison, compare
from rl_edit.files import write_result
from rl_edit.measures.intervals import Interval
from rl_edit.report.compare import comparison_page

# Columns: a narrower table would break intervals apart.
MIN_WIDTH = 190


def compare_command(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories, each evaluated with rl-edit evaluate.")
    ],
    against: Annotated[
        Path | None,
        typer.Option(help="Also subtract this run from each of the others."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write a page with charts, e.g. comparison.html.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option("--json", help="Write every number as JSON.")
    ] = None,
) -> None:
    """Compare runs on the same held-out tasks and noises. Seeds of a run are averaged."""
    comparison = compare(runs, against=against)
    console = Console(width=max(Console().width, MIN_WIDTH))
    console.print(gains_table(comparison))
    if comparison.against is not None:
        console.print(differences_table(comparison.arms, comparison.against))
    # Notes come last, next to the prompt, where they are read.
    for note in comparison.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    if out is not None:
        write_result(out, comparison_page(comparison))
    if record is not None:
        write_result(record, json.dumps(comparison.record(), indent=2, allow_nan=False) + "\n")
    # Paths last, one a line, for a shell to pick up.
    for path in (out, record):
        if path is not None:
            console.print(str(path), highlight=False, markup=False, soft_wrap=True)


def gains_table(comparison: Comparison) -> Table:
    """Shows arms as rows; each measure as its difference to base over its interval."""
    meta = comparison.meta
    noises = f" x {meta.num_noises} noises" if meta.num_noises > 1 else ""
    table = Table(
        title=f"trained minus base on {meta.num_tasks} held-out tasks{noises}; "
        "paired, 95 % bootstrap intervals over tasks"
    )
    for heading in ("run", "seeds", "updates"):
        table.add_column(heading, overflow="fold")
    for measure in MEASURES:
        table.add_column(_heading(measure), justify="right", no_wrap=True)
    table.add_column("s per\nupdate", justify="right")
    table.add_column("evaluations\nper update", justify="right", no_wrap=True)
    # Absolute values of the base, blank where arms do not agree on them.
    base = [comparison.base(measure.name) for measure in MEASURES]
    cells = [
        "" if b is None else f"{b.mean:.{m.digits}f}" for b, m in zip(base, MEASURES, strict=True)
    ]
    table.add_row("base", "", "", *cells, "", "", end_section=True)
    for arm in comparison.arms:
        seconds, effort = arm.seconds_per_update, arm.effort
        table.add_row(
            # Names come from configs; a bracket in one must not become markup.
            f"{escape(arm.label)}\n[dim]{escape(arm.runs[0].config.algorithm.name)}[/]",
            ", ".join(map(str, arm.seeds)),
            str(arm.updates),
            *(_cell(arm.gain(measure.name), measure) for measure in MEASURES),
            "" if seconds is None else f"{seconds:.3g}",
            f"{effort.total}\n{effort.rollout} + {effort.learning}",
        )
    return table


def differences_table(arms: tuple[Arm, ...], other: Arm) -> Table:
    """Shows every other arm's trained editor minus this one's."""
    table = Table(title=f"trained minus trained of {escape(other.label)}; paired by task and noise")
    table.add_column("run")
    for measure in COMMON_MEASURES:
        table.add_column(_heading(measure), justify="right", no_wrap=True)
    for arm in arms:
        if arm is not other:
            table.add_row(
                escape(arm.label),
                *(_cell(arm.minus(other, measure.name), measure) for measure in COMMON_MEASURES),
            )
    return table


def _heading(measure: Measure) -> str:
    return measure.heading.replace(": ", ":\n").replace(" reward", "\nreward")


def _cell(interval: Interval | None, measure: Measure) -> str:
    if interval is None:
        return ""
    # Mean over interval, in one cell of two lines.
    mean = f"{interval.mean:+.{measure.digits}f}"
    if not math.isfinite(interval.low):
        return f"{mean}\none task"
    colour = {1: "green", -1: "red", 0: "default"}[interval.sign]
    ends = f"{interval.low:+.{measure.digits}f}, {interval.high:+.{measure.digits}f}"
    # An opening bracket is markup for rich unless it is escaped.
    return f"[{colour}]{mean}[/]\n\\[{ends}]"
