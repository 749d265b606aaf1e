"""The book of work: open items, their results, and the chain of trained groups.

An item may run more than once (a lost actor, a missed deadline). Its first valid result is taken,
and taken once. Work ids contain no clock and no actor, so a repeated item is the same item. The
ledger keeps records only; it never waits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from rl_edit.messages import RolloutResult
from rl_edit.types import WorkItem


class Verdict(Enum):
    """Outcomes for a result that arrived."""

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
    """One open item: mutable, private to the ledger.

    Attributes:
        result: (rollout result, blob) once one was taken.
    """

    item: WorkItem
    result: tuple[RolloutResult, Any] | None = None


class Ledger:
    """Keeps open items by work id, counts of verdicts, and the chain of trained groups.

    ``chain`` hashes every consumed group id in order. Two runs trained on the same groups in the
    same order exactly when their chains are equal. A checkpoint needs nothing else of the past.
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

    def offer(self, work_id: str, result: RolloutResult, blob: Any = None) -> Verdict:
        """Returns the verdict on a result. From TAKEN on, that result is the item's."""
        verdict = self._verdict(work_id, result)
        self.counts[verdict] += 1
        if verdict is Verdict.TAKEN:
            self.open[work_id].result = (result, blob)
        return verdict

    def _verdict(self, work_id: str, result: RolloutResult) -> Verdict:
        # The order of these tests matters: a result must be the item's before its content counts.
        entry = self.open.get(work_id)
        if entry is None or result.work_id != work_id:
            return Verdict.FOREIGN
        # Weights before content: a result of other weights says nothing about determinism.
        if result.adapter != entry.item.adapter:
            return Verdict.STALE
        if not result.finite:
            return Verdict.NOT_FINITE
        if entry.result is not None:
            # Work is repeatable to the byte, so other bytes say that the machines are not.
            same = result.sha256 == entry.result[0].sha256
            return Verdict.DUPLICATE if same else Verdict.CONFLICT
        return Verdict.TAKEN

    def reopen(self, work_id: str) -> None:
        """Forgets the result that was taken, because its blob is gone."""
        self.open[work_id] = Entry(self.open[work_id].item)

    def close(self, update: int) -> None:
        """Forgets the items of an update; they may be planned again."""
        for work_id, entry in list(self.open.items()):
            if entry.item.update == update:
                del self.open[work_id]

    def consume(self, update: int, group_ids: Sequence[str]) -> None:
        """Closes the items of an applied update, and adds its groups to the chain.

        Args:
            group_ids: in slot order, which is the order of training whatever arrived first.
        """
        self.close(update)
        for group_id in group_ids:
            self.chain = hashlib.sha256(f"{self.chain} {group_id}".encode()).hexdigest()
        self.consumed += len(group_ids)

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint stores. Open items are planned again from the task cursor."""
        return {"chain": self.chain, "consumed": self.consumed}

    def restore(self, state: dict[str, Any]) -> None:
        """Puts back the state of a checkpoint."""
        self.open.clear()
        self.chain, self.consumed = str(state["chain"]), int(state["consumed"])
