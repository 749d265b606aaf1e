"""The life of a run directory: check, prepare, train, save, and say how it ended.

:func:`train` is all of ``rl-edit train``, except for its options and what a terminal shows.
Everything that can be checked is checked before a file is written.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

from learner.controller import silent
from learner.controller.loop import TrainingLoop
from learner.controller.run import Observer, Outcome, Run, Shown, Silent
from learner.controller.stop import Signals, Stop
from rl_edit.config import RunConfig
from rl_edit.data import RowsDataset
from rl_edit.errors import Interrupted
from rl_edit.files import METRICS, read_json_lines, replace_file
from rl_edit.last_resort import LastResort
from rl_edit.method.update import TrainingFailed
from rl_edit.preparation import prepare, require_judge_deadline
from rl_edit.readiness import require_place
from rl_edit.report.overlays import write_mask_files
from rl_edit.run_directory import CONFIG_FILE
from rl_edit.run_end import Attempt, one_end, status_of
from rl_edit.types import AdapterWeights


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
    observer = Shown(observer or Silent())
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
    stop = Stop()
    with Signals(stop) as signals:
        attempt = Attempt(run, record, observer, signals, had_begun=had_begun)
        with one_end(attempt):
            _describe(attempt)
            observer.starting(config)
            attempt.executor = _executor(attempt, allow_skew=allow_skew)
            attempt.loop = TrainingLoop(
                run,
                attempt.executor,
                lease=attempt.lease,
                events=attempt.events,
                observer=observer,
                stop=stop,
            )
            outcome = asyncio.run(attempt.loop.run(resume=resume))
            if status_of(outcome, config) != "stopped":
                _require_learnt(directory)
                silent.require_informative(directory, config)
            attempt.outcome = outcome
    if status_of(outcome, config) == "stopped":
        observer.say(attempt.stopped_line())
        raise Interrupted(signals.received, reported=True)
    _say_end(outcome, run, observer)
    return outcome.adapter


def _describe(attempt: Attempt) -> None:
    """Writes the files that describe a run, once the directory is this attempt's."""
    run, directory = attempt.run, attempt.run.directory
    if warning := attempt.lease.taking_over():
        attempt.observer.note(f"{warning}: that attempt ends at its next write")
    # Of two that come at the same moment, the one that was overtaken writes neither file.
    owned = attempt.lease.check
    owned()
    replace_file(directory / CONFIG_FILE, run.config.to_yaml(), check=owned)
    attempt.record.write(directory, check=owned)
    if isinstance(run.dataset, RowsDataset):
        write_mask_files(run.dataset, directory)


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


def _executor(attempt: Attempt, *, allow_skew: bool) -> Any:
    """Starts the executor of the run's runtime."""
    # Imported here: only a run with Ray may need Ray, and a dry run needs neither.
    from actors.roles import worker_roles
    from learner.learner import Learner

    config, note = attempt.run.config, attempt.observer.note
    roles = worker_roles(config, attempt.run.dataset.fields, Learner)
    if config.actors.runtime != "ray":
        from actors.local_executor import LocalExecutor

        return LocalExecutor(roles, threaded=config.actors.runtime == "thread")
    from actors import gpu_checks, ray_cluster, ray_executor, ray_watch

    attempt.check()
    with attempt.signals.kept_from_children():
        ray_cluster.connect(config, note=note)
    attempt.last_resort = LastResort(
        attempt, problem=ray_watch.problem, end_processes=ray_watch.end_processes
    )
    attempt.check()
    ray_cluster.check_stop_wait(config.train.grace_s, note=note)
    places = ray_cluster.reserve(config, roles, note=note, check=attempt.check)
    ray_cluster.check_nodes(allow_skew=allow_skew, note=note)
    report = gpu_checks.Report(
        event=attempt.events, say=attempt.observer.say, hardware=attempt.record.hardware
    )
    wait_s = config.actors.wait_for_nodes_s
    return ray_executor.RayExecutor(roles, places, report=report, wait_for_nodes_s=wait_s)
