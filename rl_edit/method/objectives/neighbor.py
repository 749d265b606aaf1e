"""The softmax surrogate over neighbouring trajectories: a policy ratio for deterministic rollouts.

Neighbor GRPO (arXiv 2511.16955, Eq. 8-9) and, with a masked metric and a reference candidate,
RC-GRPO-Editing (arXiv 2604.09386, Eq. 13-15 and 5). An anchor candidate is stepped once by the
train solver from its stored state under the current weights; that single model call is the only
gradient path. Which candidate it then lies closest to is read as a categorical policy over the
group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from rl_edit.method import flow
from rl_edit.method.objectives.replay import (
    Policy,
    ReplayPoint,
    Setting,
    Velocities,
    draw,
    parts,
    ratio_metrics,
)
from rl_edit.types import Advantages, LossOutput, RolloutGroup

LARGEST_LOG_RATIO = 10.0
"""Ratios stop at exp(10): far beyond any clip, and short of an overflow, whose gradient would be no
number."""


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
    """Squared distance, mean over channels, pooled over tokens by each region's weights (rows sum
    to 1)."""
    per_token = (anchors[:, None] - candidates[None]).square().mean(dim=-1)
    return torch.einsum("agl,rl->agr", per_token, regions)


class NeighborSurrogate(BaseModel):
    """Clipped ratio of softmax surrogate policies, averaged over anchors, trained steps and
    regions.

    ``log pi(i) = log_softmax_i(-d(candidate_i, anchor) / temperature)``; ``rho_i = pi_new(i) /
    pi_old(i)``; ``J = mean_i min(rho_i A_i, clip(rho_i) A_i)`` over the whole group, the reference
    included. The old anchor is formed by the *same* one-step train solver from the stored velocity,
    whatever solver made the rollout; so with unchanged weights every ratio is exactly 1. There the
    gradient with respect to an anchor's new state is ``(2 / (G * temperature)) * rows * sum_i A_i
    x_i / C``: the temperature then only scales it.

    Attributes:
        num_anchors: anchors drawn per group and pass, without replacement, from the perturbed
            candidates. 4 of 12 in Neighbor GRPO ("2 already competitive").
        clip: half-width of the trust region on the ratio. The published 1e-4 belongs to a
            mean-reduced distance of order 1e-4; on the built-in editor 0.2 with temperature 0.5
            clips a comparable share.
        temperature: of the softmax; the papers leave it implicit (1).
        num_steps: trained steps per group, drawn at random from the eligible ones; None trains them
            all. Neighbor GRPO trains 4 of 8.
        skip_first, skip_last: steps at either end that are never trained. Early states are mostly
            noise, so what a group disagrees about there is its noise, not its pictures; the papers
            skip only the last step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: Literal["neighbor"] = "neighbor"
    num_anchors: int = Field(default=4, ge=1)
    clip: float = Field(default=0.2, gt=0)
    temperature: float = Field(default=0.5, gt=0)
    num_steps: int | None = Field(default=None, ge=1)
    skip_first: int = Field(default=0, ge=0)
    skip_last: int = Field(default=1, ge=0)

    @property
    def policies(self) -> frozenset[Policy]:
        """Weights besides the current ones whose velocities the loss reads."""
        return frozenset()

    def check(self, setting: Setting) -> None:
        """Raises ValueError for a run this objective does not fit."""
        perturbed = setting.group_size - setting.num_references
        if self.num_anchors > perturbed:
            reference = " (one is the unperturbed reference)" if setting.num_references else ""
            raise ValueError(
                f"num_anchors {self.num_anchors} exceeds the {perturbed} perturbed candidates of "
                "rollout.group_size "
                f"{setting.group_size}{reference}: lower the anchors or raise the group."
            )
        if self.skip_first + self.skip_last >= setting.num_steps:
            raise ValueError(
                f"skips {self.skip_first} first and {self.skip_last} last steps of "
                f"rollout.num_steps {setting.num_steps}: none is left to "
                "train. Skip fewer or roll out more steps."
            )
        if setting.stochastic:
            raise ValueError(
                "compares deterministic trajectories, and algorithm.step_noise makes some steps "
                "stochastic: use step_noise "
                "{kind: none}, or the objective transition."
            )

    def trained_steps(
        self, levels: Float[Tensor, " step"], generator: torch.Generator
    ) -> tuple[int, ...]:
        """Indices of the steps to keep and train, ascending, given the SDE level of each rollout
        step."""
        return draw(
            range(self.skip_first, max(len(levels) - self.skip_last, self.skip_first + 1)),
            self.num_steps,
            generator,
        )

    def replay(
        self,
        group: RolloutGroup,
        advantages: Advantages,
        *,
        num_references: int,
        generator: torch.Generator,
        states_per_forward: int | None = None,
    ) -> list[ReplayPoint]:
        """The anchors' stored states at every kept step. Anchors come from the perturbed candidates
        only.

        Args:
            num_references: leading candidates that are no anchors.
            generator: what the anchors are drawn with.
            states_per_forward: most states a point may have; None is a point per step.
        """
        perturbed = torch.arange(num_references, group.latents.shape[0])
        chosen = (
            perturbed[torch.randperm(len(perturbed), generator=generator)[: self.num_anchors]]
            .sort()
            .values
        )
        num_steps = group.latents.shape[1]
        return [
            self._point(group, advantages, step, part, weight=len(part) / len(chosen) / num_steps)
            for step in range(num_steps)
            for part in parts(chosen, states_per_forward)
        ]

    def _point(
        self,
        group: RolloutGroup,
        advantages: Advantages,
        step: int,
        anchors: Tensor,
        *,
        weight: float,
    ) -> ReplayPoint:
        state, candidates = group.latents[anchors, step], group.next_latents[:, step]
        sigma, sigma_next = group.sigmas[step], group.sigmas_next[step]
        old = flow.euler(state, group.velocities[anchors, step], sigma=sigma, sigma_next=sigma_next)
        context = AnchorContext(
            sigma=sigma,
            sigma_next=sigma_next,
            candidates=candidates,
            old_log_policy=self._log_policy(old, candidates, advantages.regions),
            advantages=advantages,
        )
        return ReplayPoint(
            latents=state, sigma=sigma.expand(len(anchors)), context=context, weight=weight
        )

    def loss(self, point: ReplayPoint, velocities: Velocities) -> LossOutput:
        """Negated objective at one trained step, mean over anchors; gradient only through the
        policy's velocity."""
        context: AnchorContext = point.context
        anchors = flow.euler(
            point.latents, velocities.policy, sigma=context.sigma, sigma_next=context.sigma_next
        )
        log_policy = self._log_policy(anchors, context.candidates, context.advantages.regions)
        ratio = (log_policy - context.old_log_policy).clamp(max=LARGEST_LOG_RATIO).exp()
        gain = context.advantages.values
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        per_region = torch.minimum(ratio * gain, clipped * gain).mean(dim=(0, 1))
        loss = -(per_region * context.advantages.weights).sum()
        metrics = {
            **ratio_metrics(ratio, gain, clipped),
            "policy/largest": log_policy.detach().exp().amax(dim=1).mean(),
        }
        return LossOutput(loss=loss, metrics=metrics)

    def _log_policy(
        self,
        anchors: Float[Tensor, "anchor token channel"],
        candidates: Float[Tensor, "group token channel"],
        regions: Float[Tensor, "region token"],
    ) -> Float[Tensor, "anchor group region"]:
        return (-region_distances(anchors, candidates, regions) / self.temperature).log_softmax(
            dim=1
        )
