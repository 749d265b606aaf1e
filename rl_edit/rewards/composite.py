"""What the same edit would earn with a perfect background: a term scored on the edit pasted onto the untouched source."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field

from rl_edit.rewards.clip import ClipSimilarity
from rl_edit.rewards.concentration import Concentration
from rl_edit.rewards.custom import PythonReward
from rl_edit.rewards.lpips import Lpips
from rl_edit.rewards.pixel_terms import Psnr, Ssim
from rl_edit.rewards.preservation import Preservation, Similarity
from rl_edit.rewards.shapes_judge import ShapesJudge
from rl_edit.rewards.term import RewardTerm
from rl_edit.rewards.vlm.editscore import EditScore
from rl_edit.rewards.vlm.region_judge import RegionJudge
from rl_edit.types import Candidates, Score

Measure = (
    ShapesJudge
    | Preservation
    | Similarity
    | Psnr
    | Ssim
    | Lpips
    | ClipSimilarity
    | Concentration
    | EditScore
    | RegionJudge
    | PythonReward
)
"""Every term that looks at candidates as they are."""


class Composite(RewardTerm):
    """The score of ``where(mask, edit, source)``: a reference, not a goal.

    The distance from the term itself to this value is what the changed background costs or earns. Trained on, it would leave
    the background to itself, so its weight is 0 unless given.

    Attributes:
        of: the term to score with. Its own name only labels the parts here; its weight, cache and repeats are not read.
    """

    kind: Literal["composite"] = "composite"
    weight: float = 0.0
    of: Annotated[Measure, Field(discriminator="kind")]

    @property
    def requires(self) -> frozenset[str]:
        return frozenset(self.of.requires)

    @property
    def low(self) -> float:
        return self.of.low

    @property
    def high(self) -> float:
        return self.of.high

    @property
    def needs_attention(self) -> bool:
        return self.of.needs_attention

    @property
    def lower_is_better(self) -> bool:
        return self.of.lower_is_better

    def judge_timeout_s(self, num_candidates: int) -> float:
        return self.of.judge_timeout_s(num_candidates)

    @property
    def remote(self) -> bool:
        return self.of.remote

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": self.kind, "of": self.of.fingerprint()}

    def reseeded(self) -> Self:
        return self.model_copy(update={"of": self.of.reseeded()})

    def score(self, candidates: Candidates) -> tuple[Score, ...]:
        """Components: the value under the wrapped term's name, and its parts as ``NAME.PART``."""
        task = candidates.task
        pasted = torch.where(task.edit_mask[..., None], candidates.images, task.source)
        return tuple(
            self._named(score) for score in self.of.score(replace(candidates, images=pasted))
        )

    def _named(self, score: Score) -> Score:
        if score.value is None:
            return score
        parts = {f"{self.of.name}.{part}": value for part, value in score.components.items()}
        return replace(score, components={self.of.name: score.value, **parts})
