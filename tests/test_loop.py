"""A whole run in one process: the real rollout actor, reward actor, learner and loop on a small
editor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.reward import RewardActor
from actors.rollout import RolloutActor
from learner.controller.work import TaskCursor
from learner.learner import Learner
from rl_edit import wire
from rl_edit.data import DataConfig, open_dataset
from rl_edit.errors import InputError
from rl_edit.messages import LearnOrder
from rl_edit.method.update import TrainingFailed
from rl_edit.types import Candidates, RewardTable
from runs import (
    PRESERVATION,
    SilentObserver,
    adapter_bytes,
    events_of,
    metrics_of,
    replaced,
    run_inline,
    small_config,
)

PROMISED = (
    "update", "reward/preservation/mean", "reward/preservation/spread", "reward/attention/mean",
    "reward/attention/spread", "reward/total/mean", "reward/total/spread", "background/psnr/mean",
    "background/psnr/spread", "concentration/mean", "concentration/spread", "change/inside/mean",
    "loss", "ratio/mean", "ratio/min", "ratio/max", "ratio/max_deviation", "clip/share",
    "gradient/norm", "groups/used", "groups/dropped", "groups/dropped_reasons", "policy_version",
    "staleness", "adapter", "seconds/rollout", "seconds/reward", "seconds/wait", "seconds/learn",
    "seconds/commit", "seconds/update", "efficiency", "retries/infra", "retries/data",
    "step/skipped", "bytes/groups",
)  # fmt: skip


class Scripted:
    """A reward function that says different things on each call: what a judge does when it fails
    now and then."""

    def __init__(self) -> None:
        self.script: Iterator[Any] = iter(())

    def __call__(self, candidates: Candidates) -> Sequence[object]:
        reported = next(self.script, None)
        return brightness(candidates) if reported is None else reported


SCRIPTED = Scripted()


def scripted(candidates: Candidates) -> Sequence[object]:
    return SCRIPTED(candidates)


def brightness(candidates: Candidates) -> list[float]:
    return (candidates.images.float().mean(dim=(1, 2, 3)) / 255).tolist()


def of_function(name: str, **settings: Any) -> dict[str, Any]:
    return {
        "own": {
            "kind": "python",
            "function": f"{__name__}:{name}",
            "low": 0.0,
            "high": 1.0,
            **settings,
        }
    }


def test_two_runs_with_one_seed_give_the_same_adapter_bytes_and_another_seed_gives_others(
    small_editor: str, tmp_path: Path
) -> None:
    config = small_config(small_editor)
    first, second = (
        adapter_bytes(run_inline(config, tmp_path / name)) for name in ("first", "second")
    )
    other = adapter_bytes(run_inline(small_config(small_editor, "seed=1"), tmp_path / "other"))
    assert first == second
    assert set(first) == set(other)
    assert first != other


def test_a_run_moves_its_adapter(small_editor: str, tmp_path: Path) -> None:
    config = small_config(small_editor, "train.updates=1")
    start = wire.unpack(Learner(config, threads=1).export()[1]).tensors
    end = run_inline(config, tmp_path).adapter.tensors
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved >= {name for name in start if "lora_B" in name}


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("lag", [0, 1])
def test_a_run_stopped_and_resumed_gives_the_bytes_of_one_that_was_not(
    small_editor: str, tmp_path: Path, lag: int, passes: int
) -> None:
    config = small_config(
        small_editor,
        f"train.max_lag={lag}",
        f"train.inner_epochs={passes}",
        "train.updates=4",
        "train.checkpoint_every=10",
    )
    full = run_inline(config, tmp_path / "full")
    stopped = run_inline(config, tmp_path / "halves", stop_after=2)
    assert stopped.updates_done == 2
    resumed = run_inline(config, tmp_path / "halves", resume=True)
    assert resumed.updates_done == 4
    assert adapter_bytes(resumed) == adapter_bytes(full)
    timeless = [
        [
            {
                k: v
                for k, v in line.items()
                if not k.startswith(("seconds/", "bytes/", "efficiency"))
            }
            for line in metrics_of(tmp_path / run)
        ]
        for run in ("full", "halves")
    ]
    assert timeless[0] == timeless[1]


def test_a_run_killed_between_checkpoints_resumes_to_the_same_bytes(
    small_editor: str, tmp_path: Path
) -> None:
    config = small_config(small_editor, "train.updates=3", "train.checkpoint_every=2")
    full = run_inline(config, tmp_path / "full")

    class Crash(Exception):
        pass

    class CrashingInUpdateTwo(SilentObserver):
        def group_scored(self, update: int, done: int, total: int) -> None:
            if update == 2:
                raise Crash

    with pytest.raises(Crash):
        run_inline(config, tmp_path / "crashed", observer=CrashingInUpdateTwo())
    assert adapter_bytes(run_inline(config, tmp_path / "crashed", resume=True)) == adapter_bytes(
        full
    )
    assert [line["update"] for line in metrics_of(tmp_path / "crashed")] == [0, 1, 2]


def test_one_and_two_rollout_actors_give_the_same_bytes(small_editor: str, tmp_path: Path) -> None:
    runs = [
        run_inline(small_config(small_editor, f"actors.num_rollout={n}"), tmp_path / str(n))
        for n in (1, 2)
    ]
    assert adapter_bytes(runs[0]) == adapter_bytes(runs[1])


def test_the_ratio_is_exactly_one_on_policy_through_the_real_actor_and_learner(
    small_editor: str, tmp_path: Path
) -> None:
    run_inline(small_config(small_editor), tmp_path)
    lines = metrics_of(tmp_path)
    assert len(lines) == 3
    for line in lines:
        assert line["ratio/max_deviation"] == 0.0
        assert line["ratio/min"] == line["ratio/mean"] == line["ratio/max"] == 1.0
        assert line["clip/share"] == 0.0
        assert line["gradient/norm"] > 0
        assert line["staleness"] == 0


def test_one_step_off_is_one_version_stale_from_the_second_update_and_ratios_leave_one(
    small_editor: str, tmp_path: Path
) -> None:
    run_inline(small_config(small_editor, "train.max_lag=1"), tmp_path)
    lines = metrics_of(tmp_path)
    assert [line["staleness"] for line in lines] == [0, 1, 1]
    assert lines[0]["ratio/max_deviation"] == 0.0
    assert all(line["ratio/max_deviation"] > 0 for line in lines[1:])


def test_the_second_pass_over_a_batch_leaves_ratio_one(small_editor: str, tmp_path: Path) -> None:
    run_inline(small_config(small_editor, "train.inner_epochs=2", "train.updates=1"), tmp_path)
    assert metrics_of(tmp_path)[0]["ratio/max_deviation"] > 0


class Deaf(RolloutActor):
    """Loads nothing it is sent."""

    def load(self, blob: np.ndarray) -> Any:
        self._published = {weights.id: weights for weights in [wire.unpack(blob)]}
        return None

    def _use(self, requested: Any) -> Any:
        return self._published[requested]


def test_an_actor_that_ignores_a_weight_update_is_caught_on_its_first_item_and_never_trained_on(
    small_editor: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainingFailed, match="a weight update did not reach it"):
        run_inline(
            small_config(small_editor, "actors.infra_retries=1"),
            tmp_path,
            change=replaced("rollout", Deaf),
        )
    event = events_of(tmp_path, "result_stale")[0]
    assert len(metrics_of(tmp_path)) == 1
    assert event["wanted"].startswith("1:")
    assert event["wanted"].split(":")[1] != event["loaded"].split(":")[1]
    assert event["wanted"] == metrics_of(tmp_path)[0]["adapter"]


class CutOff(RolloutActor):
    """Is sent the first weights only."""

    def load(self, blob: np.ndarray) -> Any:
        return None if self._published else super().load(blob)


def test_an_actor_that_was_never_sent_the_weights_says_which_it_holds(
    small_editor: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainingFailed, match=r"work asks for adapter 1:.* holds 0:"):
        run_inline(small_config(small_editor), tmp_path, change=replaced("rollout", CutOff))


class Nudged(RolloutActor):
    """Computes a slightly different function."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        velocity = self.editor.velocity
        self.editor.velocity = lambda *given: velocity(*given) * 1.01  # type: ignore[method-assign]


