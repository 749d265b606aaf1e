"""``rl-edit train``: wires config, data, actors and learner, and watches the run."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
import shutil
import signal
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from rl_edit import adapters, telemetry
from rl_edit.config import RunConfig, load_config
from rl_edit.data import open_dataset
from rl_edit.editors import editor_identity, inspect_editor
from rl_edit.errors import InputError
from rl_edit.rewards import available


def train_command(
    config: Annotated[Path | None, typer.Argument(help="YAML file; or use --preset.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Dotted overrides: train.updates=50 seed=7 data.path=DIR")] = None,
    preset: Annotated[str | None, typer.Option(help="A shipped preset (rl-edit presets).")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where the run is written; runs/NAME by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --run-dir from its newest sound checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Validate config, data and editor, print the plan, start nothing.")] = False,
) -> None:
    """Train an adapter. Exit codes: 0 done, 2 bad input, 3 training failed, 4 resources infeasible, 5 cluster unreachable."""
    changes = list(overrides or [])
    if config is not None and "=" in str(config):
        changes, config = [str(config), *changes], None
    if resume and config is None and preset is None and run_dir is not None and (run_dir / "config.yaml").is_file():
        config = run_dir / "config.yaml"
    settings = load_config(config, preset=preset, overrides=changes)
    directory = run_dir or Path("runs") / settings.name
    train(settings, directory, resume=resume, dry_run=dry_run, console=Console(stderr=False))


def train(
    config: RunConfig, directory: Path, *, resume: bool, dry_run: bool = False, console: Console | None = None
) -> adapters.AdapterWeights | None:
    """Runs ``config`` in ``directory``; returns the final adapter. Everything that can be checked is checked before a file is written."""
    from learner.loop import TrainingLoop

    console = console or Console(quiet=True)
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--run-dir {directory} is a file: give a directory")
    occupied = directory.is_dir() and any(directory.iterdir())
    if occupied and not resume:
        raise InputError(f"run directory {directory} already holds a run: add --resume to continue it, or give another --run-dir")
    if resume and not occupied:
        raise InputError(f"nothing to resume in {directory}: drop --resume to start a run there")
    if resume:
        _require_same_settings(config, directory)
    facts = inspect_editor(config.editor)
    dataset = open_dataset(config.data, "train", resolution=config.editor.resolution, multiple=facts.pixels_per_token)
    terms, left_out = available(tuple(config.rewards.values()), dataset.fields)
    base = editor_identity(config.editor)
    identity = hashlib.sha256(f"{config.sha256()} {dataset.fingerprint} {base}".encode()).hexdigest()
    if resume:
        _require_same_run(identity, directory)
    _describe_plan(console, config, len(dataset), dataset.skipped, [term.name for term in terms], left_out)
    if dry_run:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(config.to_yaml())
    record = _run_record(config, dataset.fingerprint, base, [f"{name}: {why}" for name, why in left_out.items()])
    _write_record(directory, record)
    events = telemetry.Events(directory / telemetry.EVENTS)
    started = time.time()
    workers: Any = None
    try:
        with _Watch(console, config) as watch:
            workers = _workers(config, dataset.fields, facts.pixels_per_token, events)
            with _Signals() as signals:
                loop = TrainingLoop(
                    config,
                    dataset,
                    workers,
                    directory,
                    identity=identity,
                    events=events,
                    observer=watch,
                    should_stop=lambda: signals.received != 0,
                )
                outcome = asyncio.run(loop.run(resume=resume))
        adapters.save(directory / "adapter", outcome.adapter, config.lora)
        status = "done" if outcome.updates_done == config.train.updates else "stopped"
        events("finished", status=status, updates_done=outcome.updates_done, adapter=str(outcome.adapter.id))
        finished = {"status": status, "adapter": str(outcome.adapter.id), "finished": time.time(), "seconds": time.time() - started}
        _write_record(directory, {**record, **finished})
    except BaseException as error:
        cause = getattr(error, "cause", None) or error
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:500]}"
        events("failed", reason=reason)
        _write_record(directory, {**record, "status": "failed", "reason": reason, "finished": time.time()})
        if not occupied and not (directory / "checkpoints").exists() and (isinstance(error, InputError) or workers is None):
            shutil.rmtree(directory)
        raise
    finally:
        _close(config, workers)
    if status == "stopped":
        console.print(
            f"stopped after update {outcome.updates_done}; everything is saved. Continue with: "
            f"rl-edit train --run-dir {directory} --resume",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(128 + signals.received)
    console.print(
        f"adapter {outcome.adapter.id} in {directory / 'adapter'}; next: rl-edit evaluate {directory}; rl-edit report {directory}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return outcome.adapter


def _require_same_settings(config: RunConfig, directory: Path) -> None:
    """Refuses to resume with other settings before the run's own config is overwritten.

    Raises:
        InputError: training would silently continue a different run.
    """
    from learner.checkpoint import another_run

    written = directory / "config.yaml"
    if written.is_file() and load_config(written).sha256() != config.sha256():
        raise another_run(directory)


def _require_same_run(identity: str, directory: Path) -> None:
    """Refuses to resume on other data content or another editor, before anything of the run is overwritten.

    Raises:
        InputError: the newest sound checkpoint was made from something else.
    """
    from learner.checkpoint import another_run, newest_identity

    if newest_identity(directory / "checkpoints") not in (None, identity):
        raise another_run(directory)


def _workers(config: RunConfig, fields: frozenset[str], pixels_per_token: int, events: telemetry.Events) -> Any:
    from learner.learner import Learner
    from learner.loop import Rolled

    if config.actors.runtime == "inline":
        from actors.inline import InlineWorkers

        threads = config.actors.threads or os.cpu_count() or 1
        return InlineWorkers(config, fields, Learner(config, threads), Rolled, threads=threads)
    from actors import pool

    pool.connect(config)
    return pool.RayWorkers(config, fields, Learner, Rolled, pixels_per_token=pixels_per_token, on_event=events)


def _close(config: RunConfig, workers: Any) -> None:
    if config.actors.runtime == "ray":
        from actors import pool

        if workers is not None:
            workers.close()
        pool.disconnect()


class _Signals:
    """The first SIGINT or SIGTERM asks the loop to commit and end between updates; a second one ends at once.

    Installed after Ray has connected, because ``ray.init`` replaces the SIGTERM handler.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _on(self, number: int, _frame: object) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number


