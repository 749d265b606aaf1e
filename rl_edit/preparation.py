"""Checks of a run before it starts: its directory, deadlines, editor, data and rewards.

Everything that a dry run checks is here, and nothing here writes a file. :mod:`rl_edit.training`
goes on from the :class:`Run` that :func:`prepare` returns.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from learner.controller import heldout
from learner.controller.capacity import Capacity
from learner.controller.run import Observer, Run
from learner.controller.same_run import require_resumable
from rl_edit.audit.total import TASKS_BEFORE_TRAINING, Purpose, examine
from rl_edit.config import RunConfig
from rl_edit.data import RowsDataset, open_dataset
from rl_edit.data.canvas import fit, fittings_line
from rl_edit.device_settings import require_device
from rl_edit.editors import editor_identity, inspect_editor, require_targets
from rl_edit.editors.misfit import misfit_note
from rl_edit.errors import InputError
from rl_edit.provenance import code_sha256, versions
from rl_edit.readiness import (
    require_gold,
    require_heldout,
    require_regions,
    require_reward_files,
)
from rl_edit.rewards import Reward, available
from rl_edit.run_record import RunRecord
from rl_edit.types import EditTask

_MEASURED_SIDE = 128
"""Largest canvas, in pixels, on which the weighted sum is measured before the start."""
_TRAINED_NEVERTHELESS = "It is trained nevertheless; the report says so first."


def require_judge_deadline(config: RunConfig) -> None:
    """Refuses deadlines that a hanging judge outlasts: it must cost scores, not the actor.

    Raises:
        InputError: timeouts and retries of the judges exceed ``actors.deadline_s``.
    """
    judge_s, actors = config.judge_timeout_s(), config.actors
    # Inline there is no deadline to miss: nothing could kill the caller's own process.
    if actors.runtime != "inline" and judge_s >= actors.deadline_s:
        raise InputError(
            f"actors.deadline_s {actors.deadline_s:g} is not above the {judge_s:g} s that scoring "
            "may wait for judges that hang (timeout_s, retries and pauses of rewards, questions "
            "beyond transport.concurrency one after another): their actors would be killed in "
            "place of a few scores. Raise deadline_s, or lower timeout_s or retries."
        )


def prepare(
    config: RunConfig,
    directory: Path,
    observer: Observer,
    *,
    resume: bool,
    dry_run: bool,
    allow_drift: frozenset[str],
) -> tuple[Run, RunRecord]:
    """Opens data, editor and rewards and says the plan. Writes nothing.

    Returns:
        the run, and the content of ``run.json``.
    """
    require_device(config, observer)
    require_gold(config)
    facts = inspect_editor(config.editor)
    dataset = open_dataset(
        config.data,
        "train",
        resolution=config.editor.resolution,
        multiple=facts.pixels_per_token,
        text=config.editor,
    )
    terms, left_out = available(tuple(config.rewards.values()), dataset.fields)
    config.require_measured(left_out)
    require_targets(config.editor, config.lora)
    require_reward_files(config, terms, observer)
    require_regions(config, terms, dataset, observer)
    # Training reads them only where it evaluates; a dry run answers for what comes after it too.
    if dry_run or config.data.heldout_path is not None:
        require_heldout(
            config,
            pixels_per_token=facts.pixels_per_token,
            shown=[str(notice) for notice in dataset.notices],
            observer=observer,
        )
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
        # Before the directory is touched: a refused resume must leave the run as it was.
        require_resumable(run)
    purpose = _require_edit_rewarded(run, terms, left_out, resume=resume)
    _say_plan(run, [term.name for term in terms], left_out, observer)
    for note in filter(None, (*facts.notes, misfit_note(config.editor, dataset))):
        observer.note(note)
    if purpose.problem:
        observer.note(f"{purpose.problem}. {_TRAINED_NEVERTHELESS}")
    if purpose.unknown:
        observer.say(purpose.unknown)
    record = _run_record(run, base, [f"{name}: {why}" for name, why in left_out.items()])
    return run, record.model_copy(update={"unrewarded_edit": purpose.problem})


def _require_edit_rewarded(
    run: Run, terms: Sequence[Reward], left_out: dict[str, str], *, resume: bool
) -> Purpose:
    """Refuses to begin a run whose weighted sum does not ask for the edit.

    A run that has begun goes on, and says so: it was begun by a version that did not look, or on
    purpose.

    Raises:
        InputError: with what was found and the setting that trains nevertheless.
    """
    config, dataset = run.config, run.dataset
    purpose = examine(
        terms,
        lambda: _measured_tasks(run),
        left_out=left_out,
        has_targets="target" in dataset.fields,
        seed=config.seed,
    )
    if purpose.problem and not (config.train.allow_unrewarded_edit or resume):
        raise InputError(
            f"{purpose.problem}. To train nevertheless, set train.allow_unrewarded_edit=true"
        )
    return purpose


def _measured_tasks(run: Run) -> list[EditTask]:
    """Reads the first tasks, small: the start of a run must not wait for large images."""
    side = min(run.config.editor.resolution, _MEASURED_SIDE)
    tasks = []
    for row in range(min(TASKS_BEFORE_TRAINING, len(run.dataset))):
        task = run.dataset[row]
        # A mask may fill so small a canvas; the other tasks do.
        with contextlib.suppress(InputError):
            tasks.append(fit(task, resolution=side, multiple=run.pixels_per_token))
    return tasks


def _say_plan(run: Run, terms: list[str], left_out: dict[str, str], observer: Observer) -> None:
    """Says what is trained, on how much, and what is left out."""
    config, dataset = run.config, run.dataset
    observer.say(
        f"{config.name}: {config.algorithm.name} on {config.editor.path}; {_size(run)}; "
        f"rewards: {', '.join(terms)}"
    )
    if dataset.skipped:
        observer.note(
            f"skipped {dataset.skipped} rows whose mask is empty or full (data.empty_mask=skip)"
        )
    if isinstance(dataset, RowsDataset) and (line := fittings_line(dataset.fittings)):
        observer.say(line)
    for notice in dataset.notices:
        observer.note(str(notice))
    for name, why in left_out.items():
        observer.note(f"left out reward {name}: {why}")


def _size(run: Run) -> str:
    """Describes the amount of work."""
    train = run.config.train
    return (
        f"{train.updates} updates x {train.groups_per_update} groups x "
        f"{run.config.rollout.group_size} candidates "
        f"({train.updates * train.groups_per_update} groups from {len(run.dataset)} tasks)"
    )


def _capacity(config: RunConfig) -> Capacity:
    from actors.roles import available_cores, threads_per_actor

    return Capacity.of(config, threads_per_actor(config), available_cores())


def _run_record(run: Run, base: str, left_out: list[str]) -> RunRecord:
    """Returns the record of a run at the start of an attempt."""
    config, dataset = run.config, run.dataset
    fitted = dataset.fittings if isinstance(dataset, RowsDataset) else ()
    return RunRecord(
        name=config.name,
        method=config.algorithm.name,
        editor=config.editor.path,
        seed=config.seed,
        status="running",
        updates=config.train.updates,
        config_sha256=config.sha256(),
        data_fingerprint=dataset.fingerprint,
        editor_identity=base,
        left_out_rewards=tuple(left_out),
        canvases=tuple(each.record() for each in fitted),
        versions=versions(),
        hardware=_hardware(),
        command=" ".join(["rl-edit", *sys.argv[1:]]),
        started=time.time(),
    )


def _hardware() -> dict[str, Any]:
    """Describes this machine."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(index) for index in gpus],
    }
