"""``rl-edit train``: wires config, data, actors and learner, and watches the run."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from learner.controller.run_log import Events
from rl_edit.config import RunConfig, load_config, modern_name
from rl_edit.data import open_dataset
from rl_edit.editors import editor_identity, inspect_editor, lora
from rl_edit.errors import Fenced, InputError
from rl_edit.files import EVENTS, METRICS, read_json_lines, replace_json
from rl_edit.provenance import code_sha256, versions
from rl_edit.rewards import available

if TYPE_CHECKING:
    from learner.controller.loop import Outcome, Run, Stop


def train_command(
    config: Annotated[Path | None, typer.Argument(help="YAML file; or use --preset.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Dotted overrides: train.updates=50 seed=7 data.path=DIR"),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A shipped preset (rl-edit presets).")] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where the run is written; runs/NAME by default.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue the run in --run-dir from its newest sound checkpoint."
        ),
    ] = False,
    auto_resume: Annotated[
        bool,
        typer.Option(
            "--auto-resume",
            help="Continue the run in --run-dir if one has begun there, else start it: safe to repeat.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Validate config, data and editor, print the plan, start nothing."
        ),
    ] = False,
    allow_config_drift: Annotated[
        list[str] | None,
        typer.Option(
            help="With --resume: a dotted setting that may differ from the checkpoint's; repeatable."
        ),
    ] = None,
    allow_version_skew: Annotated[
        bool, typer.Option(help="Run although nodes have other package versions or sources.")
    ] = False,
) -> None:
    """Train an adapter.

    Exit codes: 0 done, 2 bad input, 3 training failed, 4 resources infeasible, 5 cluster unreachable, 75 a newer attempt holds the run
    directory, 130/143 stopped by a signal (everything is saved).
    """
    changes = list(overrides or [])
    if config is not None and "=" in str(config):
        changes, config = [str(config), *changes], None
    going_on = (resume or auto_resume) and config is None and preset is None
    if going_on and run_dir is not None and (run_dir / "config.yaml").is_file():
        config = run_dir / "config.yaml"
    settings = load_config(config, preset=preset, overrides=changes)
    directory = run_dir or Path("runs") / settings.name
    resume = resume or (auto_resume and directory.is_dir() and any(directory.iterdir()))
    train(
        settings,
        directory,
        resume=resume,
        dry_run=dry_run,
        console=Console(stderr=False),
        allow_drift=frozenset(map(modern_name, allow_config_drift or ())),
        allow_skew=allow_version_skew,
    )


def train(
    config: RunConfig,
    directory: Path,
    *,
    resume: bool,
    dry_run: bool = False,
    console: Console | None = None,
    allow_drift: frozenset[str] = frozenset(),
    allow_skew: bool = False,
) -> lora.AdapterWeights | None:
    """Runs ``config`` in ``directory``; returns the final adapter. Everything that can be checked is checked before a file is written."""
    console = console or Console(quiet=True)
    occupied = _require_place(directory, resume=resume)
    _require_patience(config)
    if config.actors.runtime == "ray" and not dry_run:
        from actors import ray_cluster

        ray_cluster.probe()
    run, record = _prepare(config, directory, console, resume=resume, allow_drift=allow_drift)
    if dry_run:
        return None
    outcome = _run(run, record, console, resume=resume, allow_skew=allow_skew, occupied=occupied)
    _tell_end(outcome, run, console)
    return outcome.adapter


def _require_place(directory: Path, *, resume: bool) -> bool:
    """Whether a run has begun in ``directory``.

    Raises:
        InputError: it has and is not to be resumed, or has not and is, or ``directory`` is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--run-dir {directory} is a file: give a directory")
    occupied = directory.is_dir() and any(directory.iterdir())
    if occupied and not resume:
        raise InputError(
            f"run directory {directory} already holds a run: add --resume to continue it, or give another --run-dir"
        )
    if resume and not occupied:
        raise InputError(f"nothing to resume in {directory}: drop --resume to start a run there")
    return occupied


