"""An audit as one HTML file: verdicts, response curves, and the damaged pictures themselves. No script, no outside resource."""

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
from rl_edit.audit.corruptions import LEVELS, Picture
from rl_edit.report.charts import nice_ticks, plain
from rl_edit.report.strips import MAX_PIXELATED, mask_outline

WIDTH, HEIGHT = 300.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 10.0, 10.0, 34.0
MAX_THUMBNAIL = 160
SIDE_CLASS = {"inside": "c0", "outside": "c1"}


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One picture with what every term gave it."""

    title: str
    data: str
    pixelated: bool
    outlined: bool
    scores: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """The curves of one damage."""

    title: str
    svg: Markup


def render(audit: Audit, *, title: str) -> str:
    """The page's text. The same audit gives the same bytes."""
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
    )


def _numbers(numbers: dict[str, float]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {plain(value)}"
        for name, value in numbers.items()
        if math.isfinite(value)
    )


def _drawings(term: TermAudit) -> Iterator[Drawing]:
    for damage in dict.fromkeys(curve.damage for curve in term.curves):
        curves = [curve for curve in term.curves if curve.damage == damage and curve.mean]
        if curves:
            yield Drawing(title=damage, svg=response_svg(curves, title=f"{term.name}: {damage}"))


def response_svg(curves: Sequence[Curve], *, title: str) -> Markup:
    """Score over strength, a line a side with its 95 % interval; a side the term should not respond to is dashed."""
    ends = [
        value
        for curve in curves
        for row in (curve.mean, curve.low, curve.high)
        for value in row
        if math.isfinite(value)
    ]
    ticks = nice_ticks(min(ends), max(ends))

    def x(level: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * level / LEVELS

    def y(value: float) -> float:
        return (
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - ticks[0]) / (ticks[-1] - ticks[0])
        )

    def points(values: Sequence[float], levels: Sequence[int]) -> str:
        return " ".join(
            f"{x(level):.1f},{y(value):.1f}" for level, value in zip(levels, values, strict=True)
        )

    parts = []
    for tick in ticks:
        parts.append(
            f'<line class="grid" x1="{LEFT:.0f}" y1="{y(tick):.1f}" x2="{WIDTH - RIGHT:.0f}" y2="{y(tick):.1f}"/>'
        )
        parts.append(
            f'<text class="end" x="{LEFT - 5:.0f}" y="{y(tick) + 3.5:.1f}">{plain(round(tick, 9))}</text>'
        )
    levels = range(LEVELS + 1)
    parts += [
        f'<text class="mid" x="{x(level):.1f}" y="{HEIGHT - BOTTOM + 15:.0f}">{level or "clean"}</text>'
        for level in levels
    ]
    parts.append(
        f'<text class="mid" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 4:.0f}">strength</text>'
    )
    for curve in curves:
        colour = SIDE_CLASS[curve.side]
        if all(math.isfinite(value) for value in (*curve.low, *curve.high)):
            band = f"{points(curve.low, levels)} {points(curve.high[::-1], levels[::-1])}"
            parts.append(f'<polygon class="band {colour}" points="{band}"/>')
        told = ", ".join(plain(value) for value in curve.mean)
        dashed = "" if curve.expected else " dashed"
        parts.append(
            f'<polyline class="line {colour}{dashed}" points="{points(curve.mean, levels)}">'
        )
        parts.append(f"<title>{escape(f'{curve.damage} {curve.side}: {told}')}</title></polyline>")
    body = "".join(parts)
    return Markup(
        f'<svg class="plot" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{escape(title)}">{body}</svg>'
    )


def _rows(audit: Audit) -> Iterator[tuple[str, list[Shot]]]:
    """Of the first task: what it is, every damage by strength, and what no judge may take for an edit."""
    shown, terms = audit.example, audit.terms
    first = [
        _shot("source, mask outlined", shown.task.source, {}, outlined=True),
        _shot("right edit", shown.clean, {term.name: term.example.clean for term in terms}),
    ]
    if shown.elsewhere is not None:
        first.append(
            _shot(
                "edit elsewhere",
                shown.elsewhere,
                {t.name: t.example.single.get("elsewhere", math.nan) for t in terms},
            )
        )
    yield "the task", first
    for (damage, side), pictures in shown.graded.items():
        scores = {t.name: t.example.graded.get((damage, side), (math.nan,) * LEVELS) for t in terms}
        yield (
            f"{damage}, {side}",
            [
                _shot(
                    f"level {level + 1}",
                    picture,
                    {name: row[level] for name, row in scores.items()},
                )
                for level, picture in enumerate(pictures)
            ],
        )
    yield (
        "no edit at all",
        [
            _shot(name, picture, {t.name: t.example.blanks.get(name, math.nan) for t in terms})
            for name, picture in shown.blanks.items()
        ],
    )


def _shot(
    title: str, picture: Picture, scores: dict[str, float], *, outlined: bool = False
) -> Shot:
    image = Image.fromarray(picture.numpy())
    if max(image.size) > MAX_THUMBNAIL:
        image.thumbnail((MAX_THUMBNAIL, MAX_THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    told: list[tuple[str, str]] = [
        (name, plain(value) if math.isfinite(value) else "no score")
        for name, value in scores.items()
    ]
    data = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return Shot(
        title=title,
        data=data,
        pixelated=max(image.size) <= MAX_PIXELATED,
        outlined=outlined,
        scores=tuple(told),
    )
