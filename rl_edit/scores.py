"""Numbers about the candidates of a group: scores by region, and what every run measures.

They are parts of a :class:`rl_edit.types.Score` and of a :class:`rl_edit.types.RewardTable`.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

PerCandidate = tuple[float, ...]
"""One number per candidate of a group, NaN where there is none."""


@dataclass(frozen=True, kw_only=True)
class RegionScores:
    """Scores of one candidate by region.

    Attributes:
        areas: one score per edit area of the task, in their order; NaN where there is none.
        background: the score of everything else.

    Example:
        >>> RegionScores(areas=(0.8, 0.1), background=0.97)
    """

    # NaN rather than None: scores by region go into tensors as they are.
    areas: tuple[float, ...]
    background: float

    def named(self) -> dict[str, float]:
        """Names the scores as logs and test images do: ``region.0``, ..., ``background``."""
        named = {f"region.{number}": score for number, score in enumerate(self.areas)}
        return {**named, "background": self.background}


@dataclass(frozen=True, kw_only=True)
class RegionTable:
    """Scores of one term by region, NaN where a candidate has none.

    Attributes:
        areas: one column per edit area of the task, in their order.
        background: the score of everything else.

    Example:
        >>> RegionTable(areas=torch.tensor([[0.8], [0.3]]), background=torch.tensor([0.9, 1.0]))
    """

    areas: Float[Tensor, "group area"]
    background: Float[Tensor, " group"]

    def columns(self) -> dict[str, PerCandidate]:
        """Names the columns, as :meth:`RegionScores.named` does."""
        # One tuple per area: tables, logs and files hold a number per candidate under a name.
        areas = self.areas.T.tolist()
        named = {f"region.{number}": tuple(column) for number, column in enumerate(areas)}
        return {**named, "background": tuple(self.background.tolist())}


@dataclass(frozen=True, kw_only=True)
class ChangeVariance:
    """Squared distances from the mean image of a group.

    Their means over candidates are unbiased variances. Intensities are 0..1.

    Attributes:
        inside, outside: the share of the edit mask and that of the background; they add up.

    Example:
        >>> ChangeVariance(inside=(0.020, 0.013), outside=(0.001, 0.002))
    """

    inside: PerCandidate
    outside: PerCandidate


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Measures of every run, whatever its rewards are.

    Attributes:
        background: outside the mask against the source, by measure: "psnr", "psnr_zero_filled",
            "ssim" (``measures/diagnostics.py``) and the drift of ``measures/drift.py``.
        change_inside: mean absolute change inside the mask, 0..1.
        concentration: attention density inside the edit region, 1 is diffuse.
        variance: between candidates; None for a chunk, from which it cannot be computed.

    Example:
        >>> Measures(
        ...     background={"psnr": (31.2, 28.9)},
        ...     change_inside=(0.21, 0.18),
        ...     concentration=(1.7, 1.4),
        ...     variance=None,
        ... )
    """

    background: dict[str, PerCandidate]
    change_inside: PerCandidate
    concentration: PerCandidate
    # A variance belongs to a whole group: chunks that are joined lose it.
    variance: ChangeVariance | None
