"""The curves of a run: every number of metrics.jsonl in exactly one chart, in the order of the questions one asks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rl_edit.report.charts import (
    NUM_COLOURS,
    Chart,
    Mark,
    Series,
    line_chart,
    stacked_chart,
    twin_chart,
)
from rl_edit.report.run_files import RunFiles, number

# Terms that are measured outside the mask are recognised by these words in their name.
OUTSIDE = re.compile(r"background|preserv|outside|lpips|psnr|ssim", re.IGNORECASE)
DRIFT = {
    "seam": (
        "Seam around the mask",
        0.0,
        "change just outside the mask minus further away; 0 is none",
    ),
    "brightness": (
        "Brightness shift",
        0.0,
        "mean luma minus the source's, on a scale of 1; below 0 is darker",
    ),
    "edges": ("Edge density", 1.0, "times the source's; below 1 is smoother, above 1 rougher"),
    "entropy": ("Entropy difference", 0.0, "bits of the tones, minus the source's"),
    "spectrum": (
        "Strongest wave in the change",
        0.0,
        "amplitude; a grid gathers in one wave what noise spreads over all",
    ),
}
"""Title, value of an unchanged background, and note of ``background/NAME/mean``: measures that say in which way it changed."""
MISSING = {
    "invalid_share": ("Scores that are invalid", "an answer that is no score, or none"),
    "timeout_share": ("Scores that came too late", "no answer in time"),
    "refused_share": ("Scores that were refused", "the judge declined to answer"),
    "cached_share": ("Scores recalled from the cache", ""),
    "uncached_share": ("Scores that could not be kept", "the cache's disk did not take them"),
}
"""Title and note of ``reward/TERM/NAME``."""


@dataclass(frozen=True, kw_only=True)
class ChartGroup:
    title: str
    about: str
    charts: tuple[Chart, ...]


Charts = Sequence[Chart | None]
"""None stands for a chart without data."""


def chart_groups(files: RunFiles) -> list[ChartGroup]:
    """Every numeric key of metrics.jsonl in exactly one chart; keys this page has no place for come last, under their own name."""
    curves = _Curves(files)
    planned: tuple[tuple[str, str, Charts], ...] = (
        ("Inside the mask", "Does the edit do what the instruction says?", curves.inside()),
        ("Outside the mask", "Does everything else stay as it was?", curves.outside()),
        (
            "Background drift",
            "In which way it changes, if it does: each of these hides behind a good PSNR for a while.",
            curves.drift(),
        ),
        (
            "Held-out tasks",
            "Gold is the reward that is trusted, on tasks that are not trained on. When it falls while the training reward rises, the "
            "training reward is earned by something else than was wanted.",
            _heldout(files),
        ),
        (
            "Where the editor looks",
            "How much of the text-to-image attention falls on the region to edit.",
            curves.attention(),
        ),
        (
            "Spread within a group",
            "How much the candidates of one task differ: what the method learns from. Zero teaches nothing.",
            curves.spread(),
        ),
        (
            "What drives the reward",
            "Which term and which side of the mask decide who is better than whom, and how much of it is noise or missing.",
            curves.drivers(),
        ),
        (
            "Optimisation",
            "Is the step small, and is it taken on fresh data?",
            curves.optimisation(),
        ),
        ("Time", "Where an update's seconds go.", curves.time()),
        ("Other numbers", "Further keys of metrics.jsonl, as they are.", curves.rest()),
    )
    drawn = (
        ChartGroup(title=title, about=about, charts=tuple(c for c in charts if c is not None))
        for title, about, charts in planned
    )
    return [group for group in drawn if group.charts]


class _Curves:
    """The sections, each a list of charts; what a chart has shown is not shown again by ``rest``."""

    def __init__(self, files: RunFiles) -> None:
        self._files = files
        self._names = files.metric_names()
        self._used: set[str] = {"update"}

    def inside(self) -> Charts:
        return [
            self._line(
                "reward/total/mean",
                "Total reward",
                "reward",
                note="mean over candidates; weighs every term, outside ones too",
            ),
            *(
                self._line(key, title, unit)
                for key, title, term, unit in self._parts()
                if not OUTSIDE.search(term)
            ),
            self._line(
                "change/inside/mean",
                "Change inside the mask",
                "change",
                from_zero=True,
                note="mean absolute difference from the source",
            ),
        ]

    def outside(self) -> Charts:
        other = self._matching(rf"background/(?!psnr/(?:mean|spread)$|(?:{'|'.join(DRIFT)})/)(.+)")
        return [
            self._line(
                "background/psnr/mean", "Background PSNR", "dB", note="mean over candidates"
            ),
            self._line(
                "background/psnr/spread",
                "Background PSNR, spread within a group",
                "dB",
                from_zero=True,
                note="how much the candidates of one task differ",
            ),
            *(
                self._line(
                    key, f"Background {spaced(rest)}", "dB" if rest.startswith("psnr") else ""
                )
                for key, rest in other
            ),
            *(
                self._line(key, title, unit)
                for key, title, term, unit in self._parts()
                if OUTSIDE.search(term)
            ),
        ]

    def drift(self) -> Charts:
        charts = []
        for name, (title, unchanged, note) in DRIFT.items():
            left = self._series(f"background/{name}/mean", "mean over candidates")
            right = self._series(f"background/{name}/spread", "spread in a group")
            charts.append(
                twin_chart(
                    title=title, left=left, right=right, reference=unchanged, smooth=True, note=note
                )
                or line_chart(title=title, unit=left.label, series=[left, right], note=note)
            )
        return charts

    def attention(self) -> Charts:
        found = self._matching(r"concentration/(.+)")
        return [
            self._line(
                key, f"Concentration, {spaced(rest)}", "concentration", from_zero=rest == "spread"
            )
            for key, rest in found
        ]

    def spread(self) -> Charts:
        terms = [
            (key, term) for key, term in self._matching(r"reward/(.+)/spread") if term != "total"
        ]
        components = self._matching(r"component/(.+)/spread")
        return [
            self._line(
                "reward/total/spread", "Spread of the total reward", "reward", from_zero=True
            ),
            *(
                self._line(key, f"Spread of {spaced(term)}", "reward", from_zero=True)
                for key, term in terms
            ),
            *(
                self._line(key, f"Spread of {spaced(term)}", "score", from_zero=True)
                for key, term in components
            ),
            self._line(
                "change/inside/spread",
                "Spread of the change inside the mask",
                "change",
                from_zero=True,
            ),
            *self._together(
                r"exploration/(.+)/inside",
                "Noise inside the mask, by kind of edit",
                "spread",
                note="steered, so that the score below stays in its band",
            ),
            *self._together(
                r"exploration/(.+)/deviation",
                "Deviation of the watched score within a group, by kind of edit",
                "score",
            ),
        ]

    def drivers(self) -> Charts:
        return [
            *self._by_term(
                "variance_share",
                "Share of the total's variance",
                "share",
                note="sums to 1; a term below 0 pulls against the others",
            ),
            self._line(
                "change/variance_inside_share",
                "Share of the pixels' variance inside the mask",
                "share",
                from_zero=True,
                note="of the differences between candidates; the rest is background",
            ),
            self._both_sides(
                "mean",
                "Variance between candidates, by side",
                "of pixel intensities on a scale of 1, a mean over the picture",
            ),
            self._both_sides("spread", "Spread of that variance within a group"),
            *self._by_term(
                "noise_to_spread",
                "Noise over spread",
                "ratio",
                note="at 1 the differences within a group are nothing but noise",
            ),
            *self._by_term(
                "noise",
                "Noise of one measurement",
                "reward",
                note="standard deviation, from candidates that were scored twice",
            ),
            *(
                chart
                for name, (title, note) in MISSING.items()
                for chart in self._by_term(name, title, "share", note=note)
            ),
        ]

    def optimisation(self) -> Charts:
        ends = (("min", "smallest"), ("max", "largest"))
        return [
            self._line("ratio/mean", "Probability ratio, mean", "ratio"),
            *(
                self._line(f"ratio/{end}", f"Probability ratio, {words}", "ratio")
                for end, words in ends
            ),
            self._line(
                "ratio/max_deviation",
                "Probability ratio, largest |ratio \u2212 1|",
                "|ratio \u2212 1|",
                from_zero=True,
            ),
            self._line("clip/share", "Share of ratios clipped", "share", from_zero=True),
            self._line("gradient/norm", "Gradient norm", "norm", from_zero=True),
            self._line("loss", "Loss", "loss"),
            *(
                self._line(key, f"Loss: {spaced(rest)}", "loss")
                for key, rest in self._matching(r"loss/(.+)")
            ),
            line_chart(
                title="Groups used and dropped",
                unit="groups an update",
                series=[
                    self._series(key, spaced(rest)) for key, rest in self._matching(r"groups/(.+)")
                ],
                from_zero=True,
                smooth=False,
            ),
            self._line(
                "staleness",
                "Staleness",
                "updates",
                from_zero=True,
                smooth=False,
                note="how many updates old the weights behind the groups were",
            ),
        ]

    def time(self) -> Charts:
        parts = {
            spaced(rest): self._series(key, rest).points
            for key, rest in self._matching(r"seconds/(.+)")
            if rest != "update"
        }
        whole = self._series("seconds/update", "Seconds per update").points
        if not parts:
            return [self._line("seconds/update", "Seconds per update", "s", from_zero=True)]
        note = "phases may run at the same time, so their sum can exceed the whole update"
        return [
            stacked_chart(title="Seconds per phase", unit="s", phases=parts, total=whole, note=note)
        ]

    def rest(self) -> Charts:
        return [self._line(key, key, "") for key in self._names if key not in self._used]

    def _parts(self) -> list[tuple[str, str, str, str]]:
        """(key, title, term, unit) of every term's and component's mean, instructions first among components."""
        terms = [
            (key, term) for key, term in self._matching(r"reward/(.+)/mean") if term != "total"
        ]
        components = sorted(
            self._matching(r"component/(.+)/mean"), key=lambda pair: "instruction" not in pair[1]
        )
        parts = [(key, f"Reward term: {spaced(term)}", term, "reward") for key, term in terms]
        return [
            *parts,
            *(
                (key, f"Part of a reward: {spaced(term)}", term, "score")
                for key, term in components
            ),
        ]

    def _matching(self, pattern: str) -> list[tuple[str, str]]:
        return [
            (key, found.group(1)) for key in self._names if (found := re.fullmatch(pattern, key))
        ]

    def _series(self, key: str, label: str) -> Series:
        self._used.add(key)
        return Series(label=label, points=self._files.column(key))

    def _line(
        self,
        key: str,
        title: str,
        unit: str,
        *,
        from_zero: bool = False,
        smooth: bool = True,
        note: str = "",
    ) -> Chart | None:
        series = [self._series(key, title)]
        return line_chart(
            title=title, unit=unit, series=series, from_zero=from_zero, smooth=smooth, note=note
        )

    def _together(self, pattern: str, title: str, unit: str, *, note: str = "") -> Charts:
        """One line for each key of a pattern, in as many charts as there are colours for."""
        series = [self._series(key, spaced(rest)) for key, rest in self._matching(pattern)]
        title = f"{title}: {series[0].label}" if len(series) == 1 else title
        charts: Iterable[list[Series]] = (
            series[start : start + NUM_COLOURS] for start in range(0, len(series), NUM_COLOURS)
        )
        return [
            line_chart(title=title, unit=unit, series=lines, from_zero=True, note=note)
            for lines in charts
        ]

    def _by_term(self, name: str, title: str, unit: str, *, note: str = "") -> Charts:
        """One line for each term that has ``reward/TERM/NAME``."""
        return self._together(rf"reward/(.+)/{name}", title, unit, note=note)

    def _both_sides(self, what: str, title: str, note: str = "") -> Chart | None:
        """Variance inside and outside the mask: the mean over candidates, or its spread."""
        series = [
            self._series(f"change/variance_{side}/{what}", side) for side in ("inside", "outside")
        ]
        return line_chart(title=title, unit="variance", series=series, from_zero=True, note=note)


def _heldout(files: RunFiles) -> Charts:
    """Gold against what is trained on, with the alarms and the adapter that was kept; nothing for a run without evaluations."""
    alarms = dict.fromkeys(
        number(row.get("update")) for row in files.events.rows if row.get("event") == "gold_alarm"
    )
    marks = [Mark(label="alarm", update=update) for update in alarms if update is not None]
    if (best := number(files.best.get("update"))) is not None:
        marks.insert(0, Mark(label="best", update=best))

    def line(key: str, title: str, unit: str) -> Chart | None:
        return line_chart(
            title=title,
            unit=unit,
            series=[Series(label="held-out", points=files.heldout_column(key))],
            smooth=False,
        )

    return [
        twin_chart(
            title="Held-out gold against training reward",
            left=Series(label="gold, held-out", points=files.heldout_column("gold")),
            right=Series(label="total reward, training", points=files.heldout_column("training")),
            marks=marks,
            note="two axes: compare directions, not heights; training reward is the mean since the evaluation before",
        ),
        line("total", "Total reward, held-out", "reward"),
        line("background_psnr", "Background PSNR, held-out", "dB"),
    ]


def spaced(name: object) -> str:
    """A key as words."""
    return str(name).replace("_", " ").replace("/", ", ")
