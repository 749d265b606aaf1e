"""Names and values of the reward metrics of one update, as they go to ``metrics.jsonl``.

==================================  ======================================================
``reward/TERM``, ``reward/total``   a term's values, and the weighted sum of all raw terms
``component/TERM.COMPONENT``        named parts of a term, its regions among them
``background/MEASURE``              the background against the source
``change/...``, ``concentration``   the other numbers of :class:`rl_edit.types.Measures`
==================================  ======================================================

Each has ``/mean`` and ``/spread``: the population deviation within a group, averaged over groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rl_edit.measures import reward_statistics
from rl_edit.scores import Measures, PerCandidate
from rl_edit.types import RewardTable


def reward_metrics(
    tables: Sequence[RewardTable], *, normalise: reward_statistics.Normalisation = "minibatch"
) -> dict[str, float]:
    """Computes mean and within-group spread of every term, component and measure.

    Beside them stand the statistics of :mod:`rl_edit.measures.reward_statistics`. Groups without a
    score of a weighted term appear in the shares of statuses only; the loop counts them. A term of
    weight 0 that has no score in such a group costs only its own numbers.

    Args:
        normalise: how the run's credit rule scales terms.
    """
    shares = reward_statistics.status_shares(tables)
    metrics = {f"reward/{name}": share for name, share in shares.items()}
    valid_tables = [table for table in tables if table.complete()]
    if not valid_tables:
        return metrics
    for index, name in enumerate(valid_tables[0].names):
        measured = [t.values[:, index] for t in valid_tables if bool(t.valid[:, index].all())]
        if measured:
            metrics |= _described(f"reward/{name}", measured)
    # Raw and weighted as configured; credit rules scale terms before they add them.
    # A missing score is NaN, and 0 * NaN is NaN: here only a term of weight 0 can lack one.
    totals = [table.values.nan_to_num() @ torch.tensor(table.weights) for table in valid_tables]
    metrics |= _described("reward/total", totals)
    columns = [_columns(table) for table in valid_tables]
    # A column that some group lacks has no mean over the update's groups.
    for key in sorted(set.intersection(*(set(table) for table in columns))):
        metrics |= _described(key, [torch.tensor(table[key]) for table in columns])
    variance_shares = reward_statistics.variance_shares(valid_tables, normalise=normalise)
    metrics |= {f"reward/{name}/variance_share": v for name, v in variance_shares.items()}
    noise = reward_statistics.noise(valid_tables)
    metrics |= {f"reward/{name}": value for name, value in noise.items()}
    inside_share = reward_statistics.inside_share(valid_tables)
    return metrics | {f"change/{name}": value for name, value in inside_share.items()}


def _columns(table: RewardTable) -> dict[str, PerCandidate]:
    """Lists one table's components and measures under their keys."""
    components = {
        f"component/{term}.{part}": values
        for term in table.names
        for part, values in table.columns(term).items()
    }
    return components | ({} if table.measures is None else _measured(table.measures))


def _measured(measures: Measures) -> dict[str, PerCandidate]:
    columns = {f"background/{name}": values for name, values in measures.background.items()}
    columns |= {
        "change/inside": measures.change_inside,
        "concentration": measures.concentration,
    }
    if measures.variance is not None:
        columns["change/variance_inside"] = measures.variance.inside
        columns["change/variance_outside"] = measures.variance.outside
    return columns


def _described(key: str, groups: Iterable[Tensor]) -> dict[str, float]:
    columns = [values.double() for values in groups]
    # Groups may differ in size: the mean weighs candidates alike, the spread groups.
    spread = torch.stack([values.std(correction=0) for values in columns]).mean()
    return {f"{key}/mean": float(torch.cat(columns).mean()), f"{key}/spread": float(spread)}


def count_reasons(reasons: Iterable[str]) -> dict[str, int]:
    """Counts how often each reason occurred, most frequent first."""
    return dict(Counter(reasons).most_common())
