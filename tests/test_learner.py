"""Learner and rollout actor, apart and in one process, as plain objects on a small editor."""

from __future__ import annotations

import math
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.reward import RewardActor
from actors.rollout import RolloutActor, UnknownAdapter
from learner.learner import Learner
from rl_edit import wire
from rl_edit.config import RunConfig
from rl_edit.data import open_dataset
from rl_edit.editors import lora
from rl_edit.errors import InputError
from rl_edit.messages import LearnerState, LearnOrder, LearnSlot
from rl_edit.method.rollout import joined, merged
from rl_edit.method.update import TrainingFailed
from rl_edit.types import AdapterId, AdapterWeights, RewardTable, RolloutGroup, WorkItem
from runs import colocated, small_config

FIELDS = frozenset({"target", "caption", "regions"})


def item_of(
    config: RunConfig,
    slot: int,
    adapter: AdapterId,
    *,
    update: int = 0,
    chunk: tuple[int, int] | None = None,
) -> WorkItem:
    size = config.rollout.group_size
    return WorkItem(
        group_id=f"g{update}-{slot}",
        chunk=chunk or (0, size),
        task=open_dataset(config.data, "train")[slot + update * config.train.groups_per_update],
        epoch=0,
        update=update,
        num_candidates=size,
        run_seed=config.seed,
        adapter=adapter,
    )


@dataclass(frozen=True)
class Work:
    """One update's order and its groups as blobs, by slot."""

    order: LearnOrder
    groups: tuple[np.ndarray, ...]


def work(
    config: RunConfig, actor: Any, reward: RewardActor, adapter: AdapterId, *, update: int = 0
) -> Work:
    """Rolls out and scores complete groups, with weights that the actor has."""
    slots, groups = [], []
    for slot in range(config.train.groups_per_update):
        result, blob = actor.run(wire.pack(item_of(config, slot, adapter, update=update)))
        slots.append(LearnSlot(task_type="edit", areas=result.areas, tables=(reward.score(blob),)))
        groups.append(blob)
    return Work(LearnOrder(update=update, plan=f"plan {update}", slots=tuple(slots)), tuple(groups))


def changed(blob: np.ndarray, **fields: Any) -> np.ndarray:
    return wire.pack(replace(wire.unpack(blob), **fields))


def state_of(learner: Learner) -> dict[str, bytes]:
    """Adapter and optimizer as bytes, without the counters."""
    tensors = wire.unpack(learner.export()[2]).tensors
    return {
        name: value.numpy().tobytes()
        for name, value in tensors.items()
        if name != "skipped_in_a_row"
    }


@pytest.fixture(scope="module")
def config(small_editor: str) -> RunConfig:
    return small_config(small_editor)


@pytest.fixture(scope="module")
def actor(config: RunConfig) -> RolloutActor:
    return RolloutActor(config, 1)


@pytest.fixture(scope="module")
def reward(config: RunConfig) -> RewardActor:
    return RewardActor(config, FIELDS, 1)


@pytest.fixture(scope="module")
def start(config: RunConfig) -> tuple[AdapterId, np.ndarray, np.ndarray]:
    """Name, adapter and state that a new learner exports."""
    report, adapter, state, _ = Learner(config, 1).export()
    return report.adapter, adapter, state


@pytest.fixture(scope="module")
def first(
    config: RunConfig,
    actor: RolloutActor,
    reward: RewardActor,
    start: tuple[AdapterId, np.ndarray, np.ndarray],
) -> Work:
    """The first update of a run."""
    assert actor.load(start[1]) == start[0]
    return work(config, actor, reward, start[0])


@pytest.fixture
def learner(shared: Learner, start: tuple[AdapterId, np.ndarray, np.ndarray]) -> Learner:
    """A learner as new."""
    shared.restore(start[2])
    return shared


@pytest.fixture(scope="module")
def shared(config: RunConfig) -> Learner:
    return Learner(config, 1)


# --- the rollout actor ----------------------------------------------------------------------------


