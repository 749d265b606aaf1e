"""Learner ranks that cannot be started again are given up, down to a minimum; on fake workers."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fakes import FakeLearner, as_array
from learner.controller.capacity import Capacity
from learner.controller.learner_ranks import LearnerRanks, LearnerSnapshot
from learner.controller.run_log import UpdateTimes, group_cost, update_metrics
from learner.controller.supervisor import Supervisor
from rl_edit import wire
from rl_edit.config import ActorsConfig, load_config
from rl_edit.errors import InputError, WorkerLost
from rl_edit.messages import LearnOrder
from rl_edit.method.update import TrainingFailed
from rl_edit.types import AdapterId

GROUPS = [as_array({"said": str(slot)}) for slot in range(4)]


class Rank:
    """A rank on a machine: it starts only while the machine is there."""

    def __init__(self, cluster: Cluster, slot: int) -> None:
        self.cluster, self.slot, self.learner = cluster, slot, FakeLearner()

    async def call(self, method: str, *args: Any, blobs: int = 0) -> Any:
        if self.slot in self.cluster.without_place and method == "ready":
            await asyncio.sleep(3600)
        if self.slot in self.cluster.lost:
            raise WorkerLost("its machine is gone")
        self.cluster.calls.append((method, self.slot, len(args)))
        if method in ("address", "join"):
            return "place"
        answer = getattr(self.learner, method)(*args)
        if method in ("learn", "export"):
            return answer.report, answer.adapter, answer.state, answer.result
        return answer

    def kill(self) -> None:
        """Nothing to end."""


class Cluster:
    def __init__(self) -> None:
        self.lost: set[int] = set()
        self.without_place: set[int] = set()
        self.calls: list[tuple[str, int, int]] = []

    def spawn(self, role: str, slot: int) -> Rank:
        return Rank(self, slot)

    async def keep(self, ref: Any) -> Any:
        return ref

    async def require(self, arguments: Any) -> None:
        """Nothing is lost on the driver's machine."""


def update(lost: set[int], without_place: set[int] = frozenset(), **actors: Any) -> Any:  # type: ignore[assignment]
    """An update of three ranks, some of whose machines are lost before it: the learner's snapshot,
    the cluster, and the events."""
    cluster, events = Cluster(), list[tuple[str, dict[str, Any]]]()

    async def run() -> LearnerSnapshot:
        settings = {"runtime": "ray", "num_learner": 3, "backoff_s": 0, **actors}
        supervisor = Supervisor(
            cluster,  # type: ignore[arg-type]
            ActorsConfig(**settings),
            on_event=lambda event, **details: events.append((event, details)),
        )
        learners = LearnerRanks(supervisor, on_event=lambda event, **d: events.append((event, d)))
        await learners.start()
        before = await learners.export(0)
        cluster.lost |= lost
        cluster.without_place |= without_place
        order = LearnOrder(update=0, plan="plan", slots=())

        def shards(ranks: int) -> list[list[np.ndarray]]:
            return [GROUPS[rank::ranks] for rank in range(ranks)]

        return (await learners.apply(order, shards, before))[1]

    return asyncio.run(run()), cluster, events


def test_a_rank_whose_machine_does_not_come_back_is_given_up_and_the_others_take_its_groups() -> (
    None
):
    _, cluster, events = update({1})
    learnt = [(slot, blobs - 1) for method, slot, blobs in cluster.calls if method == "learn"]
    assert learnt[-2:] == [(0, 2), (2, 2)]
    assert [event for event, _ in events] == [
        "learner_lost",
        *["actor_lost"] * 3,
        "seat_quarantined",
        "learner_rebuilt",
    ]
    assert events[-1][1]["ranks"] == 2


def test_one_rank_that_is_left_learns_everything_alone() -> None:
    snapshot, cluster, events = update({0, 2})
    assert cluster.calls[-1] == ("learn", 1, 1 + len(GROUPS))
    assert events[-1][1]["ranks"] == 1
    # A single rank joins nobody.
    restored = max(i for i, call in enumerate(cluster.calls) if call[0] == "restore")
    assert "join" not in [method for method, *_ in cluster.calls[restored - 2 :]]
    alone = FakeLearner()
    alone.learn(LearnOrder(update=0, plan="plan", slots=()), *GROUPS)
    assert wire.unpack(snapshot.adapter).id == alone.answer(plan="").report.adapter


def test_a_rank_without_a_place_is_waited_for_once() -> None:
    _, _, events = update({1}, {1}, start_timeout_s=0.2)
    assert [event for event, _ in events].count("actor_lost") == 1
    assert events[-1][1]["ranks"] == 2


def test_fewer_ranks_than_the_minimum_end_the_run() -> None:
    with pytest.raises(TrainingFailed, match="the learner was lost 2 times"):
        update({0, 2}, min_learner=2, infra_retries=1)


def test_a_sharded_base_keeps_its_ranks_and_a_smaller_minimum_is_refused() -> None:
    sharded = ("actors.shard_base=true", "actors.num_learner=2")
    assert load_config(preset="tiny-rc-grpo", overrides=sharded).actors.fewest_ranks == 2
    with pytest.raises(InputError, match="with shard_base the base fits only that many ranks"):
        load_config(preset="tiny-rc-grpo", overrides=(*sharded, "actors.min_learner=1"))
    with pytest.raises(InputError, match="min_learner 3 exceeds num_learner 2"):
        load_config(
            preset="tiny-rc-grpo", overrides=("actors.num_learner=2", "actors.min_learner=3")
        )


def test_the_minimum_of_ranks_belongs_to_no_runs_identity() -> None:
    plain = load_config(preset="tiny-rc-grpo")
    one = load_config(preset="tiny-rc-grpo", overrides=("actors.min_learner=1",))
    assert plain.identity() == one.identity()


def test_an_update_costs_the_seconds_of_the_ranks_that_are_left() -> None:
    config = load_config(
        preset="tiny-rc-grpo", overrides=("actors.num_learner=3", "actors.learner_gpus=1")
    )
    group: Any = SimpleNamespace(chunks=[], lost=True)
    report: Any = SimpleNamespace(
        seconds=6.0,
        metrics={},
        used=2,
        declined={},
        skipped="",
        adapter=AdapterId(step=1, sha256="a"),
    )

    def metrics(ranks: int) -> dict[str, Any]:
        times = UpdateTimes(wait=1.0, learn=6.0, commit=1.0, ranks=ranks)
        assert group_cost([group, group], report, times).learn_s == 3.0 * ranks
        return update_metrics(
            0,
            [group, group],
            report,
            config=config,
            capacity=Capacity.of(config, (1, 1), cores=2),
            times=times,
            retries={"infra": 0, "data": 0},
        )

    assert metrics(1)["efficiency"] == pytest.approx(metrics(3)["efficiency"] / 3)
