"""Credit: from every reward table of one update to the advantages of each group.

Credit sees the whole update because minibatch normalisation needs it. It may decline a group, which is counted and
reported, never silently filtered. An invalid reward never becomes a number: a group with one is declined whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from rl_edit.regions import Rows, UniformRows
from rl_edit.types import Advantages, RewardTable

RELATIVE_EPS = 1e-4
"""Added to a group's standard deviation, as in the released GRPO trainers (flow_grpo: 1e-4)."""


@dataclass(frozen=True)
class Declined:
    """A group that is not trained on, and why: ``invalid`` reward or no ``spread``."""

    kind: Literal["invalid", "spread"]
    reason: str


def standardise(values: Float[Tensor, "*batch group"], *, eps: float = RELATIVE_EPS) -> Float[Tensor, "*batch group"]:
    """Zero mean and unit population deviation along the last axis (RC-GRPO-Editing Eq. 4); sums to 0."""
    centred = values - values.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True).sqrt() + eps)


def quasi_norm(values: Float[Tensor, "*batch group"], p: float) -> Float[Tensor, "*batch group"]:
    """Neighbor GRPO's reweighting (arXiv 2511.16955, Eq. 11), times sqrt(G) so that p = 2 is division by the population std.

    Keeps sign, order and zero sum; p < 2 tempers dense advantage patterns against single outliers.
    """
    centred = values - values.mean(dim=-1, keepdim=True)
    norm = centred.abs().pow(p).sum(dim=-1, keepdim=True).pow(1 / p)
    return centred / norm.clamp(min=1e-12) * values.shape[-1] ** 0.5


class GroupCredit(BaseModel):
    """Group-relative credit: normalise each term, add with its weight, standardise in the group.

    ``R = sum_k w_k * normalise(r_k)`` and ``A = standardise(R)``; one pooling row per group.

    Attributes:
        normalise: how a term is scaled before the terms are added. "minibatch": z-score over every candidate of the
            update (RC-GRPO-Editing, section 3.3); "group": z-score in its own group, so that each term keeps its share
            in every group (GDPO); "none": raw.
        rows: which tokens the advantage speaks about, and hence the surrogate's metric.
        min_spread: a group whose combined reward deviates less than this has nothing to teach and is declined.
        quasi_norm: p of Neighbor GRPO's reweighting in place of the standard deviation (0.8 there); None is off.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["group"] = "group"
    normalise: Literal["minibatch", "group", "none"] = "minibatch"
    rows: Rows = UniformRows()
    min_spread: float = Field(default=1e-6, ge=0)
    quasi_norm: float | None = Field(default=None, gt=0, le=2)

    def __call__(self, tables: Sequence[RewardTable], masks: Sequence[Bool[Tensor, " token"]]) -> list[Advantages | Declined]:
        trained = [bool(table.valid.all()) for table in tables]
        scaled = self._scale([table.values for table, keep in zip(tables, trained, strict=True) if keep])
        results: list[Advantages | Declined] = []
        for table, mask, keep in zip(tables, masks, trained, strict=True):
            results.append(self._credit(table, next(scaled), mask) if keep else Declined("invalid", "; ".join(table.reasons) or "invalid"))
        return results

    def _scale(self, values: list[Float[Tensor, "group reward"]]):  # type: ignore[no-untyped-def]
        """Iterates over the groups' terms, normalised; statistics come from groups whose rewards are all valid."""
        if not values:
            return iter(())
        if self.normalise == "none":
            return iter([v.double() for v in values])
        if self.normalise == "group":
            return iter([standardise(v.double().T).T for v in values])
        pooled = torch.cat([v.double() for v in values])
        mean, std = pooled.mean(dim=0), pooled.std(dim=0, correction=0)
        return iter([(v.double() - mean) / (std + RELATIVE_EPS) for v in values])

    def _credit(self, table: RewardTable, scaled: Float[Tensor, "group reward"], mask: Bool[Tensor, " token"]) -> Advantages | Declined:
        combined = scaled @ torch.tensor(table.weights, dtype=scaled.dtype)
        spread = float(combined.std(correction=0))
        if not spread > self.min_spread:
            return Declined("spread", f"combined reward deviates {spread:.2g} in the group, not above min_spread ({self.min_spread:g})")
        values = standardise(combined, eps=0.0) if self.quasi_norm is None else quasi_norm(combined, self.quasi_norm)
        rows = self.rows(mask)
        return Advantages(values=values.float()[:, None].expand(-1, rows.shape[0]), regions=rows, weights=torch.ones(1))
