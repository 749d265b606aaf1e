"""Axes of the charts: round ticks, their labels, and the maps from data to drawing units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import escape

from rl_edit.report.numbers import format_number

# Drawing units of a chart. The page scales it to its column; 440 is about what a column gets.
WIDTH, HEIGHT = 440.0, 210.0
RIGHT, TOP, BOTTOM = 12.0, 12.0, 38.0
# Room beside an axis: for its name, between label and plot, for each character of a label. An SVG
# cannot measure its text, so characters count as wide as a digit of its font.
NAME, GAP, CHARACTER = 20.0, 6.0, 7.0


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Chooses about ``count`` round steps; the first and last tick enclose [low, high]."""
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        pad = abs(low) * 0.05
        # A constant zero is most often a share or a count, which never falls below 0.
        low, high = (low - pad, high + pad) if pad else (0.0, 1.0)
    # The smallest of 1, 2, 2.5, 5, 10 times a power of ten that is no smaller than the raw step.
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(
        factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= raw * 0.999
    )
    # The tolerances keep an end that is a tick but for rounding from getting a further tick.
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_digits(ticks: Sequence[float]) -> int:
    """Counts the decimals that distinguish neighbouring ticks; steps of 2.5 need one more."""
    step = ticks[1] - ticks[0]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return digits if math.isclose(round(step, digits), step, rel_tol=1e-6) else digits + 1


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Writes evenly spaced ticks with as many decimals as their step needs."""
    digits = tick_digits(ticks)
    return [
        format_number(tick, digits if digits <= 5 and abs(tick) < 1e5 else None) for tick in ticks
    ]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The plotting area: data ranges, ticks, and maps from data to drawing units.

    Attributes:
        left, right: margins beside the plot.
    """

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
    ) -> Frame:
        """Fits a frame around data.

        Args:
            ticks_at: first and last label of the horizontal axis, where not the ends of ``xs``.
            twin: ticks of both vertical axes, where there are two to make room for.
        """
        low, high = min(xs), max(xs)
        first, last = ticks_at or (low, high)
        # One update gets an axis of width 1, with its dot in the middle.
        if low == high:
            low, high = low - 0.5, high + 0.5
        # A round tick this close to an end would collide with the end's label.
        gap = (last - first) / 8
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
        """Maps an update to drawing units."""
        return self.left + (WIDTH - self.left - self.right) * (value - self.x_low) / (
            self.x_high - self.x_low
        )

    def y(self, value: float) -> float:
        """Maps a value to drawing units, which grow downwards."""
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        """Draws points as the data of an SVG path."""
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)

    def right_axis(self, unit: str) -> str:
        """Draws a second vertical axis, without grid lines."""
        # 3.8 units lower a text's base line so that its middle is at the tick.
        edge, middle = WIDTH - self.right, TOP + (HEIGHT - TOP - BOTTOM) / 2
        texts = [
            f'<text x="{edge + GAP:.0f}" y="{y + 3.8:.1f}">{label}</text>'
            for y, label in self._labels()
        ]
        turn = f"translate({WIDTH - 6:.0f} {middle:.0f}) rotate(-90)"
        name = f'<text class="mid name" transform="{turn}">{escape(unit)}</text>'
        return f'<g class="axes">{"".join(texts)}{name}</g>'

    def axes(self, unit: str) -> str:
        """Draws both axes, with grid lines and their names."""
        parts = ['<g class="axes">']
        edge, bottom = WIDTH - self.right, HEIGHT - BOTTOM + 16
        for y, label in self._labels():
            parts += [
                f'<line x1="{self.left:.0f}" y1="{y:.1f}" x2="{edge:.0f}" y2="{y:.1f}"/>',
                f'<text class="end" x="{self.left - GAP:.0f}" y="{y + 3.8:.1f}">{label}</text>',
            ]
        for tick in self.x_ticks:
            label = format_number(tick)
            parts.append(
                f'<text class="mid" x="{self.x(tick):.1f}" y="{bottom:.1f}">{label}</text>'
            )
        center, middle = (self.left + edge) / 2, TOP + (HEIGHT - TOP - BOTTOM) / 2
        turn = f"translate(12 {middle:.0f}) rotate(-90)"
        parts += [
            f'<text class="mid name" x="{center:.0f}" y="{HEIGHT - 5:.0f}">update</text>',
            f'<text class="mid name" transform="{turn}">{escape(unit)}</text></g>',
        ]
        return "".join(parts)

    def _labels(self) -> list[tuple[float, str]]:
        """(place, text) of each tick of the vertical axis."""
        texts = tick_labels(self.y_ticks)
        return [(self.y(tick), text) for tick, text in zip(self.y_ticks, texts, strict=True)]


def _margin(ticks: Sequence[float]) -> float:
    return NAME + CHARACTER * max(4, *map(len, tick_labels(ticks))) + GAP
