"""The contract of an objective, and the plain objectives that wrappers may add a term to."""

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
    """Contract of an objective.

    A class of yours that fulfils it can be named as ``kind: module:Class``.
    """

    @property
    def kind(self) -> str: ...

    @property
    def policies(self) -> frozenset[Policy]:
        """Names the weights, besides the current ones, whose velocities the loss reads.

        The learner evaluates exactly those.
        """

    def check(self, setting: Setting) -> None:
        """Raises ValueError, with the remedy, for a run this objective does not fit."""

    def trained_steps(
        self, levels: Float[Tensor, " step"], generator: torch.Generator
    ) -> tuple[int, ...]:
        """Chooses the rollout steps to store, ascending, given the SDE level of each."""

    def replay(
        self,
        group: RolloutGroup,
        advantages: Advantages,
        *,
        num_references: int,
        generator: torch.Generator,
        states_per_forward: int | None = None,
    ) -> list[ReplayPoint]:
        """Returns the states of a group to evaluate again.

        A point has at most ``states_per_forward`` states; None is no limit. The weights of a
        group's points sum to 1.
        """

    def loss(self, point: ReplayPoint, velocities: Velocities) -> LossOutput:
        """Computes the loss of one point; gradient only through the policy's velocity."""


# A wrapper is none of them: wrappers do not nest.
PlainObjective = Annotated[
    NeighborSurrogate | TransitionSurrogate | ForwardProcess,
    Field(discriminator="kind"),
    Plugin("algorithm.objective.inner", ObjectiveProtocol, default_kind="neighbor"),
]
