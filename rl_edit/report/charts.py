"""Charts as inline SVG: lines over updates, two lines on two axes, stacked seconds, intervals.

No script and no outside font. Colours are CSS classes (``c0`` ... ``c7``), so that one drawing
serves the light and the dark page.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from rl_edit.measures.intervals import Interval
from rl_edit.report.axes import BOTTOM, HEIGHT, TOP, WIDTH, Frame, nice_ticks
from rl_edit.report.numbers import format_number
from rl_edit.report.run_files import Points

# Classes c0 to c7 in page.html.j2. More lines in one chart are not distinguishable.
NUM_COLOURS = 8
# A chart narrower than 440 px cannot be hovered more finely; this also bounds the size of the page
# for long runs.
MAX_HOVER_STRIPS = 120
MAX_POINTS = 600
MAX_BARS = 60


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one line, by update."""

    label: str
    points: Points


@dataclass(frozen=True, kw_only=True)
class Mark:
    """An update worth a vertical line, and the word beside it."""

    label: str
    update: float


@dataclass(frozen=True, kw_only=True)
class LegendEntry:
    """Colour class and name of a line, with its last value as text."""

    colour: str
    label: str
    last: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing with its caption.

    Attributes:
        legend: one entry for each line.
        note: what is drawn, where the title does not say.
    """

    title: str
    unit: str
    legend: tuple[LegendEntry, ...]
    svg: Markup
    note: str = ""


def moving_average(values: Sequence[float], span: int) -> list[float]:
    """Averages exponentially with weight 2 / (span + 1).

    The empty start is corrected for, so the first value stays exactly as it is.
    """
    weight = 2.0 / (span + 1)
    total = norm = 0.0
    smooth = []
    for value in values:
        total = (1.0 - weight) * total + weight * value
        # The weights seen so far sum to ``norm``; dividing removes the pull of the empty start.
        norm = (1.0 - weight) * norm + weight
        smooth.append(total / norm)
    return smooth


def smoothing_span(num_points: int) -> int:
    """Updates the moving average looks back over: a tenth of the run, at least three."""
    return max(3, num_points // 10)


def line_chart(
    *,
    title: str,
    unit: str,
    series: Sequence[Series],
    from_zero: bool = False,
    smooth: bool = True,
    note: str = "",
) -> Chart | None:
    """Draws lines over updates: faint raw points under a moving average.

    None when no series has a point.

    Args:
        unit: label of the vertical axis.
        from_zero: the axis includes zero; for quantities whose size, not only whose change, is the
            message.
        smooth: draw the moving average; off for counts.
    """
    drawn = [entry for entry in series if entry.points][:NUM_COLOURS]
    if not drawn:
        return None
    values = [y for entry in drawn for _, y in entry.points] + ([0.0] if from_zero else [])
    frame = Frame.around(xs=[x for entry in drawn for x, _ in entry.points], ys=values)
    parts = [
        frame.axes(unit),
        *(_line(frame, entry, f"c{index}", smooth=smooth) for index, entry in enumerate(drawn)),
        _hover(frame, drawn, unit),
    ]
    return Chart(title=title, unit=unit, legend=_legend(drawn), svg=_svg(title, parts), note=note)


def twin_chart(
    *,
    title: str,
    left: Series,
    right: Series,
    marks: Sequence[Mark] = (),
    reference: float | None = None,
    smooth: bool = False,
    note: str = "",
) -> Chart | None:
    """Draws two quantities of different units over updates.

    Directions can be compared, heights cannot. None when one of them has no point.

    Args:
        left: read from the left axis; ``right``: from the right one, dashed.
        reference: a value of the left axis to measure by: a dotted line.
        smooth: as in :func:`line_chart`.
    """
    if not left.points or not right.points:
        return None
    xs = [x for entry in (left, right) for x, _ in entry.points] + [mark.update for mark in marks]
    columns = [[y for _, y in entry.points] for entry in (left, right)]
    # The reference belongs to the left axis and must lie on it.
    columns[0] += [] if reference is None else [reference]
    # Both frames get both axes' ticks, so that they make room for each other's labels.
    ticks = tuple(nice_ticks(min(ys), max(ys)) for ys in columns)
    frames = [Frame.around(xs=xs, ys=ys, twin=ticks) for ys in columns]
    parts = [frames[0].axes(left.label), frames[1].right_axis(right.label)]
    if reference is not None:
        y, start, end = frames[0].y(reference), frames[0].left, WIDTH - frames[0].right
        line = f'<line x1="{start:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{y:.1f}"/>'
        parts.append(f'<g class="mark">{line}</g>')
    for index, (frame, entry) in enumerate(zip(frames, (left, right), strict=True)):
        parts.append(_line(frame, entry, f"c{index}", smooth=smooth, dashed=entry is right))
    parts += [_mark(frames[0], mark, place) for place, mark in enumerate(marks)]
    parts.append(_hover(frames[0], (left, right), ""))
    return Chart(
        title=title, unit="", legend=_legend((left, right)), svg=_svg(title, parts), note=note
    )


def stacked_chart(
    *, title: str, unit: str, phases: Mapping[str, Points], total: Points = (), note: str = ""
) -> Chart | None:
    """Draws bars over updates, one layer for each phase; None when no phase has a point.

    Many updates share a bar, which then shows their mean. ``total`` is drawn as a line.
    """
    # Whatever comes beyond the colours is in the total all the same.
    phases = {name: points for name, points in list(phases.items())[:NUM_COLOURS] if points}
    if not phases:
        return None
    updates = sorted({x for points in phases.values() for x, _ in points})
    size = math.ceil(len(updates) / MAX_BARS)
    bins = [updates[start : start + size] for start in range(0, len(updates), size)]
    columns = {name: dict(points) for name, points in phases.items()}
    layers = [{name: _mean(column, keys) for name, column in columns.items()} for keys in bins]
    line = [((keys[0] + keys[-1]) / 2, _mean(dict(total), keys)) for keys in bins] if total else []
    # Half the distance of two bars: the axis reaches beyond the outer bars' middles by as much.
    half = (bins[1][0] - bins[0][0]) / 2 if len(bins) > 1 else 0.5
    frame = Frame.around(
        xs=[updates[0] - half, updates[-1] + half],
        ys=[0.0, *(sum(layer.values()) for layer in layers), *(y for _, y in line)],
        ticks_at=(updates[0], updates[-1]),
    )
    parts = [frame.axes(unit)]
    # A bar fills 84 % of its place; the rest is the gap to its neighbour.
    reach = half * 0.84 / size
    parts += [
        _bar(frame, keys, layer, unit, reach) for keys, layer in zip(bins, layers, strict=True)
    ]
    legend = _legend([Series(label=name, points=points) for name, points in phases.items()])
    if line:
        parts.append(f'<path class="line total" d="{frame.path(line)}"/>')
        last = format_number(total[-1][1])
        legend = (*legend, LegendEntry(colour="total", label="whole update", last=last))
    return Chart(title=title, unit=unit, legend=legend, svg=_svg(title, parts), note=note)


def interval_bar(interval: Interval, *, limit: float, verdict: str, width: int = 120) -> Markup:
    """Draws a mean and its interval on an axis from -limit to limit, zero in the middle.

    It is ``width`` drawing units wide and 16 high.
    """
    middle = width / 2

    def place(value: float) -> float:
        # 4 units at either end keep a dot at the limit within the drawing.
        return middle + (middle - 4.0) * max(-1.0, min(1.0, value / (limit or 1.0)))

    # An unknown end (one task) is drawn as the mean: a dot without a bar.
    low, high = (
        end if math.isfinite(end) else interval.mean for end in (interval.low, interval.high)
    )
    return Markup(
        f'<svg class="interval {escape(verdict)}" viewBox="0 0 {width} 16" aria-hidden="true">'
        f'<line class="zero" x1="{middle:.1f}" y1="1" x2="{middle:.1f}" y2="15"/>'
        f'<line class="span" x1="{place(low):.1f}" y1="8" x2="{place(high):.1f}" y2="8"/>'
        f'<circle cx="{place(interval.mean):.1f}" cy="8" r="3.6"/></svg>'
    )


def _legend(series: Sequence[Series]) -> tuple[LegendEntry, ...]:
    return tuple(
        LegendEntry(colour=f"c{index}", label=entry.label, last=format_number(entry.points[-1][1]))
        for index, entry in enumerate(series)
    )


def _line(frame: Frame, entry: Series, colour: str, *, smooth: bool, dashed: bool = False) -> str:
    """Draws one line with its points: faint under a moving average, solid without one."""
    xs, ys = [x for x, _ in entry.points], [y for _, y in entry.points]
    # An average over the whole of a short run says nothing that the points do not.
    averaged = smooth and len(ys) > 3
    average = moving_average(ys, smoothing_span(len(ys))) if averaged else ys
    parts = []
    if averaged:
        raw = frame.path(_thin(list(entry.points), MAX_POINTS))
        parts.append(f'<path class="raw {colour}" d="{raw}"/>')
    if len(ys) <= MAX_HOVER_STRIPS:
        # Dots show single updates; a long run's would run together and weigh on the page.
        parts.append(f'<g class="dots {"" if averaged else "solid "}{colour}">')
        radius = 1.6 if averaged else 2.2
        parts += [
            f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="{radius}"/>'
            for x, y in entry.points
        ]
        parts.append("</g>")
    style = f"line {colour} dashed" if dashed else f"line {colour}"
    line = frame.path(_thin(list(zip(xs, average, strict=True)), MAX_POINTS))
    parts.append(f'<path class="{style}" d="{line}"/>')
    return "".join(parts)


def _mark(frame: Frame, mark: Mark, place: int) -> str:
    """Draws a vertical line, with its word on the side where there is room.

    ``place`` puts the words of near marks on different lines.
    """
    x = frame.x(mark.update)
    right = x > (frame.left + WIDTH - frame.right) / 2
    side, left, top = "end" if right else "start", x + (-4 if right else 4), 10 + 13 * (place % 3)
    word = f'<text class="{side}" x="{left:.1f}" y="{TOP + top:.0f}">{escape(mark.label)}</text>'
    line = f'<line x1="{x:.1f}" y1="{TOP:.0f}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM:.0f}"/>'
    return f'<g class="mark">{line}{word}</g>'


def _bar(
    frame: Frame, updates: Sequence[float], layer: Mapping[str, float], unit: str, reach: float
) -> str:
    """Draws the stacked bar of some updates; hovering shows each phase's value."""
    left, right = frame.x(updates[0] - reach), frame.x(updates[-1] + reach)
    first, last = format_number(updates[0]), format_number(updates[-1])
    span = first if len(updates) == 1 else f"{first} to {last} (mean)"
    lines = [f"{name}: {format_number(value)} {unit}" for name, value in layer.items()]
    # Browsers show a <title> on hovering; this needs no script.
    title = "\n".join([f"update {span}", *lines])
    parts = [f"<g><title>{escape(title)}</title>"]
    base = 0.0
    for index, value in enumerate(layer.values()):
        low, high = frame.y(base), frame.y(base + value)
        size = f'width="{max(right - left, 0.5):.1f}" height="{low - high:.1f}"'
        parts.append(f'<rect class="bar c{index}" x="{left:.1f}" y="{high:.1f}" {size}/>')
        base += value
    return "".join([*parts, "</g>"])


