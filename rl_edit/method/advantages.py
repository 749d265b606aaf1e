"""Credit: from the reward tables of an update to the advantages of each group.

Credit sees the whole update because minibatch normalisation needs it. It may decline a group, which
is counted and reported, never silently filtered. An invalid reward never becomes a number: its
whole group is declined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from rl_edit.method.plugins import Plugin
from rl_edit.method.regions import Rows, UniformRows, softened
from rl_edit.types import Advantages, RewardTable

NEGLIGIBLE = 1e-5
"""Deviations below this fraction of a term's magnitude are rounding: they standardise to 0."""


@dataclass(frozen=True)
class Declined:
    """A group that is not trained on, and why: an ``invalid`` reward or no ``spread``."""

    kind: Literal["invalid", "spread"]
    reason: str


def varies(
    values: Float[Tensor, "*batch group"], *, fraction: float = NEGLIGIBLE
) -> Bool[Tensor, "*batch"]:
    """Tests if the last axis deviates by more than ``fraction`` of its largest magnitude."""
    return values.std(dim=-1, correction=0) > fraction * values.abs().amax(dim=-1)


def standardise(values: Float[Tensor, "*batch group"]) -> Float[Tensor, "*batch group"]:
    """Scales the last axis to zero mean and unit deviation, ``A_i = (R_i - mean) / std``.

    RC-GRPO-Editing (arXiv 2604.09386), Eq. 4, with the population deviation. Sums to 0. No constant
    is added to the deviation: it would weigh terms by their unit. Instead, values that differ by
    rounding only (:func:`varies`) become 0.
    """
    centred = values - values.mean(dim=-1, keepdim=True)
    deviation = centred.square().mean(dim=-1, keepdim=True).sqrt()
    # ``where`` evaluates both branches: the clamp keeps 0 / 0 out of the one that is not taken.
    return torch.where(
        varies(values)[..., None],
        centred / deviation.clamp(min=torch.finfo(values.dtype).tiny),
        0.0,
    )


def quasi_norm(values: Float[Tensor, "*batch group"], p: float) -> Float[Tensor, "*batch group"]:
    """Divides centred values by their p-quasi-norm (Neighbor GRPO, arXiv 2511.16955, Eq. 11).

    Times sqrt(G), so that p = 2 is division by the population deviation. Keeps sign, order and zero
    sum; p < 2 tempers dense advantage patterns against single outliers.
    """
    centred = values - values.mean(dim=-1, keepdim=True)
    # A_i = sqrt(G) c_i / (sum_j |c_j|^p)^(1/p)
    norm = centred.abs().pow(p).sum(dim=-1, keepdim=True).pow(1 / p)
    standardised: Tensor = centred / norm.clamp(min=1e-12) * values.shape[-1] ** 0.5
    return standardised


def bounded(values: Float[Tensor, "group ..."], limit: float | None) -> Float[Tensor, "group ..."]:
    """Scales advantages to at most ``limit``, by one factor per group and region.

    So the sum stays 0. Clamping each candidate, as released trainers do, breaks the sum and adds a
    pull towards all candidates alike.
    """
    if limit is None:
        return values
    largest = values.abs().amax(dim=0, keepdim=True)
    # The factor is limit / max(largest, limit), which is exactly 1 within the limit.
    return values * (limit / largest.clamp(min=limit))


Areas = Sequence[Bool[Tensor, "_area _rows _columns"]]
"""The edit areas of each group of an update, on its token grid; canvases may differ."""


def _edited(areas: Bool[Tensor, "area rows columns"]) -> Bool[Tensor, " token"]:
    return areas.any(dim=0).flatten()


@dataclass(frozen=True, kw_only=True)
class _Reward:
    """Combined reward of one group.

    Attributes:
        centred: minus the group's mean; 0 where the candidates do not differ.
        declined: why it gives no credit; None when it does.
    """

    centred: Float[Tensor, " group"]
    mean: Float[Tensor, ""]
    declined: Declined | None


def _batch_deviation(rewards: Sequence[_Reward]) -> Float[Tensor, ""]:
    """Computes the deviation over every candidate of the update (flow_grpo's global std).

    The variance within groups plus the variance of the groups' means. A group whose candidates are
    all alike counts; one that could not be scored does not.
    """
    if not rewards:
        return torch.ones(())
    # Law of total variance: Var(R) = mean_g Var_g(R) + Var_g(mean_g R), for groups of equal size.
    within = torch.stack([reward.centred.square().mean() for reward in rewards]).mean()
    between = torch.stack([reward.mean for reward in rewards]).var(correction=0)
    return (within + between).sqrt()


