"""Model evaluations of an update: what a method asks of the editor, whatever machine it runs on.

One evaluation is one forward of one latent state through the transformer; true classifier-free guidance makes two of a state. A
forward that learns costs a backward on top of it, and decoding and rewards cost something too: seconds per update show those.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rl_edit.config import RunConfig
from rl_edit.method.regions import UniformRows
from rl_edit.method.rollout import blank_group
from rl_edit.types import Advantages, Conditioning

_GRID = (2, 2)


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Evaluations of one update in which every group is trained.

    Attributes:
        rollout: to sample its groups, G * T a group.
        learning: to learn from them: every replayed state, under the trained weights and under each other policy that the objective
            reads, in every pass.
    """

    rollout: int
    learning: int

    @property
    def total(self) -> int:
        return self.rollout + self.learning


def effort(config: RunConfig) -> Effort:
    """What an update of this run asks of the editor. The objective itself says what it replays, on a group of zeros.

    Counted for the first update; every shipped schedule makes as many stochastic steps in all of them. Neither the copies that fill a
    micro-batch are counted nor evaluations on held-out tasks.
    """
    algorithm, rollout, train = config.algorithm, config.rollout, config.train
    levels = algorithm.step_noise(0, rollout.num_steps)
    keep = algorithm.objective.trained_steps(levels, torch.Generator())
    tokens = _GRID[0] * _GRID[1]
    conditioning = Conditioning(
        prompt_embeds=torch.zeros(1, 1),
        pooled=torch.zeros(1),
        text_rows=torch.ones(1, dtype=torch.bool),
        source_latents=torch.zeros(tokens, 1),
        grid=_GRID,
    )
    group = blank_group(
        conditioning, (tokens, 1), size=rollout.group_size, levels=levels, keep=keep
    )
    nothing = Advantages(
        values=torch.zeros(rollout.group_size, 1),
        regions=UniformRows()(group.candidates.token_mask),
        weights=torch.ones(1),
    )
    points = algorithm.objective.replay(
        group,
        nothing,
        num_references=algorithm.initial_noise.num_references,
        generator=torch.Generator(),
        states_per_forward=train.states_per_forward,
    )
    states = sum(len(point.latents) for point in points)
    forwards = 2 if config.editor.true_cfg > 1 else 1
    return Effort(
        rollout=forwards * train.groups_per_update * rollout.group_size * rollout.num_steps,
        learning=forwards
        * train.groups_per_update
        * states
        * (1 + len(algorithm.objective.policies))
        * train.inner_epochs,
    )