def _mean(column: Mapping[float, float], updates: Sequence[float]) -> float:
    """Averages a column over those updates that have a value; 0 without any."""
    # A bar cannot have a negative height.
    present = [max(column[update], 0.0) for update in updates if update in column]
    return sum(present) / len(present) if present else 0.0


def _hover(frame: Frame, series: Sequence[Series], unit: str) -> str:
    """Draws invisible columns whose <title> has the values of the nearest update."""
    columns: dict[float, list[str]] = {}
    for entry in series:
        name = f"{entry.label}: " if len(series) > 1 else ""
        for x, y in entry.points:
            columns.setdefault(x, []).append(f"{name}{format_number(y)} {unit}".rstrip())
    updates = [x for x, _ in _thin([(x, 0.0) for x in sorted(columns)], MAX_HOVER_STRIPS)]
    # Columns meet halfway between updates, and the outer ones end with the plot.
    inner = [frame.x((one + other) / 2) for one, other in itertools.pairwise(updates)]
    edges = [frame.left, *inner, WIDTH - frame.right]
    parts = ['<g class="hover">']
    for update, (left, right) in zip(updates, itertools.pairwise(edges), strict=True):
        title = "\n".join([f"update {format_number(update)}", *columns[update]])
        size = f'width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM:.0f}"'
        parts.append(
            f'<rect x="{left:.1f}" y="{TOP:.0f}" {size}><title>{escape(title)}</title></rect>'
        )
    parts.append("</g>")
    return "".join(parts)


def _thin(points: list[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """Takes every k-th point and always the last, so that a long run stays a light page."""
    stride = math.ceil(len(points) / limit)
    thinned = points[::stride]
    return thinned if thinned[-1] == points[-1] else [*thinned, points[-1]]


def _svg(title: str, parts: Sequence[str]) -> Markup:
    box = f'viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}"'
    return Markup(
        f'<svg class="plot" {box} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
