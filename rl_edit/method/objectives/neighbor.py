"""The softmax surrogate over neighbouring trajectories: a policy ratio for deterministic rollouts.

Neighbor GRPO (arXiv 2511.16955, Eq. 8-9). With a masked metric and a reference candidate it is
RC-GRPO-Editing (arXiv 2604.09386, Eq. 13-15 and 5). The train solver steps an anchor candidate once
from its stored state, under the current weights. That single model call is the only gradient path.
A softmax over the distances to all candidates of the group is then read as a categorical policy.
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
"""Bound of the log ratio: exp(10) is far beyond any clip, and its gradient does not overflow."""


@dataclass(frozen=True, kw_only=True)
class AnchorContext:
    """Inputs of the loss at one trained step, besides the new velocities.

    Attributes:
        candidates: states of the full group after the step.
        old_log_policy: log pi_old, from the stored velocities.
    """

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
    """Computes squared distances by region.

    ``d(i, a)_r = sum_n row_r(n) mean_c (anchor_a - candidate_i)^2``; rows of ``regions`` sum to 1.
    """
    # A mean over channels, not a sum: the published clip of 1e-4 needs distances of that order.
    per_token = (anchors[:, None] - candidates[None]).square().mean(dim=-1)
    return torch.einsum("agl,rl->agr", per_token, regions)


class NeighborSurrogate(BaseModel):
    """Clipped ratio of softmax surrogate policies (Neighbor GRPO, Eq. 8-9).

    ``log pi(i) = log_softmax_i(-d(candidate_i, anchor) / temperature)``
    ``rho_i = pi_new(i) / pi_old(i)``
    ``J = mean_i min(rho_i A_i, clip(rho_i) A_i)``

    The mean is over the full group, the reference included, and over anchors, trained steps and
    regions. The *same* one-step train solver forms the old anchor from the stored velocity,
    whatever solver made the rollout; so with unchanged weights every ratio is exactly 1. There the
    gradient with respect to an anchor's new state is
    ``(2 / (G * temperature)) * rows * sum_i A_i x_i / C``: the temperature then only scales it.

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
            noise, so what a group disagrees about there is its noise, not its images; the papers
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
        """Names no other weights: the old policy comes from stored velocities."""
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
        """Draws the steps to store and train, ascending."""
        # A rollout shorter than the skips still trains one step; check refuses it in a run.
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
        """Draws anchors and returns their stored states at every trained step.

        Anchors come from the perturbed candidates only.

        Args:
            num_references: leading candidates that are no anchors.
            generator: of the anchors' draw.
            states_per_forward: largest number of states of a point; None is a point per step.
        """
        # The reference lies in the middle of the group, at half the squared distance of two
        # perturbed candidates, so as an anchor it would favour no candidate like the others do.
        perturbed = torch.arange(num_references, group.latents.shape[0])
        chosen = (
            perturbed[torch.randperm(len(perturbed), generator=generator)[: self.num_anchors]]
            .sort()
            .values
        )
        num_steps = group.latents.shape[1]
        # One point per step and part; a part has as many states as a forward may have.
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
        """Makes the replay point of some anchors at one step, with their old log policy."""
        state, candidates = group.latents[anchors, step], group.next_latents[:, step]
        sigma, sigma_next = group.sigmas[step], group.sigmas_next[step]
        # The one-step solver of the loss, not the rollout's: only then is the old ratio exactly 1.
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
        """Computes -J at one trained step, mean over anchors.

        Gradient flows only through the policy's velocity.
        """
        context: AnchorContext = point.context
        # x_a(theta): one Euler step of the anchor under the current weights.
        anchors = flow.euler(
            point.latents, velocities.policy, sigma=context.sigma, sigma_next=context.sigma_next
        )
        log_policy = self._log_policy(anchors, context.candidates, context.advantages.regions)
        ratio = (log_policy - context.old_log_policy).clamp(max=LARGEST_LOG_RATIO).exp()
        gain = context.advantages.values
        # min(rho A, clip(rho) A), as in PPO; shape [anchor, group, region].
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        # Mean over anchors and over the full group, reference included.
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
        """Computes ``log_softmax_i(-d(i, a) / temperature)``."""
        # Over the group (dim 1), the reference included; a policy of its own for each region.
        return (-region_distances(anchors, candidates, regions) / self.temperature).log_softmax(
            dim=1
        )
