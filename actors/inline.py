"""The same workers in this process: for debugging, benchmarks, and tests without Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from actors.reward import RewardActor
from actors.rollout import RolloutActor
from rl_edit import wire
from rl_edit.config import RunConfig
from rl_edit.types import WorkItem


class InlineWorkers:
    """Rollout, reward and learner as plain objects, called in turn. Blobs are packed as on the wire."""

    def __init__(self, config: RunConfig, fields: frozenset[str], learner: Any, rolled: Callable[..., Any], *, threads: int) -> None:
        self._rollouts = [RolloutActor(config, threads) for _ in range(config.actors.num_rollout)]
        self._reward = RewardActor(config, fields, threads)
        self._learner = learner
        self._rolled = rolled
        self._next = 0
        self.pixels_per_token = self._rollouts[0].editor.pixels_per_token

    async def start(self) -> None:
        """Nothing to wait for: construction has loaded everything."""

    async def rollout(self, item: WorkItem) -> Any:
        actor = self._rollouts[self._next % len(self._rollouts)]
        self._next += 1
        meta, blob = actor.run(wire.pack(item))
        return self._rolled(blob=blob, **meta)

    async def score(self, rolled: Any) -> np.ndarray:
        return self._reward.score(rolled.blob)

    async def publish(self, adapter: np.ndarray) -> None:
        for actor in self._rollouts:
            actor.load(adapter)

    async def learn(self, update: int, groups: Sequence[Any], tables: Sequence[np.ndarray]) -> Any:
        return self._learner.learn(update, tables, *(group.blob for group in groups))

    async def learner_state(self) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self._learner.state()
        return state

    async def restore_learner(self, state: dict[str, torch.Tensor], updates_done: int) -> None:
        self._learner.restore(state, updates_done)

    async def export(self) -> np.ndarray:
        blob: np.ndarray = self._learner.export()
        return blob
