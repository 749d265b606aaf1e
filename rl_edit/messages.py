"""The messages between the controller and its workers.

Large arrays travel beside a message as blobs of their own, so that the controller moves references
only::

    WorkItem -> RolloutResult + group blob -> LearnOrder + group blobs -> LearnAnswer

``WorkItem`` itself belongs to the chain of records in :mod:`rl_edit.types`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor

from rl_edit.types import AdapterId

ABSENT: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
"""Stands where a message has no blob: the number of blobs is fixed before a call."""

ONE_MACHINE = "RL_EDIT_ONE_MACHINE"
"""Environment variable of the workers of a cluster that is one machine.

It names a directory of that machine which other users cannot enter.
"""


@dataclass(frozen=True, kw_only=True)
class RolloutResult:
    """Facts about a finished work item. The group itself is the blob beside it.

    Attributes:
        adapter: id computed from the tensors the actor had really loaded.
        sha256: hash of the blob's bytes. Two results of one item must agree.
        nbytes: size of the blob.
        finite: True when every latent and velocity is finite.
        areas: the separate edit areas on the token grid, which credit needs and which are small.
        seconds: time in the actor, by phase.
    """

    work_id: str
    adapter: AdapterId
    # Of the bytes as sent: the ledger compares repetitions by it without fetching a blob.
    sha256: str
    nbytes: int
    finite: bool
    areas: Bool[Tensor, "area rows columns"]
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LearnerState:
    """State a learner continues from: adapter and optimizer as named tensors.

    Seeds are keyed, so there is no random stream to store.
    """

    updates_done: int
    # Tensors only, so that the packed state is safetensors and never a pickle.
    tensors: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class LearnSlot:
    """One group of an update. Its blobs go to the rank that trains on it.

    Attributes:
        task_type: the kind of edit, by which exploration may be steered.
        areas: the separate edit areas on the token grid; None when the group was lost.
        tables: packed reward tables, one per chunk in candidate order; empty when the group was
            lost.
        lost: why there is no group ("" when there is one): it failed beyond its retry budget.
    """

    task_type: str
    areas: Bool[Tensor, "area rows columns"] | None
    tables: tuple[NDArray[np.uint8], ...]
    lost: str = ""


@dataclass(frozen=True, kw_only=True)
class LearnOrder:
    """One update to apply.

    Attributes:
        update: its number; updates are applied in order.
        plan: hash of everything that goes into it, in canonical order. The same plan is applied
            once.
        slots: one per group, in slot order.
    """

    update: int
    # A rank that has applied this plan answers again without a second step.
    plan: str
    slots: tuple[LearnSlot, ...]


@dataclass(frozen=True, kw_only=True)
class LearnReport:
    """Results of one update, without its tensors.

    Attributes:
        adapter: name of the new acting weights, which the actors run.
        result: name of the new weights that are evaluated and saved: the same, unless the method
            acts on a decayed average or the run saves one.
        plan: hash of what was applied (update, work items, reward tables).
        metrics: loss, ratio, clip and gradient statistics; empty when no group was trained.
        declined: why groups were not trained, by kind ("lost", "invalid", "spread").
        used: number of groups trained.
        skipped: why the optimizer did not step ("" when it did): a loss or gradient was not finite.
        skipped_in_a_row: such updates up to and including this one.
        has_blobs: True for rank 0, whose answer carries weights and state.
    """

    adapter: AdapterId
    result: AdapterId
    plan: str
    metrics: dict[str, float]
    declined: dict[str, tuple[str, ...]] = field(default_factory=dict)
    used: int = 0
    skipped: str = ""
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    has_blobs: bool = True

    @property
    def separate_result(self) -> bool:
        """True when the resulting weights are others than the acting ones."""
        return self.result != self.adapter


class LearnAnswer(NamedTuple):
    """Answer of one rank: a report, then three blobs as separate return values.

    A named tuple, because an executor returns each blob by itself: as an array in this process, as
    a reference elsewhere. ``report`` says which are there; the others are :data:`ABSENT`.

    Attributes:
        adapter: packed acting weights, on rank 0.
        state: packed learner state, on rank 0.
        result: packed resulting weights, on rank 0 and only where ``report.separate_result``.
    """

    report: LearnReport
    adapter: Any = ABSENT
    state: Any = ABSENT
    result: Any = ABSENT