class GroupCredit(BaseModel):
    """Group-relative credit: terms are normalised, added and standardised in the group.

    ``R = sum_k w_k * normalise(r_k)`` and ``A = standardise(R)``; one pooling row per group.

    Attributes:
        normalise: how a term is scaled before the terms are added. "minibatch": z-score over every
            candidate of the update (RC-GRPO-Editing, section 3.3); "group": z-score in its own
            group, so that each term keeps its share in every group (GDPO); "none": raw.
        rows: tokens that the advantage applies to, and hence the surrogate's metric.
        min_spread: a term whose values in a group deviate by less than this fraction of their
            magnitude does not count there; a group in which no weighted term varies is declined.
        deviation: what the combined, group-centred reward is divided by. "group": its own deviation
            (RC-GRPO-Editing Eq. 4), which lifts a group whose candidates hardly differ to the same
            size as one that holds success and failure; "batch": the deviation over all candidates
            of the update (flow_grpo's global std), which keeps the difference; "none": nothing,
            which with ``normalise: group`` gives the sum of each term's advantages (MixGRPO).
        quasi_norm: p of Neighbor GRPO's reweighting in place of the group's deviation (0.8 there);
            None is off.
        advantage_clip: largest absolute advantage (:func:`bounded`); 5 throughout the field, which
            standardised groups of up to 26 never reach.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: Literal["group"] = "group"
    deviation: Literal["group", "batch", "none"] = "group"
    normalise: Literal["minibatch", "group", "none"] = "minibatch"
    rows: Rows = UniformRows()
    min_spread: float = Field(default=NEGLIGIBLE, ge=0)
    quasi_norm: float | None = Field(default=None, gt=0, le=2)
    advantage_clip: float | None = Field(default=None, gt=0)

    def __call__(self, tables: Sequence[RewardTable], areas: Areas) -> list[Advantages | Declined]:
        """Returns one result per table, in order; canvases may differ.

        Only terms with a positive weight decide, the others are measured.
        """
        terms = [self._terms(table) for table in tables]
        usable = [t for t in terms if not isinstance(t, Declined)]
        # Every candidate of the update that has all its rewards: the minibatch of "minibatch".
        pooled = torch.cat(usable, dim=1) if usable else torch.empty(0, 0)
        rewards = [
            t if isinstance(t, Declined) else self._reward(table, t, pooled)
            for table, t in zip(tables, terms, strict=True)
        ]
        batch_deviation = _batch_deviation([r for r in rewards if isinstance(r, _Reward)])
        return [
            reward
            if isinstance(reward, Declined)
            else reward.declined or self._credit(reward.centred, batch_deviation, _edited(area))
            for reward, area in zip(rewards, areas, strict=True)
        ]

    def _terms(self, table: RewardTable) -> Float[Tensor, "reward group"] | Declined:
        """Selects the weighted terms of a group, or says why it has none."""
        decides = torch.tensor(table.weights) > 0
        if not bool(table.valid[:, decides].all()):
            return Declined("invalid", "; ".join(table.reasons) or "a reward is invalid")
        # Double precision: rewards of a group may differ little beside their magnitude.
        return table.values[:, decides].double().T

    def _reward(
        self,
        table: RewardTable,
        terms: Float[Tensor, "reward group"],
        pooled: Float[Tensor, "reward all_candidates"],
    ) -> _Reward:
        """Adds the normalised terms by weight and splits the sum into mean and difference."""
        if self.normalise == "group":
            scaled = standardise(terms)
        elif self.normalise == "minibatch":
            # Section 3.3: (r_k - mean_batch r_k) / std_batch r_k, over all groups of the update.
            deviation = pooled.std(dim=1, correction=0, keepdim=True)
            scaled = (terms - pooled.mean(dim=1, keepdim=True)) / deviation.clamp(
                min=torch.finfo(terms.dtype).tiny
            )
        else:
            scaled = terms
        weights = torch.tensor([w for w in table.weights if w > 0], dtype=terms.dtype)
        varying = varies(terms, fraction=self.min_spread)
        # A constant term moves the mean; within the group it adds rounding noise only, so 0.
        combined = (weights[:, None] * torch.where(varying[:, None], scaled, 0.0)).sum(dim=0)
        declined = None
        if not bool(varying.any()):
            declined = Declined("spread", "no reward term differs between the candidates")
        elif not bool(varies(combined)):
            declined = Declined("spread", "the reward terms cancel in every candidate")
        centred = torch.zeros_like(combined) if declined else combined - combined.mean()
        mean = (weights * scaled.mean(dim=1)).sum()
        return _Reward(centred=centred, mean=mean, declined=declined)

    def _credit(
        self,
        combined: Float[Tensor, " group"],
        batch_deviation: Float[Tensor, ""],
        mask: Bool[Tensor, " token"],
    ) -> Advantages:
        """Turns a group's centred reward into the advantages of its one row."""
        if self.quasi_norm is not None:
            values = quasi_norm(combined, self.quasi_norm)
        elif self.deviation == "none":
            values = combined
        else:
            values = (
                standardise(combined) if self.deviation == "group" else combined / batch_deviation
            )
        rows = self.rows(mask)
        # Bounded in double precision, then stored as the losses compute.
        return Advantages(
            values=bounded(values, self.advantage_clip).float()[:, None].expand(-1, rows.shape[0]),
            regions=rows,
            weights=torch.ones(1),
        )

    def needed_components(self) -> tuple[str, ...]:
        """Names reward terms whose scores by region the rule reads: none."""
        return ()


