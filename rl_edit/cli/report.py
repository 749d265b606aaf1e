"""``rl-edit report``: write a run's page and say where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rl_edit.report import render_report


def report_command(
    run: Annotated[
        Path, typer.Argument(help="Run directory to report on; RUN/report.html is written.")
    ],
) -> None:
    """Write RUN/report.html: headline numbers, curves, before/after pictures. One file, opens anywhere."""
    typer.echo(str(render_report(run)))
