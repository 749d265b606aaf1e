"""The reward actor: scores a group with every term, and measures inside and outside the mask. A plain class."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import numpy as np
import torch

from rl_edit import wire
from rl_edit.config import RunConfig
from rl_edit.measures.diagnostics import diagnostics
from rl_edit.measures.drift import drift
from rl_edit.measures.reward_statistics import change_variance
from rl_edit.rewards import available, score_candidates
from rl_edit.types import Candidates, RewardTable, RolloutGroup


class RewardActor:
    """A pure function of a group: every term of the config that the data can feed."""

    def __init__(self, config: RunConfig, fields: frozenset[str], threads: int) -> None:
        torch.set_num_threads(threads)
        self._group_size = config.rollout.group_size
        self.terms, _ = available(tuple(config.rewards.values()), fields)

    def ready(self) -> int:
        """Answers once construction is over: the process id."""
        return os.getpid()

    def score(self, blob: np.ndarray) -> np.ndarray:
        """The reward table of a packed group, packed."""
        group: RolloutGroup = wire.unpack(blob)
        return wire.pack(self.table(group.candidates, group_id=group.group_id))

    def table(self, candidates: Candidates, *, group_id: str) -> RewardTable:
        """Terms plus the diagnostics every run reports: background PSNR, SSIM and drift, change inside, concentration."""
        start = time.perf_counter()
        table = score_candidates(self.terms, candidates, group_id=group_id)
        measured = {**diagnostics(candidates), **drift(candidates)}
        if (
            len(candidates.images) == self._group_size
        ):  # a variance within the group cannot be told from a chunk of it
            measured |= change_variance(candidates)
        return replace(
            table, components={**table.components, **measured}, seconds=time.perf_counter() - start
        )
