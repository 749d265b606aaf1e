"""A run as the controller sees it: its identity, its end, and whoever watches it."""

from __future__ import annotations

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

    def group_scored(self, update: int, done: int, total: int) -> None: ...
    def update_done(self, metrics: dict[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a run: updates done, and the adapter; None when it was stopped before there was
    one.

    Attributes:
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
            checkpoint of others is refused.
        pixels_per_token: edge of an image token, to which tasks are fitted.
        capacity: devices that the workers occupy, for the efficiency.
        allow_drift: dotted settings that may differ from a checkpoint's.
        probes: the held-out tasks to evaluate while training; None evaluates none.
    """

    config: RunConfig
    dataset: Dataset
    directory: Path
    settings: dict[str, Any]
    pixels_per_token: int
    code_version: str = ""
    capacity: Capacity = field(default_factory=Capacity)
    allow_drift: frozenset[str] = frozenset()
    probes: Probes | None = None
