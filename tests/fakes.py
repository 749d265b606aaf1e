"""Workers whose results are small pure functions, and an executor that misbehaves on cue: the controller's tests in milliseconds.

The controller under test is the real one; only what it sends work to is replaced. A fake adapter is the hash of everything it
was trained on, so two runs end with equal adapters exactly when they trained on the same groups in the same order.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from actors.crew import Crew, Post
from rl_edit import wire
from rl_edit.adapters import digest
from rl_edit.errors import BlobLost, WorkerLost, WorkFailed
from rl_edit.types import AdapterId, AdapterWeights, LearnerState, LearnOrder, LearnReport, RewardTable, Rolled, WorkItem

REWARDS = ("preservation", "attention")


def as_array(content: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(content, sort_keys=True).encode(), dtype=np.uint8)


def as_content(blob: np.ndarray) -> Any:
    return json.loads(blob.tobytes())


class FakeRollout:
    """Answers with a group that is the hash of its item and its weights."""

    def __init__(self) -> None:
        self.loaded: dict[AdapterId, AdapterWeights] = {}

    def ready(self) -> int:
        return 0

    def canary(self) -> str:
        return ""

    def load(self, blob: np.ndarray) -> AdapterId:
        weights: AdapterWeights = wire.unpack(blob)
        self.loaded[weights.id] = weights
        return weights.id

    def run(self, blob: np.ndarray) -> tuple[Rolled, np.ndarray]:
        item: WorkItem = wire.unpack(blob)
        if item.adapter not in self.loaded:
            raise RuntimeError(f"work asks for adapter {item.adapter}")
        said = hashlib.sha256(f"{item.work_id} {item.adapter.sha256}".encode()).hexdigest()
        group = as_array({"group_id": item.group_id, "work_id": item.work_id, "said": said, "rows": item.chunk[1] - item.chunk[0]})
        rolled = Rolled(
            work_id=item.work_id,
            adapter=item.adapter,
            sha256=hashlib.sha256(group.tobytes()).hexdigest(),
            nbytes=group.nbytes,
            finite=True,
            token_mask=torch.tensor([True, False]),
            seconds={"denoise": 0.001},
        )
        return rolled, group


class FakeReward:
    """Scores that follow from the group's hash."""

    def ready(self) -> int:
        return 0

    def score(self, blob: np.ndarray) -> np.ndarray:
        group = as_content(blob)
        generator = torch.Generator().manual_seed(int(group["said"][:8], 16))
        values = torch.rand(group["rows"], len(REWARDS), generator=generator)
        return wire.pack(self.table(group["group_id"], values))

    def table(self, group_id: str, values: torch.Tensor) -> RewardTable:
        return RewardTable(group_id=group_id, names=REWARDS, weights=(1.0, 0.3), values=values, valid=values.isfinite(), seconds=0.001)


class FakeLearner:
    """Its weights are the hash of all it learnt."""

    def __init__(self) -> None:
        self.updates_done, self.weight = 0, torch.zeros(4)
        self.answers: dict[str, Any] = {}

    def ready(self) -> int:
        return 0

    def ratio(self, group: np.ndarray) -> float:
        return 0.0

    def export(self) -> tuple[AdapterId, np.ndarray, np.ndarray]:
        tensors = {"weight": self.weight.clone()}
        weights = AdapterWeights(id=AdapterId(self.updates_done, digest(tensors)), tensors=tensors)
        return weights.id, wire.pack(weights), wire.pack(LearnerState(updates_done=self.updates_done, tensors=tensors))

    def restore(self, blob: np.ndarray) -> None:
        state: LearnerState = wire.unpack(blob)
        self.updates_done, self.weight = state.updates_done, state.tensors["weight"].clone()

    def learn(self, order: LearnOrder, *blobs: np.ndarray) -> tuple[LearnReport, np.ndarray, np.ndarray]:
        if order.update == self.updates_done - 1 and order.plan in self.answers:
            answer: tuple[LearnReport, np.ndarray, np.ndarray] = self.answers[order.plan]
            return answer
        if order.update != self.updates_done:
            raise RuntimeError(f"asked for update {order.update}, done {self.updates_done}")
        content = hashlib.sha256(self.weight.numpy().tobytes())
        for blob in blobs:
            content.update(as_content(blob)["said"].encode())
        for slot in order.slots:
            for table in slot.tables:
                content.update(wire.unpack(table).values.numpy().tobytes())
        self.weight = torch.tensor([float(byte) for byte in content.digest()[:4]])
        self.updates_done += 1
        named, adapter, state = self.export()
        lost = tuple(slot.lost for slot in order.slots if slot.lost)
        report = LearnReport(
            adapter=named,
            plan=order.plan,
            metrics={},
            declined={"lost": lost} if lost else {},
            used=len(order.slots) - len(lost),
            seconds=0.001,
        )
        self.answers = {order.plan: (report, adapter, state)}
        return self.answers[order.plan]


