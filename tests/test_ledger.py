"""The ledger: first valid result wins, and what was trained on is known by its chain."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from learner.controller.ledger import Ledger, Verdict
from rl_edit.messages import RolloutResult
from rl_edit.types import AdapterId, WorkItem
from test_rewards import small_group

ADAPTER = AdapterId(3, "a" * 64)


def item(group_id: str = "g", update: int = 3) -> WorkItem:
    task = small_group().task
    return WorkItem(
        group_id=group_id,
        chunk=(0, 4),
        task=task,
        epoch=0,
        update=update,
        num_candidates=4,
        run_seed=0,
        adapter=ADAPTER,
    )


def result(work_id: str = "g.0-4", sha256: str = "1" * 64) -> RolloutResult:
    return RolloutResult(
        work_id=work_id,
        adapter=ADAPTER,
        sha256=sha256,
        nbytes=1,
        finite=True,
        areas=torch.ones(1, 1, 1, dtype=torch.bool),
    )


@pytest.fixture
def ledger() -> Ledger:
    made = Ledger()
    made.plan(item())
    return made


def test_the_first_valid_result_is_taken_and_a_repetition_is_a_duplicate_that_is_counted(
    ledger: Ledger,
) -> None:
    assert ledger.offer("g.0-4", result(), "first") is Verdict.TAKEN
    assert ledger.offer("g.0-4", result(), "second") is Verdict.DUPLICATE
    assert ledger.offer("g.0-4", result(), "third") is Verdict.DUPLICATE
    assert ledger.open["g.0-4"].result[1] == "first"
    assert (ledger.counts[Verdict.TAKEN], ledger.counts[Verdict.DUPLICATE]) == (1, 2)


def test_other_bytes_for_a_taken_item_are_a_conflict_and_the_first_stay(ledger: Ledger) -> None:
    ledger.offer("g.0-4", result(), "first")
    assert ledger.offer("g.0-4", result(sha256="2" * 64), "second") is Verdict.CONFLICT
    assert ledger.open["g.0-4"].result[1] == "first"


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        (replace(result(), adapter=AdapterId(3, "b" * 64)), Verdict.STALE),
        (replace(result(), adapter=AdapterId(2, "a" * 64)), Verdict.STALE),
        (replace(result(), finite=False), Verdict.NOT_FINITE),
        (replace(result(), work_id="g.4-8"), Verdict.FOREIGN),
    ],
    ids=["other bytes", "other step", "not finite", "other item"],
)
def test_a_result_that_is_not_what_the_item_asks_for_is_not_taken_and_leaves_the_item_open(
    ledger: Ledger, changed: RolloutResult, verdict: Verdict
) -> None:
    assert ledger.offer("g.0-4", changed, "wrong") is verdict
    assert ledger.open["g.0-4"].result is None
    assert ledger.offer("g.0-4", result(), "right") is Verdict.TAKEN


def test_a_result_after_its_update_was_applied_is_foreign(ledger: Ledger) -> None:
    ledger.offer("g.0-4", result())
    ledger.consume(3, ["g"])
    assert ledger.offer("g.0-4", result()) is Verdict.FOREIGN
    assert ledger.consumed == 1


def test_an_item_whose_result_is_gone_takes_the_next_one_from_any_attempt(ledger: Ledger) -> None:
    ledger.offer("g.0-4", result(), "gone")
    ledger.reopen("g.0-4")
    assert ledger.open["g.0-4"].result is None
    assert ledger.offer("g.0-4", result(sha256="2" * 64), "again") is Verdict.TAKEN


def test_an_item_is_planned_once_until_its_update_is_closed(ledger: Ledger) -> None:
    ledger.plan(item("h", update=4))
    with pytest.raises(ValueError, match=r"g\.0-4 is planned twice"):
        ledger.plan(item())
    ledger.close(3)
    ledger.plan(item())
    assert set(ledger.open) == {"g.0-4", "h.0-4"}


def test_consuming_an_update_closes_its_items_only(ledger: Ledger) -> None:
    ledger.plan(item("h", update=4))
    ledger.consume(3, ["g"])
    assert set(ledger.open) == {"h.0-4"}


def test_chains_are_equal_exactly_when_the_same_groups_were_consumed_in_the_same_order() -> None:
    def chain(*updates: tuple[str, ...]) -> str:
        ledger = Ledger()
        for number, groups in enumerate(updates):
            ledger.consume(number, groups)
        return ledger.chain

    assert chain(("a", "b"), ("c",)) == chain(("a", "b"), ("c",))
    assert (
        len({chain(("a", "b")), chain(("b", "a")), chain(("a",)), chain(("a", "b"), ("b",))}) == 4
    )


def test_a_restored_ledger_continues_the_chain_and_plans_open_items_anew(ledger: Ledger) -> None:
    ledger.consume(2, ["e", "f"])
    other = Ledger()
    other.plan(item())
    other.restore(ledger.state())
    assert other.open == {}
    other.plan(item())
    for one in (ledger, other):
        one.consume(3, ["g"])
    assert (other.chain, other.consumed) == (ledger.chain, ledger.consumed) and other.consumed == 3
