"""Comparison of a run with what a run directory holds: only the same run may continue there.

Settings, data and editor decide results. One run must not mix the results of two, so a difference
is refused by name unless it is allowed by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from learner.controller import checkpoint
from learner.controller.checkpoint import Checkpoint
from learner.controller.run import Run
from rl_edit.config import is_default, load_config, modern
from rl_edit.errors import InputError

ABSENT: Any = ...
"""The value, in ``differences``, of a setting that one side does not have."""


def require_resumable(run: Run) -> None:
    """Refuses to resume with other settings, data or editor. Nothing is overwritten.

    Raises:
        InputError: the newest checkpoint that verifies was made from something else.
    """
    newest = checkpoint.peek(run.directory / "checkpoints")
    if newest is not None:
        require_same_run(newest, run.settings, run.directory, allow=run.allow_drift)
        updates = run.config.train.updates
        # Fewer updates than were done would leave nothing to do, and an adapter of another length.
        if newest.updates_done > updates:
            raise InputError(
                f"{run.directory} has done {newest.updates_done} updates, and train.updates is "
                f"{updates}: ask for at least as many, or start a new --run-dir."
            )
        return
    written = run.directory / "config.yaml"
    if written.is_file():
        # Stopped before its first checkpoint: its own config.yaml says which run it is.
        there, here = load_config(written).identity(), run.config.identity()
        if different := sorted(set(differences(there, here)) - run.allow_drift):
            raise InputError(
                f"{run.directory} belongs to another run: {', '.join(different)} differ from its "
                "config.yaml. Resume with the run's own config.yaml, or start a new --run-dir."
            )


def require_same_run(
    stored: Checkpoint,
    settings: Mapping[str, Any],
    where: Path,
    allow: Iterable[str] = frozenset(),
) -> None:
    """Refuses a checkpoint of another run, and says what differs.

    Args:
        settings: of this run, in the form of ``Checkpoint.settings``.
        allow: dotted settings that may differ.

    Raises:
        InputError: training would silently continue something else.
    """
    # A setting that the checkpoint lacks is newer than it; its default is what the run had then.
    drift = {
        name: (there, here)
        for name, (there, here) in differences(modern(stored.settings), settings).items()
        if there != ABSENT or not is_default(name, settings)
    }
    if refused := {name: pair for name, pair in drift.items() if name not in allow}:
        listed = "; ".join(
            f"{name}: {_text(there)} there, {_text(here)} here"
            for name, (there, here) in refused.items()
        )
        raise InputError(
            f"{where} belongs to another run ({listed}): one run would mix the results of both. "
            "Resume with the run's own config.yaml, accept changes with "
            f"{' '.join(f'--allow-config-drift {name}' for name in refused)}, "
            "or start a new --run-dir."
        )


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Maps the dotted name of each setting that differs to (value there, value here).

    A value is ``ABSENT`` where one side has none.
    """
    pairs: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*there, *here}):
        one, other = there.get(key, ABSENT), here.get(key, ABSENT)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            pairs |= {f"{key}.{name}": pair for name, pair in differences(one, other).items()}
        elif one != other:
            pairs[key] = (one, other)
    return pairs


def _text(value: Any) -> str:
    # Cut off, because a reference of a whole config would hide the other differences.
    text = "absent" if value is ABSENT else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
