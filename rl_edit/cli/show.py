"""``rl-edit presets``, ``methods`` and ``show-config``: what there is, and what a run would use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from rl_edit.advantages import GroupCredit, SplitCredit
from rl_edit.algorithms import BUNDLES, CITATIONS
from rl_edit.config import load_config, presets


def presets_command() -> None:
    """List the shipped presets."""
    shown = Table("preset", "what it is")
    for name, line in presets().items():
        shown.add_row(name, line)
    Console().print(shown)


def methods_command() -> None:
    """List the methods and the values that make them."""
    shown = Table("method", "initial noise", "step noise", "credit", "objective", "mask needed", "paper")
    for name, bundle in BUNDLES.items():
        method = bundle()
        noise = method.initial_noise
        where = f"{noise.inside:g} inside, {noise.outside:g} outside" if noise.inside != noise.outside else f"{noise.inside:g} everywhere"
        shown.add_row(
            name,
            where + (", centre kept" if noise.keep_reference else ""),
            method.step_noise.kind,
            _credit(method.credit),
            f"{method.objective.kind}, {method.objective.num_anchors} anchors",
            "yes" if noise.inside != noise.outside or "uniform" not in _credit(method.credit) else "no",
            CITATIONS[name],
        )
    Console(width=160).print(shown)


def _credit(credit: GroupCredit | SplitCredit) -> str:
    if isinstance(credit, SplitCredit):
        return f"{credit.normalise}, edit row + background row"
    return f"{credit.normalise}, {credit.rows.kind} row" + (f", quasi-norm {credit.quasi_norm:g}" if credit.quasi_norm else "")


def show_config_command(
    config: Annotated[Path | None, typer.Argument(help="YAML file; or use --preset.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Dotted overrides.")] = None,
    preset: Annotated[str | None, typer.Option(help="A shipped preset.")] = None,
) -> None:
    """Print the complete, validated configuration of a run."""
    changes = list(overrides or [])
    if config is not None and "=" in str(config):
        changes, config = [str(config), *changes], None
    print(load_config(config, preset=preset, overrides=changes).to_yaml(), end="")
