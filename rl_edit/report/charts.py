"""Charts as inline SVG, drawn here: lines over updates, two lines on two axes, stacked seconds, intervals around zero.

No script, no outside font.

Colours are CSS classes (``c0`` ... ``c7``), so that one drawing serves the light and the dark page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from rl_edit.report.run_files import Interval, Points

WIDTH, HEIGHT = 440.0, 210.0
RIGHT, TOP, BOTTOM = 12.0, 12.0, 38.0
NAME, GAP, CHARACTER = 20.0, 6.0, 7.0
"""Beside an axis: room for its name, between a label and the plot, and for each character of a label."""
NUM_COLOURS = 8
# A chart narrower than 440 px cannot be hovered more finely; this also bounds the size of the page for long runs.
MAX_HOVER_STRIPS = 120
MAX_POINTS = 600
MAX_BARS = 60


@dataclass(frozen=True, kw_only=True)
class Series:
    label: str
    points: Points


@dataclass(frozen=True, kw_only=True)
class Mark:
    """An update worth a vertical line, and the word beside it."""

    label: str
    update: float


@dataclass(frozen=True, kw_only=True)
class LegendEntry:
    colour: str
    label: str
    last: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing with its caption. ``legend`` has one entry per line; ``note`` says what is drawn where that is not plain."""

    title: str
    unit: str
    legend: tuple[LegendEntry, ...]
    svg: Markup
    note: str = ""


def plain(value: float, digits: int | None = None) -> str:
    """``value`` for reading: ``digits`` decimals, or about four significant ones, and a real minus sign."""
    if digits is not None:
        text = f"{value:.{digits}f}"
    elif value == 0.0 or 1e-3 <= abs(value) < 1e5:
        text = f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    else:
        text = f"{value:.2e}"
    if float(text) == 0.0:
        text = text.removeprefix("-")
    return text.replace("-", "\u2212", 1) if text.startswith("-") else text


def signed(value: float, digits: int) -> str:
    """``value`` with its sign always shown; a value that rounds to zero has none."""
    text = plain(value, digits)
    return f"+{text}" if value > 0 and float(text) != 0.0 else text


def moving_average(values: Sequence[float], span: int) -> list[float]:
    """Exponential moving average with weight 2 / (span + 1), corrected for its empty start, so the first value is kept exactly."""
    weight = 2.0 / (span + 1)
    total = norm = 0.0
    smooth = []
    for value in values:
        total = (1.0 - weight) * total + weight * value
        norm = (1.0 - weight) * norm + weight
        smooth.append(total / norm)
    return smooth