@pytest.mark.parametrize("preflight", [True, False])
def test_an_actor_of_another_function_is_refused_before_the_optimizer_steps(
    small_editor: str, tmp_path: Path, preflight: bool
) -> None:
    config = small_config(
        small_editor, "train.updates=1", f"actors.preflight={str(preflight).lower()}"
    )
    with pytest.raises(TrainingFailed, match="do not compute the same velocity") as failure:
        run_inline(config, tmp_path, change=replaced("rollout", Nudged))
    assert str(failure.value).startswith("preflight") == preflight
    assert metrics_of(tmp_path) == []


def test_one_invalid_candidate_drops_its_whole_group_which_is_counted(
    small_editor: str, tmp_path: Path
) -> None:
    SCRIPTED.script = iter([None, [0.1, None, 0.2, 0.3]])
    rewards = {"preservation": PRESERVATION, **of_function("scripted")}
    config = small_config(
        small_editor, "train.updates=1", "train.max_dropped_groups=1", rewards=rewards
    )
    run_inline(config, tmp_path)
    (line,) = metrics_of(tmp_path)
    assert (line["groups/used"], line["groups/dropped"]) == (1, 1)
    ((reason, count),) = line["groups/dropped_reasons"]["invalid"].items()
    assert count == 1
    assert reason.startswith("own: ") and "None" in reason
    assert (
        events_of(tmp_path, "groups_dropped")[0]["reasons"]
        == line["groups/dropped_reasons"]["invalid"]
    )


