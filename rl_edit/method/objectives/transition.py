"""The clipped ratio of stochastic transitions: each sampling step is a Gaussian policy.

Flow-GRPO (arXiv 2505.05470). With a window of stochastic steps it is Flow-GRPO-Fast and MixGRPO
(arXiv 2507.21802); with several regions, SpatialFlow-GRPO (arXiv 2606.26872).
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
from rl_edit.types import SDE, Advantages, LossOutput, RolloutGroup


@dataclass(frozen=True, kw_only=True)
class Step:
    """One stochastic step of the grid."""

    sigma: float
    sigma_next: float
    level: float
    sde: SDE

    def moments(self, latents: Tensor, velocity: Tensor) -> tuple[Tensor, float]:
        """Computes mean and deviation of the next state (``flow.moments``)."""
        return flow.moments(
            latents,
            velocity,
            sigma=self.sigma,
            sigma_next=self.sigma_next,
            level=self.level,
            sde=self.sde,
        )


@dataclass(frozen=True, kw_only=True)
class TransitionContext:
    """Inputs of the loss at one stochastic step of some candidates.

    Attributes:
        following: states after the step.
        old_mean: mean of the step under the behaviour weights, from the stored velocities.
        gain: advantages of these candidates by region.
    """

    step: Step
    following: Float[Tensor, "batch token channel"]
    old_mean: Float[Tensor, "batch token channel"]
    gain: Float[Tensor, "batch region"]
    advantages: Advantages


class TransitionSurrogate(BaseModel):
    """Clipped ratio of Gaussian step policies (Flow-GRPO, arXiv 2505.05470).

    ``rho_ir = exp(sum_n M_r[n] (log p_new - log p_old)[i, n])``
    ``J = sum_r w_r mean_i min(rho_ir A_ir, clip(rho_ir) A_ir)``

    The mean of J is also over the stochastic steps of the rollout. Log-densities are averaged over
    channels and pooled over tokens by the credit's rows M. With one uniform row this is Flow-GRPO's
    ratio: the exponential of a **mean** log-density, the D-th root of the likelihood ratio, which
    is why its clip is 1e-4 and not 0.2. Old densities come from the stored velocities by the same
    formula, so with unchanged weights every ratio is exactly 1.

    Attributes:
        clip: half-width of the trust region; 1e-4 in Flow-GRPO, 1e-5 in its fast form ("larger may
            crash").
        clip_high: its upper half-width where it differs (EditScore uses 1e-4 and 5e-4); None is
            ``clip``.
        clip_by_area: scales the clip of a region of m of N tokens by sqrt(N / m). It averages fewer
            log-densities, so its ratio is noisier by that factor, and small regions would always
            clip. Without effect for whole-image credit.
        num_steps: stochastic steps trained per group, drawn at random; None trains them all.
            EditScore trains 60 %.
        kl_weight: of the divergence from the base editor at the trained states; 0.04 or 0.01 for
            SD3.5 in Flow-GRPO, 0 for editors.
        kl: "gaussian": the exact ``|mu - mu_ref|^2 / 2 deviation^2`` of the step, mean-reduced;
            "released": with ``s^2`` in place of ``deviation^2 = -s^2 dt``, as published code has it
            (smaller by ``-dt``; the same as "gaussian" under "cps", whose deviation has no dt);
            "velocity": the plain ``|v - v_ref|^2``.
        guard: ratio normalisation of GRPO-Guard (arXiv 2510.22319):
            ``rho = exp((d log p + |d mu|^2 / 2 k^2) k)`` with the step's deviation k and Gaussian
            densities under every law; its mean is not biased below 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: Literal["transition"] = "transition"
    clip: float = Field(default=1e-4, gt=0)
    clip_high: float | None = Field(default=None, gt=0)
    clip_by_area: bool = True
    num_steps: int | None = Field(default=None, ge=1)
    kl_weight: float = Field(default=0.0, ge=0)
    kl: Literal["gaussian", "released", "velocity"] = "gaussian"
    guard: bool = False

    @property
    def policies(self) -> frozenset[Policy]:
        return frozenset({"reference"}) if self.kl_weight > 0 else frozenset()

    def check(self, setting: Setting) -> None:
        if setting.multistep:
            raise ValueError(
                "needs the density of every trained step, which a multistep rollout solver does "
                "not have: use rollout.solver euler."
            )
        if not setting.stochastic:
            raise ValueError(
                "trains stochastic steps, and algorithm.step_noise makes none: use step_noise "
                "{kind: constant} or {kind: window}, "
                "or the objective neighbor."
            )

    def trained_steps(
        self, levels: Float[Tensor, " step"], generator: torch.Generator
    ) -> tuple[int, ...]:
        stochastic = levels.nonzero().flatten().tolist()
        # A deterministic step has no density, so only stochastic ones can be trained.
        return tuple(stochastic[i] for i in draw(range(len(stochastic)), self.num_steps, generator))

    def replay(
        self,
        group: RolloutGroup,
        advantages: Advantages,
        *,
        num_references: int,
        generator: torch.Generator,
        states_per_forward: int | None = None,
    ) -> list[ReplayPoint]:
        """Returns every candidate's states at every stored stochastic step."""
        total, num_steps = group.latents.shape[:2]
        return [
            self._point(group, advantages, step, part, weight=len(part) / total / num_steps)
            for step in range(num_steps)
            for part in parts(torch.arange(total), states_per_forward)
        ]

    def _point(
        self,
        group: RolloutGroup,
        advantages: Advantages,
        step: int,
        chosen: Tensor,
        *,
        weight: float,
    ) -> ReplayPoint:
        """Makes the replay point of some candidates at one step, with the old mean."""
        state = group.latents[chosen, step]
        grid = Step(
            sigma=float(group.sigmas[step]),
            sigma_next=float(group.sigmas_next[step]),
            level=float(group.step_noise[step]),
            sde=group.sde,
        )
        context = TransitionContext(
            step=grid,
            following=group.next_latents[chosen, step],
            # By the formula of the loss: with unchanged weights the two means are the same bits.
            old_mean=grid.moments(state, group.velocities[chosen, step])[0],
            gain=advantages.values[chosen],
            advantages=advantages,
        )
        return ReplayPoint(
            latents=state,
            sigma=group.sigmas[step].expand(len(chosen)),
            context=context,
            weight=weight,
        )

    def loss(self, point: ReplayPoint, velocities: Velocities) -> LossOutput:
        """Computes -J, plus the pull to the base, at one stochastic step, mean over candidates."""
        context: TransitionContext = point.context
        mean, deviation = context.step.moments(point.latents, velocities.policy)
        ratio = self._ratio(context, mean, deviation)
        gain = context.gain
        clipped = self._clipped(ratio, context.advantages.regions)
        # min(rho A, clip(rho) A) of shape [candidate, region]; the mean is over candidates.
        per_region = torch.minimum(ratio * gain, clipped * gain).mean(dim=0)
        loss = -(per_region * context.advantages.weights).sum()
        metrics = ratio_metrics(ratio, gain, clipped)
        if self.kl_weight > 0:
            # With its gradient, unlike the ratio's old density.
            divergence = self._divergence(point, velocities, mean, deviation)
            loss = loss + self.kl_weight * divergence
            metrics["kl/reference"] = divergence.detach()
        return LossOutput(loss=loss, metrics=metrics)

    def _clipped(self, ratio: Tensor, rows: Tensor) -> Float[Tensor, "batch region"]:
        """Clips ratios, wider by ``sqrt(N / m)`` for regions of m of N tokens."""
        # 1 / sum of squared weights is the number m of tokens that a row effectively averages.
        width = (
            (rows.shape[1] * rows.square().sum(dim=1)).sqrt()
            if self.clip_by_area
            else torch.ones_like(rows[:, 0])
        )
        return ratio.clamp(1 - self.clip * width, 1 + (self.clip_high or self.clip) * width)

    def _ratio(
        self, context: TransitionContext, mean: Tensor, deviation: float
    ) -> Float[Tensor, "batch region"]:
        """Computes ``rho = exp(sum_n M_r[n] (log p_new - log p_old)[n])``."""
        # The bias that the guard takes away is that of the Gaussian density. "cps" leaves out its
        # scale and normaliser, so the guard computes the density of "flow" instead.
        sde = "flow" if self.guard else context.step.sde

        # Both densities at the state that was reached, with the deviation of the step: only the
        # means depend on the weights.
        def log_density(of: Tensor) -> Tensor:
            return flow.log_density(context.following, of, deviation, sde=sde)

        change = log_density(mean) - log_density(context.old_mean)
        if self.guard:
            # GRPO-Guard: the expectation of d log p is -|d mu|^2 / 2 k^2; added, it is 0.
            change = (
                change + (mean - context.old_mean).square().mean(dim=-1) / (2 * deviation**2)
            ) * deviation
        return torch.einsum("bl,rl->br", change, context.advantages.regions).exp()

    def _divergence(
        self, point: ReplayPoint, velocities: Velocities, mean: Tensor, deviation: float
    ) -> Float[Tensor, ""]:
        """Computes the pull to the base editor at one step, by the law that ``kl`` names."""
        reference = velocities.of("reference")
        # |v - v_ref|^2 needs no law of the step.
        if self.kl == "velocity":
            return (velocities.policy - reference).square().mean()
        step: Step = point.context.step
        base_mean, _ = step.moments(point.latents, reference)
        variance = deviation**2
        # deviation^2 = -s^2 dt under "flow" and "dance", and published code divides by s^2. Under
        # "cps" the deviation k has no dt in it, and published code divides by k^2 as it is.
        if self.kl == "released" and step.sde != "cps":
            variance /= step.sigma - step.sigma_next
        # |mu - mu_ref|^2 / 2 k^2, mean over dimensions.
        return (mean - base_mean).square().mean() / (2 * variance)
