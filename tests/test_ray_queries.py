"""Questions to Ray end at their deadline, with one line that says what was asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from actors import ray_cluster, ray_queries
from actors.ray_executor import RayExecutor
from actors.ray_queries import answered
from actors.roles import worker_roles
from learner.learner import Learner
from rl_edit.config import load_config
from rl_edit.errors import ClusterLost

Query = Callable[..., Any]


def refuses() -> None:
    raise ConnectionError("the GCS\nis gone")


@pytest.fixture
def silent() -> Iterator[Query]:
    """A question that nobody answers before the test ends."""
    ended = threading.Event()
    yield lambda *_, **__: ended.wait()
    ended.set()


def test_a_question_without_an_answer_ends_at_its_deadline(silent: Query) -> None:
    began = time.monotonic()
    with pytest.raises(ClusterLost) as error:
        answered("which nodes it has", silent, limit_s=0.3)
    assert time.monotonic() - began < 10
    assert str(error.value).startswith(
        "Ray did not say which nodes it has (no answer within 0.3 s): its control service (GCS) "
    )


def test_an_error_of_ray_is_one_line_and_an_answer_is_returned() -> None:
    with pytest.raises(ClusterLost, match=r"\(ConnectionError: the GCS is gone\)") as error:
        answered("which nodes it has", refuses)
    assert "\n" not in str(error.value)
    assert answered("which nodes it has", lambda: [1]) == [1]


def test_a_cluster_that_ends_meanwhile_is_the_reason(
    silent: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_queries.ray_watch, "problem", lambda: "Ray's raylet ended")
    with pytest.raises(ClusterLost, match=r"^Ray's raylet ended$"):
        answered("which nodes it has", silent)


def test_what_the_executor_asks_has_a_deadline(
    silent: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answered, "__kwdefaults__", {"limit_s": 0.2})
    for name in ("cluster_resources", "available_resources"):
        monkeypatch.setattr(ray, name, silent)
    executor = RayExecutor({})
    with pytest.raises(ClusterLost, match="how large its object store is"):
        executor.store_bytes()
    # It completes a message, which is more important than it.
    assert executor.free().startswith("unknown (Ray did not say what is free")


def test_a_reservation_that_ray_does_not_answer_ends(
    silent: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(
        preset="tiny-rc-grpo", overrides=("actors.runtime=ray", "actors.rollout_gpus=1")
    )
    roles = worker_roles(config, frozenset(), Learner)
    monkeypatch.setattr(answered, "__kwdefaults__", {"limit_s": 0.2})
    monkeypatch.setattr(ray_cluster, "placement_group", silent)
    with pytest.raises(ClusterLost, match="that it reserves GPUs"):
        ray_cluster.reserve(config, roles, note=print)
