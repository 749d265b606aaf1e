"""The benchmarks run: a handful of sleepers for a moment. What they measure is for
``benchmarks/results``, not for a test."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runs import small_config

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scaling

    return scaling


@pytest.fixture
def overhead(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import overhead

    return overhead


def small(scaling: Any, *, colocated: bool = False) -> Any:
    counts = scaling.WorkerCounts(rollout=2, reward=2, learner=2)
    return scaling.Case(
        name="small",
        profile="kontext-512-6",
        counts=counts,
        groups=2,
        max_lag=0,
        colocated=colocated,
    )


@pytest.mark.parametrize("colocated", [False, True])
def test_sleepers_take_the_real_loop_through_every_update_and_never_beat_the_model(
    scaling: Any, colocated: bool
) -> None:
    timing = scaling.timed(
        small(scaling, colocated=colocated), seconds=0.1, updates=scaling.FEWEST_UPDATES
    )
    assert timing.model_s == 0.1
    assert 0 < timing.share <= 1.01
    assert timing.busy_s > 0
    assert timing.share <= timing.real_share <= 1.01
    assert len(scaling.row(timing).split("|")) == len(scaling.HEADER[0].split("|"))


def test_the_sleep_of_an_update_adds_up_to_the_work_of_the_cost_model(scaling: Any) -> None:
    case = small(scaling)
    naps = scaling.naps_of(case, 1.0)
    work = case.items * (naps.rollout_s + naps.reward_s + naps.learn_s)
    assert math.isclose(work, case.groups * case.cost.per_group_s)


def test_the_cases_hold_8_and_64_gpus_both_lags_both_placements_and_every_rollout_number(
    scaling: Any,
) -> None:
    cases = scaling.cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    for gpus in (8, 64):
        for kind in ("lag0", "lag1", "colocated"):
            assert {f"kontext-512-6-{gpus}-{kind}", f"kontext-1024-28-{gpus}-{kind}"} <= set(names)
    assert [case.counts.rollout for case in cases if case.name.startswith("sweep-")] == list(
        scaling.ROLLOUT_ACTORS
    )
    assert all(case.max_lag == 0 for case in cases if case.colocated)
    assert any(case.ray for case in cases)


def test_a_median_of_pairs_sees_through_alternating_updates(scaling: Any) -> None:
    ends = [0.0]
    for update in range(12):
        ends.append(ends[-1] + (1.0 if update % 2 else 3.0))
    watch = scaling.Stopwatch(ended=[(end, end / 10) for end in ends])
    assert watch.per_update() == pytest.approx((2.0, 0.2))


def test_the_verdict_names_the_worst_case(scaling: Any) -> None:
    case = small(scaling)
    timings = [
        scaling.Timing(case=replace(case, name=name), model_s=1.0, measured_s=measured, busy_s=0.0)
        for name, measured in (("good", 1.05), ("bad", 1.25))
    ]
    assert scaling.verdict(timings)[0].startswith("Worst share: 0.800 (bad)")


def test_the_bare_process_ends_with_the_adapter_of_the_controller(
    overhead: Any, small_editor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(small_editor, "train.updates=2")
    dataset = overhead.open_dataset(config.data, "train")
    watch = overhead.Alternating(overhead.Bare(config, dataset, 1))
    executor = overhead.LocalExecutor(
        overhead.worker_roles(config, dataset.fields, overhead.Learner)
    )
    overhead.control(config, dataset, executor, watch, pixels_per_token=watch.bare.multiple)
    assert [pair.same for pair in watch.pairs] == [True, True]
    assert all(pair.ray_s > 0 and pair.bare_s > 0 for pair in watch.pairs)


@pytest.mark.parametrize("runtime", ["inline", "thread"])
def test_the_controllers_own_time_is_measured_on_workers_that_answer_at_once(
    overhead: Any, runtime: str
) -> None:
    clock, busy = overhead.own_ms(runtime, 7, "train.groups_per_update=2")
    assert clock > 0
    assert busy > 0
