"""Learning on the forward process: no ratio and no trajectory, only finished samples and what they
were worth.

DiffusionNFT (arXiv 2509.16117). A finished sample is noised again with fresh noise; the policy is
pulled towards it and an implicit negative policy away from it, in the proportion of its reward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from rl_edit.method import flow
from rl_edit.method.objectives.replay import Policy, ReplayPoint, Setting, Velocities, draw, parts
from rl_edit.types import Advantages, LossOutput, RolloutGroup

SMALLEST = 1e-5
"""Least normaliser of the adaptive weight, as released."""


@dataclass(frozen=True, kw_only=True)
class NoisedContext:
    """Noised samples of one level: where they came from, and how good they are.

    Attributes:
        clean: the finished samples.
        optimality: r in [0, 1] per candidate and region.
    """

    clean: Float[Tensor, "batch token channel"]
    optimality: Float[Tensor, "batch region"]
    advantages: Advantages


@dataclass(frozen=True, kw_only=True)
class Implicit:
    """Clean samples that the two implicit policies predict, ``x_t - t v``."""

    positive: Float[Tensor, "batch token channel"]
    negative: Float[Tensor, "batch token channel"]


class ForwardProcess(BaseModel):
    """``L = c mean[ r l+ / beta + (1 - r) l- / beta ] + reference_weight |v - v_ref|^2`` with
    ``v+ = beta v + (1 - beta) v_old`` and ``v- = (1 + beta) v_old - beta v``; ``r = clip(1/2 + A /
    2c, 0, 1)``.

    ``l`` is the squared error of the predicted clean sample, divided by its own absolute error
    without gradient (the adaptive weight). With equal weights the sum over both is ``-2 (2r - 1) t
    e.d + beta t^2 d^2`` up to a constant: advantage-weighted regression plus a pull to the acting
    policy of strength beta; at the acting weights the gradient does not depend on beta. With
    several credit rows the errors are pooled per region and each has its own r. ``v_old`` are the
    acting weights as the update begins, also for groups that older ones made (``train.max_lag``):
    the samples are regressed on, whoever drew them.

    Attributes:
        beta: 1 for single rewards and for editors (CoCoEdit), 0.1 for several rewards.
        cut: c, the largest advantage; 5 throughout.
        reference_weight: of the velocity's distance to the base editor's; 1e-4.
        num_times: noise levels per group, drawn from those of the rollout's grid above 0; None
            draws all but one. The release does so too, but draws anew for each sample; here the
            candidates of a group share their levels.
        adaptive: divide each error by its own size.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: Literal["forward_process"] = "forward_process"
    beta: float = Field(default=1.0, gt=0)
    cut: float = Field(default=5.0, gt=0)
    reference_weight: float = Field(default=1e-4, ge=0)
    num_times: int | None = Field(default=None, ge=1)
    adaptive: bool = True

    @property
    def policies(self) -> frozenset[Policy]:
        return (
            frozenset({"acting", "reference"})
            if self.reference_weight > 0
            else frozenset({"acting"})
        )

    def check(self, setting: Setting) -> None:
        """Any rollout will do, but of a velocity that can be regressed on its samples.

        Raises:
            ValueError: under true guidance, whose velocity is that of no flow.
        """
        if setting.guided:
            raise ValueError(
                "regresses the velocity on finished samples, which a guided velocity does not fit: "
                "set editor.true_cfg to 1."
            )

    def trained_steps(
        self, levels: Float[Tensor, " step"], generator: torch.Generator
    ) -> tuple[int, ...]:
        """The last step alone: it ends in the finished sample."""
        return (len(levels) - 1,)

    def replay(
        self,
        group: RolloutGroup,
        advantages: Advantages,
        *,
        num_references: int,
        generator: torch.Generator,
        states_per_forward: int | None = None,
    ) -> list[ReplayPoint]:
        """Every candidate, noised anew at each drawn level of the grid."""
        clean = group.next_latents[:, -1]
        everyone = torch.arange(len(clean))
        optimality = (0.5 + advantages.values / (2 * self.cut)).clamp(0, 1)
        # Every level above 0 may be drawn; as released, one of them is left out at random.
        levels = range(len(group.schedule) - 1)
        steps = draw(levels, self.num_times or len(levels) - 1, generator)
        points = []
        for step in steps:
            noised = flow.interpolate(
                clean, torch.randn(clean.shape, generator=generator).to(clean), group.schedule[step]
            )
            for part in parts(everyone, states_per_forward):
                points.append(
                    ReplayPoint(
                        latents=noised[part],
                        sigma=group.schedule[step].expand(len(part)),
                        context=NoisedContext(
                            clean=clean[part], optimality=optimality[part], advantages=advantages
                        ),
                        weight=len(part) / len(everyone) / len(steps),
                    )
                )
        return points

    def implicit(self, point: ReplayPoint, velocities: Velocities) -> Implicit:
        """What the implicit positive and negative policies predict at a point."""
        old, new = velocities.of("acting"), velocities.policy
        positive = self.beta * new + (1 - self.beta) * old
        negative = (1 + self.beta) * old - self.beta * new
        sigma = point.sigma[:, None, None]
        return Implicit(
            positive=flow.clean_from_velocity(point.latents, positive, sigma),
            negative=flow.clean_from_velocity(point.latents, negative, sigma),
        )

    def loss(self, point: ReplayPoint, velocities: Velocities) -> LossOutput:
        """Loss at one noise level, mean over candidates."""
        context: NoisedContext = point.context
        predicted, r = self.implicit(point, velocities), context.optimality
        towards, away = (
            self._error(predicted.positive, context),
            self._error(predicted.negative, context),
        )
        per_region = ((r * towards + (1 - r) * away) / self.beta).mean(dim=0)
        loss = self.cut * (per_region * context.advantages.weights).sum()
        metrics = {
            "forward/positive": towards.detach().mean(),
            "forward/negative": away.detach().mean(),
            "forward/optimality": r.mean(),
            "forward/from_acting": (velocities.policy.detach() - velocities.of("acting"))
            .square()
            .mean(),
        }
        if self.reference_weight > 0:
            distance = (velocities.policy - velocities.of("reference")).square().mean()
            loss = loss + self.reference_weight * distance
            metrics["kl/reference"] = distance.detach()
        return LossOutput(loss=loss, metrics=metrics)

    def _error(self, predicted: Tensor, context: NoisedContext) -> Float[Tensor, "batch region"]:
        rows = context.advantages.regions
        squared = torch.einsum("bl,rl->br", (predicted - context.clean).square().mean(dim=-1), rows)
        if not self.adaptive:
            return squared
        with torch.no_grad():
            size = torch.einsum(
                "bl,rl->br",
                (predicted.double() - context.clean.double()).abs().mean(dim=-1),
                rows.double(),
            )
        return squared / size.clamp(min=SMALLEST).to(squared.dtype)
