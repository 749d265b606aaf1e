"""``rl-edit bench-reward``: measures throughput and latency of a run's rewards, as in training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.table import Table

from rl_edit.audit.images import Reference, reference
from rl_edit.audit.throughput import TAIL, Throughput, measure
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
from rl_edit.cli.audit_reward import chosen_terms, first_tasks
from rl_edit.config import RunConfig
from rl_edit.data import open_dataset
from rl_edit.files import write_result
from rl_edit.rewards import Reward

SCHEMA = "rl-edit/bench-reward/1"
# Without company, and as many groups as a few reward actors score at once.
CONCURRENCY = (1, 4)


def bench_reward_command(
    config: ConfigFile = None,
    overrides: Overrides = None,
    preset: Preset = None,
    term: Annotated[
        list[str] | None,
        typer.Option(help="Only this reward. May be repeated. Default: all with a weight."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="Seconds to keep each reward busy, per concurrency.", min=0.01)
    ] = 10.0,
    concurrency: Annotated[
        list[int] | None,
        typer.Option(help="Groups scored at once. May be repeated. Default: 1 and 4.", min=1),
    ] = None,
    tasks: Annotated[
        int, typer.Option(help="Number of training tasks to take images from.", min=1)
    ] = 16,
    out: Annotated[Path, typer.Option(help="File for the numbers.")] = Path("bench-reward.json"),
    strict: Strict = False,
) -> None:
    """Score groups of noisy correct edits and report candidates per second and latencies."""
    run = configured(config, strictly(overrides, strict=strict), preset)
    dataset = open_dataset(run.data, "train")
    console = Console()
    print_notices(console, dataset.notices)
    terms, left_out = chosen_terms(run, dataset.fields, term)
    references = [
        reference(task) for task in first_tasks(dataset, tasks, resolution=run.editor.resolution)
    ]
    with Progress(console=console, disable=not console.is_terminal) as progress:
        results = _measure_all(
            run, terms, references, seconds, concurrency or CONCURRENCY, progress
        )
    content = {
        "schema": SCHEMA,
        "run": run.name,
        "left_out": left_out,
        "results": [asdict(result) for result in results],
    }
    write_result(out, json.dumps(content, indent=2, allow_nan=False) + "\n")
    _print(console, results, out)
    print_reward_notes(console, terms)


def _measure_all(
    run: RunConfig,
    terms: Sequence[Reward],
    references: Sequence[Reference],
    seconds: float,
    concurrency: Sequence[int],
    progress: Progress,
) -> list[Throughput]:
    """Measures every reward at every concurrency, one after another."""

    def show(bar: TaskID, elapsed: float) -> None:
        progress.update(bar, completed=elapsed)

    results: list[Throughput] = []
    for reward in terms:
        for number in concurrency:
            # A bar counts seconds: the number of calls is not known beforehand.
            bar = progress.add_task(f"{reward.name}, {number} at a time", total=seconds)
            results.append(
                measure(
                    reward,
                    references,
                    seconds=seconds,
                    concurrency=number,
                    group_size=run.rollout.group_size,
                    seed=run.seed,
                    # Bound here: a lambda would see only the last bar of the loop.
                    progress=partial(show, bar),
                )
            )
    return results


def _print(console: Console, results: Sequence[Throughput], out: Path) -> None:
    console.print(_table(results))
    # The first reason of each result, since a failing reward is fast and its numbers mislead.
    lines = [f"no score from {result.term}: {result.reason}" for result in results if result.reason]
    for line in (*lines, str(out)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(results: Sequence[Throughput]) -> Table:
    table = Table(
        title="candidates per second, by number of concurrent calls",
        caption=f"a call scores one group; tail: share of time in calls over {TAIL:g} medians",
    )
    table.add_column("reward")
    for column in ("calls", "per s", "p50 s", "p90 s", "p99 s", "tail", "invalid"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            escape(result.term),
            str(result.concurrency),
            f"{result.candidates_per_s:.1f}",
            f"{result.p50_s:.3f}",
            f"{result.p90_s:.3f}",
            f"{result.p99_s:.3f}",
            f"{result.tail_share:.0%}",
            f"{result.invalid_share:.1%}",
        )
    return table
