"""Credit: from every reward table of one update to the advantages of each group.

Credit sees the whole update because minibatch normalisation needs it. It may decline a group, which is counted and
reported, never silently filtered. An invalid reward never becomes a number: a group with one is declined whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from rl_edit.regions import Rows, UniformRows
from rl_edit.types import Advantages, RewardTable

NEGLIGIBLE = 1e-5
"""Deviations below this fraction of a term's magnitude are rounding, not merit: they standardise to 0, never to 1."""


@dataclass(frozen=True)
class Declined:
    """A group that is not trained on, and why: ``invalid`` reward or no ``spread``."""

    kind: Literal["invalid", "spread"]
    reason: str


def speaks(values: Float[Tensor, "*batch group"], *, fraction: float = NEGLIGIBLE) -> Bool[Tensor, "*batch"]:
    """Whether values along the last axis differ by more than ``fraction`` of their magnitude."""
    return values.std(dim=-1, correction=0) > fraction * values.abs().amax(dim=-1)


def standardise(values: Float[Tensor, "*batch group"]) -> Float[Tensor, "*batch group"]:
    """Zero mean and unit population deviation along the last axis (RC-GRPO-Editing Eq. 4); sums to 0; constants give 0.

    No constant is added to the deviation: it would weigh terms by their unit. What is only rounding is 0 instead.
    """
    centred = values - values.mean(dim=-1, keepdim=True)
    deviation = centred.square().mean(dim=-1, keepdim=True).sqrt()
    return torch.where(speaks(values)[..., None], centred / deviation.clamp(min=torch.finfo(values.dtype).tiny), 0.0)


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
        min_spread: a term whose values in a group deviate by less than this fraction of their magnitude says nothing
            there; a group in which no weighted term speaks is declined.
        deviation: what the combined, group-centred reward is divided by. "group": its own deviation (RC-GRPO-Editing Eq. 4),
            which lifts a group whose candidates hardly differ to the same size as one that holds success and failure;
            "batch": the mean deviation over the update's groups, which keeps the difference (flow_grpo's global std).
        quasi_norm: p of Neighbor GRPO's reweighting in place of the group's deviation (0.8 there); None is off.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["group"] = "group"
    deviation: Literal["group", "batch"] = "group"
    normalise: Literal["minibatch", "group", "none"] = "minibatch"
    rows: Rows = UniformRows()
    min_spread: float = Field(default=NEGLIGIBLE, ge=0)
    quasi_norm: float | None = Field(default=None, gt=0, le=2)

    def __call__(self, tables: Sequence[RewardTable], masks: Sequence[Bool[Tensor, " _token"]]) -> list[Advantages | Declined]:
        """One result per table, in order; canvases may differ. Only terms with a positive weight decide, the others are measured."""
        terms = [self._terms(table) for table in tables]
        usable = [t for t in terms if not isinstance(t, Declined)]
        pooled = torch.cat(usable, dim=1) if usable else torch.empty(0, 0)
        combined = [t if isinstance(t, Declined) else self._combined(table, t, pooled) for table, t in zip(tables, terms, strict=True)]
        heard = [c.square().mean() for c in combined if not isinstance(c, Declined)]
        batch_deviation = torch.stack(heard).mean().sqrt() if heard else torch.ones(())
        return [c if isinstance(c, Declined) else self._credit(c, batch_deviation, mask) for c, mask in zip(combined, masks, strict=True)]

    def _terms(self, table: RewardTable) -> Float[Tensor, "reward group"] | Declined:
        """The weighted terms of a group, or why it has none."""
        decides = torch.tensor(table.weights) > 0
        if not bool(table.valid[:, decides].all()):
            return Declined("invalid", "; ".join(table.reasons) or "a reward is invalid")
        return table.values[:, decides].double().T

    def _combined(
        self, table: RewardTable, terms: Float[Tensor, "reward group"], pooled: Float[Tensor, "reward all_candidates"]
    ) -> Float[Tensor, " group"] | Declined:
        """The weighted sum of normalised terms, centred in its group."""
        heard = speaks(terms, fraction=self.min_spread)
        if not bool(heard.any()):
            return Declined("spread", "no reward term differs between the candidates")
        if self.normalise == "group":
            scaled = standardise(terms)
        elif self.normalise == "minibatch":
            deviation = pooled.std(dim=1, correction=0, keepdim=True)
            scaled = (terms - pooled.mean(dim=1, keepdim=True)) / deviation.clamp(min=torch.finfo(terms.dtype).tiny)
        else:
            scaled = terms
        weights = torch.tensor([w for w in table.weights if w > 0], dtype=terms.dtype)
        combined = (weights[:, None] * torch.where(heard[:, None], scaled, 0.0)).sum(dim=0)
        if not bool(speaks(combined)):
            return Declined("spread", "the reward terms cancel in every candidate")
        return combined - combined.mean()

    def _credit(self, combined: Float[Tensor, " group"], batch_deviation: Float[Tensor, ""], mask: Bool[Tensor, " token"]) -> Advantages:
        if self.quasi_norm is not None:
            values = quasi_norm(combined, self.quasi_norm)
        else:
            values = standardise(combined) if self.deviation == "group" else combined / batch_deviation
        rows = self.rows(mask)
        return Advantages(values=values.float()[:, None].expand(-1, rows.shape[0]), regions=rows, weights=torch.ones(1))