def test_more_invalid_groups_than_the_budget_stop_the_run(
    small_editor: str, tmp_path: Path
) -> None:
    SCRIPTED.script = iter([None, [0.1, None, 0.2, 0.3]])
    with pytest.raises(
        TrainingFailed, match=r"1 of 2 groups of update 0 .*max_dropped_groups is 0.*own: "
    ):
        run_inline(small_config(small_editor, rewards=of_function("scripted")), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_reward_that_is_only_measured_may_fail(small_editor: str, tmp_path: Path) -> None:
    SCRIPTED.script = iter([None, [0.1, None, 0.2, 0.3], [0.1, float("nan"), 0.2, 0.3], None])
    rewards = {"preservation": PRESERVATION, **of_function("scripted", weight=0)}
    run_inline(small_config(small_editor, "train.updates=2", rewards=rewards), tmp_path)
    assert [(line["groups/used"], line["groups/dropped"]) for line in metrics_of(tmp_path)] == [
        (2, 0),
        (2, 0),
    ]


class BlindOnce(RewardActor):
    """Forgets the regions of its first groups."""

    left = 0

    def table(self, candidates: Candidates, *, group_id: str) -> RewardTable:
        scored = super().table(candidates, group_id=group_id)
        if type(self).left == 0:
            return scored
        type(self).left -= 1
        return replace(scored, regions={})


def test_groups_that_credit_cannot_judge_count_in_the_budget_like_any_invalid_one(
    small_editor: str, tmp_path: Path
) -> None:
    rewards = {"preservation": PRESERVATION, "judge": {"kind": "shapes_judge"}}
    config = small_config(
        small_editor, "algorithm.credit={kind: region}", "train.updates=1", rewards=rewards
    )
    change = replaced("reward", BlindOnce)
    BlindOnce.left = 1
    with pytest.raises(
        TrainingFailed,
        match=r"1 of 2 groups of update 0 give no credit, train.max_dropped_groups is 0: .*"
        "no judge.region.0",
    ):
        run_inline(config, tmp_path / "none", change=change)
    assert metrics_of(tmp_path / "none") == []
    BlindOnce.left = 1
    allowed = config.model_copy(
        update={"train": config.train.model_copy(update={"max_dropped_groups": 1})}
    )
    run_inline(allowed, tmp_path / "one", change=change)
    (line,) = metrics_of(tmp_path / "one")
    assert (line["groups/used"], line["groups/dropped"]) == (1, 1)


@pytest.mark.parametrize(
    ("reported", "named"), [(float("nan"), "nan"), (float("inf"), "inf"), (1.5, "1.5")]
)
def test_a_reward_that_breaks_its_contract_is_the_users_error(
    small_editor: str, tmp_path: Path, reported: float, named: str
) -> None:
    SCRIPTED.script = iter([[0.1, reported, 0.2, 0.3]])
    with pytest.raises(InputError, match=f"own: gave {named}"):
        run_inline(small_config(small_editor, rewards=of_function("scripted")), tmp_path)


def test_a_group_without_spread_is_declined_and_counted(small_editor: str, tmp_path: Path) -> None:
    SCRIPTED.script = iter([[0.5] * 4, None])
    run_inline(
        small_config(small_editor, "train.updates=1", rewards=of_function("scripted")), tmp_path
    )
    (line,) = metrics_of(tmp_path)
    assert (line["groups/used"], line["groups/dropped"]) == (1, 1)
    ((reason, count),) = line["groups/dropped_reasons"]["spread"].items()
    assert count == 1
    assert reason == "no reward term differs between the candidates"


def test_an_update_without_any_trainable_group_leaves_the_adapter_and_says_so(
    small_editor: str, tmp_path: Path
) -> None:
    SCRIPTED.script = iter([[0.5] * 4] * 2)
    config = small_config(small_editor, "train.updates=1", rewards=of_function("scripted"))
    start = wire.unpack(Learner(config, threads=1).export()[1])
    outcome = run_inline(config, tmp_path)
    assert outcome.adapter.id.sha256 == start.id.sha256
    assert outcome.adapter.id.step == 1
    assert metrics_of(tmp_path)[0]["groups/used"] == 0


def test_a_dropped_group_does_not_touch_the_advantages_of_the_others(
    small_editor: str, tmp_path: Path
) -> None:
    """With terms normalised per group, the surviving group teaches as if it had been alone."""
    seen: list[dict[str, torch.Tensor]] = []

    class Spy(Learner):
        def learn(self, order: LearnOrder, *blobs: np.ndarray) -> Any:
            tables = [wire.unpack(slot.tables[0]) for slot in order.slots]
            areas = [slot.areas for slot in order.slots if slot.areas is not None]
            credits = self.config.algorithm.credit(tables, areas)
            seen.append(
                {
                    t.group_id: c.values
                    for t, c in zip(tables, credits, strict=True)
                    if hasattr(c, "values")
                }
            )
            return super().learn(order, *blobs)

    rewards = {"preservation": PRESERVATION, **of_function("scripted")}
    config = small_config(
        small_editor, "train.updates=1", "train.max_dropped_groups=1", rewards=rewards
    )
    for name, script in (("full", [None, None]), ("dropped", [[None] * 4, None])):
        SCRIPTED.script = iter(script)
        run_inline(config, tmp_path / name, change=replaced("learner", Spy))
    full, dropped = seen
    assert len(full) == 2 and len(dropped) == 1
    ((group_id, values),) = dropped.items()
    assert torch.equal(values, full[group_id])


def test_every_promised_metric_is_written_for_every_update(
    small_editor: str, tmp_path: Path
) -> None:
    run_inline(small_config(small_editor, "train.updates=2"), tmp_path)
    lines = metrics_of(tmp_path)
    assert [line["update"] for line in lines] == [0, 1]
    assert [line["policy_version"] for line in lines] == [1, 2]
    for line in lines:
        assert [key for key in PROMISED if key not in line] == []
        assert [key for key in PROMISED if line[key] is None] == []
        assert line["reward/total/spread"] > 0
        assert line["background/psnr/spread"] > 0
        assert line["groups/used"] == 2


def test_the_total_reward_is_the_weighted_sum_of_its_terms(
    small_editor: str, tmp_path: Path
) -> None:
    run_inline(small_config(small_editor, "train.updates=1"), tmp_path)
    (line,) = metrics_of(tmp_path)
    assert line["reward/total/mean"] == pytest.approx(
        line["reward/preservation/mean"] + 0.3 * line["reward/attention/mean"], rel=1e-5
    )


def test_a_background_anchor_of_weight_zero_is_the_plain_surrogate_to_the_byte(
    small_editor: str, tmp_path: Path
) -> None:
    def run(name: str, objective: str) -> dict[str, bytes]:
        return adapter_bytes(
            run_inline(
                small_config(small_editor, f"algorithm.objective={objective}", "train.updates=2"),
                tmp_path / name,
            )
        )

    inner = "{kind: neighbor, num_anchors: 2, num_steps: 1}"
    plain = run("plain", inner)
    assert run("zero", f"{{kind: background_regularised, weight: 0.0, inner: {inner}}}") == plain
    assert run("held", f"{{kind: background_regularised, weight: 1.0, inner: {inner}}}") != plain


def test_group_size_and_update_size_change_the_result(small_editor: str, tmp_path: Path) -> None:
    base = run_inline(small_config(small_editor, "train.updates=1"), tmp_path / "base")
    for name, override in {
        "group": "rollout.group_size=5",
        "update": "train.groups_per_update=3",
    }.items():
        other = run_inline(small_config(small_editor, "train.updates=1", override), tmp_path / name)
        assert adapter_bytes(other) != adapter_bytes(base), name


def test_every_epoch_draws_every_task_once_in_an_order_of_its_own() -> None:
    dataset = open_dataset(DataConfig(num_train=6), "train")
    cursor = TaskCursor(dataset, seed=0, groups_per_update=4)
    drawn = [cursor.at(update, slot) for update in range(3) for slot in range(4)]
    epochs = [[task.task_id for task, draw in drawn if draw == epoch] for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(dataset[i].task_id for i in range(6))
    assert epochs[0] != epochs[1]
    again = TaskCursor(dataset, seed=0, groups_per_update=4).at(2, 1)
    assert (again[0].task_id, again[1]) == (drawn[9][0].task_id, drawn[9][1])


def test_workers_in_threads_load_their_models_one_at_a_time_and_give_the_same_adapter(
    small_editor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, seen = [0], list[int]()
    load = RolloutActor.__init__

    def counted(self: RolloutActor, *arguments: Any) -> None:
        loading[0] += 1
        seen.append(loading[0])
        try:
            load(self, *arguments)
        finally:
            loading[0] -= 1

    monkeypatch.setattr(RolloutActor, "__init__", counted)
    settings = ("train.updates=1", "actors.num_rollout=3")
    threads = run_inline(
        small_config(small_editor, *settings, "actors.runtime=thread"), tmp_path / "threads"
    )
    assert seen == [1, 1, 1]
    inline = run_inline(small_config(small_editor, *settings), tmp_path / "inline")
    assert adapter_bytes(threads) == adapter_bytes(inline)
