"""Arguments that several commands share: CONFIG, dotted overrides and --preset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from rl_edit.config import RunConfig, load_config
from rl_edit.data.notices import Notice
from rl_edit.rewards import RewardTerm

ConfigFile = Annotated[Path | None, typer.Argument(help="YAML file of a run. Or use --preset.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Dotted overrides: train.updates=50 seed=7 data.path=DIR"),
]
Preset = Annotated[str | None, typer.Option(help="A shipped preset; rl-edit presets lists them.")]

Strict = Annotated[
    bool,
    typer.Option("--strict", help="Make every notice about the data an error: data.strict=true."),
]


def strictly(overrides: Sequence[str] | None, *, strict: bool) -> list[str]:
    """Adds the override of --strict."""
    return [*(overrides or ()), *(["data.strict=true"] if strict else ())]


def config_and_overrides(
    config: Path | None, overrides: Sequence[str] | None
) -> tuple[Path | None, list[str]]:
    """Separates a file from overrides.

    Arguments are filled in order. With --preset there is no file, so the first override arrives as
    ``config``.
    """
    changes = list(overrides or [])
    # An override has "=", which no sensible file name has.
    if config is not None and "=" in str(config):
        return None, [str(config), *changes]
    return config, changes


def print_notices(console: Console, notices: Sequence[Notice]) -> None:
    """Prints the findings about a dataset, before anything is done with it."""
    for notice in notices:
        console.print(
            f"[yellow]note[/yellow] {escape(str(notice))}", highlight=False, soft_wrap=True
        )


def configured(
    config: Path | None, overrides: Sequence[str] | None, preset: str | None
) -> RunConfig:
    """Loads the run of a file or a preset, with overrides."""
    file, changes = config_and_overrides(config, overrides)
    return load_config(file, preset=preset, overrides=changes)


def print_reward_notes(console: Console, terms: Iterable[RewardTerm]) -> None:
    """Shows what rewards say about their scores, once they have scored."""
    for line in [f"note: {term.name}: {note}" for term in terms for note in term.notes()]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
