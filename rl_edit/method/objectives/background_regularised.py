"""A wrapper that holds the background: one more term outside the edit region, on the surrogate's
own forwards.

Region-decoupled noise removes the background's nuisance spread and with it the background's
learning signal: what a weight change does outside the mask is compared by no group. This term looks
there directly.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rl_edit.method import flow
from rl_edit.method.objectives.neighbor import NeighborSurrogate
from rl_edit.method.objectives.protocol import ObjectiveProtocol, PlainObjective
from rl_edit.method.objectives.replay import Policy, ReplayPoint, Velocities
from rl_edit.method.objectives.wrapper import WrappedContext, Wrapper
from rl_edit.types import LossOutput


class BackgroundRegularised(Wrapper):
    """Adds ``weight * mean over tokens outside the mask of error^2`` to another objective's loss;
    tokens inside are untouched.

    Weight 0 is the wrapped objective.

    Attributes:
        inner: any plain objective.
        target: "reference" holds the background at what the base editor does: error is the
            velocity's distance to the base's (adapter off) at the same states, a KL to the
            reference outside the mask only; it costs one forward without gradient per point.
            "source" pulls it towards the source picture: error is the clean prediction's distance
            to the source latents (the keep-region term of CoCoEdit, arXiv 2602.14068, without its
            hinge), at no extra forward; on an editor whose background is already good it trades
            edits away for copying.
        weight: of the term; the surrogate's own gradient is small, so the source needs far less
            than the reference.
    """

    kind: Literal["background_regularised"] = "background_regularised"
    inner: PlainObjective = NeighborSurrogate()
    target: Literal["reference", "source"] = "source"
    weight: float = Field(default=0.1, ge=0)

    @property
    def wrapped(self) -> ObjectiveProtocol:
        return self.inner

    @property
    def policies(self) -> frozenset[Policy]:
        return self.inner.policies | ({"reference"} if self.target == "reference" else frozenset())

    def loss(self, point: ReplayPoint, velocities: Velocities) -> LossOutput:
        """The wrapped loss and the background's drift at the same states."""
        context: WrappedContext = point.context
        inner = self.inner.loss(context.inner, velocities)
        if self.target == "reference":
            distance = velocities.policy - velocities.of("reference")
        else:
            distance = (
                flow.clean_from_velocity(
                    point.latents, velocities.policy, point.sigma[:, None, None]
                )
                - context.source
            )
        error = distance.square().mean(dim=(0, 2))
        background = (~context.edited).flatten().to(error.dtype)
        drift = (error * background).sum() / background.sum().clamp(min=1)
        return LossOutput(
            loss=inner.loss + self.weight * drift,
            metrics={**inner.metrics, "background/anchor_error": drift.detach()},
        )
