"""``rl-edit bench-reward``: throughput and latency of a run's rewards, as training would ask them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from rl_edit.audit.corruptions import reference
from rl_edit.audit.files import write_whole
from rl_edit.audit.throughput import TAIL, Throughput, measure
from rl_edit.cli.audit_reward import chosen_terms, configured, first_tasks
from rl_edit.data import open_dataset

SCHEMA = "rl-edit/bench-reward/1"


def bench_reward_command(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file of a run; or use --preset.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Dotted overrides, e.g. rollout.group_size=12")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A shipped preset.")] = None,
    term: Annotated[
        list[str] | None,
        typer.Option(help="Only this reward; may be repeated. All with a weight unless given."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="How long to ask each reward at each concurrency.", min=0.01)
    ] = 10.0,
    concurrency: Annotated[
        list[int] | None, typer.Option(help="Groups scored at a time; may be repeated.", min=1)
    ] = None,
    tasks: Annotated[int, typer.Option(help="Training tasks to take pictures from.", min=1)] = 16,
    out: Annotated[Path, typer.Option(help="File for the numbers.")] = Path("bench-reward.json"),
) -> None:
    """Score groups of noisy right edits for a while and report candidates a second, latencies and the tail."""
    run = configured(config, overrides, preset)
    dataset = open_dataset(run.data, "train")
    terms, left_out = chosen_terms(run, dataset.fields, term)
    references = [
        reference(task) for task in first_tasks(dataset, tasks, resolution=run.editor.resolution)
    ]
    console = Console()
    found: list[Throughput] = []
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for reward in terms:
            for number in concurrency or [1, 4]:
                bar = progress.add_task(f"{reward.name}, {number} at a time", total=seconds)
                found.append(
                    measure(
                        reward,
                        references,
                        seconds=seconds,
                        concurrency=number,
                        group_size=run.rollout.group_size,
                        seed=run.seed,
                        progress=lambda elapsed, bar=bar: progress.update(bar, completed=elapsed),  # type: ignore[misc]
                    )
                )
    content = {
        "schema": SCHEMA,
        "run": run.name,
        "left_out": left_out,
        "results": [asdict(result) for result in found],
    }
    write_whole(out, json.dumps(content, indent=2, allow_nan=False) + "\n")
    console.print(_table(found))
    for result in found:
        if result.reason:
            console.print(
                f"no score from {result.term}: {result.reason}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
    console.print(str(out), highlight=False, markup=False, soft_wrap=True)


def _table(found: list[Throughput]) -> Table:
    shown = Table(
        title="candidates per s, by calls at a time",
        caption=f"a call scores one group; tail: time in calls over {TAIL:g} medians",
    )
    shown.add_column("reward")
    for column in ("calls", "per s", "p50 s", "p90 s", "p99 s", "tail", "invalid"):
        shown.add_column(column, justify="right")
    for result in found:
        shown.add_row(
            escape(result.term),
            str(result.concurrency),
            f"{result.candidates_per_s:.1f}",
            f"{result.p50_s:.3f}",
            f"{result.p90_s:.3f}",
            f"{result.p99_s:.3f}",
            f"{result.tail_share:.0%}",
            f"{result.invalid_share:.1%}",
        )
    return shown