def smoothing_span(num_points: int) -> int:
    """Updates the moving average looks back over: a tenth of the run, and at least three."""
    return max(3, num_points // 10)


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round steps whose first and last tick enclose [low, high]."""
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        pad = abs(low) * 0.05
        low, high = (
            (low - pad, high + pad) if pad else (0.0, 1.0)
        )  # nothing at all: most often a share or a count, never below 0
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(
        factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= raw * 0.999
    )
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def line_chart(
    *,
    title: str,
    unit: str,
    series: Sequence[Series],
    from_zero: bool = False,
    smooth: bool = True,
    note: str = "",
) -> Chart | None:
    """Lines over updates: faint raw points under a moving average. None when no series has a point.

    Args:
        unit: label of the vertical axis.
        from_zero: the axis includes zero; for quantities whose size, not only whose change, is the message.
        smooth: draw the moving average; off for counts.
    """
    drawn = [entry for entry in series if entry.points][:NUM_COLOURS]
    if not drawn:
        return None
    values = [y for entry in drawn for _, y in entry.points] + ([0.0] if from_zero else [])
    frame = _Frame.around(xs=[x for entry in drawn for x, _ in entry.points], ys=values)
    parts = [
        frame.axes(unit),
        *(_drawn(frame, entry, f"c{index}", smooth=smooth) for index, entry in enumerate(drawn)),
    ]
    parts.append(_hover(frame, drawn, unit))
    legend = tuple(
        LegendEntry(colour=f"c{index}", label=entry.label, last=plain(entry.points[-1][1]))
        for index, entry in enumerate(drawn)
    )
    return Chart(title=title, unit=unit, legend=legend, svg=_svg(title, parts), note=note)


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
    """Two quantities of different units over updates: directions can be compared, heights cannot. None when one has no point.

    Args:
        left: read from the left axis; ``right``: from the right one, dashed.
        reference: a value of the left axis to measure by: a dotted line.
        smooth: as in :func:`line_chart`.
    """
    if not left.points or not right.points:
        return None
    xs = [x for entry in (left, right) for x, _ in entry.points] + [mark.update for mark in marks]
    columns = [[y for _, y in entry.points] for entry in (left, right)]
    columns[0] += [] if reference is None else [reference]
    frames = [
        _Frame.around(xs=xs, ys=ys, twin=tuple(nice_ticks(min(ys), max(ys)) for ys in columns))
        for ys in columns
    ]
    parts = [frames[0].axes(left.label), frames[1].right_axis(right.label)]
    if reference is not None:
        y, ends = frames[0].y(reference), (frames[0].left, WIDTH - frames[0].right)
        parts.append(
            f'<g class="mark"><line x1="{ends[0]:.1f}" y1="{y:.1f}" x2="{ends[1]:.1f}" y2="{y:.1f}"/></g>'
        )
    for index, (frame, entry) in enumerate(zip(frames, (left, right), strict=True)):
        parts.append(_drawn(frame, entry, f"c{index}", smooth=smooth, dashed=entry is right))
    parts += [_marked(frames[0], mark, place) for place, mark in enumerate(marks)]
    parts.append(_hover(frames[0], (left, right), ""))
    legend = tuple(
        LegendEntry(colour=f"c{i}", label=entry.label, last=plain(entry.points[-1][1]))
        for i, entry in enumerate((left, right))
    )
    return Chart(title=title, unit="", legend=legend, svg=_svg(title, parts), note=note)


def _drawn(frame: _Frame, entry: Series, colour: str, *, smooth: bool, dashed: bool = False) -> str:
    """One line with its points: faint under a moving average, solid without one."""
    xs, ys = [x for x, _ in entry.points], [y for _, y in entry.points]
    averaged = smooth and len(ys) > 3
    average = moving_average(ys, smoothing_span(len(ys))) if averaged else ys
    parts = []
    if averaged:
        parts.append(
            f'<path class="raw {colour}" d="{frame.path(_thin(list(entry.points), MAX_POINTS))}"/>'
        )
    if len(ys) <= MAX_HOVER_STRIPS:
        parts.append(f'<g class="dots {"" if averaged else "solid "}{colour}">')
        parts += [
            f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="{1.6 if averaged else 2.2}"/>'
            for x, y in entry.points
        ]
        parts.append("</g>")
    style = f"line {colour} dashed" if dashed else f"line {colour}"
    parts.append(
        f'<path class="{style}" d="{frame.path(_thin(list(zip(xs, average, strict=True)), MAX_POINTS))}"/>'
    )
    return "".join(parts)


def _marked(frame: _Frame, mark: Mark, place: int) -> str:
    """A vertical line with its word on the side where there is room; ``place`` keeps words of near marks apart."""
    x = frame.x(mark.update)
    right = x > (frame.left + WIDTH - frame.right) / 2
    word = f'<text class="{"end" if right else "start"}" x="{x + (-4 if right else 4):.1f}" y="{TOP + 10 + 13 * (place % 3):.0f}">'
    line = f'<line x1="{x:.1f}" y1="{TOP:.0f}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM:.0f}"/>'
    return f'<g class="mark">{line}{word}{escape(mark.label)}</text></g>'


def stacked_chart(
    *, title: str, unit: str, phases: Mapping[str, Points], total: Points = (), note: str = ""
) -> Chart | None:
    """Bars over updates, one layer a phase; many updates share a bar, which then shows their mean. ``total`` is drawn as a line."""
    phases = {name: points for name, points in list(phases.items())[:NUM_COLOURS] if points}
    if not phases:
        return None
    updates = sorted({x for points in phases.values() for x, _ in points})
    size = math.ceil(len(updates) / MAX_BARS)
    bins = [updates[start : start + size] for start in range(0, len(updates), size)]
    lookup = {name: dict(points) for name, points in phases.items()}
    whole = dict(total)

    def mean(column: Mapping[float, float], keys: Sequence[float]) -> float:
        present = [max(column[key], 0.0) for key in keys if key in column]
        return sum(present) / len(present) if present else 0.0

    layers = [{name: mean(column, keys) for name, column in lookup.items()} for keys in bins]
    totals = [(keys[0] + keys[-1]) / 2 for keys in bins], [mean(whole, keys) for keys in bins]
    tops = [sum(layer.values()) for layer in layers] + (totals[1] if whole else [])
    half = (bins[1][0] - bins[0][0]) / 2 if len(bins) > 1 else 0.5
    frame = _Frame.around(
        xs=[updates[0] - half, updates[-1] + half],
        ys=[0.0, *tops],
        ticks_at=(updates[0], updates[-1]),
    )
    parts = [frame.axes(unit)]
    for keys, layer in zip(bins, layers, strict=True):
        left, right = frame.x(keys[0] - half * 0.84 / size), frame.x(keys[-1] + half * 0.84 / size)
        span = plain(keys[0]) if len(keys) == 1 else f"{plain(keys[0])} to {plain(keys[-1])} (mean)"
        told = "\n".join(
            [f"update {span}", *(f"{name}: {plain(value)} {unit}" for name, value in layer.items())]
        )
        base = 0.0
        parts.append(f"<g><title>{escape(told)}</title>")
        for index, value in enumerate(layer.values()):
            low, high = frame.y(base), frame.y(base + value)
            parts.append(
                f'<rect class="bar c{index}" x="{left:.1f}" y="{high:.1f}" width="{max(right - left, 0.5):.1f}" height="{low - high:.1f}"/>'
            )
            base += value
        parts.append("</g>")
    legend = [
        LegendEntry(colour=f"c{index}", label=name, last=plain(points[-1][1]))
        for index, (name, points) in enumerate(phases.items())
    ]
    if whole:
        parts.append(
            f'<path class="line total" d="{frame.path(list(zip(*totals, strict=True)))}"/>'
        )
        legend.append(LegendEntry(colour="total", label="whole update", last=plain(total[-1][1])))
    return Chart(title=title, unit=unit, legend=tuple(legend), svg=_svg(title, parts), note=note)


def interval_bar(interval: Interval, *, limit: float, verdict: str, width: int = 120) -> Markup:
    """A mean and its interval on an axis from -limit to limit with zero in the middle, ``width`` drawing units wide and 16 high."""
    middle = width / 2

    def place(value: float) -> float:
        return middle + (middle - 4.0) * max(-1.0, min(1.0, value / (limit or 1.0)))

    low, high = (interval.mean if end is None else end for end in (interval.low, interval.high))
    return Markup(
        f'<svg class="interval {escape(verdict)}" viewBox="0 0 {width} 16" aria-hidden="true">'
        f'<line class="zero" x1="{middle:.1f}" y1="1" x2="{middle:.1f}" y2="15"/>'
        f'<line class="span" x1="{place(low):.1f}" y1="8" x2="{place(high):.1f}" y2="8"/>'
        f'<circle cx="{place(interval.mean):.1f}" cy="8" r="3.6"/></svg>'
    )


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """The plotting area: data ranges, ticks, and the maps from data to drawing units. ``left`` and ``right`` are the margins."""

    x_low: float
    x_high: float
    x_ticks: tuple[float, ...]
    y_ticks: tuple[float, ...]
    left: float
    right: float

    @classmethod
    def around(
        cls,
        *,
        xs: Sequence[float],
        ys: Sequence[float],
        ticks_at: tuple[float, float] | None = None,
        twin: tuple[Sequence[float], ...] = (),
    ) -> _Frame:
        """The frame of this data. ``twin``: the ticks of both axes, where there are two to make room for."""
        low, high = min(xs), max(xs)
        first, last = ticks_at or (low, high)
        if low == high:
            low, high = low - 0.5, high + 0.5
        gap = (
            last - first
        ) / 8  # a round tick this close to an end would collide with the end's label
        inner = (
            [
                tick
                for tick in nice_ticks(first, last, 5)
                if first + gap < tick < last - gap and tick == int(tick)
            ]
            if last > first
            else []
        )
        ticks = tuple(dict.fromkeys((first, *inner, last)))
        y_ticks = tuple(nice_ticks(min(ys), max(ys)))
        left, right = (_margin(of) for of in twin) if twin else (_margin(y_ticks), RIGHT)
        return cls(x_low=low, x_high=high, x_ticks=ticks, y_ticks=y_ticks, left=left, right=right)

    def x(self, value: float) -> float:
        return self.left + (WIDTH - self.left - self.right) * (value - self.x_low) / (
            self.x_high - self.x_low
        )

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)

    def labels(self) -> list[tuple[float, str]]:
        """(place, text) of each tick of the vertical axis."""
        return [
            (self.y(tick), text)
            for tick, text in zip(self.y_ticks, _texts(self.y_ticks), strict=True)
        ]

    def right_axis(self, unit: str) -> str:
        edge, middle = WIDTH - self.right, TOP + (HEIGHT - TOP - BOTTOM) / 2
        texts = [
            f'<text x="{edge + GAP:.0f}" y="{y + 3.8:.1f}">{label}</text>'
            for y, label in self.labels()
        ]
        name = f'<text class="mid name" transform="translate({WIDTH - 6:.0f} {middle:.0f}) rotate(-90)">{escape(unit)}</text>'
        return f'<g class="axes">{"".join(texts)}{name}</g>'

    def axes(self, unit: str) -> str:
        parts = ['<g class="axes">']
        for y, label in self.labels():
            parts.append(
                f'<line x1="{self.left:.0f}" y1="{y:.1f}" x2="{WIDTH - self.right:.0f}" y2="{y:.1f}"/>'
            )
            parts.append(
                f'<text class="end" x="{self.left - GAP:.0f}" y="{y + 3.8:.1f}">{label}</text>'
            )
        for tick in self.x_ticks:
            parts.append(
                f'<text class="mid" x="{self.x(tick):.1f}" y="{HEIGHT - BOTTOM + 16:.1f}">{plain(tick)}</text>'
            )
        parts.append(
            f'<text class="mid name" x="{(self.left + WIDTH - self.right) / 2:.0f}" y="{HEIGHT - 5:.0f}">update</text>'
        )
        middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
        parts.append(
            f'<text class="mid name" transform="translate(12 {middle:.0f}) rotate(-90)">{escape(unit)}</text></g>'
        )
        return "".join(parts)


def _texts(ticks: Sequence[float]) -> list[str]:
    """The labels of evenly spaced ticks, with as many decimals as their step needs."""
    step = ticks[1] - ticks[0]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step * 10**digits, 6) != round(step * 10**digits):
        digits += 1  # steps of 2.5
    return [
        plain(tick, digits) if digits <= 5 and abs(tick) < 1e5 else plain(tick) for tick in ticks
    ]


def _margin(ticks: Sequence[float]) -> float:
    return NAME + CHARACTER * max(4, *map(len, _texts(ticks))) + GAP


def _svg(title: str, parts: Sequence[str]) -> Markup:
    return Markup(
        f'<svg class="plot" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def _thin(points: list[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """Every k-th point and always the last, so that a long run does not make a heavy page."""
    stride = math.ceil(len(points) / limit)
    kept = points[::stride]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _hover(frame: _Frame, series: Sequence[Series], unit: str) -> str:
    """Invisible columns across the plot whose <title> tells the values of the nearest update."""
    columns: dict[float, list[str]] = {}
    for entry in series:
        name = f"{entry.label}: " if len(series) > 1 else ""
        for x, y in entry.points:
            columns.setdefault(x, []).append(f"{name}{plain(y)} {unit}".rstrip())
    updates = [x for x, _ in _thin([(x, 0.0) for x in sorted(columns)], MAX_HOVER_STRIPS)]
    parts = ['<g class="hover">']
    for index, update in enumerate(updates):
        left = frame.left if index == 0 else frame.x((updates[index - 1] + update) / 2)
        right = (
            WIDTH - frame.right
            if index == len(updates) - 1
            else frame.x((update + updates[index + 1]) / 2)
        )
        told = "\n".join([f"update {plain(update)}", *columns[update]])
        size = f'width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM:.0f}"'
        parts.append(
            f'<rect x="{left:.1f}" y="{TOP:.0f}" {size}><title>{escape(told)}</title></rect>'
        )
    parts.append("</g>")
    return "".join(parts)
