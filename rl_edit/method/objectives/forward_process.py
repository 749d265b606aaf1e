"""Learning on the forward process, from finished samples and their rewards.

DiffusionNFT (arXiv 2509.16117). There is no ratio and no trajectory. A finished sample is noised
again with fresh noise. In proportion to its reward the policy is pulled towards it, and an implicit
negative policy away from it.
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
"""Smallest normaliser of the adaptive weight, as released."""


@dataclass(frozen=True, kw_only=True)
class NoisedContext:
    """Finished samples behind the noised states of one level.

    Attributes:
        clean: the finished samples.
        optimality: r in [0, 1] per candidate and region.
    """

    clean: Float[Tensor, "batch token channel"]
    optimality: Float[Tensor, "batch region"]
    advantages: Advantages


@dataclass(frozen=True, kw_only=True)
class Implicit:
    """Clean predictions ``x_t - t v`` of the two implicit policies."""

    positive: Float[Tensor, "batch token channel"]
    negative: Float[Tensor, "batch token channel"]


class ForwardProcess(BaseModel):
    """Reward-weighted regression of two implicit policies (DiffusionNFT, arXiv 2509.16117).

    ``L = c mean[ r l+ + (1 - r) l- ] / beta + reference_weight |v - v_ref|^2``
    ``v+ = beta v + (1 - beta) v_old``  and  ``v- = (1 + beta) v_old - beta v``
    ``r = clip(1/2 + A / 2c, 0, 1)``

    ``l`` is the squared error of the predicted clean sample, divided by its own absolute error
    without gradient (the adaptive weight). With equal weights the sum over both is
    ``-2 (2r - 1) t e.d + beta t^2 d^2`` up to a constant: advantage-weighted regression plus a pull
    to the acting policy of strength beta. At the acting weights the gradient does not depend on
    beta.

    With several credit rows the errors are pooled per region, and each has its own r. ``v_old`` is
    the velocity of the acting weights as the update begins. This also holds for groups made by
    older weights (``train.max_lag``): the loss regresses on samples, whichever weights drew them.

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
        """Accepts every rollout whose velocity can be regressed on its samples.

        Raises:
            ValueError: under true guidance, whose velocity belongs to no flow.
        """
        # A guided velocity extrapolates two flows, so no sample's noise - clean is its target.
        if setting.guided:
            raise ValueError(
                "regresses the velocity on finished samples, which a guided velocity does not fit: "
                "set editor.true_cfg to 1."
            )

    def trained_steps(
        self, levels: Float[Tensor, " step"], generator: torch.Generator
    ) -> tuple[int, ...]:
        """Returns the last step, because it ends in the finished sample."""
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
        """Noises every candidate anew at each drawn level of the grid."""
        # trained_steps stored the last step only, which ends in the finished samples.
        clean = group.next_latents[:, -1]
        candidates = torch.arange(len(clean))
        # r = clip(1/2 + A / 2c, 0, 1): an advantage of c is surely good, one of -c surely bad.
        optimality = (0.5 + advantages.values / (2 * self.cut)).clamp(0, 1)
        # Every level above 0 may be drawn; as released, one of them is left out at random.
        levels = range(len(group.schedule) - 1)
        steps = draw(levels, self.num_times or len(levels) - 1, generator)
        points = []
        for step in steps:
            # Noise of the full group before it is cut: states_per_forward must not change it.
            noise = torch.randn(clean.shape, generator=generator).to(clean)
            noised = flow.interpolate(clean, noise, group.schedule[step])
            for part in parts(candidates, states_per_forward):
                points.append(
                    # Weights of all points of a group sum to 1.
                    ReplayPoint(
                        latents=noised[part],
                        sigma=group.schedule[step].expand(len(part)),
                        context=NoisedContext(
                            clean=clean[part], optimality=optimality[part], advantages=advantages
                        ),
                        weight=len(part) / len(candidates) / len(steps),
                    )
                )
        return points

    def implicit(self, point: ReplayPoint, velocities: Velocities) -> Implicit:
        """Predicts clean samples under the implicit positive and negative policies."""
        old, new = velocities.of("acting"), velocities.policy
        # v+ moves beta of the way from the acting policy to the trained one, v- as far the other
        # way: v+ + v- = 2 v_old.
        positive = self.beta * new + (1 - self.beta) * old
        negative = (1 + self.beta) * old - self.beta * new
        # x_t - t v, the clean end of the straight path through x_t.
        sigma = point.sigma[:, None, None]
        return Implicit(
            positive=flow.clean_from_velocity(point.latents, positive, sigma),
            negative=flow.clean_from_velocity(point.latents, negative, sigma),
        )

    def loss(self, point: ReplayPoint, velocities: Velocities) -> LossOutput:
        """Computes the loss at one noise level, mean over candidates."""
        context: NoisedContext = point.context
        predicted, r = self.implicit(point, velocities), context.optimality
        towards = self._error(predicted.positive, context)
        away = self._error(predicted.negative, context)
        # c [ r l+ + (1 - r) l- ] / beta: c undoes the 1 / 2c inside r, and beta the scale of v+-.
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
            # |v - v_ref|^2: the KL of the release, in velocities.
            distance = (velocities.policy - velocities.of("reference")).square().mean()
            loss = loss + self.reference_weight * distance
            metrics["kl/reference"] = distance.detach()
        return LossOutput(loss=loss, metrics=metrics)

    def _error(self, predicted: Tensor, context: NoisedContext) -> Float[Tensor, "batch region"]:
        """Pools ``l`` of the predicted clean samples by region."""
        rows = context.advantages.regions
        # mean (a - b)^2 over channels, pooled over tokens by each region's row.
        squared = torch.einsum("bl,rl->br", (predicted - context.clean).square().mean(dim=-1), rows)
        if not self.adaptive:
            return squared
        # The adaptive weight: no gradient flows through it, and float64 is the release's own.
        with torch.no_grad():
            size = torch.einsum(
                "bl,rl->br",
                (predicted.double() - context.clean.double()).abs().mean(dim=-1),
                rows.double(),
            )
        return squared / size.clamp(min=SMALLEST).to(squared.dtype)
