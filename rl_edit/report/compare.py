"""Several runs as one HTML file: a forest plot of inside against outside the mask, and every difference with its interval.

It draws what ``evaluation/comparison.py`` found; ``compare.html.j2`` decides how it looks, in the style of a run's own page.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from rl_edit.evaluation.comparison import COMMON_MEASURES, MEASURES, TOTAL, Arm, Comparison, Measure
from rl_edit.measures.intervals import Interval
from rl_edit.report.charts import CHARACTER, nice_ticks, plain, signed
from rl_edit.report.page import templates

PANELS = tuple(
    m
    for name in ("instruction", "background_psnr_masked", TOTAL)
    for m in MEASURES
    if m.name == name
)
"""Inside, outside, and both together: what is drawn, and broken down by task type."""

LABELS, PANEL, GAP, ROW, HEAD, FOOT = 290.0, 212.0, 50.0, 28.0, 30.0, 26.0


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A difference as text. ``verdict`` is a CSS class: "better", "worse" or "unclear"."""

    mean: str
    span: str
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Row:
    label: str
    about: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Grid:
    title: str
    heading: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class ArmRow:
    """A line of the main table."""

    label: str
    about: str
    cells: tuple[Cell, ...]
    seconds: str
    evaluations: int
    parts: str
    directories: tuple[str, ...]


def comparison_page(comparison: Comparison) -> str:
    """The page's text; the same comparison gives the same bytes."""
    return templates().get_template("compare.html.j2").render(_context(comparison))


def _context(comparison: Comparison) -> dict[str, Any]:
    arms, meta, other = comparison.arms, comparison.meta, comparison.against
    runs = sum(len(arm.runs) for arm in arms)
    return {
        "title": f"{runs} run{'' if runs == 1 else 's'} compared",
        "facts": [
            ("Rows, each a mean over seeds", len(arms)),
            ("Held-out tasks", meta["num_tasks"]),
            ("Noises a task", meta["num_noises"]),
            ("Solver steps", meta["num_steps"]),
            ("Seed of the noises", meta["seed"]),
            ("Tasks", meta["tasks"][:12]),
            ("Editor", str(meta["editor"])[:12]),
        ],
        "several_seeds": any(len(arm.runs) > 1 for arm in arms),
        "forest": forest(arms),
        "measures": [measure.heading for measure in MEASURES],
        "base": [_base(comparison, measure) for measure in MEASURES],
        "arms": [_arm_row(arm) for arm in arms],
        "against": other.label if other else "",
        "over": _over(arms, other) if other else None,
        "by_type": [_by_type(arms, measure) for measure in PANELS],
        "notes": comparison.notes,
    }


def _base(comparison: Comparison, measure: Measure) -> str:
    found = comparison.base(measure.name)
    return "" if found is None else plain(found.mean, measure.digits)


def _cell(interval: Interval | None, measure: Measure) -> Cell:
    if interval is None:
        return Cell(mean="\u2014", span="not measured", verdict="unclear")
    if not math.isfinite(interval.low):
        return Cell(mean=signed(interval.mean, measure.digits), span="one task", verdict="unclear")
    span = f"{signed(interval.low, measure.digits)} to {signed(interval.high, measure.digits)}"
    return Cell(mean=signed(interval.mean, measure.digits), span=span, verdict=verdict_of(interval))


def verdict_of(interval: Interval) -> str:
    """Whether an interval lies on one side of zero; more of every measure is better."""
    return "better" if interval.low > 0 else "worse" if interval.high < 0 else "unclear"


def _arm_row(arm: Arm) -> ArmRow:
    seconds, effort = arm.seconds_per_update, arm.effort
    seeds = f"seed{'s' if len(arm.seeds) > 1 else ''} {', '.join(map(str, arm.seeds))}"
    return ArmRow(
        label=arm.label,
        about=f"{arm.runs[0].config.algorithm.name}, {seeds}; {arm.updates} updates",
        cells=tuple(_cell(arm.gain(measure.name), measure) for measure in MEASURES),
        seconds="\u2014" if seconds is None else plain(seconds),
        evaluations=effort.total,
        parts=f"{effort.rollout} + {effort.learning}",
        directories=tuple(str(run.directory) for run in arm.runs),
    )


def _over(arms: Sequence[Arm], other: Arm) -> Grid:
    rows = tuple(
        Row(
            label=arm.label,
            about="",
            cells=tuple(
                _cell(arm.over(other, measure.name), measure) for measure in COMMON_MEASURES
            ),
        )
        for arm in arms
        if arm is not other
    )
    return Grid(
        title="",
        heading="run",
        columns=tuple(measure.heading for measure in COMMON_MEASURES),
        rows=rows,
    )


