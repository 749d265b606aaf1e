"""``rl-edit dataset``: checks data, and writes the built-in world to disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from rl_edit.cli.dataset_check import check_command
from rl_edit.data import shapes
from rl_edit.data.compbench import write_compbench

dataset_app = typer.Typer(help="Check and make data sets.", no_args_is_help=True)


dataset_app.command("check")(check_command)


@dataset_app.callback()
def _group() -> None:
    """Check and make data sets."""


@dataset_app.command("make-shapes")
def make_shapes_command(
    directory: Annotated[Path, typer.Argument(help="A new directory, in CompBench's layout.")],
    count: Annotated[int, typer.Option(help="Number of tasks.", min=1)] = 256,
    split: Annotated[
        str, typer.Option(help="train, heldout or validation. Splits share no scene.")
    ] = "train",
    seed: Annotated[int, typer.Option(help="Seed of the world.")] = 0,
) -> None:
    """Write tasks of the shapes world: source, instruction, exact mask, exact target."""
    console = Console()
    # Drawn while they are written: a large world never lies in memory.
    tasks = (
        shapes.task(split, i, seed=seed)
        for i in track(
            range(count), description="drawing", console=console, disable=not console.is_terminal
        )
    )
    write_compbench(tasks, directory)
    console.print(
        f"{count} tasks in {directory}; train on them with: "
        f"rl-edit train --preset tiny-rc-grpo data.path={directory}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
