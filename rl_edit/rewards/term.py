"""What every reward term has in common: a name, a weight, and when it may be left out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rl_edit.errors import InputError
from rl_edit.types import Candidates, Score


class RewardTerm(BaseModel, ABC):
    """One term of the reward. The validated config is the object that scores.

    Besides these fields every term has four attributes, fixed by its class or settable where that makes sense:
    ``requires``, the dataset fields it reads ("target", "caption", "regions"); ``low`` and ``high``, the range its
    values must lie in (a value outside is refused, not clipped); ``needs_attention``, whether it reads
    ``candidates.attention``.

    Attributes:
        kind: which term.
        name: what the run's tables and curves call it; the kind unless given. Two terms of a run may not share one.
        weight: its share in the run's reward. 0 measures a term without training on it.
        when: "if_available" leaves the term out, with a note, of runs whose data lacks what it requires.
    """

    # Inputs stay out of messages: a key pasted into the wrong field must not reach a log.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    kind: str
    name: str = Field(default="", pattern=r"^[A-Za-z0-9_-]+$")
    weight: float = 1.0
    when: Literal["always", "if_available"] = "always"

    @model_validator(mode="before")
    @classmethod
    def _named_after_kind(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("name"):
            return {**data, "name": data.get("kind", cls.model_fields["kind"].default)}
        return data

    @field_validator("weight")
    @classmethod
    def _weight_is_a_share(cls, weight: float) -> float:
        if not math.isfinite(weight) or weight < 0:
            raise InputError(
                f"weight({weight}) of a reward must be finite and not negative: a negative weight would train towards worse edits. "
                "Use 0 to measure the term without training on it."
            )
        return weight

    @abstractmethod
    def score(self, candidates: Candidates) -> tuple[Score, ...]:
        """One score per candidate, in their order. May raise: the caller turns that into invalid scores."""
