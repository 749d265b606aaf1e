"""Statistics of the combined reward: its terms, the judge's noise, and where images differ.

All numbers are about differences within groups, the only ones that credit sees.

===============================  ===================================================================
``reward/TERM/STATUS_share``     share of scores that are invalid, timeout or refused; of terms with
                                 a cache also cached (recalled) and uncached (could not be stored)
``reward/TERM/variance_share``   share of the total's variance within groups that the term brings
                                 in: the covariance of its weighted, normalised value with the
                                 total, over the total's variance. Shares sum to 1; one below 0
                                 pulls against the others
``reward/TERM/noise``            standard deviation of one measurement, from candidates that were
                                 scored twice
``reward/TERM/noise_to_spread``  the same over the deviation within groups; at 1 the differences are
                                 nothing else
``change/variance_inside_share`` share of the pixels' variance between candidates that lies inside
                                 the edit mask
===============================  ===================================================================
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rl_edit.measures.pixels import unit_range
from rl_edit.method.advantages import standardise, varies
from rl_edit.scores import ChangeVariance
from rl_edit.types import Candidates, RewardTable

Normalisation = Literal["minibatch", "group", "none"]


def status_shares(tables: Sequence[RewardTable]) -> dict[str, float]:
    """Computes ``TERM/STATUS_share`` over every candidate of the tables."""
    counts = sum((Counter(table.counts) for table in tables), Counter())
    shares: dict[str, float] = {}
    for name in tables[0].names if tables else ():
        total = sum(
            counts[f"{name}.{status}"] for status in ("ok", "invalid", "timeout", "refused")
        )
        # A term without a cache has no such shares, rather than shares of 0.
        cached = any(f"{name}.cached" in table.counts for table in tables)
        for status in (
            "invalid",
            "timeout",
            "refused",
            *(("cached", "uncached") if cached else ()),
        ):
            if total:
                shares[f"{name}/{status}_share"] = counts[f"{name}.{status}"] / total
    return shares


def variance_shares(tables: Sequence[RewardTable], *, normalise: Normalisation) -> dict[str, float]:
    """Computes the share of each weighted term; empty where the total does not vary.

    Args:
        normalise: how the credit rule scales terms.
    """
    deciding = (
        [index for index, weight in enumerate(tables[0].weights) if weight > 0] if tables else []
    )
    if not deciding:
        return {}
    raw = [table.values[:, deciding].double().T for table in tables]
    weights = torch.tensor([tables[0].weights[index] for index in deciding], dtype=torch.float64)
    parts = [weights[:, None] * terms for terms in normalised(raw, normalise)]
    # cov(part, total) of centred values. Mean over candidates, so that a large group counts like a
    # small one.
    shared = torch.stack([(part * part.sum(dim=0)).mean(dim=1) for part in parts]).sum(dim=0)
    total = float(shared.sum())
    return (
        {
            tables[0].names[index]: float(share) / total
            for index, share in zip(deciding, shared, strict=True)
        }
        if total > 0
        else {}
    )


def normalised(
    groups: Sequence[Float[Tensor, "term _group"]], kind: Normalisation
) -> list[Float[Tensor, "term _group"]]:
    """Scales terms as the credit rule adds them, centred in their group.

    A term that does not vary in a group is 0 there.
    """
    if kind == "group":
        return [standardise(terms) for terms in groups]
    # "none" leaves terms in their own units.
    scale = torch.ones(len(groups[0]), 1, dtype=torch.float64)
    if kind == "minibatch":
        scale = (
            torch.cat(list(groups), dim=1)
            .std(dim=1, correction=0, keepdim=True)
            .clamp(min=torch.finfo(torch.float64).tiny)
        )
    return [
        torch.where(varies(terms)[:, None], (terms - terms.mean(dim=1, keepdim=True)) / scale, 0.0)
        for terms in groups
    ]


def noise(tables: Sequence[RewardTable]) -> dict[str, float]:
    """Computes ``TERM/noise`` and ``TERM/noise_to_spread`` of terms with repeated scores."""
    metrics: dict[str, float] = {}
    for index, name in enumerate(tables[0].names if tables else ()):
        differences = [
            difference
            for table in tables
            for difference in table.repeats.get(name, ())
            if math.isfinite(difference)
        ]
        if not differences:
            continue
        # Two scores of one candidate differ by two measurements' noise, so their difference has
        # twice the variance of one.
        deviation = math.sqrt(sum(d * d for d in differences) / len(differences) / 2)
        metrics[f"{name}/noise"] = deviation
        # A term of weight 0 may lack scores in some groups.
        variances = [
            float(table.values[:, index].double().var(correction=0))
            for table in tables
            if bool(table.valid[:, index].all())
        ]
        spread = math.sqrt(sum(variances) / len(variances)) if variances else 0.0
        if spread > 0:
            metrics[f"{name}/noise_to_spread"] = deviation / spread
    return metrics


def change_variance(candidates: Candidates) -> ChangeVariance | None:
    """Splits the variance between candidates into that inside and outside the mask.

    Each number is a candidate's squared distance from the mean image of its group, averaged over
    all pixels; those of the other side count as 0. It is scaled by n / (n - 1), so that the mean
    over candidates is unbiased. None for a single candidate.
    """
    number = len(candidates.images)
    if number < 2:
        return None
    images = unit_range(candidates.images)
    # Without n / (n - 1), the variance around the group's own mean would be too small.
    squared = (images - images.mean(dim=0)).square().mean(dim=-1) * number / (number - 1)
    inside = (squared * candidates.task.edit_mask).mean(dim=(1, 2))
    outside = (squared * ~candidates.task.edit_mask).mean(dim=(1, 2))
    return ChangeVariance(inside=tuple(inside.tolist()), outside=tuple(outside.tolist()))


def inside_share(tables: Sequence[RewardTable]) -> dict[str, float]:
    """Computes ``variance_inside_share``; empty where no table has a variance."""
    variances = [
        table.measures.variance
        for table in tables
        if table.measures is not None and table.measures.variance is not None
    ]
    inside = sum(v for variance in variances for v in variance.inside if math.isfinite(v))
    outside = sum(v for variance in variances for v in variance.outside if math.isfinite(v))
    return {"variance_inside_share": inside / (inside + outside)} if inside + outside > 0 else {}
