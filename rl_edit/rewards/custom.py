"""Makes a Python function of the user's a reward term."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

from pydantic import field_validator, model_validator

from rl_edit.errors import InputError
from rl_edit.method.plugins import import_remedy, nearest_function
from rl_edit.rewards.term import RewardTerm, Sides, source_sha256
from rl_edit.types import Candidates, Score


class PythonReward(RewardTerm):
    """Calls ``function(candidates)``, which returns one number per candidate, or None.

    None is a candidate without a score. The function may return a ``Score`` instead of a number, to
    give the reason, to name components or to score regions.

    Attributes:
        function: "package.module:name", importable by every process of the run.
        low, high: range its values must lie in; a value outside is invalid, not clipped. ``.inf``
            leaves a side open.
        direction: which values are good. Those of "lower" are negated in the run's table, so that
            higher is always better there.
        requires: optional dataset fields it reads.
        needs_attention: whether it reads ``candidates.attention``.
    """

    kind: Literal["python"] = "python"
    function: str
    low: float
    high: float
    direction: Literal["higher", "lower"] = "higher"
    requires: frozenset[Literal["target", "caption", "regions"]] = frozenset()
    needs_attention: bool = False

    # Only its user knows; ``rl-edit audit-reward --expects`` declares it.
    responds_to: ClassVar[Sides | None] = None

    @field_validator("function")
    @classmethod
    def _can_be_called(cls, function: str) -> str:
        _resolve(function)
        return function

    @model_validator(mode="after")
    def _range_is_ordered(self) -> PythonReward:
        if math.isnan(self.low) or math.isnan(self.high) or self.low >= self.high:
            raise InputError(
                f"Reward {self.name!r} declares the range {self.low}..{self.high}: no value could "
                "be valid. Set low < high."
            )
        return self

    @property
    def lower_is_better(self) -> bool:
        return self.direction == "lower"

    def fingerprint(self) -> dict[str, Any]:
        """Adds the source of the function's module; its imports are not followed."""
        source = source_sha256(self.function.partition(":")[0])
        return {**super().fingerprint(), "requires": sorted(self.requires), "source": source}

    def score(self, candidates: Candidates) -> tuple[Score, ...]:
        return tuple(_scored(self.function, value) for value in _resolve(self.function)(candidates))


def _scored(function: str, value: object) -> Score:
    """Accepts numbers of Python, of NumPy and in tensors of one element; nothing else."""
    if isinstance(value, Score):
        return value
    if value is not None and not isinstance(value, str | bytes):
        try:
            # A value without float() is refused below.
            return Score(value=float(value))  # type: ignore[arg-type]  # any object may come
        except (TypeError, ValueError, RuntimeError, OverflowError):
            pass
    return Score(value=None, reason=f"{function} returned {_shown(value)}, which is not a number")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _resolve(function: str) -> Callable[[Candidates], Iterable[object]]:
    module_name, colon, name = function.partition(":")
    if not colon or not module_name or not name:
        raise InputError(
            f"function({function!r}) does not say where to find the reward. Write it as "
            "'package.module:name'."
        )
    try:
        module = importlib.import_module(module_name)
    # An import runs code of the user's, which may raise anything.
    except (Exception, SystemExit) as error:
        raise InputError(
            f"The module {module_name!r} of reward function {function!r} cannot be imported "
            f"({type(error).__name__}: {error}): {import_remedy(module_name, error)}"
        ) from error
    resolved: Callable[[Candidates], Iterable[object]] | None = getattr(module, name, None)
    if not callable(resolved):
        what = "is not callable" if hasattr(module, name) else "does not exist"
        hint = nearest_function(module_name, name) or "."
        # A module that is built in has no file.
        where = f"{module_name!r} ({getattr(module, '__file__', 'built in')})"
        raise InputError(
            f"{name!r} {what} in {where}, so there is no reward to compute{hint} Define it or "
            "correct 'function'."
        )
    return resolved