def _run_record(config: RunConfig, fingerprint: str, base: str, left_out: list[str]) -> dict[str, Any]:
    packages = ("torch", "diffusers", "transformers", "peft", "ray", "numpy")
    return {
        "name": config.name,
        "method": config.algorithm.name,
        "editor": config.editor.path,
        "seed": config.seed,
        "status": "running",
        "updates": config.train.updates,
        "config_sha256": config.sha256(),
        "data_fingerprint": fingerprint,
        "editor_identity": base,
        "left_out_rewards": left_out,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "gpus": _gpus()},
        "command": " ".join(["rl-edit", *sys.argv[1:]]),
        "started": time.time(),
    }


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def _write_record(directory: Path, record: dict[str, Any]) -> None:
    temporary = directory / "run.json.tmp"
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(temporary, directory / "run.json")


def _describe_plan(console: Console, config: RunConfig, tasks: int, skipped: int, terms: list[str], left_out: dict[str, str]) -> None:
    train = config.train
    groups = train.updates * train.groups_per_update
    console.print(
        f"[bold]{config.name}[/bold]: {config.algorithm.name} on {config.editor.path}; "
        f"{train.updates} updates x {train.groups_per_update} groups x {config.rollout.group_size} candidates "
        f"({groups} groups from {tasks} tasks); rewards: {', '.join(terms)}"
    )
    if skipped:
        console.print(f"[yellow]skipped[/yellow] {skipped} rows whose mask is empty or full (data.empty_mask=skip)")
    for name, why in left_out.items():
        console.print(f"[yellow]left out[/yellow] reward {name}: {why}")


class _Watch:
    """Live progress on a terminal; one plain line per update elsewhere."""

    def __init__(self, console: Console, config: RunConfig) -> None:
        self._console, self._config = console, config
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

    def __enter__(self) -> _Watch:
        self._progress.start()
        self._updates = self._progress.add_task("updates", total=self._config.train.updates, note="starting actors")
        self._groups = self._progress.add_task("groups", total=self._config.train.groups_per_update, note="")
        self._began: float | None = None
        self._done = 0
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def group_scored(self, update: int, done: int, total: int) -> None:
        self._began = self._began or time.time()
        self._progress.update(self._groups, completed=done, note="learning" if done == total else "rolling out")

    def update_done(self, metrics: dict[str, Any]) -> None:
        note = progress_line(metrics)
        self._progress.update(self._updates, completed=metrics["update"] + 1, note=note)
        self._progress.update(self._groups, completed=0)
        self._done += 1
        if not self._console.is_terminal:
            elapsed = time.time() - (self._began or time.time())
            left = elapsed / self._done * (self._config.train.updates - metrics["update"] - 1)
            self._console.print(
                f"update {metrics['update'] + 1}/{self._config.train.updates}  {note}  ETA {left:.0f} s", highlight=False, soft_wrap=True
            )


def progress_line(metrics: dict[str, Any]) -> str:
    """What one wants to see while waiting: inside, outside, and where the time goes."""

    def shown(label: str, key: str, form: str) -> str:
        return f"{label} {metrics[key]:{form}}" if isinstance(metrics.get(key), float) else ""

    inside = next((key for key in metrics if key.startswith("component/") and key.endswith("instruction/mean")), "change/inside/mean")
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
