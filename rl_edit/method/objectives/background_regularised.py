"""A wrapper that adds a loss outside the edit region, on the forwards of the wrapped objective.

Region-decoupled noise makes the candidates agree outside the mask. It removes the background's
nuisance spread, and with it the background's learning signal: no group compares what a weight
change does there. This term measures it directly.
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
    """Wrapped loss plus a squared error outside the mask.

    ``L = inner + weight * mean over tokens outside the mask of error^2``. Tokens inside are
    untouched. Weight 0 is the wrapped objective.

    Attributes:
        inner: any plain objective.
        target: "reference" holds the background at what the base editor does: error is the
            velocity's distance to the base's (adapter off) at the same states, a KL to the
            reference outside the mask only; it costs one forward without gradient per point.
            "source" pulls it towards the source image: error is the clean prediction's distance to
            the source latents (the keep-region term of CoCoEdit, arXiv 2602.14068, without its
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
        # Only "reference" pays for another forward.
        return self.inner.policies | ({"reference"} if self.target == "reference" else frozenset())

    def loss(self, point: ReplayPoint, velocities: Velocities) -> LossOutput:
        """Computes the wrapped loss and the background's error at the same states."""
        context: WrappedContext = point.context
        inner = self.inner.loss(context.inner, velocities)
        if self.target == "reference":
            # v_theta - v_base: in velocities, because both are read at the same states.
            distance = velocities.policy - velocities.of("reference")
        else:
            # (x - sigma v_theta) - source: CoCoEdit's keep term without its hinge.
            distance = (
                flow.clean_from_velocity(
                    point.latents, velocities.policy, point.sigma[:, None, None]
                )
                - context.source
            )
        # Mean over candidates and channels, so one error for each token.
        error = distance.square().mean(dim=(0, 2))
        background = (~context.edited).flatten().to(error.dtype)
        # A mask over the whole image leaves no background; the clamp makes its term 0, not NaN.
        drift = (error * background).sum() / background.sum().clamp(min=1)
        # The metric keeps the name that files of earlier runs have.
        return LossOutput(
            loss=inner.loss + self.weight * drift,
            metrics={**inner.metrics, "background/anchor_error": drift.detach()},
        )
