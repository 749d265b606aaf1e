"""The objectives that stand by themselves; wrappers add a term to one of them."""

from __future__ import annotations

from typing import Annotated, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from rl_edit.method.objectives.forward_process import ForwardProcess
from rl_edit.method.objectives.neighbor import NeighborSurrogate
from rl_edit.method.objectives.replay import Policy, ReplayPoint, Setting, Velocities
from rl_edit.method.objectives.transition import TransitionSurrogate
from rl_edit.method.plugins import Plugin
from rl_edit.types import Advantages, LossOutput, RolloutGroup


@runtime_checkable
class ObjectiveProtocol(Protocol):
    """What an objective does. A class of yours that does it, named ``module:Class`` as ``kind``, is
    one."""

    @property
    def kind(self) -> str: ...

    @property
    def policies(self) -> frozenset[Policy]:
        """Weights besides the current ones whose velocities the loss reads; the learner evaluates
        exactly those."""

    def check(self, setting: Setting) -> None:
        """Raises ValueError, with the remedy, for a run this objective does not fit."""

    def trained_steps(
        self, levels: Float[Tensor, " step"], generator: torch.Generator
    ) -> tuple[int, ...]:
        """Rollout steps to keep, ascending, given the SDE level of each."""

    def replay(
        self,
        group: RolloutGroup,
        advantages: Advantages,
        *,
        num_references: int,
        generator: torch.Generator,
        states_per_forward: int | None = None,
    ) -> list[ReplayPoint]:
        """Where to evaluate a group again, at most ``states_per_forward`` states a point."""

    def loss(self, point: ReplayPoint, velocities: Velocities) -> LossOutput:
        """The loss of one point; gradient only through the policy's velocity."""


PlainObjective = Annotated[
    NeighborSurrogate | TransitionSurrogate | ForwardProcess,
    Field(discriminator="kind"),
    Plugin("algorithm.objective.inner", ObjectiveProtocol, default_kind="neighbor"),
]