class SplitCredit(BaseModel):
    """Separate credit of edit region and background, each from its terms only.

    Two pooling rows, the mean over the edit region and the mean over the rest. Each has advantages
    that are standardised apart, so that the background's terms leave the edit region's advantages
    unchanged. The two-region case of region credit (SpatialFlow-GRPO, arXiv 2606.26872; Edit-GRPO,
    arXiv 2605.16951, of which only the abstract is public: the instantiation is ours). Where an
    area's terms do not differ, its advantages are 0.

    Attributes:
        background_terms: names of the reward terms about what should stay; all others are about
            the edit.
        edit_share: weight of the edit region in the objective; the background has the rest.
        normalise: how terms are scaled within each part, as in :class:`GroupCredit`.
        soft_border: tokens to either side of the mask's border over which one row fades into the
            other, so that the border follows both signals (Edit-GRPO names inconsistency there; the
            form is ours). 0 is a hard border.
        advantage_clip: largest absolute advantage, as in :class:`GroupCredit`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: Literal["split"] = "split"
    background_terms: tuple[str, ...] = ("preservation",)
    edit_share: float = Field(default=0.5, ge=0, le=1)
    normalise: Literal["minibatch", "group", "none"] = "group"
    soft_border: int = Field(default=0, ge=0)
    advantage_clip: float | None = Field(default=None, gt=0)

    def __call__(self, tables: Sequence[RewardTable], areas: Areas) -> list[Advantages | Declined]:
        """Returns one result per table, in order.

        A group is declined when neither area has anything to learn from it.
        """
        part = GroupCredit(normalise=self.normalise, advantage_clip=self.advantage_clip)
        edits = part(
            [_only(table, self.background_terms, background=False) for table in tables], areas
        )
        keeps = part(
            [_only(table, self.background_terms, background=True) for table in tables], areas
        )
        return [
            self._joined(table, edit, keep, group_areas)
            for table, edit, keep, group_areas in zip(tables, edits, keeps, areas, strict=True)
        ]

    def _joined(
        self,
        table: RewardTable,
        edit: Advantages | Declined,
        keep: Advantages | Declined,
        areas: Bool[Tensor, "area rows columns"],
    ) -> Advantages | Declined:
        refused = [part for part in (edit, keep) if isinstance(part, Declined)]
        for part in refused:
            if part.kind == "invalid" or len(refused) == 2:
                return part
        # One side without spread teaches nothing there: advantages 0, and the other side counts.
        columns = [
            torch.zeros(len(table.values)) if isinstance(p, Declined) else p.values[:, 0]
            for p in (edit, keep)
        ]
        # m in [0, 1] per token: the rows are m / sum m and (1 - m) / sum (1 - m).
        inside = softened(areas.any(dim=0).float(), self.soft_border).flatten()
        shares = torch.stack([inside, 1 - inside])
        sizes = shares.sum(dim=1, keepdim=True)
        return Advantages(
            values=torch.stack(columns, dim=1),
            regions=shares / sizes.clamp(min=1e-6),
            # Where the mask leaves no background, there is no ratio that its weight could multiply.
            weights=torch.tensor([self.edit_share, 1 - self.edit_share]) * (sizes[:, 0] > 0),
        )

    def needed_components(self) -> tuple[str, ...]:
        return ()


class RegionCredit(BaseModel):
    """Credit by region: a reward and an advantage per edit area and for the background.

    SpatialFlow-GRPO (arXiv 2606.26872). One pooling row per area and one for the background. The
    reward of an area is its component of the region judge (``TERM.region.N``, ``TERM.background``,
    Eq. 3) and, normalised in the group, the table's other weighted terms: those of
    ``background_terms`` count for the background only, all others for the edit areas. Each is
    standardised over the group by itself. The paper's weights of regions are not public:
    ``area_power`` names the choice.

    Attributes:
        term: the reward term with scores by region.
        background_terms: terms about what should stay.
        area_power: gamma of the objective's weights ``|M_r|^gamma``. 1 weighs by area, which at the
            old weights is the gradient of whole-image credit when all regions agree; 0 weighs all
            regions alike.
        normalise: the other weighted terms are normalised in the group.
        advantage_clip: largest absolute advantage, as in :class:`GroupCredit`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: Literal["region"] = "region"
    term: str = "judge"
    background_terms: tuple[str, ...] = ("preservation",)
    area_power: float = Field(default=1.0, ge=0, le=1)
    normalise: Literal["group"] = "group"
    advantage_clip: float | None = Field(default=None, gt=0)

    def __call__(self, tables: Sequence[RewardTable], areas: Areas) -> list[Advantages | Declined]:
        """Returns one result per table, in order.

        A group is declined when no region has anything to learn from it.
        """
        return [self._credit(table, regions) for table, regions in zip(tables, areas, strict=True)]

    def _credit(
        self, table: RewardTable, areas: Bool[Tensor, "area rows columns"]
    ) -> Advantages | Declined:
        decides = torch.tensor(table.weights) > 0
        if not bool(table.valid[:, decides].all()):
            return Declined("invalid", "; ".join(table.reasons) or "a reward is invalid")
        scores = self._region_scores(table, len(areas))
        if isinstance(scores, Declined):
            return scores
        weight = table.weights[table.names.index(self.term)]
        # R_r = w z(s_r) + sum_k w_k z(r_k): z standardises in the group, and the terms k are those
        # of the region's side.
        edit, keep = self._others(table, background=False), self._others(table, background=True)
        combined = weight * standardise(scores) + torch.stack([edit] * len(areas) + [keep])
        if not bool(varies(combined).any()):
            return Declined("spread", "no region's reward differs between the candidates")
        rows = torch.cat([areas.flatten(1), ~_edited(areas)[None]]).float()
        sizes = rows.sum(dim=1)
        # w_r ~ |M_r|^gamma; the product keeps 0^0 = 1 from weighing an empty region.
        shares = sizes**self.area_power * (sizes > 0)
        return Advantages(
            values=bounded(standardise(combined).T, self.advantage_clip).float(),
            # A region without a token pools none and weighs nothing; its row stays uniform to sum
            # to 1.
            regions=torch.where(
                sizes[:, None] > 0, rows / sizes[:, None].clamp(min=1), 1 / rows.shape[1]
            ),
            weights=shares / shares.sum(),
        )

    def _region_scores(
        self, table: RewardTable, num_areas: int
    ) -> Float[Tensor, "region group"] | Declined:
        """Stacks the scores of the areas and of the background, or says what is missing."""
        regions = table.regions.get(self.term)
        num_scored = 0 if regions is None else regions.areas.shape[1]
        if regions is None or num_scored < num_areas:
            return Declined(
                "invalid",
                f"reward {self.term!r} gave no {self.term}.region.{num_scored}: "
                "it does not score these regions",
            )
        # A table may have more columns than this group has areas.
        scores = torch.cat([regions.areas.T[:num_areas], regions.background[None]]).double()
        if not bool(scores.isfinite().all()):
            return Declined("invalid", f"reward {self.term!r} lacks a score of a region")
        return scores

    def _others(self, table: RewardTable, *, background: bool) -> Float[Tensor, " group"]:
        """Adds the other terms of one side by weight, each standardised in the group."""
        total = torch.zeros(len(table.values), dtype=torch.float64)
        for index, (name, weight) in enumerate(zip(table.names, table.weights, strict=True)):
            if weight > 0 and name != self.term and (name in self.background_terms) == background:
                total = total + weight * standardise(table.values[:, index].double())
        return total

    def needed_components(self) -> tuple[str, ...]:
        return (self.term,)


