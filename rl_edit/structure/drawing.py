"""Draws an import graph as one SVG file.

It suits light and dark pages. The file holds no script and loads no font.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from rl_edit.structure.floors import floor_of
from rl_edit.structure.imports import ImportGraph
from rl_edit.structure.layout import (
    BOX_WIDTH,
    HEADER,
    MARGIN,
    Arrow,
    Layout,
    lay_out,
)

# Pixels.
_CORNER = 6.0
_TIP_LENGTH, _TIP_HALF = 8.0, 3.7
# Lanes beside each other differ in colour; farther ones may share one.
_NUM_COLOURS = 6
_UP_WIDTH = 2.5
# Numbers of imports whose widths the legend shows.
_LEGEND = (1, 4, 16)

# Colours by class, on a light and on a dark page. Plain values: some programs that show SVG do not
# know CSS variables.
_COLOURS = {
    "page": ("#ffffff", "#0d1117"),
    "band": ("#f2f4f9", "#161c26"),
    "box": ("#ffffff", "#202936"),
    "edge": ("#5b6b8c", "#8b9bb8"),
    "ink": ("#14213d", "#e8edf6"),
    "soft": ("#56627c", "#a3afc4"),
    "up": ("#c62828", "#ff6b6b"),
    "c0": ("#2c6fbb", "#6fb1f5"),
    "c1": ("#b5651d", "#f0a35e"),
    "c2": ("#2e7d46", "#6cc98a"),
    "c3": ("#7a4fb0", "#c39bf0"),
    "c4": ("#0f8a8a", "#56cfcf"),
    "c5": ("#857410", "#d8c64f"),
}
_FIXED_STYLE = """
.head { font-size: 17px; font-weight: 600 } .name { font-weight: 600 } .soft { font-size: 11.5px }
.mid { text-anchor: middle } .line { fill: none }
"""


def draw(graph: ImportGraph) -> str:
    """Draws the graph. The same graph gives the same text.

    A box carries ``data-room`` and ``data-floor``, an arrow ``data-from`` and ``data-to``; both
    serve the test that compares a drawing with the sources.
    """
    layout = lay_out(graph)
    width, height = f"{layout.width:.0f}", f"{layout.height:.0f}"
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" font-size="13" '
            "font-family=\"system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif\">",
            "<title>Imports between the rooms of rl-edit</title>",
            f"<style>{_style()}</style>",
            f'<rect class="page" width="{width}" height="{height}" rx="10"/>',
            *_header(layout),
            *_bands(layout),
            # Wide lines first: a thin one on top of them stays visible.
            *(
                line
                for arrow in sorted(layout.arrows, key=lambda arrow: -arrow.weight)
                for line in _arrow(arrow, _colour(layout, arrow))
            ),
            *_boxes(layout),
            *_footer(layout, graph),
            "</svg>",
            "",
        )
    )


def summary(graph: ImportGraph) -> str:
    """Describes the graph in one sentence: rooms, arrows, imports, and arrows that run back up."""
    weights, num_up = graph.weights, len(graph.arrows_up)
    order = {0: "no arrow runs", 1: "1 arrow runs"}.get(num_up, f"{num_up} arrows run")
    return (
        f"{len(graph.rooms)} rooms, {len(weights)} arrows, {weights.total()} imports; "
        f"{order} back up"
    )


def _style() -> str:
    """Makes the style sheet: fills of areas and text, strokes of lines, once per kind of page."""

    def rules(dark: bool) -> str:
        colours = {name: pair[dark] for name, pair in _COLOURS.items()}
        fills = "".join(f".{name} {{ fill: {colour} }}\n" for name, colour in colours.items())
        lines = "".join(
            f".{name} .line {{ stroke: {colour} }}\n"
            for name, colour in colours.items()
            if name.startswith(("c", "up", "edge"))
        )
        return f"{fills}{lines}.box {{ stroke: {colours['edge']}; stroke-width: 1.3 }}\n"

    dark = rules(dark=True)
    return f"{_FIXED_STYLE}{rules(dark=False)}@media (prefers-color-scheme: dark) {{\n{dark}}}\n"


def _header(layout: Layout) -> Iterator[str]:
    yield f'<text class="head ink" x="{MARGIN:.0f}" y="32">Imports between rooms</text>'
    lines = (
        "An arrow leads from the room that imports to the room that is imported.",
        "Each lane with its colour belongs to one importing room.",
    )
    for number, line in enumerate(lines):
        yield f'<text class="soft" x="{MARGIN:.0f}" y="{51 + 16 * number}">{line}</text>'
    yield f'<text class="soft" x="{MARGIN:.0f}" y="{HEADER - 6:.0f}">floor</text>'


def _bands(layout: Layout) -> Iterator[str]:
    # Bands lie below everything else and reach across the lanes.
    for band in layout.bands:
        yield (
            f'<rect class="band" x="{MARGIN / 2:.0f}" y="{band.top:.1f}" '
            f'width="{layout.width - MARGIN:.0f}" height="{band.height:.1f}" rx="6"/>'
        )
        yield (
            f'<text class="soft mid" x="{MARGIN + 13:.0f}" '
            f'y="{band.top + band.height / 2 + 4:.1f}">{band.floor}</text>'
        )


def _boxes(layout: Layout) -> Iterator[str]:
    for box in layout.boxes:
        yield (
            f'<g data-room="{escape(box.room.name)}" data-floor="{floor_of(box.room)}">'
            f'<rect class="box" x="{layout.left:.0f}" y="{box.top:.1f}" width="{BOX_WIDTH:.0f}" '
            f'height="{box.height:.1f}" rx="6"/>'
            f'<text class="name ink" x="{layout.left + 12:.0f}" y="{box.top + 18:.1f}">'
            f"{escape(box.room.name)}</text>"
            f'<text class="soft" x="{layout.left + 12:.0f}" y="{box.top + 35:.1f}">'
            f"{escape(box.room.holds)}</text></g>"
        )


def _colour(layout: Layout, arrow: Arrow) -> str:
    if arrow.back_up:
        return "up"
    # By the order of the lanes, so that neighbours differ.
    return f"c{layout.sources.index(arrow.importer) % _NUM_COLOURS}"


def _arrow(arrow: Arrow, colour: str) -> Iterator[str]:
    """Draws one arrow along its lane."""
    # Signs: away from the boxes, and along the lane. Lanes on the left are mirrored.
    away = 1.0 if arrow.lane > arrow.edge else -1.0
    along = 1.0 if arrow.end > arrow.start else -1.0
    tip = arrow.edge + away * _TIP_LENGTH
    bend = _CORNER * away
    turn = _CORNER * along
    # Two rounded corners: out of the room into the lane, and out of the lane into the room. The
    # line ends inside the tip, so that no gap shows between them.
    path = (
        f"M{arrow.edge:.1f} {arrow.start:.1f}H{arrow.lane - bend:.1f}"
        f"Q{arrow.lane:.1f} {arrow.start:.1f} {arrow.lane:.1f} {arrow.start + turn:.1f}"
        f"V{arrow.end - turn:.1f}"
        f"Q{arrow.lane:.1f} {arrow.end:.1f} {arrow.lane - bend:.1f} {arrow.end:.1f}"
        f"H{tip - away:.1f}"
    )
    # One import that leads up must catch the eye as well as ten.
    line_width = max(_line_width(arrow.weight), _UP_WIDTH if arrow.back_up else 0.0)
    hover = f"{arrow.importer.name} imports {arrow.imported.name}: {arrow.weight}"
    yield (
        f'<g class="{colour}" data-from="{escape(arrow.importer.name)}" '
        f'data-to="{escape(arrow.imported.name)}"><title>{escape(hover)}</title>'
        f'<path class="line" stroke-width="{line_width:.1f}" d="{path}"/>'
        f'<path d="M{arrow.edge:.1f} {arrow.end:.1f}L{tip:.1f} '
        f'{arrow.end - _TIP_HALF:.1f}V{arrow.end + _TIP_HALF:.1f}Z"/></g>'
    )


def _line_width(weight: int) -> float:
    """Computes a width in pixels that grows with every doubling."""
    return 1 + 0.75 * math.log2(weight)


def _footer(layout: Layout, graph: ImportGraph) -> Iterator[str]:
    # Left to right: a label, then every width with its number; the summary stands below.
    y = layout.height - 40
    x = MARGIN
    yield f'<text class="soft" x="{x:.0f}" y="{y:.0f}">Width of a line:</text>'
    x += 100
    for weight in _LEGEND:
        label = f"{weight} import{'s' if weight > 1 else ''}"
        yield (
            f'<g class="edge"><path class="line" stroke-width="{_line_width(weight):.1f}" '
            f'd="M{x:.0f} {y - 4:.0f}h34"/></g>'
            f'<text class="soft" x="{x + 41:.0f}" y="{y:.0f}">{label}</text>'
        )
        x += 120
    colour = "name up" if graph.arrows_up else "name ink"
    yield (
        f'<text class="{colour}" x="{MARGIN:.0f}" y="{y + 24:.0f}">{escape(summary(graph))}.</text>'
    )
