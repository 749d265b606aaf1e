"""Text-to-image attention mass and its concentration in the edit region.

RC-GRPO-Editing (arXiv 2604.09386), Eq. 16-18. Pure tensors; hooks live with the editors. Attention
is measured beside the fused kernel: restricting the softmax to target-image keys equals the joint
softmax renormalised over those keys, so the full joint map is never formed.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

HeadAverage = Literal["renormalised", "joint"]
"""Order of averaging heads and renormalising over target tokens, which the paper leaves open.

"renormalised": each head's row is renormalised first, so that all heads weigh the same. "joint":
heads are averaged first, so that a head weighs as much as it attends to the target at all.
"""


def text_to_image_mass(
    query: Float[Tensor, "batch text head dim"],
    key: Float[Tensor, "batch token head dim"],
    text_rows: Bool[Tensor, "batch text"],
    others: Float[Tensor, "batch other head dim"] | None = None,
) -> Float[Tensor, "batch token"]:
    """Averages the attention from instruction to target tokens over text rows and heads (Eq. 16).

    Rows of the result sum to 1. Without ``others`` each head is renormalised before heads are
    averaged; with them afterwards (:data:`HeadAverage`).

    Args:
        query: text queries after normalisation and rotary embedding.
        key: target-image keys after normalisation and rotary embedding.
        text_rows: instruction rows; padding and end markers are real queries in FLUX and would only
            dilute the mean.
        others: all other keys that the queries see, likewise.
    """
    scale = query.shape[-1] ** -0.5
    query = query.float() * scale
    logits = torch.einsum("bshd,blhd->bhsl", query, key.float())
    # Over target-image keys only: the joint softmax renormalised over them.
    heads = logits.softmax(dim=-1)
    if others is None:
        rows = heads.mean(dim=1)
    else:
        rest = torch.einsum("bshd,blhd->bhsl", query, others.float()).logsumexp(dim=-1)
        # The share of the target's keys in each head's joint softmax: e^a / (e^a + e^b).
        share = torch.sigmoid(logits.logsumexp(dim=-1) - rest)[..., None]
        rows = (share * heads).sum(dim=1) / share.sum(dim=1).clamp(min=1e-30)
    weights = text_rows.float() / text_rows.float().sum(dim=1, keepdim=True).clamp(min=1.0)
    # s: text rows, l: target tokens
    return torch.einsum("bs,bsl->bl", weights, rows)


def concentration_density(
    mass: Float[Tensor, "group token"], token_mask: Bool[Tensor, " token"], *, eps: float = 1e-12
) -> Float[Tensor, " group"]:
    """Divides mean attention inside the edit region by mean attention (Eq. 17-18).

    1 is diffuse, > 1 concentrated. The range is [0, token / inside]. The mean over layers and steps
    of this ratio equals the ratio of the mean mass, because every mass row sums to 1; so actors
    ship one map per candidate and never per-layer maps.
    """
    inside = token_mask.to(mass.dtype)
    # (sum_{l in M} a_l / |M|) / (sum_l a_l / L); eps only matters where no mass was recorded.
    density_inside = (mass * inside).sum(dim=-1) / inside.sum().clamp(min=1.0)
    return density_inside / (mass.mean(dim=-1) + eps)


class MassTally:
    """Averages attention mass over captured layers and steps, one row per sample."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, mass: Float[Tensor, "batch token"]) -> None:
        """Adds one forward's mass (already averaged over layers)."""
        # In host memory: a tally lives as long as a rollout and must not hold device memory.
        mass = mass.detach().float().cpu()
        self._sum = mass if self._sum is None else self._sum + mass
        self._count += 1

    def mean(self) -> Float[Tensor, "batch token"]:
        if self._sum is None:
            raise RuntimeError(
                "no attention was recorded: the editor ran no forward with this tally"
            )
        return self._sum / self._count