def _by_type(arms: Sequence[Arm], measure: Measure) -> Grid:
    kinds = arms[0].task_types()
    tasks = Counter(
        kind for _, kind in {(row.task_id, row.task_type) for row in arms[0].runs[0].rows.values()}
    )
    return Grid(
        title=measure.heading,
        heading="run",
        columns=tuple(f"{kind.replace('_', ' ')} ({tasks[kind]})" for kind in kinds),
        rows=tuple(
            Row(
                label=arm.label,
                about="",
                cells=tuple(
                    _cell(arm.gain(measure.name, task_type=kind), measure) for kind in kinds
                ),
            )
            for arm in arms
        ),
    )


def forest(arms: Sequence[Arm]) -> Markup:
    """A row an arm and a panel a measure: mean, 95 % interval, and the means of single seeds, around zero."""
    width = LABELS + len(PANELS) * (PANEL + GAP) - GAP / 2
    bottom = HEAD + ROW * len(arms)
    parts = []
    for index, arm in enumerate(arms):
        top = HEAD + ROW * index
        if index % 2 == 0:
            parts.append(
                f'<rect class="stripe" x="0" y="{top:.0f}" width="{width:.0f}" height="{ROW:.0f}"/>'
            )
        name = f"{escape(_cut(arm.label))}<title>{escape(arm.label)}</title>"
        parts.append(f'<text class="label" x="4" y="{top + ROW / 2 + 4:.1f}">{name}</text>')
    for index, measure in enumerate(PANELS):
        parts += _panel(arms, measure, left=LABELS + index * (PANEL + GAP), bottom=bottom)
    size = f'viewBox="0 0 {width:.0f} {bottom + FOOT:.0f}"'
    return Markup(
        f'<svg class="plot forest" {size} role="img" aria-label="differences to base">{"".join(parts)}</svg>'
    )


def _panel(arms: Sequence[Arm], measure: Measure, *, left: float, bottom: float) -> list[str]:
    gains = {arm.label: arm.gain(measure.name) for arm in arms}
    seeds = {
        arm.label: [mean for mean in arm.by_seed(measure.name).values() if mean is not None]
        for arm in arms
        if len(arm.runs) > 1
    }
    parts = [
        f'<text class="mid head" x="{left + PANEL / 2:.1f}" y="18">{escape(measure.heading)}</text>'
    ]
    known = [gain for gain in gains.values() if gain is not None]
    if not known:
        return [
            *parts,
            f'<text class="mid" x="{left + PANEL / 2:.1f}" y="{HEAD + 18:.0f}">not measured</text>',
        ]
    ends = [end for gain in known for end in (gain.low, gain.mean, gain.high) if math.isfinite(end)]
    ends += [mean for means in seeds.values() for mean in means]
    ticks = nice_ticks(min(0.0, *ends), max(0.0, *ends), 4)

    def x(value: float) -> float:
        return left + PANEL * (value - ticks[0]) / (ticks[-1] - ticks[0])

    texts = [signed(round(tick, 9), _digits(ticks)) for tick in ticks]
    # Where labels would touch only every second or third has one, counted from zero.
    apart = math.ceil((CHARACTER * max(map(len, texts)) + 2) / (PANEL / (len(ticks) - 1)))
    middle = min(range(len(ticks)), key=lambda index: abs(ticks[index]))
    for index, (tick, text) in enumerate(zip(ticks, texts, strict=True)):
        zero = ' class="zero"' if abs(tick) < 1e-12 else ""
        parts.append(
            f'<g class="axes"><line{zero} x1="{x(tick):.1f}" y1="{HEAD:.0f}" x2="{x(tick):.1f}" y2="{bottom:.0f}"/>'
        )
        shown = text if (index - middle) % apart == 0 else ""
        parts.append(
            f'<text class="mid" x="{x(tick):.1f}" y="{bottom + 16:.1f}">{shown}</text></g>'
        )
    for index, arm in enumerate(arms):
        gain, y = gains[arm.label], HEAD + ROW * (index + 0.5)
        if gain is None:
            continue
        cell = _cell(gain, measure)
        parts.append(
            f'<g class="{cell.verdict}"><title>{escape(f"{arm.label}: {cell.mean} ({cell.span}), n = {gain.n}")}</title>'
        )
        if math.isfinite(gain.low):
            parts.append(
                f'<line class="span" x1="{x(gain.low):.1f}" y1="{y:.1f}" x2="{x(gain.high):.1f}" y2="{y:.1f}"/>'
            )
        parts += [
            f'<circle class="seed" cx="{x(mean):.1f}" cy="{y:.1f}" r="2.6"/>'
            for mean in seeds.get(arm.label, ())
        ]
        parts.append(f'<circle class="mean" cx="{x(gain.mean):.1f}" cy="{y:.1f}" r="4"/></g>')
    return parts


def _digits(ticks: Sequence[float]) -> int:
    """Decimals that tell neighbouring ticks apart; steps of 2.5 need one more."""
    step = ticks[1] - ticks[0]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return digits if math.isclose(round(step, digits), step, rel_tol=1e-6) else digits + 1


def _cut(label: str, longest: int = 42) -> str:
    return label if len(label) <= longest else f"{label[: longest - 1]}\u2026"
