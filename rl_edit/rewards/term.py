"""What every reward term has in common: a name, a weight, when it may be left out, where its scores are kept."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rl_edit.errors import InputError
from rl_edit.types import Candidates, Score

OPERATIONAL = frozenset(
    {"cache", "repeat_every", "device", "gpu_memory_utilization", "tensor_parallel_size"}
    | {
        "base_url",
        "api_key_env",
        "api_key_file",
        "timeout_s",
        "concurrency",
        "retries",
        "backoff_s",
    }
)
"""Settings, at any depth of a term, that say where and how it is asked, not what it answers."""

_OTHER_SEED = 1_000_003
"""Far from every seed that the passes and retries of a judge count up to."""


class RewardTerm(BaseModel, ABC):
    """One term of the reward. The validated config is the object that scores.

    Besides these fields every term has four attributes, fixed by its class or settable where that makes sense:
    ``requires``, the dataset fields it reads ("target", "caption", "regions"); ``low`` and ``high``, the range its
    values must lie in (a value outside is refused, not clipped); ``needs_attention``, whether it reads
    ``candidates.attention``. ``gives_regions`` says whether its components score every region (``region.0`` ..., ``background``).

    Attributes:
        kind: which term.
        name: what the run's tables and curves call it; the kind unless given. Two terms of a run may not share one.
        weight: its share in the run's reward. 0 measures a term without training on it.
        when: "if_available" leaves the term out, with a note, of runs whose data lacks what it requires.
        cache: a directory that keeps every score by the content it follows from, for repeated and resumed runs; processes may
            share it. Only for terms that score a candidate without looking at the others; all built-in ones do.
        repeat_every: in one of this many groups, drawn by its id, score one candidate again with another seed: the term's
            noise, to compare with its differences within a group. 0 is never; costs one more score each time.
    """

    # Inputs stay out of messages: a key pasted into the wrong field must not reach a log.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    gives_regions: ClassVar[bool] = False

    kind: str
    name: str = Field(default="", pattern=r"^[A-Za-z0-9_-]+$")
    weight: float = 1.0
    when: Literal["always", "if_available"] = "always"
    cache: Path | None = None
    repeat_every: int = Field(default=0, ge=0)

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

    @property
    def lower_is_better(self) -> bool:
        """Whether small values are good. The reward table then holds the negated value; the range speaks of the value itself."""
        return False

    def judge_timeout_s(self, num_candidates: int) -> float:
        """Longest one scoring call waits for another machine that never answers, in seconds; 0 where none is asked."""
        return 0.0

    @property
    def remote(self) -> bool:
        """Whether scoring is waiting for another machine, and so occupies no device of this run."""
        return False

    def fingerprint(self) -> dict[str, Any]:
        """What its scores follow from besides the candidates: settings without names, weights and places."""
        return _without(self.model_dump(mode="json"), OPERATIONAL | {"name", "weight", "when"})

    def sha256(self) -> str:
        """Hash of what its share in the reward follows from: scores and weight."""
        return hashlib.sha256(
            json.dumps({**self.fingerprint(), "weight": self.weight}, sort_keys=True).encode()
        ).hexdigest()

    def reseeded(self) -> Self:
        """The same term with other random numbers; itself where it has no seed."""
        seed = dict(self).get("seed")
        return self if seed is None else self.model_copy(update={"seed": seed + _OTHER_SEED})

    @abstractmethod
    def score(self, candidates: Candidates) -> tuple[Score, ...]:
        """One score per candidate, in their order. May raise: the caller turns that into scores without a value."""


def _without(settings: Any, left_out: frozenset[str]) -> Any:
    if isinstance(settings, dict):
        return {
            key: _without(value, left_out) for key, value in settings.items() if key not in left_out
        }
    return settings
