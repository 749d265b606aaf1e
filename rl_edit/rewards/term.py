"""Defines the settings and the contract that all reward terms share."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rl_edit.errors import InputError
from rl_edit.rewards.cache import content_sha256
from rl_edit.rewards.first_names import FIRST_NAMES
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
"""Settings, at any depth of a term, of how it is reached. They do not change its scores."""

# Far from every seed that the passes and retries of a judge count up to.
_OTHER_SEED = 1_000_003

DECLARED = ("requires", "low", "high", "needs_attention")
"""Attributes that every term has, fixed by its class, a setting or a property."""

Sides = Literal["inside", "outside", "both"]
"""Where corruption of an image must lower a score: inside the edit mask, outside, or both."""


class RewardTerm(BaseModel, ABC):
    """One term of the reward. The validated config is the object that scores.

    A class declares its contract, or its definition is refused::

        class Sharpness(RewardTerm):
            kind: Literal["my_rewards:Sharpness"] = "my_rewards:Sharpness"
            responds_to: ClassVar[Sides] = "inside"
            requires: ClassVar[frozenset[str]] = frozenset()
            low: ClassVar[float] = 0.0
            high: ClassVar[float] = 1.0
            needs_attention: ClassVar[bool] = False

    ``responds_to`` is None where no audit of images can know it. ``reads_instruction`` is True when
    the same image must score lower under another instruction; None derives it from the rest.

    Besides these, every term has four attributes, fixed by its class or settable where that makes
    sense. ``requires`` names the dataset fields it reads ("target", "caption", "regions"). ``low``
    and ``high`` bound its values; a value outside is refused, not clipped. ``needs_attention`` says
    whether it reads ``candidates.attention``. ``gives_regions`` says whether its scores have
    ``regions``.

    Attributes:
        kind: which term.
        name: what the run's tables and curves call it; the kind unless given. Two terms of a run
            may not share one.
        weight: its share in the run's reward. 0 measures a term without training on it.
        when: "if_available" leaves the term out, with a note, of runs whose data lacks what it
            requires.
        cache: a directory that stores every score by the content it follows from, for repeated and
            resumed runs. Processes may share it. Only for terms that score a candidate without
            looking at the others; all built-in ones do.
        repeat_every: in one of this many groups, drawn by its id, score one candidate again with
            another seed. This measures the term's noise, to compare with its differences within a
            group. 0 is never; each time costs one more score.
    """

    # Inputs stay out of messages: a key pasted into the wrong field must not reach a log.
    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, ser_json_inf_nan="constants"
    )

    responds_to: ClassVar[Sides | None]
    # ClassVars are no settings: they stay out of configurations and fingerprints.
    reads_instruction: ClassVar[bool | None] = None
    gives_regions: ClassVar[bool] = False

    kind: str
    name: str = Field(default="", pattern=r"^[A-Za-z0-9_-]+$")
    weight: float = 1.0
    when: Literal["always", "if_available"] = "always"
    cache: Path | None = None
    # Two scores of one candidate cost a request, so the noise is sampled and not always measured.
    repeat_every: int = Field(default=0, ge=0)

    if TYPE_CHECKING:
        # Declared for readers only: a field of a subclass would take a property for its default.
        @property
        def requires(self) -> frozenset[str]: ...
        @property
        def low(self) -> float: ...
        @property
        def high(self) -> float: ...
        @property
        def needs_attention(self) -> bool: ...

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuses a term that does not declare its contract."""
        super().__pydantic_init_subclass__(**kwargs)
        if inspect.isabstract(cls):
            return
        if not hasattr(cls, "responds_to"):
            raise TypeError(
                f"Reward {cls.__name__!r} does not declare what it responds to, so no audit could "
                "separate a good score from a bad one. Add 'responds_to: ClassVar[Sides] = "
                '"inside"\' (or "outside", "both"; None if only its user knows).'
            )
        lacking = [
            name for name in DECLARED if not hasattr(cls, name) and name not in cls.model_fields
        ]
        if lacking:
            raise TypeError(
                f"Reward {cls.__name__!r} does not declare {', '.join(lacking)}: add each as a "
                "ClassVar, as in examples/own_reward.py."
            )

    @model_validator(mode="before")
    @classmethod
    def _named_after_kind(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("name"):
            kind = str(data.get("kind", cls.model_fields["kind"].default))
            # A class of the user's is named module:Class; a name takes no colon.
            return {**data, "name": kind.rpartition(":")[2]}
        return data

    @field_validator("weight")
    @classmethod
    def _weight_is_a_share(cls, weight: float) -> float:
        if not math.isfinite(weight) or weight < 0:
            raise InputError(
                f"weight({weight}) of a reward must be finite and not negative: a negative weight "
                "would train towards worse edits. Use 0 to measure the term without training on it."
            )
        return weight

    @property
    def lower_is_better(self) -> bool:
        """True when small values are good.

        The reward table then holds the negated value. ``low`` and ``high`` bound the value itself.
        """
        return False

    def judge_timeout_s(self, num_candidates: int) -> float:
        """Computes the longest wait for a judge that never answers, in seconds.

        One scoring call is meant. 0 where no other machine is asked.
        """
        return 0.0

    @property
    def remote(self) -> bool:
        """True when scoring waits for another machine and occupies no device of this run."""
        return False

    def gpu_weights(self) -> Mapping[str, int]:
        """Lists the models that it loads onto a GPU, with the bytes of their weights.

        Reward actors that share a GPU are refused by it where they cannot fit. A model that is left
        out, or not on this machine, is not counted.
        """
        return {}

    def notes(self) -> tuple[str, ...]:
        """Says what the user should know about how scores came about, a sentence each.

        Asked for after scoring, in the process that scored.
        """
        return ()

    @property
    def quick(self) -> bool:
        """True when it loads no model and scores in milliseconds on a CPU.

        Such terms are measured before a run starts (:mod:`rl_edit.audit.total`).
        """
        return False

    def fingerprint(self) -> dict[str, Any]:
        """Lists what scores follow from besides the candidates.

        These are the settings without names, weights and places, and of a class of the user's the
        source of its module; imports of that are not followed.
        """
        # Names, weights and places may change without changing a score.
        settings = _without(self.model_dump(mode="json"), OPERATIONAL | {"name", "weight", "when"})
        module_name, colon, _ = self.kind.partition(":")
        return {**settings, "source": source_sha256(module_name)} if colon else settings

    def sha256(self) -> str:
        """Hashes what the term's share in the reward follows from: its scores and its weight."""
        # Sorted keys, so that the order of settings is no difference.
        content = _under_first_names({**self.fingerprint(), "weight": self.weight})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def reseeded(self) -> Self:
        """Copies the term with other random numbers; itself where it has no seed."""
        seed = dict(self).get("seed")
        return self if seed is None else self.model_copy(update={"seed": seed + _OTHER_SEED})

    def require_files(self) -> None:
        """Refuses a term whose files, models or keys are not here.

        It loads nothing large. A dry run calls it for every term, so a term of yours that reads
        files should look for them here.

        Raises:
            InputError: with what is missing and the remedy.
        """
        if self.cache is not None and self.cache.exists() and not self.cache.is_dir():
            raise InputError(
                f"cache({self.cache}) of reward {self.name!r} is a file, so no score could be "
                "stored. Name a directory."
            )

    @abstractmethod
    def score(self, candidates: Candidates) -> tuple[Score, ...]:
        """Scores every candidate, in their order.

        It may raise: the caller turns that into scores without a value.
        """


def source_sha256(module_name: str) -> str:
    """Hashes the source of a module; "" where it has no file."""
    module = importlib.import_module(module_name)
    return content_sha256(module.__file__) if module.__file__ else ""


def _under_first_names(settings: Any) -> Any:
    if isinstance(settings, dict):
        return {
            FIRST_NAMES.get(key, key): _under_first_names(value) for key, value in settings.items()
        }
    return settings


def _without(settings: Any, left_out: frozenset[str]) -> Any:
    if isinstance(settings, dict):
        return {
            key: _without(value, left_out) for key, value in settings.items() if key not in left_out
        }
    return settings
