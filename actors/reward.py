"""The reward actor: scores candidates with every reward term. A plain class."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from rl_edit import wire
from rl_edit.config import RunConfig
from rl_edit.measures.diagnostics import measure
from rl_edit.rewards import available, score_candidates
from rl_edit.types import Candidates, RewardTable, RolloutGroup


class RewardActor:
    """Applies every reward term that the data can feed.

    Scores are a pure function of the group: any reward actor gives the same table.

    Args:
        fields: names of the task fields that the data set provides.
    """

    def __init__(self, config: RunConfig, fields: frozenset[str], threads: int) -> None:
        torch.set_num_threads(threads)
        self._group_size = config.rollout.group_size
        # What is left out, and why, was reported when the run was planned.
        self.terms, _ = available(tuple(config.rewards.values()), fields)

    def ready(self) -> int:
        """Returns the process id, once construction is over."""
        return os.getpid()

    def score(self, blob: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Scores a packed group; returns the packed reward table."""
        group: RolloutGroup = wire.unpack(blob)
        return wire.pack(self.table(group.candidates, group_id=group.group_id))

    def table(self, candidates: Candidates, *, group_id: str) -> RewardTable:
        """Scores candidates and adds every run's diagnostics.

        These are background PSNR, SSIM and drift, change inside the mask, and concentration.
        """
        # The time of diagnostics is part of a group's cost, so it counts as scoring.
        start = time.perf_counter()
        table = score_candidates(self.terms, candidates, group_id=group_id)
        measures = measure(candidates, complete=len(candidates.images) == self._group_size)
        return replace(table, measures=measures, seconds=time.perf_counter() - start)
