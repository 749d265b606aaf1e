"""A method of your own in one file: an objective, and values for noise and credit.

    python examples/own_method.py        # two updates, into runs/own_method

A configuration names the class in the same way; nothing is registered:

    objective: {kind: "own_method:BestOf", pull: 0.05}      # under ``algorithm``

The method is made up: it regresses the velocity on the finished samples of the better candidates.
The contract is ``rl_edit/method/objectives/protocol.py``. A credit rule can be a class of yours as
well (``CreditProtocol`` in ``rl_edit/method/advantages.py``).
"""

from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor

from rl_edit.config import load_config
from rl_edit.method.objectives import Policy, ReplayPoint, Setting, Velocities
from rl_edit.training import train
from rl_edit.types import Advantages, LossOutput, RolloutGroup


class BestOf(BaseModel):
    """Velocity regression on the finished samples of candidates with a positive advantage.

    ``L = mean_i max(A_i, 0) |x - sigma v - clean_i|^2 + pull |v - v_base|^2``

    Attributes:
        pull: weight of the distance to the base editor's velocity.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["own_method:BestOf"] = "own_method:BestOf"
    pull: float = Field(default=0.1, ge=0)
    # The learner evaluates these weights as well, at the same states.
    policies: ClassVar[frozenset[Policy]] = frozenset({"reference"})

    def check(self, setting: Setting) -> None:
        """Accepts every run. Raise ValueError for one that does not fit."""

    def trained_steps(self, levels: Tensor, generator: Generator) -> tuple[int, ...]:
        return (0, len(levels) - 1)  # the state to learn at, and the step to the finished sample

    def replay(
        self,
        group: RolloutGroup,
        advantages: Advantages,
        *,
        num_references: int,
        generator: Generator,
        states_per_forward: int | None = None,
    ) -> list[ReplayPoint]:
        total = len(group.latents)
        return [
            ReplayPoint(
                latents=group.latents[part, 0],
                sigma=group.sigmas[0].expand(len(part)),
                context=(group.next_latents[part, -1], advantages.values[part, 0].clamp(min=0)),
                weight=len(part) / total,  # the weights of a group's points sum to 1
            )
            for part in torch.arange(total).split(states_per_forward or total)
        ]

    def loss(self, point: ReplayPoint, velocities: Velocities) -> LossOutput:
        clean, gain = point.context
        predicted = point.latents - point.sigma[:, None, None] * velocities.policy
        error = (predicted - clean).square().mean(dim=(1, 2))
        drift = (velocities.policy - velocities.of("reference")).square().mean()
        return LossOutput(
            loss=(gain * error).mean() + self.pull * drift,
            metrics={"best_of/error": error.detach().mean()},
        )


OVERRIDES = (
    # A value in each seam: group credit, and a little noise on every step but the last.
    "algorithm={credit: {kind: group, normalise: group}, step_noise: {kind: constant, level: 0.3}, "
    "objective: {kind: own_method:BestOf, pull: 0.05}}",
    "actors.runtime=inline",
    "train.updates=2",
    "train.groups_per_update=2",
    "data.num_train=16",
)

if __name__ == "__main__":
    train(load_config(preset="tiny-rc-grpo", overrides=OVERRIDES), Path("runs/own_method"))