def _prepare(
    config: RunConfig,
    directory: Path,
    console: Console,
    *,
    resume: bool,
    allow_drift: frozenset[str],
) -> tuple[Run, dict[str, Any]]:
    """Opens data, editor and rewards, tells the plan, and writes nothing. Returns the run and what ``run.json`` says of it."""
    from learner.controller import heldout
    from learner.controller.loop import Run

    facts = inspect_editor(config.editor)
    dataset = open_dataset(
        config.data, "train", resolution=config.editor.resolution, multiple=facts.pixels_per_token
    )
    terms, left_out = available(tuple(config.rewards.values()), dataset.fields)
    config.require_measured(left_out)
    base = editor_identity(config.editor)
    run = Run(
        config=config,
        dataset=dataset,
        directory=directory,
        settings={**config.identity(), "content": {"data": dataset.fingerprint, "editor": base}},
        pixels_per_token=facts.pixels_per_token,
        code_version=code_sha256(),
        capacity=_capacity(config),
        allow_drift=allow_drift,
        probes=heldout.probes(config, terms, pixels_per_token=facts.pixels_per_token),
    )
    if resume:
        _require_same_run(run)
    _describe_plan(
        console, config, len(dataset), dataset.skipped, [term.name for term in terms], left_out
    )
    return run, _run_record(
        config, dataset.fingerprint, base, [f"{name}: {why}" for name, why in left_out.items()]
    )


