"""``rl-edit evaluate``: base against adapter on held-out tasks, paired; a table, ``evaluation.json`` and pictures."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from rl_edit.config import RunConfig, load_config
from rl_edit.data import open_dataset
from rl_edit.editors import inspect_editor, load_editor, lora
from rl_edit.errors import InputError
from rl_edit.evaluation.evaluate import Evaluation, evaluate
from rl_edit.rewards import available

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
    adapter: Annotated[Path | None, typer.Option(help="Another adapter than RUN/adapter.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where evaluation.json and evaluation/ go; into RUN unless given, in place of its last ones."
        ),
    ] = None,
) -> None:
    """Compare base and trained editor on the same held-out tasks and noises."""
    if not (run / "config.yaml").is_file():
        raise InputError(
            f"no run at {run}: expected {run / 'config.yaml'}, written by rl-edit train"
        )
    config = load_config(run / "config.yaml", overrides=list(overrides or []))
    console = Console()
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a directory")
    evaluation = evaluate_run(config, adapter or run / "adapter", out or run, console=console)
    summary = evaluation.summary()
    console.print(table(summary))
    following = f"; next: rl-edit report {run}" if out is None else ""
    console.print(
        f"{(out or run) / 'evaluation.json'}{following}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def evaluate_run(config: RunConfig, adapter: Path, out: Path, *, console: Console) -> Evaluation:
    """Evaluates an adapter and writes ``evaluation.json``, with rows and pictures in ``evaluation/``, into ``out``.

    An earlier evaluation is replaced only when the new one is whole.
    """
    facts = inspect_editor(config.editor)
    dataset = open_dataset(
        config.data, "heldout", resolution=config.editor.resolution, multiple=facts.pixels_per_token
    )
    terms, left_out = available(tuple(config.rewards.values()), dataset.fields)
    weights, lora_config = lora.read(adapter)
    editor = load_editor(config.editor)
    lora.attach(editor.transformer, lora_config, seed=0)
    lora.load(editor.transformer, weights)
    directory, temporary = out / "evaluation", out / ".evaluation.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("evaluating", total=None)
        result = evaluate(
            editor,
            dataset,
            terms,
            config.evaluation,
            num_steps=config.rollout.num_steps,
            images=temporary / "images",
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    result.meta.update(
        adapter=str(weights.id),
        rewards={term.name: term.sha256() for term in terms},
        left_out=sorted(left_out),
    )
    result.write(temporary / "evaluation.json", temporary / "rows.jsonl")
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)
    (directory / "evaluation.json").replace(out / "evaluation.json")
    return result


def table(summary: dict[str, Any]) -> Table:
    """Headline metrics: base, trained, paired difference with its 95 % interval."""
    meta = summary["meta"]
    noises = f" x {meta['num_noises']} noises" if meta["num_noises"] > 1 else ""
    shown = Table(
        title=f"held-out tasks: {meta['num_tasks']}{noises}; difference paired, 95 % interval"
    )
    for column in ("metric", "base", "trained", "difference", "interval"):
        shown.add_column(column, justify="left" if column == "metric" else "right")
    for key, (label, digits) in SHOWN.items():
        if key not in summary["delta"]:
            continue
        delta = summary["delta"][key]
        interval = (
            f"[{delta['low']:+.{digits}f}, {delta['high']:+.{digits}f}]"
            if delta["low"] is not None
            else "n = 1"
        )
        colour = (
            ""
            if delta["low"] is None or delta["low"] <= 0 <= delta["high"]
            else ("green" if delta["low"] > 0 else "red")
        )
        shown.add_row(
            label,
            f"{summary['base'][key]['mean']:.{digits}f}",
            f"{summary['trained'][key]['mean']:.{digits}f}",
            f"{delta['mean']:+.{digits}f}",
            interval,
            style=colour,
        )
    return shown
