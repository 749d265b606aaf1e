"""CoCoEdit's region regularisers around the forward-process objective (arXiv 2602.14068).

They are two hinges on predicted clean samples. The background may not leave a reference by more
than a tolerance. The edit region must leave the source by at least another. The released code and
the paper differ, and both reverse the second hinge: they put it on the negative policy, which moves
against the trained one. ``variant`` chooses between them and the corrected form.
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
"""Weight of the tokens that erosion took from either region, as released."""


class RegionRegularised(Wrapper):
    """Forward process plus two region hinges (CoCoEdit, arXiv 2602.14068).

    ``L = NFT + mean(r keep_weight relu(d_keep - keep_tolerance))``
    ``        + mean((1 - r) edit_weight relu(edit_tolerance - d_edit))``
    ``d(a, b; W) = sum W (a - b)^2 / sum W``  over tokens, mean over channels

    W is 1 in the eroded region, 0.2 in the ring that erosion leaves, 0 elsewhere. r is the mean of
    the forward process's optimality over its regions. Weight 0 is the wrapped objective.

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
        """Computes the wrapped loss and the two hinges at the same states."""
        context: WrappedContext = point.context
        noised: NoisedContext = context.inner.context
        inner = self.inner.loss(context.inner, velocities)
        predicted, source = self.inner.implicit(context.inner, velocities), context.source
        trained = flow.clean_from_velocity(
            point.latents, velocities.policy, point.sigma[:, None, None]
        )
        # The table of variants in the class docstring, row by row.
        background, edited = self.weights(context)
        target = noised.clean if self.variant == "release" else source
        changed = trained if self.variant == "fixed" else predicted.negative
        keep = _distance(predicted.positive, target, background)
        edit = _distance(changed, source, edited)
        # One r per candidate: a hinge is one number per image, and credit may have several rows.
        r = noised.optimality.mean(dim=1)
        # Hinges. An empty region has distance 0, which the second one would take for no edit.
        too_far = (keep - self.keep_tolerance).clamp(min=0) * bool(background.any())
        too_near = (self.edit_tolerance - edit).clamp(min=0) * bool(edited.any())
        # Good samples (r near 1) hold the background, bad ones (1 - r) are driven off the source.
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
        """Computes W of the background and of the edit region.

        The eroded regions and the ring between them are disjoint.
        """
        edit, keep = (
            regions.eroded(mask, self.erosion) for mask in (context.edited, ~context.edited)
        )
        # Tokens within the erosion's radius of the mask's border, on either side.
        ring = RING_WEIGHT * (~(edit | keep)).float()
        # A region too small to erode has no core. Its ring is shared with the other region, so it
        # gets no weight at all.
        weights = [(core.float() + ring).clamp(0, 1) * bool(core.any()) for core in (keep, edit)]
        return weights[0].flatten(), weights[1].flatten()


def _distance(
    predicted: Float[Tensor, "batch token channel"],
    target: Float[Tensor, "*shape"],
    weights: Float[Tensor, " token"],
) -> Float[Tensor, " batch"]:
    """Computes ``d(a, b; W) = sum W (a - b)^2 / sum W``, mean over channels."""
    # An empty W pools to 0: the clamp keeps the division finite.
    squared = (predicted - target).square().mean(dim=-1)
    return torch.einsum("bl,l->b", squared, (weights / weights.sum().clamp(min=1e-6)).to(squared))
