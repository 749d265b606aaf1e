"""Renders an audit as one HTML file: verdicts, response curves, and the corrupted images.

The page holds no script and loads nothing from outside.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from rl_edit.audit.audit import Audit, Curve, TermAudit
from rl_edit.audit.corruptions import LEVELS, RGB
from rl_edit.report.axes import nice_ticks
from rl_edit.report.numbers import format_number
from rl_edit.report.strips import MAX_PIXELATED, mask_outline

# Pixels of one plot, and its margins.
WIDTH, HEIGHT = 300.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 10.0, 10.0, 34.0
MAX_THUMBNAIL = 160
# Colours of the style sheet, for light and dark pages.
SIDE_CLASS = {"inside": "c0", "outside": "c1"}


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """One embedded image with every term's score."""

    title: str
    data: str
    pixelated: bool
    outlined: bool
    scores: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """The curves of one corruption."""

    title: str
    svg: Markup


def render(audit: Audit, *, title: str) -> str:
    """Writes the page's text. The same audit gives the same bytes."""
    # Scores and names come from data and rewards, so everything is escaped. A name missing from the
    # template's variables is an error, not an empty string.
    environment = Environment(
        loader=PackageLoader("rl_edit.audit", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    task = audit.example.task
    height, width = task.edit_mask.shape
    return environment.get_template("page.html.j2").render(
        title=title,
        audit=audit,
        levels=LEVELS,
        drawings={term.name: list(_drawings(term)) for term in audit.terms},
        numbers=_numbers,
        task=task,
        outline=mask_outline(task.edit_mask.numpy()),
        width=width,
        height=height,
        rows=list(_rows(audit)),
        sides=SIDE_CLASS,
        examples=_total_examples(audit),
    )


def response_svg(curves: Sequence[Curve], *, title: str) -> Markup:
    """Draws score over strength, with 95 % intervals.

    Each side of the mask has a line. The line of a side that the term should not respond to is
    dashed.
    """
    ends = [
        value
        for curve in curves
        for row in (curve.mean, curve.low, curve.high)
        for value in row
        if math.isfinite(value)
    ]
    # Ticks enclose all means and intervals, so no line leaves the plot.
    axes = _Axes(ticks=tuple(nice_ticks(min(ends), max(ends))))
    # Curves come last: what is drawn later lies on top of the grid.
    body = "".join([*axes.draw(), *(part for curve in curves for part in axes.draw_curve(curve))])
    return Markup(
        f'<svg class="plot" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" '
        f'aria-label="{escape(title)}">{body}</svg>'
    )


@dataclass(frozen=True, kw_only=True)
class _Axes:
    """Coordinates of a plot: levels run to the right, scores run up between the outer ticks."""

    ticks: tuple[float, ...]

    def x(self, level: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * level / LEVELS

    def y(self, value: float) -> float:
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        # SVG counts y downwards.
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    def points(self, values: Sequence[float], levels: Sequence[int]) -> str:
        return " ".join(
            f"{self.x(level):.1f},{self.y(value):.1f}"
            for level, value in zip(levels, values, strict=True)
        )

    def draw(self) -> Iterator[str]:
        """Draws the grid with its labels."""
        for tick in self.ticks:
            yield (
                f'<line class="grid" x1="{LEFT:.0f}" y1="{self.y(tick):.1f}" '
                f'x2="{WIDTH - RIGHT:.0f}" y2="{self.y(tick):.1f}"/>'
            )
            yield (
                f'<text class="end" x="{LEFT - 5:.0f}" y="{self.y(tick) + 3.5:.1f}">'
                f"{format_number(round(tick, 9))}</text>"
            )
        for level in range(LEVELS + 1):
            yield (
                f'<text class="mid" x="{self.x(level):.1f}" y="{HEIGHT - BOTTOM + 15:.0f}">'
                f"{level or 'clean'}</text>"
            )
        centre = (LEFT + WIDTH - RIGHT) / 2
        yield f'<text class="mid" x="{centre:.0f}" y="{HEIGHT - 4:.0f}">strength</text>'

    def draw_curve(self, curve: Curve) -> Iterator[str]:
        """Draws a line and its interval, if any."""
        levels = range(LEVELS + 1)
        colour = SIDE_CLASS[curve.side]
        # With a single task the interval is infinite and cannot be drawn.
        if all(math.isfinite(value) for value in (*curve.low, *curve.high)):
            low = self.points(curve.low, levels)
            high = self.points(curve.high[::-1], levels[::-1])
            yield f'<polygon class="band {colour}" points="{low} {high}"/>'
        values = ", ".join(format_number(value) for value in curve.mean)
        dashed = "" if curve.expected else " dashed"
        line = self.points(curve.mean, levels)
        yield f'<polyline class="line {colour}{dashed}" points="{line}">'
        hover = escape(f"{curve.corruption} {curve.side}: {values}")
        yield f"<title>{hover}</title></polyline>"


def _numbers(numbers: dict[str, float]) -> str:
    # Numbers that do not exist are left out; audit.json has them as null.
    return ", ".join(
        f"{name.replace('_', ' ')} {format_number(value)}"
        for name, value in numbers.items()
        if math.isfinite(value)
    )


def _drawings(term: TermAudit) -> Iterator[Drawing]:
    # Both sides of a corruption share a plot; dict keys keep the order of the first task.
    for corruption in dict.fromkeys(curve.corruption for curve in term.curves):
        # A curve without values has no task with a score at every level.
        curves = [curve for curve in term.curves if curve.corruption == corruption and curve.mean]
        if curves:
            svg = response_svg(curves, title=f"{term.name}: {corruption}")
            yield Drawing(title=corruption, svg=svg)


def _total_examples(audit: Audit) -> list[Thumbnail]:
    """Shows what the weighted sum was asked about, with its values."""
    if audit.total is None:
        return []
    return [
        _thumbnail(title, image, {"weighted sum": audit.total.scores[title]})
        for title, image in audit.total.example.items()
    ]


def _rows(audit: Audit) -> Iterator[tuple[str, list[Thumbnail]]]:
    """Yields the first task's images: the task, every corruption by strength, and the blanks."""
    images, terms = audit.example, audit.terms
    # A term without a score shows "no score", so every image has an entry for every term.
    first = [
        _thumbnail("source, mask outlined", images.task.source, {}, outlined=True),
        _thumbnail("correct edit", images.clean, {t.name: t.example.clean for t in terms}),
    ]
    if images.elsewhere is not None:
        scores = {t.name: t.example.single.get("elsewhere", math.nan) for t in terms}
        first.append(_thumbnail("edit elsewhere", images.elsewhere, scores))
    yield "the task", first
    for (corruption, side), row in images.graded.items():
        # A term without a score of the correct edit was shown nothing else.
        graded = {
            t.name: t.example.graded.get((corruption, side), (math.nan,) * LEVELS) for t in terms
        }
        yield (
            f"{corruption}, {side}",
            [
                _thumbnail(
                    f"level {level + 1}",
                    image,
                    {name: by_level[level] for name, by_level in graded.items()},
                )
                for level, image in enumerate(row)
            ],
        )
    yield (
        "no edit at all",
        [
            _thumbnail(name, image, {t.name: t.example.blanks.get(name, math.nan) for t in terms})
            for name, image in images.blanks.items()
        ],
    )


def _thumbnail(
    title: str, pixels: RGB, scores: dict[str, float], *, outlined: bool = False
) -> Thumbnail:
    # Shown small, embedded small: a page of a large canvas would have tens of megabytes.
    image = Image.fromarray(pixels.numpy())
    if max(image.size) > MAX_THUMBNAIL:
        image.thumbnail((MAX_THUMBNAIL, MAX_THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return Thumbnail(
        title=title,
        data="data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"),
        # Small images are enlarged as squares, so that single corrupted pixels can be seen.
        pixelated=max(image.size) <= MAX_PIXELATED,
        outlined=outlined,
        scores=tuple(
            (name, format_number(value) if math.isfinite(value) else "no score")
            for name, value in scores.items()
        ),
    )
