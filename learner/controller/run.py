"""A run as the controller sees it: its identity, its end, and its observer."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from learner.controller.capacity import Capacity
from learner.controller.heldout import Probes
from rl_edit.config import RunConfig
from rl_edit.data import Dataset
from rl_edit.types import AdapterWeights


class Observer(Protocol):
    """Receives the progress of a run, for a terminal or for nothing."""

    # In order: starting, then groups and updates, then ended. Notes may come at any time.
    def starting(self, config: RunConfig) -> None:
        """Workers are about to start."""

    def ended(self) -> None:
        """No progress follows. May be called more than once."""

    def say(self, text: str) -> None:
        """Shows one line about the run: its plan, what is left out, how it ended."""

    def note(self, text: str) -> None:
        """Shows something that a person should know."""

    def group_scored(self, update: int, done: int, total: int) -> None:
        """Another group of an update is complete or lost."""

    def update_done(self, metrics: dict[str, Any]) -> None:
        """An update is applied, and its line of metrics is written."""


class Silent:
    """Shows nothing."""

    def starting(self, config: RunConfig) -> None: ...
    def ended(self) -> None: ...
    def say(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def group_scored(self, update: int, done: int, total: int) -> None: ...
    def update_done(self, metrics: dict[str, Any]) -> None: ...


class Shown:
    """Passes progress on, and goes on without it where it cannot be shown or written.

    A full disk or a closed terminal is no reason to end hours of training. Any other error of an
    observer is a fault and ends the run.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def starting(self, config: RunConfig) -> None:
        with contextlib.suppress(OSError):
            self._observer.starting(config)

    def ended(self) -> None:
        with contextlib.suppress(OSError):
            self._observer.ended()

    def say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._observer.say(text)

    def note(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._observer.note(text)

    def group_scored(self, update: int, done: int, total: int) -> None:
        with contextlib.suppress(OSError):
            self._observer.group_scored(update, done, total)

    def update_done(self, metrics: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._observer.update_done(metrics)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a run.

    Attributes:
        updates_done: updates of the run, also those of earlier attempts.
        adapter: the resulting weights; None when the run was stopped before there were any.
        early: why the run itself ended before its last update; "" when it did not.
    """

    updates_done: int
    adapter: AdapterWeights | None
    early: str = ""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's identity, beside its config.

    Attributes:
        settings: everything that decides results: settings and the content of data and editor. A
            checkpoint of other settings is refused.
        pixels_per_token: edge of an image token, to which tasks are fitted.
        capacity: devices that the workers occupy, for the efficiency.
        allow_drift: dotted settings that may differ from a checkpoint's.
        probes: the held-out tasks to evaluate while training; None evaluates none.
    """

    config: RunConfig
    dataset: Dataset
    directory: Path
    # Compared by name with those of a checkpoint, so it holds JSON values only.
    settings: dict[str, Any]
    pixels_per_token: int
    code_version: str = ""
    capacity: Capacity = field(default_factory=Capacity)
    allow_drift: frozenset[str] = frozenset()
    probes: Probes | None = None
