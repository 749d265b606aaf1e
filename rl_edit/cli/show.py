"""Commands that print presets, methods and configurations."""

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

_COLUMNS = ("method", "initial noise", "step noise", "credit", "objective", "acting")


def presets_command() -> None:
    """List the shipped presets."""
    table = Table("preset", "description")
    for name, line in presets().items():
        table.add_row(name, line)
    Console().print(table)


def methods_command(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as Markdown, for docs/method.md.")
    ] = False,
) -> None:
    """List the methods and the values that make them."""
    if markdown:
        print(methods_table(), end="")
        return
    table = Table(*_COLUMNS, "mask", "attention", "paper")
    for name, method in METHODS.items():
        table.add_row(
            name,
            *_values(method.algorithm),
            "yes" if method.needs_mask else "no",
            "yes" if method.needs_attention else "no",
            method.citation,
        )
    # A fixed width, so that a pipe gets the same table as a terminal.
    Console(width=200).print(table)


def methods_table() -> str:
    """Returns the table of methods as Markdown, made from ``METHODS``."""
    rows = [
        _COLUMNS,
        tuple("---" for _ in _COLUMNS),
        *((f"`{name}`", *_values(method.algorithm)) for name, method in METHODS.items()),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _values(algorithm: Algorithm) -> tuple[str, ...]:
    """Describes the five values of an algorithm, in the order of the columns."""
    return (
        _noise(algorithm),
        _step_noise(algorithm),
        _credit(algorithm),
        _objective(algorithm),
        _acting(algorithm),
    )


def _noise(algorithm: Algorithm) -> str:
    law = algorithm.initial_noise
    # An adaptive law moves the spread inside the mask; the table shows its start.
    start = law.start if isinstance(law, AdaptiveSpread) else law
    # "shared" and "independent" are the ends of the spread, 0 and 1.
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
    if kind == "none":
        return "none"
    text = f"{kind} {settings['level']:g} ({settings['sde']})"
    if kind == "window":
        text += f", {settings['size']} steps, {settings['schedule']}"
        text += f", before step {stop}" if (stop := settings["stop"]) else ""
        # Only the two moving schedules stay at a position for some updates.
        if settings["schedule"] in ("progressive", "exponential"):
            text += f" every {settings['every']} updates"
    else:
        # "last" alone means one step, as in every shipped bundle.
        skip = settings["skip_last"]
        text += ", all steps but the last" + (f" {skip}" if skip > 1 else "")
    return text


def _credit(algorithm: Algorithm) -> str:
    settings = algorithm.credit.model_dump()
    # Functions, because the three rules have different settings.
    rows: dict[str, Callable[[], str]] = {
        "group": lambda: f"{settings['rows']['kind']} row",
        "split": lambda: "edit row + keep row",
        "region": lambda: "a row a region",
    }
    text = rows[settings["kind"]]() + f", terms per {settings['normalise']}"
    text = text.replace("terms per none", "raw terms")
    # None and the defaults of a setting are left out; "group" is the usual deviation.
    if (deviation := settings.get("deviation", "group")) != "group":
        text += ", terms summed" if deviation == "none" else f", deviation of the {deviation}"
    text += f", quasi-norm {p:g}" if (p := settings.get("quasi_norm")) else ""
    text += f", border softened by {width}" if (width := settings.get("soft_border")) else ""
    return text + (f", limit {limit:g}" if (limit := settings.get("advantage_clip")) else "")


def _objective(algorithm: Algorithm) -> str:
    settings = algorithm.objective.model_dump()
    text = str(settings["kind"])
    text += f" ({settings['variant']})" if "variant" in settings else ""
    # The numbers that a reader compares between papers; all others are in show-config.
    names = {"num_anchors": "anchors", "clip": "clip", "temperature": "temperature", "beta": "beta"}
    text += "".join(f", {word} {settings[key]:g}" for key, word in names.items() if key in settings)
    inner = settings.get("inner")
    return text + (f" around {inner['kind']}" if inner else "")


def _acting(algorithm: Algorithm) -> str:
    settings = algorithm.acting.model_dump()
    if settings["kind"] == "latest":
        return "latest"
    return f"decayed, rate {settings['rate']:g} up to {settings['max_decay']:g}"


def show_config_command(
    config: ConfigFile = None,
    overrides: Overrides = None,
    preset: Preset = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="Print a reference of all settings, as Markdown.")
    ] = False,
) -> None:
    """Print the complete, validated configuration of a run."""
    # print, not a rich console: both outputs are files that other programs read.
    if reference:
        print(config_reference(), end="")
        return
    print(configured(config, overrides, preset).to_yaml(), end="")
