"""The curves of a run: every number of metrics.jsonl in exactly one chart.

The sections follow the questions one asks of a run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from rl_edit.report.charts import Chart, Mark, Series, line_chart, stacked_chart, twin_chart
from rl_edit.report.metric_charts import Charts, Line, MetricCharts, spaced
from rl_edit.report.run_files import RunFiles, number

# A reward term does not declare its side of the mask in metrics.jsonl.
# Terms that are measured outside the mask are recognised by these words in their name.
# The pattern decides the section of a chart and nothing else.
OUTSIDE = re.compile(r"background|preserv|outside|lpips|psnr|ssim", re.IGNORECASE)
# Keys are NAME in ``background/NAME/mean``: ways in which a background changes, each with its
# title, the value of an unchanged background, and a note.
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
# Keys are NAME in ``reward/TERM/NAME``, each with title and note.
MISSING = {
    "invalid_share": ("Scores that are invalid", "an answer that is no score, or none"),
    "timeout_share": ("Scores that came too late", "no answer in time"),
    "refused_share": ("Scores that were refused", "the judge declined to answer"),
    "cached_share": ("Scores recalled from the cache", ""),
    "uncached_share": ("Scores that could not be kept", "the cache's disk did not take them"),
}


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
    groups = []
    for title, about, draw in SECTIONS:
        # None is a chart whose keys this run does not have.
        charts = tuple(chart for chart in draw(metrics) if chart is not None)
        if charts:
            groups.append(ChartGroup(title=title, about=about, charts=charts))
    return groups


def _inside(metrics: MetricCharts) -> Charts:
    # The total comes first although it weighs terms of both sides: it is what training raises.
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
    # Every background measure except PSNR, drawn by name above, and the drift, a section below.
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
    # (.+) is greedy: a term's name may hold slashes. The total is drawn elsewhere.
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
    # Mean and spread share a chart: training can only remove a drift that candidates differ in.
    charts = []
    for name, (title, unchanged, note) in DRIFT.items():
        left = metrics.series(f"background/{name}/mean", "mean over candidates")
        right = metrics.series(f"background/{name}/spread", "spread in a group")
        charts.append(
            twin_chart(
                title=title, left=left, right=right, reference=unchanged, smooth=True, note=note
            )
            # Where a run has only one of the two.
            or line_chart(title=title, unit=left.label, series=[left, right], note=note)
        )
    return charts


def _heldout(metrics: MetricCharts) -> Charts:
    """Draws gold against the training reward, with the alarms and the best adapter.

    Nothing is drawn for a run without held-out evaluations.
    """
    files = metrics.files
    # A resumed run repeats the events after its checkpoint: one mark for each update.
    alarms = dict.fromkeys(
        number(row.get("update")) for row in files.events.rows if row.get("event") == "gold_alarm"
    )
    # Marks show when the run should have been stopped, and which adapter it saved as the best.
    marks = [Mark(label="alarm", update=update) for update in alarms if update is not None]
    if (best := number(files.best.get("update"))) is not None:
        marks.insert(0, Mark(label="best", update=best))

    # Not smoothed: held-out evaluations are few, and each is a mean over the same tasks.
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
    # ``each`` fills in key and name. Terms have the unit of a reward, parts that of their judge.
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
        # Only for exploration that adapts its noise to each kind of edit.
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
    # Shares first: which term, then which side, and last how much of it is noise.
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
        *_noise(metrics),
    ]


def _noise(metrics: MetricCharts) -> Charts:
    """Draws the part of the reward that is measurement: noise, and scores that are missing."""
    return [
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
# The ratio is that of the trained policy's probability to the acting one's; it starts at 1.
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
    # Counts of groups share a chart: those used and those dropped add up to those planned.
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
        # Counted, so not smoothed: a fraction of an update means nothing.
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
    # Where no phase was timed, the update's duration is drawn by itself.
    title, key = "Seconds per update", "seconds/update"
    # Layers are phases; the duration of the update itself is the line over them.
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


SECTIONS: tuple[tuple[str, str, Callable[[MetricCharts], Charts]], ...] = (
    ("Inside the mask", "Does the edit do what the instruction says?", _inside),
    ("Outside the mask", "Does everything else stay as it was?", _outside),
    (
        "Background drift",
        "The kind of change, if any: each of these hides behind a good PSNR for a while.",
        _drift,
    ),
    (
        "Held-out tasks",
        "Gold is the reward that is trusted, on tasks that are not trained on. When it falls while "
        "the training reward rises, something else than the requested edit earns the reward.",
        _heldout,
    ),
    (
        "Where the editor looks",
        "How much of the text-to-image attention falls on the region to edit.",
        _attention,
    ),
    (
        "Spread within a group",
        "The method learns from differences between the candidates of one task. Without spread it "
        "learns nothing.",
        _spread,
    ),
    (
        "What drives the reward",
        "Which term and which side of the mask decide the order of candidates, and how much of "
        "the reward is noise or missing.",
        _drivers,
    ),
    ("Optimisation", "Is the step small, and is it taken on fresh data?", _optimisation),
    ("Time", "Where an update's seconds go.", _time),
    # Last, because it draws the keys that no section before it has drawn.
    ("Other numbers", "Further keys of metrics.jsonl, as they are.", MetricCharts.rest),
)
"""Title, question, and charts of each section, in the order of the page."""
