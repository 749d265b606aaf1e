"""Checks that everything a run will need is here: directory, device, models, data of both splits.

Each function refuses one kind of absence, and a dry run calls them all, so that what it passes
starts. Nothing is loaded that is large, and nothing is written.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from learner.controller.run import Observer
from rl_edit.config import RunConfig
from rl_edit.data import Dataset, RowsDataset, open_dataset
from rl_edit.errors import InputError, ResourcesInfeasible, did_you_mean, lacks_space
from rl_edit.files import EVENTS, METRICS
from rl_edit.lease_holder import LEASE
from rl_edit.rewards import Reward, available
from rl_edit.rewards.vlm.region_judge import RegionJudge
from rl_edit.run_directory import CONFIG_FILE, no_run_at
from rl_edit.run_record import RUN_FILE

_MARKS = (CONFIG_FILE, RUN_FILE, EVENTS, LEASE, "checkpoints")
"""Names of which a directory has at least one where a run has begun."""

_PROBE = b"\0" * (1 << 20)


def require_place(directory: Path, *, resume: bool) -> bool:
    """Returns True when a run has begun in ``directory``.

    Raises:
        InputError: it has and is not to be resumed, or has not and is; or nothing can be written.
        ResourcesInfeasible: the disk is full.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--run-dir {directory} is a file: give a directory")
    entries = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
    begun = any(mark in entries for mark in _MARKS)
    _require_kinds(directory)
    if entries and not begun:
        raise InputError(
            f"--run-dir {directory} is not empty and holds no run (it has {entries[0]}): a run's "
            "files would be mixed with what is there. Give a new directory"
        )
    if begun and not resume:
        raise InputError(
            f"run directory {directory} already holds a run: add --resume to continue it, or give "
            "another --run-dir"
        )
    if resume and not begun:
        raise InputError(
            f"nothing to resume: {no_run_at(directory)} Or drop --resume to start a run there"
        )
    _require_writable(directory)
    return begun


def _require_kinds(directory: Path) -> None:
    """Refuses a directory in the place of a file of the run, or the other way round."""
    for name in (CONFIG_FILE, RUN_FILE, EVENTS, METRICS, LEASE):
        if (directory / name).is_dir():
            raise InputError(
                f"{directory / name} is a directory where a run has a file, so nothing could be "
                "continued or started here: move it away, or give another --run-dir"
            )
    if (directory / "checkpoints").is_file():
        raise InputError(
            f"{directory / 'checkpoints'} is a file where a run has a directory: move it away, or "
            "give another --run-dir"
        )


def _require_writable(directory: Path) -> None:
    """Writes a nameless file where the run directory is or will be made."""
    existing = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise InputError(
            f"--run-dir {directory} cannot be made: {existing} is a file. Give another directory"
        )
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(_PROBE)
            file.flush()
    except OSError as error:
        problem = (
            f"--run-dir {directory} cannot be written to: {existing} refuses a file of 1 MiB "
            f"({error.strerror}). Free space or change its rights, or give another directory"
        )
        if lacks_space(error):
            raise ResourcesInfeasible(problem) from error
        raise InputError(problem) from error


def require_reward_files(config: RunConfig, terms: Sequence[Reward], observer: Observer) -> None:
    """Refuses rewards whose models, files or keys are missing."""
    elsewhere = config.actors.runtime == "ray" and os.environ.get("RAY_ADDRESS") not in (
        *(None, "", "local"),
    )
    for term in terms:
        try:
            term.require_files()
        except InputError as error:
            # The machines of a cluster may have what the one that starts the run has not.
            if not elsewhere:
                raise
            observer.note(f"on this machine, which may not be one of the cluster's: {error}")


def require_regions(
    config: RunConfig, terms: Sequence[Reward], dataset: Dataset, observer: Observer
) -> None:
    """Refuses credit and judges by region on data in which no task has regions."""
    names = set(config.algorithm.credit.needed_components())
    readers = [t.name for t in terms if isinstance(t, RegionJudge) or t.name in names]
    if not readers or "regions" in dataset.fields:
        return
    having = (
        sum("regions" in row.fields for row in dataset.rows)
        if isinstance(dataset, RowsDataset)
        else 0
    )
    if having:
        observer.note(
            f"{having} of {len(dataset)} tasks have regions (region_map); the mask of each other "
            f"one is its only region, for {', '.join(readers)}"
        )
    elif config.data.without_regions == "error":
        raise InputError(
            f"reward {readers[0]!r} scores region by region, and none of the {len(dataset)} tasks "
            "has regions: each mask would be one region. Add a region_map to the rows (rl-edit "
            "find-masks writes one), or accept that with data.without_regions=mask"
        )


def require_gold(config: RunConfig) -> None:
    """Refuses a trusted reward that no reward is called, also where nothing is evaluated yet."""
    gold = config.evaluation.gold
    if gold and gold not in config.rewards:
        hint = did_you_mean(gold, config.rewards) or "."
        raise InputError(
            f"evaluation.gold {gold!r} is no reward of this run{hint} It has "
            f"{', '.join(config.rewards)}"
        )


def require_heldout(
    config: RunConfig, *, pixels_per_token: int, shown: Sequence[str], observer: Observer
) -> None:
    """Opens the held-out tasks, which an evaluation after the run will need.

    Args:
        shown: notices that the training tasks had, which are not repeated.

    Raises:
        InputError: they cannot be opened, or cannot feed a reward.
    """
    try:
        heldout = open_dataset(
            config.data,
            "heldout",
            resolution=config.editor.resolution,
            multiple=pixels_per_token,
        )
        _, left_out = available(tuple(config.rewards.values()), heldout.fields)
    except InputError as error:
        raise InputError(f"held-out tasks (for rl-edit evaluate): {error}") from error
    for text in (str(notice) for notice in heldout.notices):
        if text not in shown:
            observer.note(f"held-out tasks: {text}")
    _say_left_out(left_out, observer)


def _say_left_out(left_out: Mapping[str, str], observer: Observer) -> None:
    for name, why in left_out.items():
        observer.note(f"held-out tasks leave out reward {name}: {why}")
