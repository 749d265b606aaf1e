"""Names and values of the reward metrics of one update, as they go to ``metrics.jsonl``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from rl_edit.measures import reward_statistics
from rl_edit.types import RewardTable


def reward_metrics(
    tables: Sequence[RewardTable], *, normalise: reward_statistics.Normalisation = "minibatch"
) -> dict[str, float]:
    """Mean and within-group spread (population deviation, mean over groups) of every term, component and of the total.

    Beside them the statistics named in :mod:`rl_edit.measures.reward_statistics`; ``normalise`` is how the run's credit rule scales terms.
    Groups with an invalid term appear in the shares of statuses only, and are counted by the loop. "reward/total" is the weighted
    sum of raw terms.
    """
    metrics = {
        f"reward/{name}": share for name, share in reward_statistics.status_shares(tables).items()
    }
    sound = [table for table in tables if bool(table.valid.all())]
    if not sound:
        return metrics
    for index, name in enumerate(sound[0].names):
        _describe(metrics, f"reward/{name}", [table.values[:, index] for table in sound])
    _describe(
        metrics, "reward/total", [table.values @ torch.tensor(table.weights) for table in sound]
    )
    for name in sorted(set.intersection(*(set(table.components) for table in sound))):
        if not name.endswith(f".{reward_statistics.REPEAT}"):
            _describe(
                metrics,
                _component_key(name),
                [torch.tensor(table.components[name]) for table in sound],
            )
    metrics |= {
        f"reward/{name}/variance_share": v
        for name, v in reward_statistics.variance_shares(sound, normalise=normalise).items()
    }
    metrics |= {f"reward/{name}": value for name, value in reward_statistics.noise(sound).items()}
    metrics |= {
        f"change/{name}": value for name, value in reward_statistics.inside_share(sound).items()
    }
    return metrics


def _component_key(name: str) -> str:
    """Diagnostics (``background.psnr``, ``concentration``) have keys of their own; parts of a term live under ``component/``."""
    room, _, part = name.partition(".")
    return (
        f"{room}/{part}"
        if room in ("background", "change")
        else name
        if not part
        else f"component/{name}"
    )


def _describe(metrics: dict[str, float], key: str, groups: Iterable[torch.Tensor]) -> None:
    groups = [values.double() for values in groups]
    metrics[f"{key}/mean"] = float(torch.cat(groups).mean())
    metrics[f"{key}/spread"] = float(
        torch.stack([values.std(correction=0) for values in groups]).mean()
    )


def count_reasons(reasons: Iterable[str]) -> dict[str, int]:
    """How often each reason occurred, most frequent first."""
    return dict(Counter(reasons).most_common())
