"""CoCoEdit's region regularisers around the forward-process objective (arXiv 2602.14068): keep what
should stay, change what should not.

Two hinges on the clean samples that the implicit policies predict: the kept region may not leave a
reference by more than a tolerance, the edit region must leave the source by at least one. The
released code and the paper differ, and both reverse the second hinge (it is put on the negative
policy, which moves against the trained one); ``variant`` names which is meant.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from rl_edit.method import flow, regions
from rl_edit.method.objectives.forward_process import ForwardProcess, NoisedContext
from rl_edit.method.objectives.protocol import ObjectiveProtocol
from rl_edit.method.objectives.replay import ReplayPoint, Velocities
from rl_edit.method.objectives.wrapper import WrappedContext, Wrapper
from rl_edit.types import LossOutput

RING_WEIGHT = 0.2
"""Of tokens that erosion took from either region, as released."""


class RegionRegularised(Wrapper):
    """``L = NFT + mean(r keep_weight relu(d_keep - keep_tolerance)) + mean((1 - r) edit_weight
    relu(edit_tolerance - d_edit))``.

    ``d(a, b; W) = sum W (a - b)^2 / sum W`` over tokens, mean over channels; W is 1 in the eroded
    region, 0.2 in the ring that erosion leaves, 0 elsewhere. r is the mean of the forward process's
    optimality over its regions. Weight 0 is the wrapped objective.

    ===========  =====================================  ========================================
    variant      d_keep compares the kept region of     d_edit compares the edit region of
    ===========  =====================================  ========================================
    fixed        positive prediction and source         the policy's own prediction and source
    paper        positive prediction and source         negative prediction and source
    release      positive prediction and its sample     negative prediction and source
    ===========  =====================================  ========================================

    On the negative prediction ``2 x_old - x_policy`` (beta 1) the edit hinge moves the policy
    *towards* the source, the reverse of its purpose; "fixed" puts it where it acts as meant.

    Attributes:
        inner: the forward process that is regularised.
        variant: a row of the table above.
        keep_weight, edit_weight: 0.02 and 0.02 for FLUX.1-Kontext, 0.8 and 0.5 for
            Qwen-Image-Edit-2509.
        keep_tolerance, edit_tolerance: 1e-3 and 3e-2.
        erosion: in tokens; 1 token is the release's radius of 2 latent pixels.
    """

    kind: Literal["region_regularised"] = "region_regularised"
    inner: ForwardProcess = ForwardProcess()
    variant: Literal["fixed", "paper", "release"] = "fixed"
    keep_weight: float = Field(default=0.02, ge=0)
    edit_weight: float = Field(default=0.02, ge=0)
    keep_tolerance: float = Field(default=1e-3, ge=0)
    edit_tolerance: float = Field(default=3e-2, ge=0)
    erosion: int = Field(default=1, ge=0)

    @property
    def wrapped(self) -> ObjectiveProtocol:
        return self.inner

    def loss(self, point: ReplayPoint, velocities: Velocities) -> LossOutput:
        """The wrapped loss and the two hinges at the same states."""
        context: WrappedContext = point.context
        noised: NoisedContext = context.inner.context
        inner = self.inner.loss(context.inner, velocities)
        predicted, source = self.inner.implicit(context.inner, velocities), context.source
        own = flow.clean_from_velocity(point.latents, velocities.policy, point.sigma[:, None, None])
        kept, edited = self.weights(context)
        keep = _distance(
            predicted.positive, noised.clean if self.variant == "release" else source, kept
        )
        edit = _distance(own if self.variant == "fixed" else predicted.negative, source, edited)
        r = noised.optimality.mean(dim=1)
        too_far = (keep - self.keep_tolerance).clamp(min=0) * bool(kept.any())
        too_near = (self.edit_tolerance - edit).clamp(min=0) * bool(edited.any())
        loss = (
            inner.loss
            + self.keep_weight * (r * too_far).mean()
            + self.edit_weight * ((1 - r) * too_near).mean()
        )
        metrics = {
            "region/kept_error": keep.detach().mean(),
            "region/edit_change": edit.detach().mean(),
        }
        return LossOutput(loss=loss, metrics={**inner.metrics, **metrics})

    def weights(
        self, context: WrappedContext
    ) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
        """W of the kept and of the edit region. The eroded regions and the ring between them are
        disjoint."""
        edit, keep = (
            regions.eroded(mask, self.erosion) for mask in (context.edited, ~context.edited)
        )
        ring = RING_WEIGHT * (~(edit | keep)).float()
        # A region too small to erode has no inside: its ring alone would speak for the other one
        # too.
        weights = [(core.float() + ring).clamp(0, 1) * bool(core.any()) for core in (keep, edit)]
        return weights[0].flatten(), weights[1].flatten()


def _distance(
    found: Float[Tensor, "batch token channel"],
    wanted: Float[Tensor, "*shape"],
    weights: Float[Tensor, " token"],
) -> Float[Tensor, " batch"]:
    squared = (found - wanted).square().mean(dim=-1)
    return torch.einsum("bl,l->b", squared, (weights / weights.sum().clamp(min=1e-6)).to(squared))
