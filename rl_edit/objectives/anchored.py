"""A wrapper that holds the background: one more term outside the edit region, on the surrogate's own forwards.

Region-decoupled noise removes the background's nuisance spread and with it the background's learning signal: what a weight
change does outside the mask is compared by no group. This term looks there directly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from rl_edit import flow
from rl_edit.objectives.neighbor import NeighborSurrogate
from rl_edit.objectives.replay import ReplayPoint
from rl_edit.types import Advantages, LossOutput, RolloutGroup


@dataclass(frozen=True, kw_only=True)
class SourceContext:
    """The wrapped objective's context and the clean source the background should show."""

    inner: Any
    source: Float[Tensor, "token channel"]
    background: Bool[Tensor, " token"]


class BackgroundAnchored(BaseModel):
    """Adds ``weight * mean over tokens outside the mask of error^2`` to another objective's loss; tokens inside are untouched.

    Weight 0 is the wrapped objective.

    Attributes:
        target: "reference" holds the background at what the base editor does: error is the velocity's distance to the
            base's (adapter off) at the same states, a KL to the reference outside the mask only; it costs one forward
            without gradient per anchor. "source" pulls it towards the source picture: error is the clean prediction's
            distance to the source latents (the keep-region term of CoCoEdit, arXiv 2602.14068, without its hinge), at no
            extra forward; on an editor whose background is already good it trades edits away for copying.
        weight: of the term; the surrogate's own gradient is small, so the source needs far less than the reference.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["background_anchored"] = "background_anchored"
    inner: NeighborSurrogate = NeighborSurrogate()
    target: Literal["reference", "source"] = "source"
    weight: float = Field(default=0.1, ge=0)

    @property
    def needs_reference(self) -> bool:
        return self.target == "reference"

    @property
    def num_anchors(self) -> int:
        return self.inner.num_anchors

    def trained_steps(self, num_rollout_steps: int, generator: torch.Generator) -> tuple[int, ...]:
        return self.inner.trained_steps(num_rollout_steps, generator)

    def replay(self, group: RolloutGroup, advantages: Advantages, *, num_references: int, generator: torch.Generator) -> list[ReplayPoint]:
        background = ~group.candidates.token_mask
        return [
            ReplayPoint(
                latents=point.latents,
                sigma=point.sigma,
                context=SourceContext(inner=point, source=group.conditioning.source_latents, background=background),
            )
            for point in self.inner.replay(group, advantages, num_references=num_references, generator=generator)
        ]

    def loss(
        self,
        point: ReplayPoint,
        velocity: Float[Tensor, "batch token channel"],
        reference: Float[Tensor, "batch token channel"] | None = None,
    ) -> LossOutput:
        context: SourceContext = point.context
        inner = self.inner.loss(context.inner, velocity)
        if self.target == "reference":
            assert reference is not None, "the learner evaluates the reference when an objective needs it"
            distance = velocity - reference
        else:
            distance = flow.clean_from_velocity(point.latents, velocity, point.sigma[:, None, None]) - context.source
        error = distance.square().mean(dim=(0, 2))
        background = context.background.to(error.dtype)
        drift = (error * background).sum() / background.sum().clamp(min=1)
        return LossOutput(loss=inner.loss + self.weight * drift, metrics={**inner.metrics, "background/anchor_error": drift.detach()})