def test_chunks_merged_are_the_whole_group_bitwise_and_their_tables_the_whole_table(
    small_editor: str,
) -> None:
    config = small_config(small_editor, "rollout.group_size=10")
    actor, reward = RolloutActor(config, 1), RewardActor(config, FIELDS, 1)
    weights = lora.export(actor.editor.transformer, step=3)
    name = actor.load(wire.pack(weights))
    full = actor.run(wire.pack(item_of(config, 0, name)))[1]
    parts = [
        actor.run(wire.pack(item_of(config, 0, name, chunk=chunk)))[1]
        for chunk in ((0, 4), (4, 8), (8, 10))
    ]
    assert np.array_equal(wire.pack(merged([wire.unpack(part) for part in parts])), full)
    tables = [wire.unpack(reward.score(blob)) for blob in (full, *parts)]
    assert tables[0].measures.variance is not None
    assert all(table.measures.variance is None for table in tables[1:])
    measures = replace(tables[0].measures, variance=None)
    single, together = (
        replace(tables[0], seconds=0.0, measures=measures),
        replace(joined(tables[1:]), seconds=0.0),
    )
    assert np.array_equal(wire.pack(single), wire.pack(together))


def test_a_result_says_what_its_blob_is_and_the_same_item_gives_the_same_bytes(
    config: RunConfig, actor: RolloutActor, first: Work, start: Any
) -> None:
    item = item_of(config, 0, start[0])
    result, blob = actor.run(wire.pack(item))
    again, same = actor.run(wire.pack(item))
    assert np.array_equal(blob, same) and np.array_equal(blob, first.groups[0])
    assert (result.work_id, result.adapter, result.nbytes, result.finite) == (
        item.work_id,
        start[0],
        blob.nbytes,
        True,
    )
    assert result.sha256 == again.sha256 and result.seconds.keys() == {
        "encode",
        "denoise",
        "decode",
    }
    group: RolloutGroup = wire.unpack(blob)
    assert group.group_id == item.group_id and torch.equal(
        group.candidates.token_mask, result.areas.any(dim=0).flatten()
    )


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_a_velocity_that_is_not_finite_is_reported(
    config: RunConfig, actor: RolloutActor, first: Work, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    velocity = actor.editor.velocity
    monkeypatch.setattr(actor.editor, "velocity", lambda *args: velocity(*args) * math.nan)
    assert not actor.run(wire.pack(item_of(config, 0, start[0])))[0].finite


def test_weights_altered_on_the_way_are_known_by_another_name_and_never_served(
    config: RunConfig, actor: RolloutActor, start: Any
) -> None:
    weights: AdapterWeights = wire.unpack(start[1])
    other = replace(
        weights,
        id=AdapterId(7, weights.id.sha256),
        tensors={k: v + 1 for k, v in weights.tensors.items()},
    )
    name = actor.load(wire.pack(other))
    assert name.step == 7 and name.sha256 == lora.digest(other.tensors) != other.id.sha256
    with pytest.raises(UnknownAdapter, match="The publish did not reach it"):
        actor.run(wire.pack(item_of(config, 0, other.id)))


def test_an_older_step_published_anew_is_not_the_one_forgotten(
    config: RunConfig, actor: RolloutActor, start: Any
) -> None:
    weights: AdapterWeights = wire.unpack(start[1])
    for step in (5, 6, 4):
        actor.load(wire.pack(replace(weights, id=AdapterId(step, weights.id.sha256))))
    actor.load(start[1])
    assert actor.run(wire.pack(item_of(config, 0, start[0])))[0].adapter == start[0]
    with pytest.raises(UnknownAdapter):
        actor.run(wire.pack(item_of(config, 0, AdapterId(5, weights.id.sha256))))


def test_the_canary_finds_nothing_in_a_sound_actor_and_leaves_its_weights(
    config: RunConfig, actor: RolloutActor, start: Any
) -> None:
    actor.load(start[1])
    before = actor.run(wire.pack(item_of(config, 0, start[0])))[0].sha256
    assert actor.canary() == ""
    assert actor.run(wire.pack(item_of(config, 0, start[0])))[0].sha256 == before


@pytest.mark.faults
@pytest.mark.parametrize(
    ("fault", "complaint"),
    [("set_active", "attached but never applied"), ("load", "an update would never arrive")],
    ids=["inactive", "unloaded"],
)
def test_the_canary_notices_an_adapter_that_is_never_applied(
    actor: RolloutActor, monkeypatch: pytest.MonkeyPatch, fault: str, complaint: str
) -> None:
    off = lora.set_active
    broken = {
        "set_active": lambda transformer, active, **_: off(transformer, False),
        "load": lambda *_, **__: None,
    }
    monkeypatch.setattr(lora, fault, broken[fault])
    assert complaint in actor.canary()


# --- one update, once -----------------------------------------------------------------------------


def test_the_ratio_is_one_on_a_real_rollout_of_the_same_weights_and_asking_changes_nothing(
    learner: Learner, first: Work, actor: RolloutActor, config: RunConfig
) -> None:
    before = state_of(learner)
    assert learner.ratio(first.groups[0]) == 0.0
    assert state_of(learner) == before
    _, adapter, _, _ = learner.learn(first.order, *first.groups)
    assert learner.ratio(first.groups[0]) > 1e-6
    trained = actor.load(adapter)
    chunk = actor.run(wire.pack(item_of(config, 1, trained, chunk=(0, 2))))[1]
    assert learner.ratio(chunk) == 0.0


def test_a_ratio_of_velocities_that_are_not_finite_is_not_called_one(
    learner: Learner, first: Work
) -> None:
    group: RolloutGroup = wire.unpack(first.groups[0])
    assert math.isnan(
        learner.ratio(
            wire.pack(replace(group, velocities=torch.full_like(group.velocities, math.nan)))
        )
    )


def test_an_update_asked_for_twice_is_applied_once_and_answered_alike(
    learner: Learner, first: Work, start: Any
) -> None:
    report, adapter, state, _ = learner.learn(first.order, *first.groups)
    assert (
        report.adapter != start[0]
        and report.adapter.step == 1
        and report.used == 2
        and not report.skipped
    )
    again = learner.learn(first.order, *first.groups)
    assert (
        again[0] == report and np.array_equal(again[1], adapter) and np.array_equal(again[2], state)
    )
    assert (
        learner.policy.updates_done == 1
        and np.array_equal(learner.export()[2], state)
        and np.array_equal(learner.export()[1], adapter)
    )


def test_another_plan_for_a_done_update_and_an_update_out_of_order_are_refused(
    learner: Learner, first: Work
) -> None:
    with pytest.raises(RuntimeError, match="asked for update 1"):
        learner.learn(replace(first.order, update=1), *first.groups)
    learner.learn(first.order, *first.groups)
    before = state_of(learner)
    with pytest.raises(
        RuntimeError, match=r"asked for update 0 with plan another, but this learner has done 1"
    ):
        learner.learn(replace(first.order, plan="another"), *first.groups)
    assert state_of(learner) == before


def test_a_number_of_chunks_other_than_the_order_says_is_refused(
    learner: Learner, first: Work
) -> None:
    with pytest.raises(RuntimeError, match="got 1 chunks of its slots, expected 2"):
        learner.learn(first.order, first.groups[0])


def test_a_lost_group_is_declined_and_the_others_are_trained(
    learner: Learner, first: Work, start: Any
) -> None:
    lost = LearnSlot(task_type="edit", areas=None, tables=(), lost="gone three times")
    report, _, _, _ = learner.learn(
        replace(first.order, slots=(lost, first.order.slots[1])), first.groups[1]
    )
    assert (
        report.declined == {"lost": ("gone three times",)}
        and report.used == 1
        and report.adapter.sha256 != start[0].sha256
    )


def test_an_update_without_a_group_to_train_changes_no_weight_and_is_no_skip(
    learner: Learner, first: Work, start: Any
) -> None:
    lost = LearnSlot(task_type="edit", areas=None, tables=(), lost="gone")
    before = state_of(learner)
    report, _, _, _ = learner.learn(replace(first.order, slots=(lost, lost)))
    assert (report.used, report.metrics, report.skipped, report.skipped_in_a_row) == (0, {}, "", 0)
    assert learner.policy.updates_done == 1 and state_of(learner) == before
    assert report.adapter == AdapterId(1, start[0].sha256)


@pytest.fixture(scope="module")
def halves(small_editor: str) -> Learner:
    return Learner(small_config(small_editor, "train.minibatches=2"), 1)


def test_every_minibatch_is_an_optimizer_step_from_its_own_groups_and_the_later_ones_are_off_policy(
    learner: Learner, halves: Learner, first: Work, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves.restore(start[2])
    full = learner.learn(first.order, *first.groups)[0]
    real, learnt_from = halves._step, []

    def seen(groups: Any, trained: Any, **which: Any) -> Any:
        learnt_from.append(list(trained))
        return real(groups, trained, **which)

    monkeypatch.setattr(halves, "_step", seen)
    report = halves.learn(first.order, *first.groups)[0]
    assert learnt_from == [[0], [1]]
    assert full.metrics["ratio/max_deviation"] == 0.0 < report.metrics["ratio/max_deviation"]
    parameter = halves.policy.parameters[0]
    assert (
        int(halves.policy.optimizer.state[parameter]["step"]) == 2
        and int(learner.policy.optimizer.state[learner.policy.parameters[0]]["step"]) == 1
    )
    # A minibatch whose only group is gone makes no step.
    halves.restore(start[2])
    lost = LearnSlot(task_type="edit", areas=None, tables=(), lost="gone")
    halves.learn(replace(first.order, slots=(first.order.slots[0], lost)), first.groups[0])
    assert int(halves.policy.optimizer.state[parameter]["step"]) == 1


def test_a_step_that_is_skipped_undoes_the_steps_of_its_update_before_it(
    halves: Learner, first: Work, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves.restore(start[2])
    halves.learn(first.order, *first.groups)
    before, real, calls = state_of(halves), halves._step, []

    def second_fails(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        result = real(*arguments, **keywords)
        return replace(result, skipped="loss nan is not finite") if len(calls) == 2 else result

    monkeypatch.setattr(halves, "_step", second_fails)
    report = halves.learn(replace(first.order, update=1), *first.groups)[0]
    assert (report.skipped, report.skipped_in_a_row, len(calls)) == ("loss nan is not finite", 1, 2)
    assert state_of(halves) == before


def test_the_sum_of_gradients_does_not_depend_on_where_the_chunks_end(
    learner: Learner, first: Work, start: Any
) -> None:
    full = learner.learn(first.order, *first.groups)[1]
    learner.restore(start[2])
    group: RolloutGroup = wire.unpack(first.groups[0])
    table: RewardTable = wire.unpack(first.order.slots[0].tables[0])
    chunks, tables = [], []
    for part in (slice(0, 2), slice(2, 4)):
        candidates = replace(
            group.candidates,
            images=group.candidates.images[part],
            attention=group.candidates.attention[part],
        )
        cut = {
            name: getattr(group, name)[part] for name in ("latents", "next_latents", "velocities")
        }
        chunks.append(wire.pack(replace(group, candidates=candidates, **cut)))
        components = {
            term: {name: values[part] for name, values in columns.items()}
            for term, columns in table.components.items()
        }
        regions = {
            term: replace(scores, areas=scores.areas[part], background=scores.background[part])
            for term, scores in table.regions.items()
        }
        tables.append(
            wire.pack(
                replace(
                    table,
                    values=table.values[part],
                    valid=table.valid[part],
                    components=components,
                    regions=regions,
                    measures=None,
                )
            )
        )
    slots = (replace(first.order.slots[0], tables=tuple(tables)), first.order.slots[1])
    assert np.array_equal(
        learner.learn(replace(first.order, slots=slots), *chunks, first.groups[1])[1], full
    )


# --- what is not finite ---------------------------------------------------------------------------


@pytest.mark.faults
def test_a_loss_that_is_not_finite_skips_the_update_and_the_third_in_a_row_stops_training(
    learner: Learner, first: Work, start: Any
) -> None:
    learner.learn(first.order, *first.groups)
    before = state_of(learner)
    group: RolloutGroup = wire.unpack(first.groups[1])
    poisoned = wire.pack(replace(group, velocities=torch.full_like(group.velocities, math.nan)))
    for number in (1, 2):
        report, adapter, state, _ = learner.learn(
            replace(first.order, update=number), first.groups[0], poisoned
        )
        assert (
            "not finite" in report.skipped
            and report.skipped_in_a_row == number
            and learner.policy.updates_done == number + 1
        )
        assert state_of(learner) == before and wire.unpack(adapter).id == report.adapter
    with pytest.raises(
        TrainingFailed,
        match=r"not finite at update 3, after 2 .*train\.learning_rate, or look at RUN/diagnostics",
    ):
        learner.learn(replace(first.order, update=3), first.groups[0], poisoned)
    assert learner.policy.updates_done == 3 and state_of(learner) == before

    learner.restore(state)
    assert learner.policy.skipped_in_a_row == 2
    assert learner.learn(replace(first.order, update=3), *first.groups)[0].skipped_in_a_row == 0


# --- state ----------------------------------------------------------------------------------------


def test_a_restored_learner_continues_bit_for_bit(
    learner: Learner, first: Work, config: RunConfig, start: Any
) -> None:
    _, _, state, _ = learner.learn(first.order, *first.groups)
    second = replace(first.order, update=1)
    full = learner.learn(second, *first.groups)
    other = Learner(config, 1)
    other.restore(state)
    continued = other.learn(second, *first.groups)
    assert all(np.array_equal(a, b) for a, b in zip(full[1:], continued[1:], strict=True))
    assert full[0].adapter == continued[0].adapter != start[0]


def test_the_state_is_a_valid_safetensors_file(learner: Learner, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    (tmp_path / "state.safetensors").write_bytes(learner.export()[2].tobytes())
    tensors = load_file(tmp_path / "state.safetensors")
    state: LearnerState = wire.unpack(learner.export()[2])
    assert len(tensors) == len(state.tensors) > len(learner.policy.parameters)


def test_the_state_of_another_adapter_is_refused(learner: Learner, small_editor: str) -> None:
    other = Learner(small_config(small_editor, "lora.rank=8"), 1)
    with pytest.raises(InputError, match="resume with the run's own lora settings"):
        learner.restore(other.export()[2])


def test_the_address_is_one_where_rank_0_can_listen(learner: Learner) -> None:
    place, _, secret = learner.address().partition("#")
    host, _, port = place.rpartition(":")
    # Where rank 0 listens already: the ranks of other machines come here.
    with socket.create_connection((host, int(port)), timeout=10):
        assert len(secret) == 64


# --- one process for both -------------------------------------------------------------------------


def two_updates(config: RunConfig, actor: RolloutActor, learner: Learner) -> list[bytes]:
    """Every byte that leaves the workers in two updates, with a preflight first."""
    reward = RewardActor(config, FIELDS, 1)
    report, adapter, _, _ = learner.export()
    name = report.adapter
    seen = [adapter.tobytes()]
    for update in range(2):
        actor.load(adapter)
        assert actor.canary() == ""
        step = work(config, actor, reward, name, update=update)
        assert learner.ratio(step.groups[0]) == 0.0
        report, adapter, state, _ = learner.learn(step.order, *step.groups)
        name = report.adapter
        seen += [*(group.tobytes() for group in step.groups), adapter.tobytes(), state.tobytes()]
    return seen


def test_one_process_for_rollout_and_learning_gives_the_bytes_of_two(small_editor: str) -> None:
    objective = (
        "algorithm.objective={kind: background_regularised, target: reference, "
        "inner: {num_anchors: 2, num_steps: 1}}"
    )
    config = small_config(small_editor, objective, "train.inner_epochs=2")
    actor, learner = colocated(config)
    assert actor.editor is learner.editor
    apart = two_updates(config, RolloutActor(config, 1), Learner(config, 1))
    assert two_updates(config, actor, learner) == apart


def test_one_process_rolls_out_with_older_weights_while_it_learns_newer_ones(
    config: RunConfig, first: Work, start: Any
) -> None:
    actor, learner = colocated(config)
    actor.load(start[1])
    report, _, _, _ = learner.learn(first.order, *first.groups)
    result, blob = actor.run(wire.pack(item_of(config, 0, start[0])))
    assert result.adapter == start[0] != report.adapter
    assert np.array_equal(blob, first.groups[0])
    assert learner.export()[0].adapter == report.adapter
