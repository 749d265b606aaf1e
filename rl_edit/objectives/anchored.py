"""A wrapper that holds the background: the same forwards, one more term outside the edit region.

Region-decoupled noise removes the background's nuisance spread and with it the background's learning signal; this term
gives it a direct one, at no extra model evaluation.
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
    """Adds ``weight * mean_outside (clean_prediction - source)^2`` to another objective's loss.

    The clean prediction is read from the anchor forwards that are computed anyway (the keep-region term of CoCoEdit,
    arXiv 2602.14068, in latent space and without its hinge). Tokens of the edit region are untouched. Weight 0 is the
    wrapped objective.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["background_anchored"] = "background_anchored"
    inner: NeighborSurrogate = NeighborSurrogate()
    weight: float = Field(default=0.1, ge=0)

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

    def loss(self, point: ReplayPoint, velocity: Float[Tensor, "batch token channel"]) -> LossOutput:
        context: SourceContext = point.context
        inner = self.inner.loss(context.inner, velocity)
        clean = flow.clean_from_velocity(point.latents, velocity, point.sigma[:, None, None])
        error = (clean - context.source).square().mean(dim=(0, 2))
        background = context.background.to(error.dtype)
        drift = (error * background).sum() / background.sum().clamp(min=1)
        return LossOutput(loss=inner.loss + self.weight * drift, metrics={**inner.metrics, "background/latent_drift": drift.detach()})
