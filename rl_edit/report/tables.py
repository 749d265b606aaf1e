"""Tables of an evaluation: base, trained and difference of each metric, as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from rl_edit.evaluation.record import EvaluationRecord, Sides
from rl_edit.measures.intervals import Interval
from rl_edit.report.charts import interval_bar
from rl_edit.report.metric_charts import spaced
from rl_edit.report.numbers import format_number, format_signed


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A measured quantity, with its label and unit.

    Attributes:
        digits: decimals to show.
        better: 1 if more is better, -1 if less is, 0 if neither.
    """

    name: str
    label: str
    unit: str
    digits: int
    better: int


# Known metrics, in the order of the tables. LPIPS is the only one where less is better; how far the
# attention concentrates, or the edit changes pixels, is neither good nor bad in itself.
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
# What was trained, whether the edit happens, and whether the background stays.
HEADLINES = ("reward", "instruction", "background_psnr_masked")
# Metrics that the caption of an example has room for: inside, outside, and both.
EXAMPLE_METRICS = ("instruction", "background_psnr_masked", "reward")
VERDICTS = {"better": "better", "worse": "worse", "moved": "changed", "unclear": "no clear change"}

NOT_MEASURED = "\u2014"


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One line of a table, as text.

    Attributes:
        span: ends of the interval; "" where none was computed.
        verdict: a CSS class and a key of ``VERDICTS``.
        bar: the interval, drawn.
    """

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
    """One metric, with a row for each task type."""

    metric: Metric
    rows: tuple[TableRow, ...]


def headlines(overall: Sides) -> list[TableRow]:
    """Rows of the headline metrics, with wide bars."""
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


def metric_table(overall: Sides) -> list[TableRow]:
    """One row for each metric, known ones first."""
    return [
        _row(_metric(name).label, _metric(name), overall, _reach([overall.delta.get(name)]))
        for name in _ordered(overall.names)
    ]


def type_tables(evaluation: EvaluationRecord) -> list[TypeTable]:
    """One table for each metric that was measured by task type; all bars of one share an axis."""
    present = dict.fromkeys(name for sides in evaluation.by_type.values() for name in sides.names)
    tables = []
    for name in _ordered(present):
        kinds = {
            kind: sides for kind, sides in sorted(evaluation.by_type.items()) if name in sides.names
        }
        # One axis for all bars of a table, so that their lengths compare between types.
        limit = _reach(sides.delta.get(name) for sides in (*kinds.values(), evaluation))
        rows = [_row(kind, _metric(name), sides, limit) for kind, sides in kinds.items()]
        if name in evaluation.names:
            # The last row is the overall number again, for comparison.
            rows.append(_row("all", _metric(name), evaluation, limit))
        tables.append(TypeTable(metric=_metric(name), rows=tuple(rows)))
    return tables


def example_numbers(
    base: Mapping[str, float], trained: Mapping[str, float]
) -> list[tuple[str, str, str, str]]:
    """(label, base, trained, difference) of the metrics that an example's caption shows."""
    rows = []
    for name in EXAMPLE_METRICS:
        if name in base and name in trained:
            metric, before, after = METRICS[name], base[name], trained[name]
            unit = f" {metric.unit}" if metric.unit else ""
            rows.append(
                (
                    metric.label,
                    format_number(before, metric.digits),
                    format_number(after, metric.digits) + unit,
                    format_signed(after - before, metric.digits),
                )
            )
    return rows


def _metric(name: str) -> Metric:
    # Parts of a judge's score and reward terms have no entry: their direction is not known here.
    return METRICS.get(name) or Metric(name=name, label=spaced(name), unit="", digits=3, better=0)


def _ordered(names: Iterable[str]) -> list[str]:
    """Known metrics first, in the order they are declared; the rest as they come."""
    present = list(names)
    return [name for name in METRICS if name in present] + [
        name for name in present if name not in METRICS
    ]


def _row(
    label: str, metric: Metric, sides: Sides, limit: float, *, bar_width: int = 120
) -> TableRow:
    base, trained, delta = (
        side.get(metric.name) for side in (sides.base, sides.trained, sides.delta)
    )
    # A metric may lack a side: files of other programs, or a judge that was invalid everywhere.
    verdict = _verdict(metric, delta)
    span = _span(metric, delta)
    return TableRow(
        label=label,
        unit=metric.unit,
        base=NOT_MEASURED if base is None else format_number(base.mean, metric.digits),
        trained=NOT_MEASURED if trained is None else format_number(trained.mean, metric.digits),
        delta=NOT_MEASURED if delta is None else format_signed(delta.mean, metric.digits),
        span=span,
        n=_count([delta, trained, base]),
        verdict=verdict,
        verdict_text=VERDICTS[verdict] if span else "no interval",
        bar=Markup("")
        if delta is None
        else interval_bar(delta, limit=limit, verdict=verdict, width=bar_width),
    )


def _span(metric: Metric, delta: Interval | None) -> str:
    # One task has no interval.
    if delta is None or not (math.isfinite(delta.low) and math.isfinite(delta.high)):
        return ""
    return (
        f"{format_signed(delta.low, metric.digits)} to {format_signed(delta.high, metric.digits)}"
    )


def _count(intervals: Sequence[Interval | None]) -> str:
    """Number of tasks, of the first interval that has it."""
    sizes = [interval.n for interval in intervals if interval is not None and interval.n]
    return str(sizes[0]) if sizes else NOT_MEASURED


def _verdict(metric: Metric, delta: Interval | None) -> str:
    # Green and red need an interval on one side of zero and a metric with a good direction.
    if delta is None or delta.sign == 0:
        return "unclear"
    return {1: "better", -1: "worse", 0: "moved"}[metric.better * delta.sign]


def _reach(deltas: Iterable[Interval | None]) -> float:
    """Half-width of an axis around zero on which every interval fits."""
    ends = [
        abs(end)
        for delta in deltas
        if delta is not None
        for end in (delta.mean, delta.low, delta.high)
        if math.isfinite(end)
    ]
    # 8 % of room, so that the end of the longest bar is not at the edge.
    return max(ends, default=0.0) * 1.08
