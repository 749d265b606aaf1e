"""Two learner ranks in processes of their own give the numbers of one learner.

They meet over loopback, with a complete and with a sharded base.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch.distributed.tensor import DTensor

import learner.learner
from actors.reward import RewardActor
from actors.rollout import RolloutActor
from learner.learner import Learner
from learner.ranks import Ranks
from learner.rendezvous import open_place
from rl_edit import wire
from rl_edit.config import RunConfig, load_config, presets
from rl_edit.errors import InputError
from rl_edit.messages import LearnOrder, LearnSlot
from runs import small_config
from test_learner import FIELDS, work

WORLD = 2
PATIENCE_S = 240.0
LOST = LearnSlot(task_type="edit", areas=None, tables=(), lost="gone")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Updates for one learner: orders with their groups by slot (None where lost)."""

    config: RunConfig
    orders: tuple[LearnOrder, ...]
    groups: tuple[tuple[np.ndarray | None, ...], ...]


def applied(scenario: Scenario, one: Learner, rank: int, world: int) -> dict[str, Any]:
    """Applies a scenario on one rank; returns reports, final adapter and state.

    Bytes are hexadecimal text.
    """
    probe = next(group for group in scenario.groups[0] if group is not None)
    seen: dict[str, Any] = {"ratio": one.ratio(probe), "reports": []}
    adapter = state = np.empty(0, dtype=np.uint8)
    for order, groups in zip(scenario.orders, scenario.groups, strict=True):
        report, adapter, state, _ = one.learn(
            order, *(group for group in groups[rank::world] if group is not None)
        )
        seen["reports"].append(
            [str(report.adapter), report.used, report.metrics, report.declined, report.skipped]
        )
    return {**seen, "adapter": adapter.tobytes().hex(), "state": state.tobytes().hex()}


def base_of(one: Learner) -> list[torch.nn.Parameter]:
    """The frozen parameters of the transformer."""
    return [
        parameter
        for name, parameter in one.editor.transformer.named_parameters()
        if "lora_" not in name
    ]


def be_rank(rank: int, address: str, scenarios: Mapping[str, Scenario], directory: str) -> None:
    """Runs in a process of the test: a learner for each scenario, joined to its peer."""
    learner.learner.Ranks = functools.cache(
        Ranks
    )  # a process joins once, its learners one after the other are the same rank
    outcomes = {}
    for name, scenario in scenarios.items():
        joined = Learner(scenario.config, 1)
        joined.join(rank, WORLD, address)
        size = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in base_of(joined))
        outcomes[name] = {**applied(scenario, joined, rank, WORLD), "size": size}
    Path(directory, f"{rank}.json").write_text(json.dumps(outcomes))


@pytest.fixture(scope="module")
def scenarios(small_editor: str) -> dict[str, Scenario]:
    """Three groups on two ranks, then the same groups off-policy.

    One rank has nothing to do in the last round.
    """
    regularised = (
        "algorithm.objective={kind: background_regularised, target: reference, "
        "inner: {num_anchors: 2, num_steps: 1}}"
    )
    overrides = (
        regularised,
        "train.groups_per_update=3",
        f"actors.deadline_s={PATIENCE_S}",
        "actors.runtime=ray",
        f"actors.num_learner={WORLD}",
    )
    config = small_config(small_editor, *overrides)
    actor, (report, adapter, _, _) = RolloutActor(config, 1), Learner(config, 1).export()
    actor.load(adapter)
    step = work(config, actor, RewardActor(config, FIELDS, 1), report.adapter)
    orders, groups = (step.order, replace(step.order, update=1)), (step.groups, step.groups)
    ordered = Scenario(config=config, orders=orders, groups=groups)
    sharded = small_config(
        small_editor,
        *overrides,
        "actors.shard_base=true",
        "train.inner_epochs=2",
        "train.minibatches=3",
    )
    only_rank_0 = replace(step.order, slots=(step.order.slots[0], LOST, step.order.slots[2]))
    return {
        "ordered": ordered,
        "allreduce": replace(
            ordered, config=small_config(small_editor, *overrides, "train.reduction=allreduce")
        ),
        "sharded": Scenario(config=sharded, orders=orders, groups=groups),
        "sharded, one rank without a group": Scenario(
            config=sharded, orders=(only_rank_0,), groups=((step.groups[0], None, step.groups[2]),)
        ),
    }


