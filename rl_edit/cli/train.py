"""``rl-edit train``: the options of a run, and its progress on a terminal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from rl_edit.cli import ending, output
from rl_edit.cli.arguments import (
    ConfigFile,
    Overrides,
    Preset,
    Strict,
    config_and_overrides,
    strictly,
)
from rl_edit.config import RunConfig, load_config, modern_name
from rl_edit.errors import InputError
from rl_edit.run_directory import CONFIG_FILE, holds_run, no_run_at
from rl_edit.training import train


def train_command(
    config: ConfigFile = None,
    overrides: Overrides = None,
    preset: Preset = None,
    run_dir: Annotated[Path | None, typer.Option(help="Run directory. Default: runs/NAME.")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue the run in --run-dir from its newest valid checkpoint."
        ),
    ] = False,
    auto_resume: Annotated[
        bool,
        typer.Option(
            "--auto-resume",
            help="Continue the run in --run-dir if there is one, else start it. Safe to repeat.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check config, data and editor, print the plan, and start nothing."
        ),
    ] = False,
    allow_config_drift: Annotated[
        list[str] | None,
        typer.Option(
            help="With --resume: dotted name of a setting that may differ from the checkpoint's. "
            "May be repeated."
        ),
    ] = None,
    allow_version_skew: Annotated[
        bool, typer.Option(help="Run even if nodes have other package versions or sources.")
    ] = False,
    strict: Strict = False,
) -> None:
    """Train an adapter.

    Exit codes: 0 done; 2 bad input; 3 training failed; 4 not enough resources; 5 cluster
    unreachable; 75 a newer attempt has the run directory; 129, 130 or 143 stopped by a signal,
    with everything saved.
    """
    config, changes = config_and_overrides(config, overrides)
    # A run that goes on needs no config on the command line: its directory has one.
    if (resume or auto_resume) and config is None and preset is None:
        config = _config_of_run(run_dir, may_start=auto_resume)
    changes = strictly(changes, strict=strict)
    settings = load_config(config, preset=preset, overrides=changes)
    directory = run_dir or Path("runs") / settings.name
    # An empty directory is a place to start in, such as a volume that was just mounted.
    resume = resume or (auto_resume and directory.is_dir() and any(directory.iterdir()))
    # Hours of training must not end with a ``head``, a full disk of a log, or a terminal.
    with output.lasting(), ending.within_run(directory):
        train(
            settings,
            directory,
            resume=resume,
            dry_run=dry_run,
            observer=LiveProgress(Console()),
            allow_drift=frozenset(map(modern_name, allow_config_drift or ())),
            allow_skew=allow_version_skew,
        )


def _config_of_run(run_dir: Path | None, *, may_start: bool) -> Path:
    """Finds the configuration that a run wrote."""
    if run_dir is None:
        raise InputError(
            "There is nothing to continue: neither a run directory nor a configuration is given. "
            "Add --run-dir, or a YAML file or --preset whose run lies in runs/NAME."
        )
    if not holds_run(run_dir):
        start = (
            "--auto-resume starts a run there when a YAML file or --preset is given too."
            if may_start
            else "To start a new run, drop --resume and give a YAML file or --preset NAME."
        )
        raise InputError(f"nothing to resume: {no_run_at(run_dir)} {start}")
    return run_dir / CONFIG_FILE


class LiveProgress:
    """Shows live progress on a terminal, one line per update elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._num_updates = self._done = 0
        self._began: float | None = None

    def starting(self, config: RunConfig) -> None:
        self._num_updates = config.train.updates
        self._progress.start()
        self._updates = self._progress.add_task(
            "updates", total=config.train.updates, note="starting actors"
        )
        self._groups = self._progress.add_task(
            "groups", total=config.train.groups_per_update, note=""
        )

    def ended(self) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def group_scored(self, update: int, done: int, total: int) -> None:
        # From the first score on: loading the models must not count in the remaining time.
        self._began = self._began or time.time()
        self._progress.update(
            self._groups, completed=done, note="learning" if done == total else "rolling out"
        )

    def note(self, text: str) -> None:
        self._console.print(
            f"[yellow]note[/yellow] {escape(text)}", highlight=False, soft_wrap=True
        )

    def update_done(self, metrics: dict[str, Any]) -> None:
        note = progress_line(metrics)
        self._progress.update(self._updates, completed=metrics["update"] + 1, note=note)
        self._progress.update(self._groups, completed=0)
        self._done += 1
        # A log file has no progress bar, so it gets a line.
        if not self._console.is_terminal:
            elapsed = time.time() - (self._began or time.time())
            left = elapsed / self._done * (self._num_updates - metrics["update"] - 1)
            self._console.print(
                f"update {metrics['update'] + 1}/{self._num_updates}  {note}  ETA {left:.0f} s",
                highlight=False,
                soft_wrap=True,
            )


def progress_line(metrics: dict[str, Any]) -> str:
    """Makes a line of scores inside and outside the mask, and of the seconds of the parts."""

    def shown(label: str, key: str, form: str) -> str:
        return f"{label} {metrics[key]:{form}}" if isinstance(metrics.get(key), float) else ""

    # The judge's score of the instruction, or the change of pixels in a run without one.
    inside = next(
        (
            key
            for key in metrics
            if key.startswith("component/") and key.endswith("instruction/mean")
        ),
        "change/inside/mean",
    )
    parts = [
        shown("reward", "reward/total/mean", ".3f"),
        shown("inside", inside, ".3f"),
        shown("outside dB", "background/psnr/mean", ".2f"),
        shown("grad", "gradient/norm", ".2g"),
        shown("wait", "seconds/wait", ".1f"),
        shown("learn", "seconds/learn", ".1f"),
        f"dropped {metrics['groups/dropped']}" if metrics.get("groups/dropped") else "",
    ]
    return "  ".join(part for part in parts if part)
