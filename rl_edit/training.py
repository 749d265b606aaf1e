"""The life of a run directory: check, prepare, train, save, and say how it ended.

:func:`train` is all of ``rl-edit train``, except for its options and what a terminal shows.
Everything that can be checked is checked before a file is written.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner.controller import heldout, silent
from learner.controller.lease import Lease
from learner.controller.loop import TrainingLoop
from learner.controller.run import Observer, Outcome, Run, Silent
from learner.controller.run_log import Events
from learner.controller.stop import Signals, Stop
from rl_edit.config import RunConfig
from rl_edit.data import RowsDataset
from rl_edit.editors import lora
from rl_edit.errors import Fenced, InputError, Interrupted
from rl_edit.files import EVENTS, METRICS, read_json_lines, replace_file
from rl_edit.method.update import TrainingFailed
from rl_edit.preparation import prepare, require_judge_deadline
from rl_edit.readiness import require_place
from rl_edit.report.overlays import write_mask_files
from rl_edit.run_record import RUN_FILE, RunRecord
from rl_edit.types import AdapterWeights


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """One attempt to train a run in its directory.

    Attributes:
        record: content of ``run.json`` while the run goes on.
        had_begun: True when there was a run in the directory before.
        before: files that describe the run, as they were before this attempt.
    """

    run: Run
    record: RunRecord
    observer: Observer
    resume: bool
    allow_skew: bool
    had_begun: bool
    before: dict[Path, bytes]


def train(
    config: RunConfig,
    directory: Path,
    *,
    resume: bool = False,
    dry_run: bool = False,
    observer: Observer | None = None,
    allow_drift: frozenset[str] = frozenset(),
    allow_skew: bool = False,
) -> AdapterWeights | None:
    """Trains ``config`` in ``directory`` and returns the final adapter; None for a dry run.

    Args:
        directory: the run directory; it must be new or empty, unless ``resume``.
        resume: continue from the newest checkpoint that verifies, bit for bit.
        dry_run: check configuration, data and editor, say the plan, and start nothing.
        allow_drift: dotted settings that may differ from those of the checkpoint.
        allow_skew: run although nodes have other package versions or sources.

    Raises:
        InputError: the settings, the data or the directory are wrong; nothing was changed.
        TrainingFailed: the run cannot go on, or no update learnt anything.
        ResourcesInfeasible, ClusterUnreachable: there is no place for the run.
        Fenced: a newer attempt owns the directory.
        Interrupted: a signal stopped the run; everything is saved.
    """
    observer = observer or Silent()
    had_begun = require_place(directory, resume=resume)
    require_judge_deadline(config)
    if config.actors.runtime == "ray" and not dry_run:
        from actors import ray_cluster

        # A missing cluster is reported first: opening data and editor may take minutes.
        ray_cluster.probe()
    run, record = prepare(
        config,
        directory,
        observer,
        resume=resume,
        dry_run=dry_run,
        allow_drift=allow_drift,
    )
    if dry_run:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    attempt = _Attempt(
        run=run,
        record=record,
        observer=observer,
        resume=resume,
        allow_skew=allow_skew,
        had_begun=had_begun,
        before=_description_files(directory),
    )
    outcome = _run(attempt)
    _say_end(outcome, run, observer)
    return outcome.adapter


def _run(attempt: _Attempt) -> Outcome:
    """Takes the directory, trains and saves the adapter.

    ``run.json`` says how it ended, also after a failure.
    """
    run, observer = attempt.run, attempt.observer
    config, directory = run.config, run.directory
    lease = Lease.take(directory)
    if warning := lease.taking_over():
        observer.note(f"{warning}: that attempt ends at its next write")
    # After the lease: these files belong to the attempt that owns the directory.
    replace_file(directory / "config.yaml", config.to_yaml())
    attempt.record.write(directory)
    if isinstance(run.dataset, RowsDataset):
        write_mask_files(run.dataset, directory)
    events = Events(directory / EVENTS)
    executor: Any = None
    loop: TrainingLoop | None = None
    stop = Stop()
    try:
        observer.starting(config)
        with Signals(stop) as signals:
            executor = _executor(attempt, signals)
            loop = TrainingLoop(
                run, executor, lease=lease, events=events, observer=observer, stop=stop
            )
            outcome = asyncio.run(loop.run(resume=attempt.resume))
        status = _status(outcome, config)
        if status != "stopped":
            _require_learnt(directory)
            silent.require_informative(directory, config)
        observer.ended()
        _save(attempt, outcome, status, events)
    except Fenced:
        # The directory belongs to another attempt now. Nothing more is written there.
        raise
    except BaseException as error:
        # Also KeyboardInterrupt and SystemExit: a record must not say "running" for ever.
        _record_failure(attempt, error, events, started=executor is not None, loop=loop)
        raise
    finally:
        observer.ended()
        # Workers end before the lease: the next attempt must not meet them.
        _close(config, executor)
        if directory.is_dir():
            lease.release()
    if status == "stopped":
        observer.say(
            f"stopped after update {outcome.updates_done}; everything is saved. Continue with: "
            f"rl-edit train --run-dir {directory} --resume"
        )
        raise Interrupted(signals.received, reported=True)
    return outcome


def _save(attempt: _Attempt, outcome: Outcome, status: str, events: Events) -> None:
    """Writes the adapters, the last event and the final ``run.json``."""
    run, name, ended = attempt.run, None, time.time()
    if outcome.adapter is not None:
        name = str(outcome.adapter.id)
        # Weights before the record: `done` in run.json means that the adapter is there.
        lora.save(run.directory / "adapter", outcome.adapter, run.config.lora)
        _save_best(run, outcome.adapter, attempt.observer)
    events("finished", status=status, updates_done=outcome.updates_done, adapter=name)
    seconds = ended - (attempt.record.started or ended)
    end = {"status": status, "adapter": name, "finished": ended, "seconds": seconds}
    attempt.record.model_copy(update=end).write(run.directory)


def _record_failure(
    attempt: _Attempt,
    error: BaseException,
    events: Events,
    *,
    started: bool,
    loop: TrainingLoop | None,
) -> None:
    """Writes why the run failed. An attempt that added nothing leaves the run as it was.

    Args:
        started: True when the workers had been started.
    """
    directory = attempt.run.directory
    # A wrapper that carries its cause would hide the message that says what to do.
    cause = getattr(error, "cause", None) or error
    reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:500]}"
    events("failed", reason=reason)
    end = {"status": "failed", "reason": reason, "finished": time.time()}
    attempt.record.model_copy(update=end).write(directory)
    # Settings that never trained must not replace those of the updates that did.
    if loop is None or not loop.log.updates_reported:
        for path, content in attempt.before.items():
            replace_file(path, content)
    # A new directory in which nothing began is removed, so that a second try needs no --resume.
    unused = not attempt.had_begun and not (directory / "checkpoints").exists()
    if unused and (isinstance(error, InputError) or not started):
        shutil.rmtree(directory)


def _description_files(directory: Path) -> dict[Path, bytes]:
    """Reads the files that describe a run, by path.

    A record that says "running" is left out: a killed attempt leaves it, and it is no longer true.
    """
    paths = (directory / "config.yaml", directory / RUN_FILE)
    contents = {path: path.read_bytes() for path in paths if path.is_file()}
    return {
        path: content
        for path, content in contents.items()
        if path.name != RUN_FILE or b'"status": "running"' not in content
    }


def _require_learnt(directory: Path) -> None:
    """Refuses an adapter that no update has moved.

    Raises:
        TrainingFailed: every update of the run was without a group to learn from, or skipped.
    """
    lines = read_json_lines(directory / METRICS)
    if not lines or any(line["groups/used"] and not line["step/skipped"] for line in lines):
        return
    reasons: Counter[str] = Counter()
    for line in lines:
        if line["step/skipped"]:
            reasons["the step was skipped: a loss or gradient was not finite"] += 1
        for kind, counts in line["groups/dropped_reasons"].items():
            reasons.update({f"{kind}: {reason}": count for reason, count in counts.items()})
    raise TrainingFailed(
        f"nothing was learnt in {len(lines)} updates, so the adapter is as it began "
        f"({'; '.join(f'{n} times {why}' for why, n in reasons.most_common(3))}). Look at the "
        "rewards (rl-edit audit-reward), at algorithm.initial_noise and algorithm.credit"
    )


def _status(outcome: Outcome, config: RunConfig) -> str:
    if outcome.updates_done == config.train.updates:
        return "done"
    return "done early" if outcome.early else "stopped"


def _say_end(outcome: Outcome, run: Run, observer: Observer) -> None:
    directory = run.directory
    assert outcome.adapter is not None
    if outcome.updates_done < run.config.train.updates:
        observer.say(
            f"ended after update {outcome.updates_done} of {run.config.train.updates} "
            f"(evaluation.stop_on_alarm): {outcome.early}. Go on nevertheless with: "
            f"rl-edit train --run-dir {directory} --resume evaluation.stop_on_alarm=false"
        )
    observer.say(
        f"adapter {outcome.adapter.id} in {directory / 'adapter'}; "
        f"next: rl-edit evaluate {directory}; rl-edit report {directory}"
    )


def _save_best(run: Run, last: AdapterWeights, observer: Observer) -> None:
    """Saves ``adapter_best/`` when the best adapter on held-out tasks is not the last one."""
    directory = run.directory
    shutil.rmtree(directory / "adapter_best", ignore_errors=True)
    try:
        stored = heldout.read_best(directory / heldout.BEST)
    except ValueError as error:  # damaged, or of another version: the last adapter is saved already
        observer.note(str(error))
        return
    if stored is None or stored[1].id.sha256 == last.id.sha256:
        return
    best, weights = stored
    lora.save(directory / "adapter_best", weights, run.config.lora)
    observer.say(
        f"the best adapter by held-out {best.protocol} is {weights.id} with {best.gold:.4g}: "
        f"{directory / 'adapter_best'}"
    )


def _executor(attempt: _Attempt, signals: Signals) -> Any:
    """Starts the executor of the run's runtime."""
    # Imported here: only a run with Ray may need Ray, and a dry run needs neither.
    from actors.roles import worker_roles
    from learner.learner import Learner

    config, note = attempt.run.config, attempt.observer.note
    roles = worker_roles(config, attempt.run.dataset.fields, Learner)
    if config.actors.runtime != "ray":
        from actors.local_executor import LocalExecutor

        return LocalExecutor(roles, threaded=config.actors.runtime == "thread")
    from actors import ray_cluster, ray_executor

    signals.check()
    ray_cluster.connect(config, note=note)
    signals.check()
    ray_cluster.check_stop_wait(config.train.grace_s, note=note)
    places = ray_cluster.reserve(config, roles, note=note, check=signals.check)
    ray_cluster.check_nodes(allow_skew=attempt.allow_skew, note=note)
    return ray_executor.RayExecutor(roles, places)


def _close(config: RunConfig, executor: Any) -> None:
    if executor is not None:
        # In a loop of its own: that of the run has ended, maybe by an exception.
        asyncio.run(executor.close())
    if config.actors.runtime == "ray":
        from actors import ray_cluster

        ray_cluster.disconnect()
