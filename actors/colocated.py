"""Rollout and learning in one process on one frozen base: two adapters, one set of weights of everything else.

Which weights a forward uses is decided by who asks, never by who asked last, so results are those of two processes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from actors.rollout import RolloutActor
from rl_edit.config import RunConfig
from rl_edit.editors import load_editor, lora
from rl_edit.types import AdapterId, LearnAnswer, LearnOrder, RolloutResult


class Colocated:
    """A rollout actor and a learner that share an editor; it answers for both. Calls come one after the other.

    Args:
        learner_class: the learner's class, an argument because actors do not know the learner.
    """

    def __init__(self, config: RunConfig, threads: int, learner_class: Any) -> None:
        editor = load_editor(config.editor)
        self.rollout = RolloutActor(config, threads, editor=editor, adapter_name=lora.BEHAVIOUR)
        self.learner = learner_class(config, threads, editor=editor)

    def ready(self) -> int:
        return self.rollout.ready()

    def load(self, blob: np.ndarray) -> AdapterId:
        return self.rollout.load(blob)

    def run(self, blob: np.ndarray) -> tuple[RolloutResult, np.ndarray]:
        return self.rollout.run(blob)

    def canary(self) -> str:
        return self.rollout.canary()

    def address(self) -> str:
        address: str = self.learner.address()
        return address

    def join(self, rank: int, world: int, address: str) -> None:
        self.learner.join(rank, world, address)

    def export(self) -> LearnAnswer:
        exported: LearnAnswer = self.learner.export()
        return exported

    def restore(self, state: np.ndarray) -> None:
        self.learner.restore(state)

    def learn(self, order: LearnOrder, *blobs: np.ndarray) -> LearnAnswer:
        answer: LearnAnswer = self.learner.learn(order, *blobs)
        return answer

    def ratio(self, blob: np.ndarray) -> float:
        deviation: float = self.learner.ratio(blob)
        return deviation
