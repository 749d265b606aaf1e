"""The softmax surrogate over neighbouring trajectories: a policy ratio for deterministic rollouts.

Neighbor GRPO (arXiv 2511.16955, Eq. 8-9) and, with a masked metric and a reference candidate, RC-GRPO-Editing
(arXiv 2604.09386, Eq. 13-15 and 5). An anchor candidate is stepped once by the train solver from its stored state under
the current weights; that single model call is the only gradient path. Which candidate it then lies closest to is read as
a categorical policy over the group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from rl_edit import flow
from rl_edit.objectives.replay import ReplayPoint
from rl_edit.types import Advantages, LossOutput, RolloutGroup


@dataclass(frozen=True, kw_only=True)
class AnchorContext:
    """What the loss needs at one trained step besides the new velocities."""

    sigma: Float[Tensor, ""]
    sigma_next: Float[Tensor, ""]
    candidates: Float[Tensor, "group token channel"]
    old_log_policy: Float[Tensor, "anchor group region"]
    advantages: Advantages


def region_distances(
    anchors: Float[Tensor, "anchor token channel"],
    candidates: Float[Tensor, "group token channel"],
    regions: Float[Tensor, "region token"],
) -> Float[Tensor, "anchor group region"]:
    """Squared distance, mean over channels, pooled over tokens by each region's weights (rows sum to 1)."""
    per_token = (anchors[:, None] - candidates[None]).square().mean(dim=-1)
    return torch.einsum("agl,rl->agr", per_token, regions)


class NeighborSurrogate(BaseModel):
    """Clipped ratio of softmax surrogate policies, averaged over anchors, trained steps and regions.

    ``log pi(i) = log_softmax_i(-d(candidate_i, anchor) / temperature)``; ``rho_i = pi_new(i) / pi_old(i)``;
    ``J = mean_i min(rho_i A_i, clip(rho_i) A_i)`` over the whole group, the reference included. The old anchor is formed by
    the *same* one-step train solver from the stored velocity, whatever solver made the rollout; so with unchanged weights
    every ratio is exactly 1. There the gradient with respect to an anchor's new state is
    ``(2 / (G * temperature)) * rows * sum_i A_i x_i / C``: the temperature then only scales it.

    Attributes:
        num_anchors: anchors drawn per group and pass, without replacement, from the perturbed candidates. 4 of 12 in
            Neighbor GRPO ("2 already competitive").
        clip: half-width of the trust region on the ratio. The published 1e-4 belongs to a mean-reduced distance of
            order 1e-4; on the built-in editor 0.2 with temperature 0.5 clips a comparable share.
        temperature: of the softmax; the papers leave it implicit (1).
        num_steps: trained steps per group, drawn at random from the eligible ones; None trains them all. Neighbor GRPO
            trains 4 of 8.
        skip_first, skip_last: steps at either end that are never trained. Early states are mostly noise, so what a
            group disagrees about there is its noise, not its pictures; the papers skip only the last step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["neighbor"] = "neighbor"
    num_anchors: int = Field(default=4, ge=1)
    clip: float = Field(default=0.2, gt=0)
    temperature: float = Field(default=0.5, gt=0)
    num_steps: int | None = Field(default=None, ge=1)
    skip_first: int = Field(default=0, ge=0)
    skip_last: int = Field(default=1, ge=0)

    def trained_steps(self, num_rollout_steps: int, generator: torch.Generator) -> tuple[int, ...]:
        """Indices of the steps to keep and train, ascending."""
        eligible = range(self.skip_first, max(num_rollout_steps - self.skip_last, self.skip_first + 1))
        if self.num_steps is None or self.num_steps >= len(eligible):
            return tuple(eligible)
        return tuple(sorted(eligible[i] for i in torch.randperm(len(eligible), generator=generator)[: self.num_steps].tolist()))

    def replay(self, group: RolloutGroup, advantages: Advantages, *, num_references: int, generator: torch.Generator) -> list[ReplayPoint]:
        """One point per kept step: the anchors' stored states. Anchors come from the perturbed candidates only."""
        perturbed = torch.arange(num_references, group.latents.shape[0])
        chosen = perturbed[torch.randperm(len(perturbed), generator=generator)[: self.num_anchors]].sort().values
        points = []
        for step in range(group.latents.shape[1]):
            state = group.latents[chosen, step]
            sigma, sigma_next = group.sigmas[step], group.sigmas_next[step]
            context = AnchorContext(
                sigma=sigma,
                sigma_next=sigma_next,
                candidates=group.next_latents[:, step],
                old_log_policy=self._log_policy(
                    flow.euler(state, group.velocities[chosen, step], sigma=sigma, sigma_next=sigma_next),
                    group.next_latents[:, step],
                    advantages.regions,
                ),
                advantages=advantages,
            )
            points.append(ReplayPoint(latents=state, sigma=sigma.expand(len(chosen)), context=context))
        return points

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the base editor's velocities (adapter off) besides the current ones."""
        return False

    def loss(
        self,
        point: ReplayPoint,
        velocity: Float[Tensor, "batch token channel"],
        reference: Float[Tensor, "batch token channel"] | None = None,
    ) -> LossOutput:
        """Negated objective at one trained step, mean over anchors; gradient only through ``velocity``."""
        context: AnchorContext = point.context
        anchors = flow.euler(point.latents, velocity, sigma=context.sigma, sigma_next=context.sigma_next)
        log_policy = self._log_policy(anchors, context.candidates, context.advantages.regions)
        ratio = (log_policy - context.old_log_policy).exp()
        gain = context.advantages.values
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        per_region = torch.minimum(ratio * gain, clipped * gain).mean(dim=(0, 1))
        loss = -(per_region * context.advantages.weights).sum()
        with torch.no_grad():
            metrics = {
                "ratio/mean": ratio.mean(),
                "ratio/min": ratio.min(),
                "ratio/max": ratio.max(),
                "ratio/max_deviation": (ratio - 1).abs().max(),
                "clip/share": ((ratio * gain) > (clipped * gain)).float().mean(),
                "policy/largest": log_policy.exp().amax(dim=1).mean(),
            }
        return LossOutput(loss=loss, metrics=metrics)

    def _log_policy(
        self,
        anchors: Float[Tensor, "anchor token channel"],
        candidates: Float[Tensor, "group token channel"],
        regions: Float[Tensor, "region token"],
    ) -> Float[Tensor, "anchor group region"]:
        return (-region_distances(anchors, candidates, regions) / self.temperature).log_softmax(dim=1)
