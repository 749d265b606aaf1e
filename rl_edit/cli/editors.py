"""``rl-edit editors``: makes tiny editors of every family, to try a run before real weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rl_edit.editors.tiny_families import KINDS, write_tiny
from rl_edit.errors import InputError
from rl_edit.files import new_directory

editors_app = typer.Typer(help="Make editors to try things with.", no_args_is_help=True)


@editors_app.callback()
def _group() -> None:
    """Make editors to try things with."""


@editors_app.command("make-tiny")
def make_tiny_command(
    kind: Annotated[str, typer.Argument(help=f"A family: {', '.join(KINDS)}.")],
    directory: Annotated[Path, typer.Argument(help="A new directory. Stock diffusers loads it.")],
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
) -> None:
    """Write a tiny editor of a family: the real classes with small numbers, untrained.

    Every verb works on it, in milliseconds a forward. Its images are noise.
    """
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise InputError(f"{directory} is there already: give a new or an empty directory")
    try:
        with new_directory(directory) as partial:
            write_tiny(kind, partial, seed=seed)
    except OSError as error:
        raise InputError(
            f"cannot write {directory} ({error.strerror}): give a directory that can be written"
        ) from error
    Console().print(
        f"A tiny {kind} with random weights in {directory}; try it with: rl-edit train "
        f"--preset tiny-rc-grpo 'editor={{path: {directory}}}' --run-dir runs/tiny train.updates=2",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