def _run(
    run: Run,
    record: dict[str, Any],
    console: Console,
    *,
    resume: bool,
    allow_skew: bool,
    occupied: bool,
) -> Outcome:
    """Takes the directory, trains, saves the adapter. ``run.json`` says how it ended, also when it failed."""
    from learner.controller.lease import Lease
    from learner.controller.loop import Stop, TrainingLoop

    config, directory = run.config, run.directory
    directory.mkdir(parents=True, exist_ok=True)
    before = _said(directory)
    watch = _Watch(console, config)
    lease = Lease.take(directory)
    if took := lease.taking_over():
        console.print(
            f"[yellow]{took}[/yellow]: that attempt ends at its next write",
            highlight=False,
            soft_wrap=True,
        )
    (directory / "config.yaml").write_text(config.to_yaml())
    _write_record(directory, record)
    events = Events(directory / EVENTS)
    executor: Any = None
    stop = Stop()
    try:
        with watch:
            executor = _executor(config, run.dataset.fields, allow_skew=allow_skew, note=watch.note)
            with _Signals(stop) as signals:
                loop = TrainingLoop(
                    run, executor, lease=lease, events=events, observer=watch, stop=stop
                )
                outcome = asyncio.run(loop.run(resume=resume))
        if _status(outcome, config) != "stopped":
            _require_learnt(directory)
        if outcome.adapter is not None:
            lora.save(directory / "adapter", outcome.adapter, config.lora)
            _save_best(directory, outcome.adapter, config, console)
        status, name = (
            _status(outcome, config),
            None if outcome.adapter is None else str(outcome.adapter.id),
        )
        events("finished", status=status, updates_done=outcome.updates_done, adapter=name)
        ended = time.time()
        _write_record(
            directory,
            {
                **record,
                "status": status,
                "adapter": name,
                "finished": ended,
                "seconds": ended - record["started"],
            },
        )
    except Fenced:
        raise  # the directory is another attempt's now: not a byte more
    except BaseException as error:
        cause = getattr(error, "cause", None) or error
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:500]}"
        events("failed", reason=reason)
        _write_record(
            directory, {**record, "status": "failed", "reason": reason, "finished": time.time()}
        )
        if not watch.done:  # this attempt did not add to the run, so it changes nothing of what the run says of itself
            for path, content in before.items():
                path.write_bytes(content)
        if (
            not occupied
            and not (directory / "checkpoints").exists()
            and (isinstance(error, InputError) or executor is None)
        ):
            shutil.rmtree(directory)
        raise
    finally:
        _close(config, executor)
        if directory.is_dir():
            lease.release()
    if status == "stopped":
        console.print(
            f"stopped after update {outcome.updates_done}; everything is saved. Continue with: "
            f"rl-edit train --run-dir {directory} --resume",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(128 + signals.received)
    return outcome


def _said(directory: Path) -> dict[Path, bytes]:
    """What a run says of itself; without its record where that says that it runs, which a killed attempt leaves."""
    found = {
        path: path.read_bytes()
        for path in (directory / "config.yaml", directory / "run.json")
        if path.is_file()
    }
    return {
        path: content
        for path, content in found.items()
        if path.name != "run.json" or b'"status": "running"' not in content
    }


def _require_learnt(directory: Path) -> None:
    """An adapter that no update has moved is no result.

    Raises:
        TrainingFailed: every update of the run was without a group to learn from, or skipped.
    """
    from rl_edit.method.update import TrainingFailed

    lines = read_json_lines(directory / METRICS)
    if not lines or any(line["groups/used"] and not line["step/skipped"] for line in lines):
        return
    why: Counter[str] = Counter()
    for line in lines:
        why.update(
            {"the step was skipped: a loss or gradient was not finite": 1}
            if line["step/skipped"]
            else {}
        )
        for kind, reasons in line["groups/dropped_reasons"].items():
            why.update({f"{kind}: {reason}": count for reason, count in reasons.items()})
    raise TrainingFailed(
        f"nothing was learnt in {len(lines)} updates, so the adapter is as it began "
        f"({'; '.join(f'{n} times {w}' for w, n in why.most_common(3))}). "
        "Look at the rewards (rl-edit audit-reward), at algorithm.initial_noise and algorithm.credit"
    )


def _status(outcome: Outcome, config: RunConfig) -> str:
    return (
        "done"
        if outcome.updates_done == config.train.updates
        else "done early"
        if outcome.early
        else "stopped"
    )


def _tell_end(outcome: Outcome, run: Run, console: Console) -> None:
    directory = run.directory
    assert outcome.adapter is not None
    if outcome.updates_done < run.config.train.updates:
        console.print(
            f"ended after update {outcome.updates_done} of {run.config.train.updates} (evaluation.stop_on_alarm): {outcome.early}. Go on "
            f"nevertheless with: rl-edit train --run-dir {directory} --resume evaluation.stop_on_alarm=false",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    console.print(
        f"adapter {outcome.adapter.id} in {directory / 'adapter'}; next: rl-edit evaluate {directory}; rl-edit report {directory}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _save_best(
    directory: Path, last: lora.AdapterWeights, config: RunConfig, console: Console
) -> None:
    """``adapter_best/`` beside ``adapter/``, when the adapter that held-out tasks liked best is not the last one."""
    from learner.controller import heldout

    shutil.rmtree(directory / "adapter_best", ignore_errors=True)
    try:
        found = heldout.read_best(directory / heldout.BEST)
    except ValueError as error:  # damaged, or of another version: what was trained is saved already
        console.print(f"[yellow]note[/yellow] {error}", highlight=False, soft_wrap=True)
        return
    if found is None or found[1].id.sha256 == last.id.sha256:
        return
    best, weights = found
    lora.save(directory / "adapter_best", weights, config.lora)
    console.print(
        f"the best adapter by held-out {best.protocol} is {weights.id} with {best.gold:.4g}: {directory / 'adapter_best'}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _require_same_run(run: Run) -> None:
    """Refuses to resume with other settings, other data or another editor, before anything of the run is overwritten.

    Raises:
        InputError: the newest sound checkpoint was made from something else.
    """
    from learner.controller import checkpoint

    found = checkpoint.peek(run.directory / "checkpoints")
    if found is not None:
        checkpoint.require_same_run(found, run.settings, run.directory, allow=run.allow_drift)
        if found.updates_done > run.config.train.updates:
            raise InputError(
                f"{run.directory} has done {found.updates_done} updates, and train.updates is {run.config.train.updates}: ask for at least "
                "as many, or start a new --run-dir."
            )
    elif (written := run.directory / "config.yaml").is_file() and (
        there := load_config(written).identity()
    ) != run.config.identity():
        different = {
            key
            for key in checkpoint.differences(there, run.config.identity())
            if key not in run.allow_drift
        }
        if different:
            raise InputError(
                f"{run.directory} belongs to another run: {', '.join(sorted(different))} differ from its config.yaml. "
                "Resume with the run's own config.yaml, or start a new --run-dir."
            )


def _executor(
    config: RunConfig, fields: frozenset[str], *, allow_skew: bool, note: Callable[[str], None]
) -> Any:
    from actors.roles import worker_roles
    from learner.learner import Learner

    roles = worker_roles(config, fields, Learner)
    if config.actors.runtime != "ray":
        from actors.local_executor import LocalExecutor

        return LocalExecutor(roles, threaded=config.actors.runtime == "thread")
    from actors import ray_cluster, ray_executor

    ray_cluster.connect(config)
    ray_cluster.check_stop_wait(config.train.grace_s, note=note)
    places = ray_cluster.reserve(config, roles, note=note)
    ray_cluster.check_nodes(allow_skew=allow_skew, note=note)
    return ray_executor.RayExecutor(roles, places)


def _require_patience(config: RunConfig) -> None:
    """A judge that hangs must cost scores, not the actor that asks it.

    Raises:
        InputError: the timeouts and retries of the judges outlast ``actors.deadline_s``.
    """
    waits, asked = config.patience_s(), config.actors
    if asked.runtime != "inline" and waits >= asked.deadline_s:
        raise InputError(
            f"actors.deadline_s {asked.deadline_s:g} is not above the {waits:g} s that scoring may wait for judges that hang (timeout_s, "
            "retries and pauses of rewards, questions beyond transport.concurrency one after another): their actors would be killed in "
            "place of a few scores. Raise deadline_s, or lower timeout_s or retries."
        )


def _capacity(config: RunConfig) -> Any:
    """What the run's workers occupy: GPUs where there are any, else cores. Waiting for a judge elsewhere occupies none."""
    from actors.roles import available_cores, threads_per_actor
    from learner.controller.capacity import Capacity

    asked = config.actors
    colocated = asked.placement == "colocated"
    learner_gpus = asked.rollout_gpus if colocated else asked.learner_gpus
    gpus = (
        asked.num_rollout * asked.rollout_gpus
        + asked.num_reward * asked.reward_gpus
        + (0 if colocated else asked.num_learner * learner_gpus)
    )
    if gpus:
        equal = asked.rollout_gpus == asked.reward_gpus == learner_gpus
        return Capacity(
            rollout=asked.rollout_gpus,
            reward=asked.reward_gpus,
            learner=learner_gpus,
            total=gpus,
            divisible=equal,
        )
    rollout, learner = threads_per_actor(config)
    cores = available_cores()
    reward = 0 if any(term.remote for term in config.rewards.values()) else 1
    return Capacity(
        rollout=min(rollout, cores),
        reward=reward,
        learner=min(learner, cores),
        total=cores if asked.runtime == "ray" else rollout,
    )


def _close(config: RunConfig, executor: Any) -> None:
    if executor is not None:
        asyncio.run(executor.close())
    if config.actors.runtime == "ray":
        from actors import ray_cluster

        ray_cluster.disconnect()


class _Signals:
    """The first SIGINT or SIGTERM asks the loop to commit and end; a second one ends at once.

    Installed after Ray has connected, because ``ray.init`` replaces the SIGTERM handler.
    """

    def __init__(self, stop: Stop) -> None:
        self.received = 0
        self._stop = stop
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._on)
                for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _on(self, number: int, _frame: object) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number
        self._stop.request()


def _run_record(
    config: RunConfig, fingerprint: str, base: str, left_out: list[str]
) -> dict[str, Any]:
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
        "versions": versions(),
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "gpus": _gpus()},
        "command": " ".join(["rl-edit", *sys.argv[1:]]),
        "started": time.time(),
    }


