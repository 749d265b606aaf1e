"""Model evaluations of an update: the cost of a method, whatever machine it runs on.

One evaluation is one forward of one latent state through the transformer. True classifier-free
guidance makes two of a state. A forward that learns costs a backward on top of it; decoding and
rewards are not counted here. Seconds per update show both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rl_edit.config import RunConfig
from rl_edit.method.regions import UniformRows
from rl_edit.method.rollout import blank_group
from rl_edit.types import Advantages, Conditioning, RolloutGroup

# Token grid of the probe group. The number of states does not depend on it, so it is tiny.
_GRID = (2, 2)


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Evaluations of one update in which every group is trained.

    Attributes:
        rollout: to sample its groups, G * T for each group.
        learning: to learn from them. Every replayed state counts in every inner epoch, under the
            trained weights and under each further policy that the objective reads.
    """

    rollout: int
    learning: int

    @property
    def total(self) -> int:
        """Rollout and learning."""
        return self.rollout + self.learning


def effort(config: RunConfig) -> Effort:
    """Counts the evaluations of this run's first update.

    The objective is asked to replay a group of zeros, so it decides the states itself. Every
    shipped schedule makes as many stochastic steps in all updates. Copies that fill a micro-batch
    are not counted, nor are evaluations on held-out tasks.
    """
    algorithm, rollout, train = config.algorithm, config.rollout, config.train
    group = _zero_group(config)
    points = algorithm.objective.replay(
        group,
        Advantages(
            values=torch.zeros(rollout.group_size, 1),
            regions=UniformRows()(group.candidates.token_mask),
            weights=torch.ones(1),
        ),
        num_references=algorithm.initial_noise.num_references,
        generator=torch.Generator(),
        states_per_forward=train.states_per_forward,
    )
    states = sum(len(point.latents) for point in points)
    # Guidance adds a forward of the negative prompt for each state.
    forwards = 2 if config.editor.guided else 1
    # The trained policy, and those that the objective compares with (acting, base, reference).
    policies = 1 + len(algorithm.objective.policies)
    # rollout: groups * G * T; learning: groups * states * policies * epochs.
    return Effort(
        rollout=forwards * train.groups_per_update * rollout.group_size * rollout.num_steps,
        learning=forwards * train.groups_per_update * states * policies * train.inner_epochs,
    )


def _zero_group(config: RunConfig) -> RolloutGroup:
    """Builds a rollout group of zeros with the run's sizes and trained steps."""
    algorithm, rollout = config.algorithm, config.rollout
    # Update 0 stands for all: see the docstring of ``effort``.
    levels = algorithm.step_noise(0, rollout.num_steps)
    tokens = _GRID[0] * _GRID[1]
    conditioning = Conditioning(source_latents=torch.zeros(tokens, 1), grid=_GRID)
    return blank_group(
        conditioning,
        (tokens, 1),
        size=rollout.group_size,
        levels=levels,
        keep=algorithm.objective.trained_steps(levels, torch.Generator()),
    )