@pytest.fixture(scope="module")
def together(
    scenarios: dict[str, Scenario], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Every rank's answers."""
    directory, address = tmp_path_factory.mktemp("ranks"), open_place()
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(
            target=be_rank, args=(rank, address, scenarios, str(directory)), daemon=True
        )
        for rank in range(WORLD)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_S)
        process.kill()
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def single(scenarios: dict[str, Scenario]) -> dict[str, dict[str, Any]]:
    """The answers of one learner that does everything. A learner alone shards nothing."""
    return {
        name: json.loads(json.dumps(applied(scenario, Learner(scenario.config, 1), 0, 1)))
        for name, scenario in scenarios.items()
    }


NAMES = ("ordered", "sharded", "sharded, one rank without a group")


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_give_the_bytes_and_the_metrics_of_one(
    name: str, together: list[dict[str, Any]], single: dict[str, dict[str, Any]]
) -> None:
    assert together[0][name]["reports"] == single[name]["reports"]
    assert together[0][name]["adapter"] == single[name]["adapter"]
    assert together[0][name]["state"] == single[name]["state"]
    assert [report[1] for report in single[name]["reports"]] == [
        2 if "without" in name else 3
    ] * len(single[name]["reports"])


@pytest.mark.parametrize("name", [*NAMES, "allreduce"])
def test_every_rank_reports_the_same_and_only_rank_0_sends_weights(
    name: str, together: list[dict[str, Any]]
) -> None:
    first, second = (outcomes[name] for outcomes in together)
    assert first["reports"] == second["reports"] and first["adapter"] and first["state"]
    assert second["adapter"] == second["state"] == ""


def test_allreduce_is_equal_up_to_rounding(
    together: list[dict[str, Any]], single: dict[str, dict[str, Any]]
) -> None:
    two, one = (
        wire.unpack(np.frombuffer(bytes.fromhex(a["allreduce"]["adapter"]), dtype=np.uint8))
        for a in (together[0], single)
    )
    scale = max(float(value.abs().max()) for value in one.tensors.values())
    furthest = max(
        float((two.tensors[name] - value).abs().max()) for name, value in one.tensors.items()
    )
    # Adam divides by the gradient's size, so rounding in an almost zero gradient is felt most.
    assert furthest <= 1e-2 * scale
    assert torch.cat([value.flatten() for value in one.tensors.values()]).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_the_ratio_of_every_rank_is_one_at_equal_weights(
    name: str, together: list[dict[str, Any]]
) -> None:
    assert [outcomes[name]["ratio"] for outcomes in together] == [0.0, 0.0]


def test_a_sharded_base_lies_in_halves_and_a_complete_one_twice(
    together: list[dict[str, Any]], scenarios: dict[str, Scenario]
) -> None:
    size = sum(parameter.numel() for parameter in base_of(Learner(scenarios["ordered"].config, 1)))
    assert [outcomes["ordered"]["size"] for outcomes in together] == [size, size]
    halves = [outcomes["sharded"]["size"] for outcomes in together]
    assert sum(halves) == size and max(halves) < 0.6 * size


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [
        ((), 2),
        (("actors.placement=colocated",), 2),
        (("train.groups_per_update=1",), 1),
        (("actors.num_rollout=1",), 1),
        (("actors.runtime=inline",), 1),
        (("actors.runtime=thread",), 1),
        (("actors.learner_gpus=1",), 1),
        (("train.max_lag=1",), 1),
        (("train.reduction=allreduce",), 1),
        (("actors.num_learner=1",), 1),
    ],
)
def test_the_tiny_presets_learn_with_a_rank_for_each_rollout_actor_where_that_changes_no_bit(
    overrides: tuple[str, ...], ranks: int
) -> None:
    for preset in (name for name in presets() if name.startswith("tiny-")):
        config = load_config(preset=preset, overrides=("train.minibatches=1", *overrides))
        assert config.actors.num_learner == ranks
        assert load_config(preset=preset).actors.num_learner == 2


def test_ranks_that_are_given_in_number_are_counted_as_before() -> None:
    with pytest.raises(InputError, match="which cannot hold num_learner 2 ranks"):
        load_config(
            preset="tiny-rc-grpo", overrides=("actors.runtime=inline", "actors.num_learner=2")
        )
    with pytest.raises(InputError, match=r"actors\.num_rollout.*'many'"):
        load_config(preset="tiny-rc-grpo", overrides=("actors.num_rollout=many",))
    with pytest.raises(InputError, match=r"actors\.num_learner.*'some'"):
        load_config(preset="tiny-rc-grpo", overrides=("actors.num_learner=some",))