def _only(
    table: RewardTable, background_terms: tuple[str, ...], *, background: bool
) -> RewardTable:
    """Restricts a table to the weights of one side.

    A group with an invalid reward on either side counts on neither.
    """
    shares = zip(table.names, table.weights, strict=True)
    weights = tuple(w if (name in background_terms) == background else 0.0 for name, w in shares)
    complete = bool(table.valid[:, torch.tensor(table.weights) > 0].all())
    valid = table.valid if complete else torch.zeros_like(table.valid)
    return replace(table, weights=weights, valid=valid)


@runtime_checkable
class CreditProtocol(Protocol):
    """Protocol of credit rules; a plugin class (``kind: module:Class``) follows it."""

    @property
    def kind(self) -> str: ...

    @property
    def normalise(self) -> Literal["minibatch", "group", "none"]:
        """Scaling of terms before they are added, for the log of their shares."""

    def needed_components(self) -> tuple[str, ...]:
        """Names reward terms whose scores by region the rule reads."""

    def __call__(self, tables: Sequence[RewardTable], areas: Areas) -> list[Advantages | Declined]:
        """Returns one result per table, in order. A group that is declined is counted."""


CreditRule = Annotated[
    GroupCredit | SplitCredit | RegionCredit,
    Field(discriminator="kind"),
    Plugin("algorithm.credit", CreditProtocol),
]
"""Seam: from the reward tables of an update to advantages."""