class SplitCredit(BaseModel):
    """Edit region and background judged apart: each area follows only the terms that speak about it.

    Two pooling rows, the mean over the edit region and the mean over the rest, each with advantages of its own, standardised
    apart, so that whatever the background's terms say leaves the edit region's advantages unchanged. The two-region case of
    region credit (SpatialFlow-GRPO, arXiv 2606.26872; Edit-GRPO, arXiv 2605.16951, of which only the abstract is public: the
    instantiation is ours). Where an area's terms do not differ, its advantages are 0.

    Attributes:
        background_terms: names of the reward terms that judge what should stay; all others judge the edit.
        edit_share: weight of the edit region in the objective; the background has the rest.
        normalise: how terms are scaled within each part, as in :class:`GroupCredit`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["split"] = "split"
    background_terms: tuple[str, ...] = ("preservation",)
    edit_share: float = Field(default=0.5, ge=0, le=1)
    normalise: Literal["minibatch", "group", "none"] = "group"

    def __call__(self, tables: Sequence[RewardTable], masks: Sequence[Bool[Tensor, " _token"]]) -> list[Advantages | Declined]:
        """One result per table, in order; a group is declined when neither area has anything to learn from it."""
        part = GroupCredit(normalise=self.normalise)
        edits = part([self._only(table, background=False) for table in tables], masks)
        keeps = part([self._only(table, background=True) for table in tables], masks)
        return [self._joined(table, edit, keep, mask) for table, edit, keep, mask in zip(tables, edits, keeps, masks, strict=True)]

    def _only(self, table: RewardTable, *, background: bool) -> RewardTable:
        shares = zip(table.names, table.weights, strict=True)
        return replace(table, weights=tuple(w if (name in self.background_terms) == background else 0.0 for name, w in shares))

    def _joined(
        self, table: RewardTable, edit: Advantages | Declined, keep: Advantages | Declined, mask: Bool[Tensor, " token"]
    ) -> Advantages | Declined:
        refused = [part for part in (edit, keep) if isinstance(part, Declined)]
        for part in refused:
            if part.kind == "invalid" or len(refused) == 2:
                return part
        columns = [torch.zeros(len(table.values)) if isinstance(p, Declined) else p.values[:, 0] for p in (edit, keep)]
        areas = torch.stack([mask, ~mask]).float()
        return Advantages(
            values=torch.stack(columns, dim=1),
            regions=areas / areas.sum(dim=1, keepdim=True).clamp(min=1),
            weights=torch.tensor([self.edit_share, 1 - self.edit_share]),
        )


CreditRule = Annotated[GroupCredit | SplitCredit, Field(discriminator="kind")]