def fake_crew(**classes: Callable[[], Any]) -> Callable[[Crew], Crew]:
    """Every role played by a fake, or by a class given by role."""
    made = {"rollout": FakeRollout, "reward": FakeReward, "learner": FakeLearner, **classes}
    return lambda crew: {role: Post(process=role, make=make, arguments=()) for role, make in made.items()}


Kind = Literal["lose", "raise", "hang", "late", "corrupt", "lose_blob"]


@dataclass
class Fault:
    """What goes wrong with the ``nth`` call of a method (1 is the first), as counted over all workers of the role.

    Attributes:
        kind: the worker dies; the method raises; it never answers; it answers after its deadline; the answer is
            changed by ``change``; the blobs it is given are gone.
    """

    role: str
    method: str
    nth: int
    kind: Kind
    change: Callable[[Any], Any] = lambda answer: answer
    times: int = 1


@dataclass
class FaultyExecutor:
    """An executor whose calls fail as planned. Everything else goes to the one inside."""

    inside: Any
    faults: list[Fault]
    calls: dict[tuple[str, str], int] = field(default_factory=dict)
    spawned: list[tuple[str, int]] = field(default_factory=list)

    def spawn(self, role: str, seat: int) -> Any:
        self.spawned.append((role, seat))
        return _FaultyWorker(self, role, self.inside.spawn(role, seat))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inside, name)

    def fault(self, role: str, method: str) -> Fault | None:
        number = self.calls[role, method] = self.calls.get((role, method), 0) + 1
        return next((f for f in self.faults if (f.role, f.method) == (role, method) and f.nth <= number < f.nth + f.times), None)


class _FaultyWorker:
    def __init__(self, executor: FaultyExecutor, role: str, inside: Any) -> None:
        self._executor, self._role, self._inside = executor, role, inside
        self._dead = asyncio.Event()

    async def call(self, method: str, *args: Any, blobs: int = 0) -> Any:
        if self._dead.is_set():
            raise WorkerLost("it is dead")
        fault = self._executor.fault(self._role, method)
        if fault is None:
            return await self._inside.call(method, *args, blobs=blobs)
        if fault.kind == "lose":
            self.kill()
            raise WorkerLost("it died")
        if fault.kind == "raise":
            raise WorkFailed("ValueError: it raised")
        if fault.kind == "lose_blob":
            raise BlobLost("its machine is gone")
        if fault.kind == "hang":
            await self._dead.wait()
            raise WorkerLost("it was killed")
        answer = await self._inside.call(method, *args, blobs=blobs)
        if fault.kind == "late":
            await self._dead.wait()
        return fault.change(answer) if fault.kind in ("corrupt", "late") else answer

    def kill(self) -> None:
        self._dead.set()
        self._inside.kill()


def faulty(*faults: Fault) -> Callable[[Any], FaultyExecutor]:
    return lambda inside: FaultyExecutor(inside, list(faults))