def _gpus() -> list[str]:
    import torch

    return (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )


def _write_record(directory: Path, record: dict[str, Any]) -> None:
    replace_json(directory / "run.json", record)


def _describe_plan(
    console: Console,
    config: RunConfig,
    tasks: int,
    skipped: int,
    terms: list[str],
    left_out: dict[str, str],
) -> None:
    train = config.train
    groups = train.updates * train.groups_per_update
    console.print(
        f"[bold]{config.name}[/bold]: {config.algorithm.name} on {config.editor.path}; "
        f"{train.updates} updates x {train.groups_per_update} groups x {config.rollout.group_size} candidates "
        f"({groups} groups from {tasks} tasks); rewards: {', '.join(terms)}"
    )
    if skipped:
        console.print(
            f"[yellow]skipped[/yellow] {skipped} rows whose mask is empty or full (data.empty_mask=skip)"
        )
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
        self.done = 0

    def __enter__(self) -> _Watch:
        self._progress.start()
        self._updates = self._progress.add_task(
            "updates", total=self._config.train.updates, note="starting actors"
        )
        self._groups = self._progress.add_task(
            "groups", total=self._config.train.groups_per_update, note=""
        )
        self._began: float | None = None
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def group_scored(self, update: int, done: int, total: int) -> None:
        self._began = self._began or time.time()
        self._progress.update(
            self._groups, completed=done, note="learning" if done == total else "rolling out"
        )

    def note(self, text: str) -> None:
        self._console.print(f"[yellow]note[/yellow] {text}", highlight=False, soft_wrap=True)

    def update_done(self, metrics: dict[str, Any]) -> None:
        note = progress_line(metrics)
        self._progress.update(self._updates, completed=metrics["update"] + 1, note=note)
        self._progress.update(self._groups, completed=0)
        self.done += 1
        if not self._console.is_terminal:
            elapsed = time.time() - (self._began or time.time())
            left = elapsed / self.done * (self._config.train.updates - metrics["update"] - 1)
            self._console.print(
                f"update {metrics['update'] + 1}/{self._config.train.updates}  {note}  ETA {left:.0f} s",
                highlight=False,
                soft_wrap=True,
            )


def progress_line(metrics: dict[str, Any]) -> str:
    """What one wants to see while waiting: inside, outside, and where the time goes."""

    def shown(label: str, key: str, form: str) -> str:
        return f"{label} {metrics[key]:{form}}" if isinstance(metrics.get(key), float) else ""

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
