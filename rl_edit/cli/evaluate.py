"""``rl-edit evaluate``: compares base and adapter on held-out tasks, paired.

It prints a table and writes ``evaluation.json``, with rows and example images in ``evaluation/``.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from rl_edit.cli.arguments import Strict, print_notices, print_reward_notes, strictly
from rl_edit.config import RunConfig, load_config
from rl_edit.data import open_dataset
from rl_edit.editors import inspect_editor, load_editor, lora, read_adapter, require_adapter
from rl_edit.editors.misfit import misfit_note
from rl_edit.errors import InputError
from rl_edit.evaluation.evaluate import Evaluation, evaluate
from rl_edit.evaluation.record import EvaluationRecord
from rl_edit.measures.intervals import Interval
from rl_edit.rewards import available
from rl_edit.run_directory import holds_run, no_run_at

# Label and decimals of each metric in the printed table; evaluation.json has all of them.
SHOWN = {
    "reward": ("training reward (weighted sum)", 3),
    "instruction": ("instruction score", 3),
    "background_psnr_masked": ("background PSNR, masked (dB)", 3),
    "background_psnr_zero_filled": ("background PSNR, zero-filled (dB)", 3),
    "background_ssim": ("background SSIM", 4),
    "concentration": ("attention concentration", 4),
}


def evaluate_command(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Dotted overrides: evaluation.num_tasks=512 data.heldout_path=DIR"),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter to evaluate. Default: RUN/adapter.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory for evaluation.json and evaluation/. "
            "Default: RUN, where they replace the last ones."
        ),
    ] = None,
    strict: Strict = False,
) -> None:
    """Compare base and trained editor on the same held-out tasks and noises."""
    if not holds_run(run):
        raise InputError(no_run_at(run))
    config = load_config(run / "config.yaml", overrides=strictly(overrides, strict=strict))
    console = Console()
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a directory")
    evaluation = evaluate_run(config, adapter or run / "adapter", out or run, console=console)
    # The headline numbers here, all of them in evaluation.json.
    console.print(table(evaluation.record))
    # An evaluation elsewhere is not what the run's report shows.
    next_command = f"; next: rl-edit report {run}" if out is None else ""
    console.print(
        f"{(out or run) / 'evaluation.json'}{next_command}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def evaluate_run(config: RunConfig, adapter: Path, out: Path, *, console: Console) -> Evaluation:
    """Evaluates an adapter and writes ``evaluation.json`` and ``evaluation/`` into ``out``.

    An earlier evaluation is replaced only when the new one is complete.
    """
    facts = inspect_editor(config.editor)
    dataset = open_dataset(
        config.data,
        "heldout",
        resolution=config.editor.resolution,
        multiple=facts.pixels_per_token,
        text=config.editor,
    )
    for note in filter(None, (*facts.notes, misfit_note(config.editor, dataset))):
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    print_notices(console, dataset.notices)
    terms, left_out = available(tuple(config.rewards.values()), dataset.fields)
    for term in terms:
        term.require_files()
    # Read before the editor is loaded: a wrong path must not cost a minute.
    weights, lora_config = read_adapter(config.editor, adapter)
    for note in lora_config.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    require_adapter(config.editor, weights)
    editor = load_editor(config.editor)
    # The seed is of initial weights, which are overwritten at once.
    lora.attach(editor.transformer, lora_config, seed=0)
    lora.load(editor.transformer, weights)
    # Beside its final place, so that the rename at the end stays on one file system.
    directory, temporary = out / "evaluation", out / ".evaluation.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("evaluating", total=None)
        evaluation = evaluate(
            editor,
            dataset,
            terms,
            config.evaluation,
            num_steps=config.rollout.num_steps,
            adapter=str(weights.id),
            left_out=tuple(left_out),
            images=temporary / "images",
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    print_reward_notes(console, terms)
    evaluation.write(temporary / "evaluation.json", temporary / "rows.jsonl")
    # evaluation.json comes last: a reader that sees it finds its rows and images beside it.
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)
    (directory / "evaluation.json").replace(out / "evaluation.json")
    return evaluation


def table(record: EvaluationRecord) -> Table:
    """Shows headline metrics: base, trained, paired difference with its 95 % interval."""
    meta = record.meta
    noises = f" x {meta['num_noises']} noises" if meta["num_noises"] > 1 else ""
    shown = Table(
        title=f"held-out tasks: {meta['num_tasks']}{noises}; difference paired, 95 % interval"
    )
    for column in ("metric", "base", "trained", "difference", "interval"):
        shown.add_column(column, justify="left" if column == "metric" else "right")
    # A metric is missing where nothing measures it, such as the instruction without a judge.
    for key, (label, digits) in SHOWN.items():
        if key not in record.delta:
            continue
        delta = record.delta[key]
        shown.add_row(
            label,
            f"{record.base[key].mean:.{digits}f}",
            f"{record.trained[key].mean:.{digits}f}",
            f"{delta.mean:+.{digits}f}",
            _ends(delta, digits),
            style={1: "green", -1: "red", 0: ""}[delta.sign],
        )
    return shown


def _ends(interval: Interval, digits: int) -> str:
    if not math.isfinite(interval.low):
        return "n = 1"
    return f"[{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"
