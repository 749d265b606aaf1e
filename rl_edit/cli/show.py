"""``rl-edit presets``, ``methods`` and ``show-config``: what there is, and what a run would use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from rl_edit.cli.arguments import ConfigFile, Overrides, Preset, configured
from rl_edit.config import presets
from rl_edit.config.reference import reference as config_reference
from rl_edit.method.algorithms import METHODS, Algorithm
from rl_edit.method.exploration import AdaptiveSpread


def presets_command() -> None:
    """List the shipped presets."""
    shown = Table("preset", "description")
    for name, line in presets().items():
        shown.add_row(name, line)
    Console().print(shown)


def methods_command() -> None:
    """List the methods and the values that make them."""
    shown = Table(
        "method",
        "initial noise",
        "step noise",
        "credit",
        "objective",
        "acting",
        "mask",
        "attention",
        "paper",
    )
    for name, method in METHODS.items():
        algorithm = method.algorithm
        shown.add_row(
            name,
            _noise(algorithm),
            _step_noise(algorithm),
            _credit(algorithm),
            _objective(algorithm),
            algorithm.acting.kind,
            "yes" if method.needs_mask else "no",
            "yes" if method.needs_attention else "no",
            method.citation,
        )
    Console(width=200).print(shown)


def _noise(algorithm: Algorithm) -> str:
    law = algorithm.initial_noise
    start = law.start if isinstance(law, AdaptiveSpread) else law
    if not start.spreads:
        return "shared"
    if start.inside == start.outside:
        return "independent" if start.inside == 1 else f"{start.inside:g} everywhere"
    return f"{start.inside:g} inside, {start.outside:g} outside" + (
        ", centre kept" if start.keep_reference else ""
    )


def _step_noise(algorithm: Algorithm) -> str:
    settings = algorithm.step_noise.model_dump()
    kind = settings.pop("kind")
    return (
        kind
        if kind == "none"
        else f"{kind} {settings['level']:g} ({settings['sde']})"
        + (f", {settings['size']} steps, {settings['schedule']}" if kind == "window" else "")
    )


def _credit(algorithm: Algorithm) -> str:
    settings = algorithm.credit.model_dump()
    rows: dict[str, Callable[[], str]] = {
        "group": lambda: f"{settings['rows']['kind']} row",
        "split": lambda: "edit row + keep row",
        "region": lambda: "a row a region",
    }
    shown = rows[settings["kind"]]() + f", terms per {settings['normalise']}"
    return shown.replace("terms per none", "raw terms") + (
        f", quasi-norm {p:g}" if (p := settings.get("quasi_norm")) else ""
    )


def _objective(algorithm: Algorithm) -> str:
    settings = algorithm.objective.model_dump()
    inner = settings.get("inner")
    shown = str(settings["kind"])
    shown += f" ({settings['variant']})" if "variant" in settings else ""
    return shown + (f" around {inner['kind']}" if inner else "")


def show_config_command(
    config: ConfigFile = None,
    overrides: Overrides = None,
    preset: Preset = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="Print a reference of all settings, as Markdown.")
    ] = False,
) -> None:
    """Print the complete, validated configuration of a run."""
    if reference:
        print(config_reference(), end="")
        return
    print(configured(config, overrides, preset).to_yaml(), end="")
