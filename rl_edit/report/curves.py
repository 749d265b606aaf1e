"""The curves of a run: every number of metrics.jsonl in exactly one chart.

The sections follow the questions one asks of a run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rl_edit.report.charts import Chart, Mark, Series, line_chart, stacked_chart, twin_chart
from rl_edit.report.metric_charts import Charts, Line, MetricCharts, spaced
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
"""Title, value of an unchanged background, and note of ``background/NAME/mean``: kinds of drift."""
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
    """A section of charts under the question it answers."""

    title: str
    about: str
    charts: tuple[Chart, ...]


def chart_groups(files: RunFiles) -> list[ChartGroup]:
    """Draws every numeric key of metrics.jsonl in exactly one chart.

    Keys without a place on this page come last, under their own name.
    """
    metrics = MetricCharts(files)
    sections: tuple[tuple[str, str, Charts], ...] = (
        ("Inside the mask", "Does the edit do what the instruction says?", _inside(metrics)),
        ("Outside the mask", "Does everything else stay as it was?", _outside(metrics)),
        (
            "Background drift",
            "In which way it changes, if it does: each of these hides behind a good PSNR for a "
            "while.",
            _drift(metrics),
        ),
        (
            "Held-out tasks",
            "Gold is the reward that is trusted, on tasks that are not trained on. When it falls "
            "while the training reward rises, the training reward is earned by something else than "
            "was wanted.",
            _heldout(files),
        ),
        (
            "Where the editor looks",
            "How much of the text-to-image attention falls on the region to edit.",
            _attention(metrics),
        ),
        (
            "Spread within a group",
            "How much the candidates of one task differ: what the method learns from. "
            "Zero teaches nothing.",
            _spread(metrics),
        ),
        (
            "What drives the reward",
            "Which term and which side of the mask decide who is better than whom, and how much "
            "of it is noise or missing.",
            _drivers(metrics),
        ),
        (
            "Optimisation",
            "Is the step small, and is it taken on fresh data?",
            _optimisation(metrics),
        ),
        ("Time", "Where an update's seconds go.", _time(metrics)),
        # Last, because it draws the keys that no section before it has drawn.
        ("Other numbers", "Further keys of metrics.jsonl, as they are.", metrics.rest()),
    )
    groups = (
        ChartGroup(
            title=title, about=about, charts=tuple(chart for chart in charts if chart is not None)
        )
        for title, about, charts in sections
    )
    return [group for group in groups if group.charts]


def _inside(metrics: MetricCharts) -> Charts:
    return [
        metrics.line(
            Line(
                key="reward/total/mean",
                title="Total reward",
                unit="reward",
                note="mean over candidates; weighs every term, outside ones too",
            )
        ),
        *metrics.lines(line for term, line in _parts(metrics) if not OUTSIDE.search(term)),
        metrics.line(
            Line(
                key="change/inside/mean",
                title="Change inside the mask",
                unit="change",
                from_zero=True,
                note="mean absolute difference from the source",
            )
        ),
    ]


def _outside(metrics: MetricCharts) -> Charts:
    other = metrics.matching(rf"background/(?!psnr/(?:mean|spread)$|(?:{'|'.join(DRIFT)})/)(.+)")
    return [
        metrics.line(
            Line(
                key="background/psnr/mean",
                title="Background PSNR",
                unit="dB",
                note="mean over candidates",
            )
        ),
        metrics.line(
            Line(
                key="background/psnr/spread",
                title="Background PSNR, spread within a group",
                unit="dB",
                from_zero=True,
                note="how much the candidates of one task differ",
            )
        ),
        *metrics.lines(
            Line(
                key=key,
                title=f"Background {spaced(rest)}",
                unit="dB" if rest.startswith("psnr") else "",
            )
            for key, rest in other
        ),
        *metrics.lines(line for term, line in _parts(metrics) if OUTSIDE.search(term)),
    ]


def _parts(metrics: MetricCharts) -> list[tuple[str, Line]]:
    """Returns (term, line) of each term's and component's mean, instructions first among these."""
    terms = [(key, term) for key, term in metrics.matching(r"reward/(.+)/mean") if term != "total"]
    components = sorted(
        metrics.matching(r"component/(.+)/mean"), key=lambda pair: "instruction" not in pair[1]
    )
    return [
        *(
            (term, Line(key=key, title=f"Reward term: {spaced(term)}", unit="reward"))
            for key, term in terms
        ),
        *(
            (term, Line(key=key, title=f"Part of a reward: {spaced(term)}", unit="score"))
            for key, term in components
        ),
    ]


def _drift(metrics: MetricCharts) -> Charts:
    charts = []
    for name, (title, unchanged, note) in DRIFT.items():
        left = metrics.series(f"background/{name}/mean", "mean over candidates")
        right = metrics.series(f"background/{name}/spread", "spread in a group")
        charts.append(
            twin_chart(
                title=title, left=left, right=right, reference=unchanged, smooth=True, note=note
            )
            or line_chart(title=title, unit=left.label, series=[left, right], note=note)
        )
    return charts


def _heldout(files: RunFiles) -> Charts:
    """Draws gold against the training reward, with the alarms and the best adapter.

    Nothing is drawn for a run without held-out evaluations.
    """
    alarms = dict.fromkeys(
        number(row.get("update")) for row in files.events.rows if row.get("event") == "gold_alarm"
    )
    marks = [Mark(label="alarm", update=update) for update in alarms if update is not None]
    if (best := number(files.best.get("update"))) is not None:
        marks.insert(0, Mark(label="best", update=best))

    def line(key: str, title: str, unit: str) -> Chart | None:
        series = Series(label="held-out", points=files.heldout_column(key))
        return line_chart(title=title, unit=unit, series=[series], smooth=False)

    return [
        twin_chart(
            title="Held-out gold against training reward",
            left=Series(label="gold, held-out", points=files.heldout_column("gold")),
            right=Series(label="total reward, training", points=files.heldout_column("training")),
            marks=marks,
            note="two axes: compare directions, not heights; "
            "training reward is the mean since the evaluation before",
        ),
        line("total", "Total reward, held-out", "reward"),
        line("background_psnr", "Background PSNR, held-out", "dB"),
    ]


def _attention(metrics: MetricCharts) -> Charts:
    return metrics.lines(
        Line(
            key=key,
            title=f"Concentration, {spaced(rest)}",
            unit="concentration",
            from_zero=rest == "spread",
        )
        for key, rest in metrics.matching(r"concentration/(.+)")
    )


def _spread(metrics: MetricCharts) -> Charts:
    term = Line(key="", title="Spread of {}", unit="reward", from_zero=True)
    part = Line(key="", title="Spread of {}", unit="score", from_zero=True)
    return [
        metrics.line(
            Line(
                key="reward/total/spread",
                title="Spread of the total reward",
                unit="reward",
                from_zero=True,
            )
        ),
        *metrics.each(r"reward/(?!total/)(.+)/spread", term),
        *metrics.each(r"component/(.+)/spread", part),
        metrics.line(
            Line(
                key="change/inside/spread",
                title="Spread of the change inside the mask",
                unit="change",
                from_zero=True,
            )
        ),
        *metrics.together(
            r"exploration/(.+)/inside",
            "Noise inside the mask, by kind of edit",
            "spread",
            note="steered, so that the score below stays in its band",
        ),
        *metrics.together(
            r"exploration/(.+)/deviation",
            "Deviation of the watched score within a group, by kind of edit",
            "score",
        ),
    ]


def _drivers(metrics: MetricCharts) -> Charts:
    return [
        *metrics.by_term(
            "variance_share",
            "Share of the total's variance",
            "share",
            note="sums to 1; a term below 0 pulls against the others",
        ),
        metrics.line(
            Line(
                key="change/variance_inside_share",
                title="Share of the pixels' variance inside the mask",
                unit="share",
                from_zero=True,
                note="of the differences between candidates; the rest is background",
            )
        ),
        _both_sides(
            metrics,
            "mean",
            "Variance between candidates, by side",
            "of pixel intensities on a scale of 1, a mean over the image",
        ),
        _both_sides(metrics, "spread", "Spread of that variance within a group"),
        *metrics.by_term(
            "noise_to_spread",
            "Noise over spread",
            "ratio",
            note="at 1 the differences within a group are nothing but noise",
        ),
        *metrics.by_term(
            "noise",
            "Noise of one measurement",
            "reward",
            note="standard deviation, from candidates that were scored twice",
        ),
        *(
            chart
            for name, (title, note) in MISSING.items()
            for chart in metrics.by_term(name, title, "share", note=note)
        ),
    ]


def _both_sides(metrics: MetricCharts, statistic: str, title: str, note: str = "") -> Chart | None:
    """Draws the variance inside and outside the mask: its mean over candidates, or its spread."""
    series = [
        metrics.series(f"change/variance_{side}/{statistic}", side)
        for side in ("inside", "outside")
    ]
    return line_chart(title=title, unit="variance", series=series, from_zero=True, note=note)


_RATIO = "Probability ratio"
OPTIMISATION = (
    Line(key="ratio/mean", title=f"{_RATIO}, mean", unit="ratio"),
    Line(key="ratio/min", title=f"{_RATIO}, smallest", unit="ratio"),
    Line(key="ratio/max", title=f"{_RATIO}, largest", unit="ratio"),
    Line(
        key="ratio/max_deviation",
        title=f"{_RATIO}, largest |ratio \u2212 1|",
        unit="|ratio \u2212 1|",
        from_zero=True,
    ),
    Line(key="clip/share", title="Share of ratios clipped", unit="share", from_zero=True),
    Line(key="gradient/norm", title="Gradient norm", unit="norm", from_zero=True),
    Line(key="loss", title="Loss", unit="loss"),
)
"""Charts of the optimiser that are one key each, in their order."""


def _optimisation(metrics: MetricCharts) -> Charts:
    groups = [metrics.series(key, spaced(rest)) for key, rest in metrics.matching(r"groups/(.+)")]
    return [
        *metrics.lines(OPTIMISATION),
        *metrics.each(r"loss/(.+)", Line(key="", title="Loss: {}", unit="loss")),
        line_chart(
            title="Groups used and dropped",
            unit="groups an update",
            series=groups,
            from_zero=True,
            smooth=False,
        ),
        metrics.line(
            Line(
                key="staleness",
                title="Staleness",
                unit="updates",
                from_zero=True,
                smooth=False,
                note="how many updates old the weights behind the groups were",
            )
        ),
    ]


def _time(metrics: MetricCharts) -> Charts:
    title, key = "Seconds per update", "seconds/update"
    phases = {
        spaced(rest): metrics.series(phase, rest).points
        for phase, rest in metrics.matching(r"seconds/(.+)")
        if rest != "update"
    }
    if not phases:
        return [metrics.line(Line(key=key, title=title, unit="s", from_zero=True))]
    return [
        stacked_chart(
            title="Seconds per phase",
            unit="s",
            phases=phases,
            total=metrics.series(key, title).points,
            note="phases may run at the same time, so their sum can exceed the whole update",
        )
    ]
