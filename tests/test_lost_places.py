"""An actor whose reserved GPU was on a lost node is given up quickly; without Ray."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from actors import ray_executor
from actors.devices import Device
from rl_edit.errors import WorkerLost

ANSWER = Device(
    node="a (10.0.0.1)",
    node_id="n",
    share=1.0,
    assigned=("0",),
    variable="CUDA_VISIBLE_DEVICES",
    visible=None,
    positions=(0,),
    noset=False,
    gpus=(),
)


class Actor:
    """An actor that tells its device after some seconds."""

    def __init__(self, seconds: float) -> None:
        self.device, self.seconds = self, seconds

    async def remote(self) -> Device:
        await asyncio.sleep(self.seconds)
        return ANSWER


class Process:
    """A process with a reserved place."""

    def __init__(self, seconds: float) -> None:
        self.actor, self.place = Actor(seconds), ("group", 0)


def first_answer(
    monkeypatch: pytest.MonkeyPatch, *, answers_after_s: float, lost: list[bool], wait_s: float = 0
) -> Any:
    monkeypatch.setattr(ray_executor, "PLACE_POLL_S", 0.02)
    monkeypatch.setattr(ray_executor, "PLACE_LOST_S", 0.06)
    monkeypatch.setattr(
        ray_executor, "place_lost", lambda *place: lost.pop(0) if len(lost) > 1 else lost[0]
    )
    executor = ray_executor.RayExecutor({}, wait_for_nodes_s=wait_s)
    return asyncio.run(executor._first_answer(Process(answers_after_s)))  # type: ignore[arg-type]


def test_a_process_whose_place_was_lost_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorkerLost, match="the node with its GPUs was lost"):
        first_answer(monkeypatch, answers_after_s=60, lost=[True])


def test_a_process_whose_place_is_there_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_answer(monkeypatch, answers_after_s=0.5, lost=[False]) is ANSWER


def test_a_place_that_comes_back_in_time_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_answer(monkeypatch, answers_after_s=0.5, lost=[True, True, False]) is ANSWER


def test_an_autoscaler_gets_its_time_to_replace_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    found = first_answer(monkeypatch, answers_after_s=0.3, lost=[True], wait_s=30)
    assert found is ANSWER
