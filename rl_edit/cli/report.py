"""``rl-edit report``: writes a run's page, and a figure of it on request."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rl_edit.files import EVENTS, HELDOUT, METRICS, damage
from rl_edit.report import render_report, write_figure


def report_command(
    run: Annotated[
        Path, typer.Argument(help="Run directory to report on; RUN/report.html is written.")
    ],
    figure: Annotated[
        Path | None,
        typer.Option(
            help="Also write a PNG with the first evaluated example of each kind of edit, "
            "e.g. figure.png."
        ),
    ] = None,
) -> None:
    """Write RUN/report.html: headline numbers, curves, before/after images, in one file."""
    # The page first: a figure needs examples, which an unevaluated run does not have.
    typer.echo(str(render_report(run)))
    for name in (METRICS, HELDOUT, EVENTS):
        if lost := damage(run / name):
            typer.echo(f"note: {lost}", err=True)
    # A line for each file, so that a script can read the paths.
    if figure is not None:
        typer.echo(str(write_figure(run, figure)))
