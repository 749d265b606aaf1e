"""``rl-edit audit-reward``: known damages through a run's rewards, and a verdict per check before anything is trained on them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from rl_edit.audit import TermAudit, audit, expected_of
from rl_edit.audit.checks import Verdict
from rl_edit.audit.files import write_whole
from rl_edit.audit.page import render
from rl_edit.config import RunConfig, load_config
from rl_edit.data import Dataset, open_dataset
from rl_edit.data.canvas import fit
from rl_edit.errors import InputError
from rl_edit.rewards import Reward, available
from rl_edit.types import EditTask

MISLEADS = 3
CANVAS_STEP = 16
"""Pixels; canvases of every editor are multiples of it or finer. Rewards are audited without loading an editor."""
COLOURS: dict[Verdict, str] = {"pass": "green", "warn": "yellow", "fail": "red", "n/a": "dim"}


def audit_reward_command(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file of a run; or use --preset.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Dotted overrides, e.g. data.path=DIR")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A shipped preset.")] = None,
    term: Annotated[
        list[str] | None,
        typer.Option(help="Only this reward; may be repeated. All with a weight unless given."),
    ] = None,
    tasks: Annotated[int, typer.Option(help="Training tasks to audit on.", min=1)] = 16,
    expects: Annotated[
        str | None,
        typer.Option(
            help="What the rewards respond to: inside, outside or both the sides of the mask."
        ),
    ] = None,
    instruction: Annotated[
        bool | None,
        typer.Option(help="Whether they read the instruction; known for built-in rewards."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for audit.json and audit.html.")] = Path(
        "audit"
    ),
) -> None:
    """Damage right edits in known ways and check that the rewards notice. Exits with 3 when one would mislead training."""
    run = configured(config, overrides, preset)
    dataset = open_dataset(run.data, "train")
    chosen, left_out = chosen_terms(run, dataset.fields, term)
    wanted = [
        (reward, expected_of(reward, expects, reads_instruction=instruction)) for reward in chosen
    ]
    console = Console()
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("auditing", total=None)
        found = audit(
            wanted,
            first_tasks(dataset, tasks, resolution=run.editor.resolution),
            seed=run.seed,
            left_out=left_out,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    write_whole(out / "audit.json", found.to_json(run=run.name, data=run.data.path))
    write_whole(out / "audit.html", render(found, title=run.name))
    for entry in found.terms:
        console.print(_table(entry))
    for name, why in left_out.items():
        console.print(f"not audited: {name} ({why})", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{out / 'audit.json'}, {out / 'audit.html'}", highlight=False, markup=False, soft_wrap=True
    )
    if found.verdict == "fail":
        failed = ", ".join(entry.name for entry in found.terms if entry.verdict == "fail")
        console.print(
            f"[red]would mislead training: {escape(failed)}[/red]", highlight=False, soft_wrap=True
        )
        raise typer.Exit(MISLEADS)


def configured(
    config: Path | None, overrides: Sequence[str] | None, preset: str | None
) -> RunConfig:
    """The run of a file or preset. With --preset the first argument is an override."""
    changes = list(overrides or [])
    if config is not None and "=" in str(config):
        changes, config = [str(config), *changes], None
    return load_config(config, preset=preset, overrides=changes)


def chosen_terms(
    run: RunConfig, fields: Collection[str], names: Sequence[str] | None
) -> tuple[tuple[Reward, ...], dict[str, str]]:
    """The rewards to ask, those named or all with a weight, and why the others are left out.

    Attention comes from an editor's rollout, not from a picture: terms that read it cannot be asked without one.
    """
    unknown = [name for name in names or () if name not in run.rewards]
    if unknown:
        raise InputError(
            f"There is no reward {unknown[0]!r} in this run; it has {', '.join(run.rewards)}. Correct --term."
        )
    terms, left_out = available(tuple(run.rewards.values()), fields)
    kept: list[Reward] = []
    for reward in terms:
        if names and reward.name not in names:
            continue
        if reward.needs_attention:
            left_out[reward.name] = "it reads the editor's attention, not pictures"
        elif not names and reward.weight == 0:
            left_out[reward.name] = "weight 0: nothing is trained on it; name it with --term"
        else:
            kept.append(reward)
    if not kept:
        why = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise InputError(f"No reward of this run can be asked ({why}). Name another with --term.")
    return tuple(kept), {name: why for name, why in left_out.items() if not names or name in names}


def first_tasks(dataset: Dataset, count: int, *, resolution: int) -> list[EditTask]:
    """Tasks on a canvas of the run's resolution."""
    side = max(resolution, 2 * CANVAS_STEP)
    return [
        fit(dataset[row], resolution=side, multiple=CANVAS_STEP)
        for row in range(min(count, len(dataset)))
    ]


def _table(term: TermAudit) -> Table:
    shown = Table(
        "check",
        "verdict",
        "what was found",
        title=f"{escape(term.name)}: {_coloured(term.verdict)}",
    )
    for check in term.checks:
        shown.add_row(check.name, _coloured(check.verdict), escape(check.sentence))
    return shown


def _coloured(verdict: Verdict) -> str:
    return f"[{COLOURS[verdict]}]{verdict}[/]"
