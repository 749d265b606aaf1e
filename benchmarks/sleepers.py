"""Workers that sleep as long as real ones would work: the real controller can be timed without the
hardware.

What the controller reads (tables, masks, names) has its real size. Groups and adapters, which it
only passes on by reference, are a few bytes.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from actors.roles import Roles, WorkerSpec
from rl_edit import wire
from rl_edit.editors.lora import digest
from rl_edit.messages import LearnAnswer, LearnerState, LearnOrder, LearnReport, RolloutResult
from rl_edit.types import AdapterId, AdapterWeights, RewardTable

REWARDS = {"judge": 1.0, "preservation": 0.6, "attention": 0.1}
COMPONENTS = (
    "background.psnr",
    "background.ssim",
    "change.inside",
    "concentration",
    "judge.instruction",
    "judge.quality",
)


@dataclass(frozen=True, kw_only=True)
class Naps:
    """Seconds of sleep.

    Attributes:
        rollout_s, reward_s, learn_s: for one work item.
        step_s, publish_s: for every update, on each learner rank and on each rollout actor.
        tokens: of a picture, for the size of masks.
    """

    rollout_s: float = 0.0
    reward_s: float = 0.0
    learn_s: float = 0.0
    step_s: float = 0.0
    publish_s: float = 0.0
    tokens: int = 16


class Sleeper:
    """Rollout actor, reward actor and learner rank, whichever is asked; what it computes meanwhile
    is part of its time."""

    def __init__(self, naps: Naps) -> None:
        self.naps = naps
        self.updates_done = 0

    def ready(self) -> int:
        return 0

    def load(self, blob: np.ndarray) -> None:
        time.sleep(self.naps.publish_s)

    def run(self, blob: np.ndarray) -> tuple[RolloutResult, np.ndarray]:
        began = time.perf_counter()
        item = _fields(blob)
        group_id, chunk = item["group_id"], item["chunk"]["$tuple"]
        work_id = f"{group_id}.{chunk[0]}-{chunk[1]}"
        group = np.frombuffer(
            json.dumps({"group_id": group_id, "rows": chunk[1] - chunk[0]}).encode(), dtype=np.uint8
        )
        areas = torch.zeros(1, 1, self.naps.tokens, dtype=torch.bool)
        areas[0, 0, 0] = True
        _sleep_until(began + self.naps.rollout_s)
        rollout_result = RolloutResult(
            work_id=work_id,
            adapter=AdapterId(**item["adapter"]["fields"]),
            sha256=hashlib.sha256(work_id.encode()).hexdigest(),
            nbytes=group.nbytes,
            finite=True,
            areas=areas,
            seconds={"denoise": time.perf_counter() - began},
        )
        return rollout_result, group

    def score(self, blob: np.ndarray) -> np.ndarray:
        began = time.perf_counter()
        group = json.loads(blob.tobytes())
        values = torch.linspace(0, 1, group["rows"])[:, None].repeat(1, len(REWARDS))
        table = RewardTable(
            group_id=group["group_id"],
            names=tuple(REWARDS),
            weights=tuple(REWARDS.values()),
            values=values,
            valid=values.isfinite(),
            # As many numbers as a real table carries, under one term: here only their size counts.
            components={
                next(iter(REWARDS)): {name: tuple(values[:, 0].tolist()) for name in COMPONENTS}
            },
            seconds=self.naps.reward_s,
        )
        packed = wire.pack(table)
        _sleep_until(began + self.naps.reward_s)
        return packed

    def address(self) -> str:
        return "nowhere"

    def join(self, rank: int, world: int, address: str) -> None:
        """Sleepers need not meet."""

    def export(self) -> LearnAnswer:
        return self._answer(plan="", used=0, seconds=0.0)

    def _answer(self, *, plan: str, used: int, seconds: float) -> LearnAnswer:
        tensors = {"weight": torch.tensor([float(self.updates_done)])}
        weights = AdapterWeights(id=AdapterId(self.updates_done, digest(tensors)), tensors=tensors)
        report = LearnReport(
            adapter=weights.id, result=weights.id, plan=plan, metrics={}, used=used, seconds=seconds
        )
        state = wire.pack(LearnerState(updates_done=self.updates_done, tensors=tensors))
        return LearnAnswer(report, adapter=wire.pack(weights), state=state)

    def learn(self, order: LearnOrder, *blobs: np.ndarray) -> LearnAnswer:
        began = time.perf_counter()
        self.updates_done = order.update + 1
        answer = self._answer(plan=order.plan, used=len(order.slots), seconds=0.0)
        _sleep_until(began + len(blobs) * self.naps.learn_s + self.naps.step_s)
        seconds = time.perf_counter() - began
        return answer._replace(report=replace(answer.report, seconds=seconds))


def sleeping_roles(naps: Naps, *, colocated: bool = False) -> Roles:
    """Every role asleep, each in processes of its own, or all three by turns in the same ones."""
    return {
        role: WorkerSpec(
            process="colocated" if colocated else role, make=Sleeper, arguments=(naps,)
        )
        for role in ("rollout", "reward", "learner")
    }


def _fields(blob: np.ndarray) -> dict[str, Any]:
    """What a packed record says besides its tensors. A worker in a thread would take from the
    controller the time that copies need."""
    size = int.from_bytes(blob[:8].tobytes(), "little")
    header = json.loads(blob[8 : 8 + size].tobytes())["__metadata__"]["rl-edit"]
    fields: dict[str, Any] = json.loads(header)["record"]["fields"]
    return fields


def _sleep_until(end: float) -> None:
    time.sleep(max(0.0, end - time.perf_counter()))
