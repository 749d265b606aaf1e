"""``rl-edit audit-reward``: checks a run's rewards before anything is trained on them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from rl_edit.audit import Audit, Check, TotalAudit, Verdict, audit, audit_total, expected_of
from rl_edit.audit.page import render
from rl_edit.cli.arguments import (
    ConfigFile,
    Overrides,
    Preset,
    Strict,
    configured,
    print_notices,
    print_reward_notes,
    strictly,
)
from rl_edit.config import RunConfig
from rl_edit.data import Dataset, open_dataset
from rl_edit.data.canvas import fit
from rl_edit.errors import InputError
from rl_edit.files import write_result
from rl_edit.rewards import Reward, available
from rl_edit.types import EditTask

MISLEADS = 3
"""Exit code when a reward would mislead training."""
CANVAS_STEP = 16
"""Pixels. The canvas of every editor is a multiple of it or finer; no editor is loaded here."""
COLOURS: dict[Verdict, str] = {"pass": "green", "warn": "yellow", "fail": "red", "n/a": "dim"}


def audit_reward_command(
    config: ConfigFile = None,
    overrides: Overrides = None,
    preset: Preset = None,
    term: Annotated[
        list[str] | None,
        typer.Option(help="Only this reward. May be repeated. Default: all with a weight."),
    ] = None,
    tasks: Annotated[int, typer.Option(help="Number of training tasks to audit on.", min=1)] = 16,
    expects: Annotated[
        str | None,
        typer.Option(
            help="What the rewards respond to: inside or outside of the mask, or both. "
            "Default: what their classes declare."
        ),
    ] = None,
    instruction: Annotated[
        bool | None,
        typer.Option(help="Whether they read the instruction. Known for built-in rewards."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for audit.json and audit.html.")] = Path(
        "audit"
    ),
    strict: Strict = False,
) -> None:
    """Corrupt correct edits in known ways and check that every reward notices.

    Without --term, the weighted sum of the run is audited too. Exits with 3 when a reward or the
    sum would mislead training.
    """
    run = configured(config, strictly(overrides, strict=strict), preset)
    dataset = open_dataset(run.data, "train")
    console = Console()
    print_notices(console, dataset.notices)
    chosen, left_out = chosen_terms(run, dataset.fields, term)
    terms = [
        (reward, expected_of(reward, expects, reads_instruction=instruction)) for reward in chosen
    ]
    examples = first_tasks(dataset, tasks, resolution=run.editor.resolution)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        # The total is known with the first call of progress: terms times tasks.
        bar = progress.add_task("auditing", total=None)
        result = audit(
            terms,
            examples,
            seed=run.seed,
            left_out=left_out,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    if not term:
        result = replace(result, total=_total(run, dataset, examples))
    # Written before anything is printed: a closed pipe must not cost the result.
    files = (out / "audit.json", out / "audit.html")
    write_result(files[0], result.to_json(run=run.name, data=run.data.path))
    write_result(files[1], render(result, title=run.name))
    _print(console, result, files)
    print_reward_notes(console, chosen)
    if result.verdict == "fail":
        raise typer.Exit(MISLEADS)


def _total(run: RunConfig, dataset: Dataset, examples: Sequence[EditTask]) -> TotalAudit:
    """Audits the weighted sum of all rewards that the data can feed."""
    usable, left_out = available(tuple(run.rewards.values()), dataset.fields)
    allowed = run.train.allow_unrewarded_edit
    return audit_total(usable, examples, seed=run.seed, left_out=left_out, allowed=allowed)


def chosen_terms(
    run: RunConfig, fields: Collection[str], names: Sequence[str] | None
) -> tuple[tuple[Reward, ...], dict[str, str]]:
    """Chooses the rewards to score with: those named, or all with a weight.

    Attention comes from an editor's rollout, not from an image, so terms that read it are left out.

    Returns:
        The rewards, and the reasons why others are left out.
    """
    # A misspelt name must not lead to an audit of nothing.
    unknown = [name for name in names or () if name not in run.rewards]
    if unknown:
        raise InputError(
            f"There is no reward {unknown[0]!r} in this run. It has {', '.join(run.rewards)}. "
            "Correct --term."
        )
    terms, left_out = available(tuple(run.rewards.values()), fields)
    chosen: list[Reward] = []
    for reward in terms:
        if names and reward.name not in names:
            continue
        if reward.needs_attention:
            left_out[reward.name] = "it reads the editor's attention, not images"
        elif not names and reward.weight == 0:
            left_out[reward.name] = "weight 0: nothing is trained on it; name it with --term"
        else:
            chosen.append(reward)
    if not chosen:
        why = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise InputError(
            f"No reward of this run can be scored here ({why}). Name another with --term."
        )
    # A model that is not here would look like a reward without scores.
    for reward in chosen:
        reward.require_files()
    # With --term, the reasons of rewards that were not named are of no interest.
    return tuple(chosen), {
        name: why for name, why in left_out.items() if not names or name in names
    }


def first_tasks(dataset: Dataset, count: int, *, resolution: int) -> list[EditTask]:
    """Reads the first tasks, on a canvas of the run's resolution."""
    # Twice the step, so that a tiny resolution still leaves room for a mask and its background.
    side = max(resolution, 2 * CANVAS_STEP)
    return [
        fit(dataset[row], resolution=side, multiple=CANVAS_STEP)
        for row in range(min(count, len(dataset)))
    ]


def _print(console: Console, result: Audit, files: Sequence[Path]) -> None:
    for term in result.terms:
        console.print(_table(term.name, term.verdict, term.checks))
    if result.total is not None:
        console.print(_table("weighted sum", result.total.verdict, result.total.checks))
    lines = [f"not audited: {name} ({why})" for name, why in result.left_out.items()]
    # No wrapping: a path must stay one word for a terminal that opens it.
    for line in (*lines, ", ".join(str(file) for file in files)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    failed = [term.name for term in result.terms if term.verdict == "fail"]
    if result.total is not None and result.total.verdict == "fail":
        failed.append("the weighted sum")
    if failed:
        text = f"[red]would mislead training: {escape(', '.join(failed))}[/red]"
        console.print(text, highlight=False, soft_wrap=True)


def _table(name: str, verdict: Verdict, checks: Sequence[Check]) -> Table:
    title = f"{escape(name)}: {_coloured(verdict)}"
    table = Table("check", "verdict", "finding", title=title)
    for check in checks:
        table.add_row(check.name, _coloured(check.verdict), escape(check.sentence))
    return table


def _coloured(verdict: Verdict) -> str:
    return f"[{COLOURS[verdict]}]{verdict}[/]"
