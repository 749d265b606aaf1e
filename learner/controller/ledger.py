"""The book of work: which items are open, whose result was taken, what was trained on. Pure bookkeeping, no waiting.

Execution is at-least-once and the first valid result wins: an item may be run twice (a lost actor, a missed deadline), its
result is taken once. Work ids contain no clock and no actor, so a repeated item is the same item.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from rl_edit.messages import RolloutResult
from rl_edit.types import WorkItem


class State(Enum):
    """Where an item stands. Failure leads back to PLANNED."""

    PLANNED = "planned"
    DISPATCHED = "dispatched"
    ROLLED = "rolled"
    SCORED = "scored"


class Verdict(Enum):
    """What became of a result that arrived."""

    TAKEN = "taken"
    DUPLICATE = "duplicate"
    """The same bytes again, after the first were taken."""
    CONFLICT = "conflict"
    """Other bytes for an item already taken: the work is not deterministic on these machines."""
    STALE = "stale"
    """Made with other weights than the item names."""
    NOT_FINITE = "not_finite"
    FOREIGN = "foreign"
    """Of an item that is not open: already trained on, or never planned."""


@dataclass
class Entry:
    """One open item: mutable, private to the ledger."""

    item: WorkItem
    state: State = State.PLANNED
    attempts: int = 0
    sha256: str = ""
    result: Any = None


class Ledger:
    """Open items by work id, counters, and the chain of what was trained on.

    ``chain`` hashes every consumed group id in order, so that two runs trained on the same groups in the same order
    exactly when their chains are equal; it is all that a checkpoint needs of the past.
    """

    def __init__(self) -> None:
        self.open: dict[str, Entry] = {}
        self.chain = ""
        self.consumed = 0
        self.counts = {verdict: 0 for verdict in Verdict}

    def plan(self, item: WorkItem) -> None:
        """Opens an item.

        Raises:
            ValueError: for an id that is open already.
        """
        if item.work_id in self.open:
            raise ValueError(f"work item {item.work_id} is planned twice")
        self.open[item.work_id] = Entry(item)

    def dispatched(self, work_id: str) -> int:
        """Marks an item as under way; returns which attempt this is, from 1."""
        entry = self.open[work_id]
        entry.attempts += 1
        if entry.state is State.PLANNED:
            entry.state = State.DISPATCHED
        return entry.attempts

    def failed(self, work_id: str) -> None:
        """An attempt failed: the item waits for the next one, unless another attempt's result was taken meanwhile."""
        entry = self.open.get(work_id)
        if entry is not None and entry.state is State.DISPATCHED:
            entry.state = State.PLANNED

    def offer(self, work_id: str, rolled: RolloutResult, blob: Any = None) -> Verdict:
        """Judges a result. One that is TAKEN is its entry's ``result`` from then on, whichever attempt it is of."""
        verdict = self._judge(work_id, rolled)
        self.counts[verdict] += 1
        if verdict is Verdict.TAKEN:
            entry = self.open[work_id]
            entry.state, entry.sha256, entry.result = State.ROLLED, rolled.sha256, (rolled, blob)
        return verdict

    def _judge(self, work_id: str, rolled: RolloutResult) -> Verdict:
        entry = self.open.get(work_id)
        if entry is None or rolled.work_id != work_id:
            return Verdict.FOREIGN
        if rolled.adapter != entry.item.adapter:
            return Verdict.STALE
        if not rolled.finite:
            return Verdict.NOT_FINITE
        if entry.state in (State.ROLLED, State.SCORED):
            return Verdict.DUPLICATE if rolled.sha256 == entry.sha256 else Verdict.CONFLICT
        return Verdict.TAKEN

    def scored(self, work_id: str) -> None:
        self.open[work_id].state = State.SCORED

    def reopen(self, work_id: str) -> None:
        """The result that was taken is gone: the item needs another one."""
        self.open[work_id] = Entry(self.open[work_id].item)

    def close(self, update: int) -> None:
        """Forgets the items of an update; they may be planned again."""
        for work_id in [
            work_id for work_id, entry in self.open.items() if entry.item.update == update
        ]:
            del self.open[work_id]

    def consume(self, update: int, group_ids: Sequence[str]) -> None:
        """Closes the items of an update that was applied, and adds its groups, in slot order, to the chain."""
        self.close(update)
        for group_id in group_ids:
            self.chain = hashlib.sha256(f"{self.chain} {group_id}".encode()).hexdigest()
        self.consumed += len(group_ids)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps. Open items are not kept: they are planned again from the data cursor."""
        return {"chain": self.chain, "consumed": self.consumed}

    def restore(self, state: dict[str, Any]) -> None:
        self.open.clear()
        self.chain, self.consumed = str(state["chain"]), int(state["consumed"])
