"""The plans of ``benchmarks/chaos.py``: random faults on real runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
BOTH = ("ray", "inline")


@pytest.fixture
def chaos(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import chaos

    return chaos


def test_a_seed_decides_every_plan_and_each_kind_comes_once_in_every_round(chaos: Any) -> None:
    names = [*chaos.KINDS, *chaos.ALONE]
    plans = [chaos.plan_of(3, number, names, BOTH) for number in range(2 * len(names))]
    assert plans == [chaos.plan_of(3, number, names, BOTH) for number in range(2 * len(names))]
    assert plans != [chaos.plan_of(4, number, names, BOTH) for number in range(2 * len(names))]
    counted = Counter(kind for plan in plans for kind in set(plan.faults))
    assert set(counted) == set(names) and min(counted.values()) >= 2


def test_a_fault_is_planned_only_where_it_can_happen_and_at_most_one_ends_an_attempt(
    chaos: Any,
) -> None:
    names = [*chaos.KINDS, *chaos.ALONE]
    for number in range(300):
        plan = chaos.plan_of(0, number, names, BOTH)
        if plan.rivalry:
            continue
        first = [chaos.KINDS[fault.kind] for fault in plan.first]
        assert all(plan.runtime in kind.runtimes for kind in first)
        assert sum(kind.when == "end" for kind in first) <= 1
        assert len(first) == 1 or not any(kind.alone for kind in first)
        if plan.between or plan.second:
            assert any(kind.when == "end" for kind in first), str(plan)
