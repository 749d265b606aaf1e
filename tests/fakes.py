"""Workers whose results are small pure functions, and an executor that misbehaves on cue: the
controller's tests in milliseconds.

The controller under test is the real one; only what it sends work to is replaced. A fake adapter is
the hash of everything it was trained on, so two runs end with equal adapters exactly when they
trained on the same groups in the same order.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from actors.roles import Roles, WorkerSpec
from rl_edit import wire
from rl_edit.editors.lora import digest
from rl_edit.errors import BlobLost, WorkerLost, WorkFailed
from rl_edit.messages import LearnAnswer, LearnerState, LearnOrder, LearnReport, RolloutResult
from rl_edit.types import AdapterId, AdapterWeights, RewardTable, WorkItem

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

    def run(self, blob: np.ndarray) -> tuple[RolloutResult, np.ndarray]:
        item: WorkItem = wire.unpack(blob)
        if item.adapter not in self.loaded:
            raise RuntimeError(f"work asks for adapter {item.adapter}")
        said = hashlib.sha256(f"{item.work_id} {item.adapter.sha256}".encode()).hexdigest()
        group = as_array(
            {
                "group_id": item.group_id,
                "work_id": item.work_id,
                "said": said,
                "rows": item.chunk[1] - item.chunk[0],
            }
        )
        rollout_result = RolloutResult(
            work_id=item.work_id,
            adapter=item.adapter,
            sha256=hashlib.sha256(group.tobytes()).hexdigest(),
            nbytes=group.nbytes,
            finite=True,
            areas=torch.tensor([[[True, False]]]),
            seconds={"denoise": 0.001},
        )
        return rollout_result, group


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
        return RewardTable(
            group_id=group_id,
            names=REWARDS,
            weights=(1.0, 0.3),
            values=values,
            valid=values.isfinite(),
            seconds=0.001,
        )


class FakeLearner:
    """Its weights are the hash of all it learnt."""

    def __init__(self) -> None:
        self.updates_done, self.weight = 0, torch.zeros(4)
        self.responses: dict[str, Any] = {}

    def ready(self) -> int:
        return 0

    def ratio(self, group: np.ndarray) -> float:
        return 0.0

    def export(self) -> LearnAnswer:
        return self.answer(plan="")

    def answer(self, *, plan: str, used: int = 0, lost: tuple[str, ...] = ()) -> LearnAnswer:
        tensors = {"weight": self.weight.clone()}
        weights = AdapterWeights(id=AdapterId(self.updates_done, digest(tensors)), tensors=tensors)
        report = LearnReport(
            adapter=weights.id,
            result=weights.id,
            plan=plan,
            metrics={},
            declined={"lost": lost} if lost else {},
            used=used,
            seconds=0.001,
        )
        state = LearnerState(updates_done=self.updates_done, tensors=tensors)
        return LearnAnswer(report, adapter=wire.pack(weights), state=wire.pack(state))

    def restore(self, blob: np.ndarray) -> None:
        state: LearnerState = wire.unpack(blob)
        self.updates_done, self.weight = state.updates_done, state.tensors["weight"].clone()

    def learn(self, order: LearnOrder, *blobs: np.ndarray) -> LearnAnswer:
        if order.update == self.updates_done - 1 and order.plan in self.responses:
            answer: LearnAnswer = self.responses[order.plan]
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
        lost = tuple(slot.lost for slot in order.slots if slot.lost)
        self.responses = {
            order.plan: self.answer(plan=order.plan, used=len(order.slots) - len(lost), lost=lost)
        }
        return self.responses[order.plan]


def fake_roles(**classes: Callable[[], Any]) -> Callable[[Roles], Roles]:
    """Every role played by a fake, or by a class given by role."""
    made = {"rollout": FakeRollout, "reward": FakeReward, "learner": FakeLearner, **classes}
    return lambda roles: {
        role: WorkerSpec(process=role, make=make, arguments=()) for role, make in made.items()
    }


Kind = Literal[
    "lose", "die_after", "raise", "hang", "late", "corrupt", "lose_blob", "crash", "crash_after"
]


class Crash(Exception):
    """The driver itself ends here: nothing of the controller may catch this."""


@dataclass
class Fault:
    """What goes wrong with the ``nth`` call of a method (1 is the first), counted over all workers
    of the role or over one worker slot.

    Attributes:
        kind: the worker dies before its work, or after it and before it answers; the method raises;
            it never answers; it answers after its deadline; the answer is changed by ``change``;
            the blobs it is given are gone; the driver dies before the call, or after it.
        until: a late answer waits until so many calls of the method have begun.
    """

    role: str
    method: str
    nth: int
    kind: Kind
    change: Callable[[Any], Any] = lambda answer: answer
    times: int = 1
    worker_slot: int | None = None
    until: int = 0


@dataclass
class FaultyExecutor:
    """An executor whose calls fail as planned, or take as long as ``latency`` says. Everything else
    goes to the one inside."""

    inside: Any
    faults: list[Fault]
    latency: Callable[[], float] | None = None
    calls: dict[tuple[str, str, int | None], int] = field(default_factory=dict)
    spawned: list[tuple[str, int]] = field(default_factory=list)

    def direct(self, role: str) -> None:
        return None

    def spawn(self, role: str, worker_slot: int) -> Any:
        self.spawned.append((role, worker_slot))
        return _FaultyWorker(self, role, worker_slot, self.inside.spawn(role, worker_slot))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inside, name)

    def fault(self, role: str, method: str, worker_slot: int) -> Fault | None:
        number: dict[int | None, int] = {}
        for counted in (None, worker_slot):
            number[counted] = self.calls[role, method, counted] = (
                self.calls.get((role, method, counted), 0) + 1
            )
        meant = (
            f
            for f in self.faults
            if (f.role, f.method) == (role, method) and f.worker_slot in number
        )
        return next((f for f in meant if f.nth <= number[f.worker_slot] < f.nth + f.times), None)


class Chaos(FaultyExecutor):
    """Random faults at random calls, a limited number of them, and random latencies: everything
    follows from the seed."""

    KINDS: ClassVar[dict[str, tuple[Kind, ...]]] = {
        "run": ("lose", "die_after", "raise", "hang", "late"),
        "score": ("lose", "die_after", "raise", "hang", "lose_blob"),
        "learn": ("lose", "die_after", "hang", "lose_blob"),
        "load": ("lose", "die_after", "hang"),
        "restore": ("lose",),
        "ready": ("lose",),
    }

    def __init__(self, inside: Any, *, seed: int, share: float, max_faults: int) -> None:
        self.random, self.share, self.left = random.Random(seed), share, max_faults
        super().__init__(inside, [], latency=lambda: self.random.choice((0.0, 0.0, 0.001, 0.003)))
        self.started = 0

    def fault(self, role: str, method: str, worker_slot: int) -> Fault | None:
        # A worker that dies during the very first start ends the run with a clear message, which is
        # another test's subject.
        self.started += method == "load"
        if (
            not self.started
            or not self.left
            or method not in self.KINDS
            or self.random.random() > self.share
        ):
            return None
        self.left -= 1
        return Fault(role, method, 0, self.random.choice(self.KINDS[method]))


class _FaultyWorker:
    def __init__(self, executor: FaultyExecutor, role: str, worker_slot: int, inside: Any) -> None:
        self._executor, self._role, self._slot, self._inside = executor, role, worker_slot, inside
        self._dead = asyncio.Event()

    async def call(self, method: str, *args: Any, blobs: int = 0) -> Any:
        if self._dead.is_set():
            raise WorkerLost("it is dead")
        fault = self._executor.fault(self._role, method, self._slot)
        if self._executor.latency is not None:
            await asyncio.sleep(self._executor.latency())
        if fault is None:
            return await self._inside.call(method, *args, blobs=blobs)
        if fault.kind == "lose":
            self.kill()
            raise WorkerLost("it died")
        if fault.kind == "raise":
            raise WorkFailed("ValueError: it raised")
        if fault.kind == "lose_blob":
            raise BlobLost("its machine is gone")
        if fault.kind == "crash":
            raise Crash
        if fault.kind == "hang":
            await self._dead.wait()
            raise WorkerLost("it was killed")
        answer = await self._inside.call(method, *args, blobs=blobs)
        if fault.kind == "crash_after":
            raise Crash
        if fault.kind == "die_after":
            self.kill()
            raise WorkerLost("it died before it answered")
        if fault.kind == "late":
            await self._dead.wait()
            while self._executor.calls.get((self._role, method, None), 0) < fault.until:
                await asyncio.sleep(0.001)
        return fault.change(answer)

    def kill(self) -> None:
        self._dead.set()
        self._inside.kill()


def faulty(
    *faults: Fault, latency: Callable[[], float] | None = None
) -> Callable[[Any], FaultyExecutor]:
    return lambda inside: FaultyExecutor(inside, list(faults), latency)


def chaos(seed: int, *, share: float, max_faults: int) -> Callable[[Any], Chaos]:
    return lambda inside: Chaos(inside, seed=seed, share=share, max_faults=max_faults)
