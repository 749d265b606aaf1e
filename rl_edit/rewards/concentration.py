"""Scores how much attention of the instruction lies on the region it may change."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from rl_edit.method.attention import concentration_density
from rl_edit.rewards.term import RewardTerm, Sides
from rl_edit.types import Candidates, Score


class Concentration(RewardTerm):
    """Measures the attention concentration density, ACD, of the trajectory.

    RC-GRPO-Editing (arXiv 2604.09386), Eq. 16-18. With m(n) the text-to-image attention mass on
    target token n, M the edit region and N all tokens:
    ``ACD = (1/|M|) sum_{n in M} m(n) / ((1/N) sum_n m(n))``. 1 is diffuse, N/|M| is all mass
    inside. It is measured under the behaviour weights during the rollout; no gradient passes
    through it.

    Attributes:
        normalisation: the range of ACD grows with N/|M|, so under batch-wide normalisation tasks
            with small masks set the scale. "paper" is ACD itself; "log" is log ACD; "unit" is
            (ACD - 1) / (N/|M| - 1), which is 0 for diffuse and 1 for all mass inside, whatever the
            mask.
    """

    kind: Literal["concentration"] = "concentration"
    normalisation: Literal["paper", "log", "unit"] = "paper"

    # It reads attention, which an audit's images do not have.
    responds_to: ClassVar[Sides | None] = None
    requires: ClassVar[frozenset[str]] = frozenset()
    needs_attention: ClassVar[bool] = True

    @property
    def low(self) -> float:
        """Lowest value: attention may avoid the region, so log and unit have none."""
        return 0.0 if self.normalisation == "paper" else -math.inf

    @property
    def high(self) -> float:
        return 1.0 if self.normalisation == "unit" else math.inf

    def score(self, candidates: Candidates) -> tuple[Score, ...]:
        """Components: ``acd`` (Eq. 16, unnormalised) and ``mass_inside`` (share in the region)."""
        inside = candidates.token_mask
        num_tokens, num_inside = inside.numel(), int(inside.sum())
        if not 0 < num_inside < num_tokens:
            reason = (
                f"the edit region covers {num_inside} of {num_tokens} tokens, where concentration "
                "is undefined"
            )
            return (Score(value=None, reason=reason),) * len(candidates.images)
        # ACD with all mass inside: (1/|M|) / (1/N).
        limit = num_tokens / num_inside
        return tuple(
            self._score(density, limit)
            for density in concentration_density(candidates.attention, inside).tolist()
        )

    def _score(self, density: float, limit: float) -> Score:
        if self.normalisation == "unit":
            # All mass inside may exceed the limit by a rounding error; the declared range is exact.
            value = min((density - 1) / (limit - 1), 1.0)
        elif self.normalisation == "log":
            if density <= 0:
                return Score(
                    value=None,
                    reason="no attention fell on the edit region, so log ACD is infinite",
                )
            value = math.log(density)
        else:
            value = density
        return Score(value=value, components={"acd": density, "mass_inside": density / limit})
