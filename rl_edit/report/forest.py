"""The forest plot of a comparison: an arm on each row, a measure on each panel, around zero."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from rl_edit.evaluation.arms import MEASURES, TOTAL, Arm, Measure
from rl_edit.measures.intervals import Interval
from rl_edit.report.axes import CHARACTER, nice_ticks, tick_digits
from rl_edit.report.comparison_cells import cell_of
from rl_edit.report.numbers import format_signed

# Inside, outside, and both together.
PANELS = tuple(
    measure
    for name in ("instruction", "background_psnr_masked", TOTAL)
    for measure in MEASURES
    if measure.name == name
)

# Drawing units: room for labels, width of a panel, gap between panels, heights of row, heading and
# axis.
LABELS, PANEL, GAP, ROW, HEAD, FOOT = 290.0, 212.0, 50.0, 28.0, 30.0, 26.0


def forest(arms: Sequence[Arm]) -> Markup:
    """Draws mean, 95 % interval, and the means of single seeds of each arm and measure."""
    width = LABELS + len(PANELS) * (PANEL + GAP) - GAP / 2
    bottom = HEAD + ROW * len(arms)
    parts = []
    for index, arm in enumerate(arms):
        top = HEAD + ROW * index
        if index % 2 == 0:
            size = f'width="{width:.0f}" height="{ROW:.0f}"'
            parts.append(f'<rect class="stripe" x="0" y="{top:.0f}" {size}/>')
        name = f"{escape(_cut(arm.label))}<title>{escape(arm.label)}</title>"
        parts.append(f'<text class="label" x="4" y="{top + ROW / 2 + 4:.1f}">{name}</text>')
    for index, measure in enumerate(PANELS):
        parts += _panel(arms, measure, left=LABELS + index * (PANEL + GAP), bottom=bottom)
    box = f'viewBox="0 0 {width:.0f} {bottom + FOOT:.0f}"'
    return Markup(
        f'<svg class="plot forest" {box} role="img" aria-label="differences to base">'
        f"{''.join(parts)}</svg>"
    )


def _panel(arms: Sequence[Arm], measure: Measure, *, left: float, bottom: float) -> list[str]:
    """Draws one measure: heading, axis, and a mark for each arm."""
    middle = f"{left + PANEL / 2:.1f}"
    heading = f'<text class="mid head" x="{middle}" y="18">{escape(measure.heading)}</text>'
    gains = [arm.gain(measure.name) for arm in arms]
    seeds = [_seed_means(arm, measure) for arm in arms]
    known = [gain for gain in gains if gain is not None]
    if not known:
        return [heading, f'<text class="mid" x="{middle}" y="{HEAD + 18:.0f}">not measured</text>']
    ends = [end for gain in known for end in (gain.low, gain.mean, gain.high) if math.isfinite(end)]
    ends += [mean for means in seeds for mean in means]
    # Zero is always on the axis: a difference is read against it.
    ticks = nice_ticks(min(0.0, *ends), max(0.0, *ends), 4)
    axis = _Axis(ticks, left=left)
    parts = [heading, *_grid(axis, bottom)]
    for index, (arm, gain) in enumerate(zip(arms, gains, strict=True)):
        if gain is not None:
            y = HEAD + ROW * (index + 0.5)
            parts += _marks(arm, measure, gain, seeds[index], axis, y)
    return parts


class _Axis:
    """The map from differences to drawing units of one panel."""

    def __init__(self, ticks: Sequence[float], *, left: float) -> None:
        self.ticks = ticks
        self._left = left

    def x(self, value: float) -> float:
        return self._left + PANEL * (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])


def _seed_means(arm: Arm, measure: Measure) -> list[float]:
    """Mean gain of each seed; none for a single run, whose mean is drawn anyway."""
    if len(arm.runs) == 1:
        return []
    return [mean for mean in arm.by_seed(measure.name).values() if mean is not None]


def _grid(axis: _Axis, bottom: float) -> list[str]:
    """Draws a line for each tick, with labels where they do not touch."""
    ticks = axis.ticks
    texts = [format_signed(round(tick, 9), tick_digits(ticks)) for tick in ticks]
    # Where labels would touch only every second or third has one, counted from zero.
    apart = math.ceil((CHARACTER * max(map(len, texts)) + 2) / (PANEL / (len(ticks) - 1)))
    zero = min(range(len(ticks)), key=lambda index: abs(ticks[index]))
    parts = []
    for index, (tick, text) in enumerate(zip(ticks, texts, strict=True)):
        # Ticks are products of floats: zero may be off by rounding.
        style = ' class="zero"' if abs(tick) < 1e-12 else ""
        x = f"{axis.x(tick):.1f}"
        line = f'<line{style} x1="{x}" y1="{HEAD:.0f}" x2="{x}" y2="{bottom:.0f}"/>'
        label = text if (index - zero) % apart == 0 else ""
        word = f'<text class="mid" x="{x}" y="{bottom + 16:.1f}">{label}</text>'
        parts += [f'<g class="axes">{line}', f"{word}</g>"]
    return parts


def _marks(
    arm: Arm, measure: Measure, gain: Interval, seeds: Sequence[float], axis: _Axis, y: float
) -> list[str]:
    """Draws interval, seeds and mean of one arm; hovering shows them as text."""
    cell = cell_of(gain, measure)
    title = escape(f"{arm.label}: {cell.mean} ({cell.span}), n = {gain.n}")
    parts = [f'<g class="{cell.verdict}"><title>{title}</title>']
    # One task has a mean and no interval.
    if math.isfinite(gain.low):
        low, high = axis.x(gain.low), axis.x(gain.high)
        parts.append(
            f'<line class="span" x1="{low:.1f}" y1="{y:.1f}" x2="{high:.1f}" y2="{y:.1f}"/>'
        )
    parts += [
        f'<circle class="seed" cx="{axis.x(mean):.1f}" cy="{y:.1f}" r="2.6"/>' for mean in seeds
    ]
    parts.append(f'<circle class="mean" cx="{axis.x(gain.mean):.1f}" cy="{y:.1f}" r="4"/></g>')
    return parts


def _cut(label: str, longest: int = 42) -> str:
    return label if len(label) <= longest else f"{label[: longest - 1]}\u2026"
