"""Scores the edit pasted onto the untouched source: the same edit with a perfect background."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field

from rl_edit.method.plugins import Plugin
from rl_edit.rewards.kinds import Term
from rl_edit.rewards.term import RewardTerm, Sides
from rl_edit.types import Candidates, Score


class Composite(RewardTerm):
    """Scores ``where(mask, edit, source)`` with another term, as a reference and not as a goal.

    The distance from that term's own score to this one is what the changed background costs or
    earns. A run trained on it would ignore the background, so its weight is 0 unless given.

    Attributes:
        of: the term to score with. Its name labels the components here. Its weight, cache and
            repeats are not read.
    """

    kind: Literal["composite"] = "composite"
    weight: float = 0.0
    of: Annotated[Term, Field(discriminator="kind"), Plugin("rewards.NAME.of", RewardTerm)]

    # The background is the source's own, so corrupting it cannot lower the score.
    responds_to: ClassVar[Sides] = "inside"

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

    def gpu_weights(self) -> Mapping[str, int]:
        return self.of.gpu_weights()

    def notes(self) -> tuple[str, ...]:
        return self.of.notes()

    @property
    def quick(self) -> bool:
        return self.of.quick

    def fingerprint(self) -> dict[str, Any]:
        # The wrapped term's weight, cache and name do not change the score.
        return {"kind": self.kind, "of": self.of.fingerprint()}

    def require_files(self) -> None:
        super().require_files()
        self.of.require_files()

    def reseeded(self) -> Self:
        return self.model_copy(update={"of": self.of.reseeded()})

    def score(self, candidates: Candidates) -> tuple[Score, ...]:
        """Scores the pasted edits.

        Components: the value under the wrapped term's name, its components as ``NAME.COMPONENT``,
        and its regions as ``NAME.region.N`` and ``NAME.background``.
        """
        task = candidates.task
        pasted = torch.where(task.edit_mask[..., None], candidates.images, task.source)
        return tuple(
            self._relabelled(score) for score in self.of.score(replace(candidates, images=pasted))
        )

    def _relabelled(self, score: Score) -> Score:
        if score.value is None:
            return score
        # The background of a pasted edit is perfect, so credit by region must not read its scores.
        regions = {} if score.regions is None else score.regions.named()
        named = {**score.components, **regions}
        labelled = {f"{self.of.name}.{part}": value for part, value in named.items()}
        return replace(score, components={self.of.name: score.value, **labelled}, regions=None)
