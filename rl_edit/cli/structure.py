"""``rl-edit structure``: draws the imports between the project's own rooms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rl_edit.files import write_result
from rl_edit.structure import draw, import_graph, summary

RUNS_BACK_UP = 1


def structure_command(
    out: Annotated[Path, typer.Option(help="SVG file to write.")] = Path("structure.svg"),
) -> None:
    """Draw the packages of rl-edit and the imports between them, as SVG.

    Exits with 1 when an import runs back up, from a lower floor to a higher one.
    """
    graph = import_graph()
    write_result(out, draw(graph))
    # Line by line, since an arrow alone does not say which file to mend.
    for entry in graph.imports_up:
        typer.echo(f"runs back up: {entry}")
    typer.echo(f"{summary(graph)}: {out}")
    if graph.imports_up:
        raise typer.Exit(RUNS_BACK_UP)
