"""Charts of the keys of metrics.jsonl: each key is drawn once, under the first chart that asks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rl_edit.report.charts import NUM_COLOURS, Chart, Series, line_chart
from rl_edit.report.run_files import RunFiles

Charts = Sequence[Chart | None]
"""None stands for a chart without data."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A chart of a single key.

    Attributes:
        from_zero, smooth, note: as in :func:`line_chart`.
    """

    key: str
    title: str
    unit: str
    from_zero: bool = False
    smooth: bool = True
    note: str = ""


class MetricCharts:
    """Draws keys, and remembers which have been drawn."""

    def __init__(self, files: RunFiles) -> None:
        self.files = files
        self._names = files.metric_names()
        # The update is the horizontal axis of all charts.
        self._drawn: set[str] = {"update"}

    def rest(self) -> Charts:
        """Draws every key that no other chart has shown, under its name."""
        # The list is complete only after all other sections have drawn theirs.
        return [
            self.line(Line(key=key, title=key, unit=""))
            for key in self._names
            if key not in self._drawn
        ]

    def matching(self, pattern: str) -> list[tuple[str, str]]:
        """Returns (key, first group) of each key that matches as a whole."""
        return [
            (key, match.group(1)) for key in self._names if (match := re.fullmatch(pattern, key))
        ]

    def series(self, key: str, label: str) -> Series:
        """Reads the points of a key, which is drawn from now on."""
        # Even where it has no points: then it has no number, and ``rest`` does not list it either.
        self._drawn.add(key)
        return Series(label=label, points=self.files.column(key))

    def line(self, line: Line) -> Chart | None:
        """Draws one key."""
        return line_chart(
            title=line.title,
            unit=line.unit,
            series=[self.series(line.key, line.title)],
            from_zero=line.from_zero,
            smooth=line.smooth,
            note=line.note,
        )

    def lines(self, lines: Iterable[Line]) -> list[Chart | None]:
        """Draws one chart for each key."""
        return [self.line(line) for line in lines]

    def each(self, pattern: str, line: Line) -> list[Chart | None]:
        """Draws one chart for each key of a pattern; ``line.title`` holds ``{}`` for its name."""
        return [
            self.line(replace(line, key=key, title=line.title.format(spaced(rest))))
            for key, rest in self.matching(pattern)
        ]

    def together(self, pattern: str, title: str, unit: str, *, note: str = "") -> Charts:
        """Draws all keys of a pattern, in as many charts as there are colours for."""
        series = [self.series(key, spaced(rest)) for key, rest in self.matching(pattern)]
        # A single line has no name in its legend, so the title says which it is.
        title = f"{title}: {series[0].label}" if len(series) == 1 else title
        # All lines stay readable: none is dropped for want of a colour.
        charts = (
            series[start : start + NUM_COLOURS] for start in range(0, len(series), NUM_COLOURS)
        )
        return [
            line_chart(title=title, unit=unit, series=lines, from_zero=True, note=note)
            for lines in charts
        ]

    def by_term(self, name: str, title: str, unit: str, *, note: str = "") -> Charts:
        """Draws one line for each reward term that has ``reward/TERM/NAME``."""
        return self.together(rf"reward/(.+)/{name}", title, unit, note=note)


def spaced(name: object) -> str:
    """Writes a key as words."""
    return str(name).replace("_", " ").replace("/", ", ")
