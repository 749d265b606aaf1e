"""Finds silent terms: weighted rewards that give all candidates of every group the same score.

Credit sees differences within a group only. A silent term therefore changes nothing that is learnt,
however large its weight. All is read from lines of ``metrics.jsonl``, so a resumed run counts as an
undisturbed one does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rl_edit.method.advantages import NEGLIGIBLE


@dataclass(frozen=True, kw_only=True)
class Silence:
    """The last updates in a row in which a term did not vary within any group.

    Attributes:
        updates: how many. Updates without a scored group count neither way.
        varied_before: whether the term varied in an earlier update of the run.
        low, high: range of its mean score over these updates.
        same_images: whether the candidates themselves did not differ inside the edit mask.
    """

    name: str
    updates: int
    varied_before: bool
    low: float
    high: float
    same_images: bool

    def __str__(self) -> str:
        constant = math.isclose(self.low, self.high, rel_tol=1e-9, abs_tol=1e-12)
        value = f"always {self.low:.4g}" if constant else f"mean {self.low:.4g} to {self.high:.4g}"
        updates = f"{self.updates} updates in a row" if self.updates > 1 else "this update"
        return (
            f"reward {self.name!r} gave all candidates of every group the same score in {updates} "
            f"({value}), so nothing is learnt from it"
        )


def silence(
    lines: Sequence[Mapping[str, Any]], name: str, *, parts: Sequence[str] = ()
) -> Silence | None:
    """Returns the silence that stands after the last line; None where the term varied there.

    Args:
        lines: of ``metrics.jsonl``, oldest first.
        parts: beginnings of the keys of components that credit reads beside the score itself.
    """
    scored = [line for line in lines if _spread(line, f"reward/{name}") is not None]
    # Backwards from the newest: a silence stands only while it lasts.
    silent = next(
        (
            index
            for index, line in enumerate(reversed(scored))
            if _varies(line, f"reward/{name}") or any(_part_varies(line, part) for part in parts)
        ),
        len(scored),
    )
    if not silent:
        return None
    means = [float(line[f"reward/{name}/mean"]) for line in scored[-silent:]]
    return Silence(
        name=name,
        updates=silent,
        varied_before=silent < len(scored),
        low=min(means),
        high=max(means),
        same_images=all(_same_images(line) for line in scored[-silent:]),
    )


def _spread(line: Mapping[str, Any], key: str) -> float | None:
    value = line.get(f"{key}/spread")
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _varies(line: Mapping[str, Any], key: str) -> bool:
    # Written with more than rounding, as credit itself decides it.
    return (_spread(line, key) or 0.0) > NEGLIGIBLE * abs(float(line[f"{key}/mean"]))


def _same_images(line: Mapping[str, Any]) -> bool:
    # Unknown where nothing measured the images.
    return _spread(line, "change/inside") is not None and not _varies(line, "change/inside")


def _part_varies(line: Mapping[str, Any], part: str) -> bool:
    keys = [key.removesuffix("/spread") for key in line if key.endswith("/spread")]
    return any(_varies(line, key) for key in keys if key.startswith(part))
