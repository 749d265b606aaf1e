"""Several runs as one HTML file: a forest plot, and every difference with its interval.

It draws what ``evaluation/comparison.py`` computes; ``compare.html.j2`` decides how it looks, in
the style of a run's page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rl_edit.evaluation.arms import COMMON_MEASURES, MEASURES, Arm, Measure
from rl_edit.evaluation.comparison import Comparison
from rl_edit.report.comparison_cells import Cell, cell_of
from rl_edit.report.forest import PANELS, forest
from rl_edit.report.numbers import format_number
from rl_edit.report.page import templates


@dataclass(frozen=True, kw_only=True)
class GridRow:
    """One arm in a grid of differences."""

    label: str
    about: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of differences with its headings."""

    title: str
    heading: str
    columns: tuple[str, ...]
    rows: tuple[GridRow, ...]


@dataclass(frozen=True, kw_only=True)
class ArmRow:
    """One arm in the main table.

    Attributes:
        evaluations: model evaluations of an update; ``parts`` splits them into rollout + learning.
    """

    label: str
    about: str
    cells: tuple[Cell, ...]
    seconds: str
    evaluations: int
    parts: str
    directories: tuple[str, ...]


def comparison_page(comparison: Comparison) -> str:
    """Renders the page; the same comparison gives the same bytes."""
    return templates().get_template("compare.html.j2").render(_context(comparison))


def _context(comparison: Comparison) -> dict[str, Any]:
    arms, meta, other = comparison.arms, comparison.meta, comparison.against
    # A run is a directory, an arm one line of the table.
    runs = sum(len(arm.runs) for arm in arms)
    return {
        "title": f"{runs} run{'' if runs == 1 else 's'} compared",
        "facts": [
            ("Rows, each a mean over seeds", len(arms)),
            ("Held-out tasks", meta.num_tasks),
            ("Noises a task", meta.num_noises),
            ("Solver steps", meta.num_steps),
            ("Seed of the noises", meta.seed),
            ("Tasks", meta.tasks[:12]),
            ("Editor", meta.editor[:12]),
        ],
        "several_seeds": any(len(arm.runs) > 1 for arm in arms),
        "forest": forest(arms),
        # The main table: heading, the base's absolute values, and a row for each arm.
        "measures": [measure.heading for measure in MEASURES],
        "base": [_base(comparison, measure) for measure in MEASURES],
        "arms": [_arm_row(arm) for arm in arms],
        # The second table, only with --against.
        "against": other.label if other else "",
        "over": _differences(arms, other) if other else None,
        "by_type": [_by_type(arms, measure) for measure in PANELS],
        "notes": comparison.notes,
    }


def _base(comparison: Comparison, measure: Measure) -> str:
    # Blank where arms do not agree on the base: each has a training reward of its own weights.
    interval = comparison.base(measure.name)
    return "" if interval is None else format_number(interval.mean, measure.digits)


def _arm_row(arm: Arm) -> ArmRow:
    # Both costs: evaluations do not depend on the machine, seconds include everything.
    seconds, effort = arm.seconds_per_update, arm.effort
    seeds = f"seed{'s' if len(arm.seeds) > 1 else ''} {', '.join(map(str, arm.seeds))}"
    return ArmRow(
        label=arm.label,
        about=f"{arm.runs[0].config.algorithm.name}, {seeds}; {arm.updates} updates",
        cells=tuple(cell_of(arm.gain(measure.name), measure) for measure in MEASURES),
        seconds="\u2014" if seconds is None else format_number(seconds),
        evaluations=effort.total,
        parts=f"{effort.rollout} + {effort.learning}",
        directories=tuple(str(run.directory) for run in arm.runs),
    )


def _differences(arms: Sequence[Arm], other: Arm) -> Grid:
    """Subtracts one arm from each of the others."""
    rows = tuple(
        GridRow(
            label=arm.label,
            about="",
            cells=tuple(
                cell_of(arm.minus(other, measure.name), measure) for measure in COMMON_MEASURES
            ),
        )
        for arm in arms
        if arm is not other
    )
    return Grid(
        title="",
        heading="run",
        # The training reward is missing: it means another sum in every arm.
        columns=tuple(measure.heading for measure in COMMON_MEASURES),
        rows=rows,
    )


def _by_type(arms: Sequence[Arm], measure: Measure) -> Grid:
    """Breaks the gains of one measure down by task type; headings count the tasks."""
    # All arms were evaluated on the same tasks, so the first one's types are everyone's.
    kinds = arms[0].task_types()
    # A task has a row for each noise, and counts once.
    tasks = Counter(
        kind for _, kind in {(row.task_id, row.task_type) for row in arms[0].runs[0].rows.values()}
    )
    return Grid(
        title=measure.heading,
        heading="run",
        columns=tuple(f"{kind.replace('_', ' ')} ({tasks[kind]})" for kind in kinds),
        rows=tuple(
            GridRow(
                label=arm.label,
                about="",
                cells=tuple(
                    cell_of(arm.gain(measure.name, task_type=kind), measure) for kind in kinds
                ),
            )
            for arm in arms
        ),
    )
