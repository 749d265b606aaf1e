"""Rewards: what a finished edit is worth, term by term, and the boundary that lets no invented number through.

A term turns ``Candidates`` into one ``Score`` each. ``score_candidates`` runs the terms of a run and checks every
value; what fails a check, or was never measured, is invalid with a reason and NaN in the table. Weights are carried,
not applied: combining terms is the credit rule's business.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from typing import Annotated

import torch
from pydantic import Field

from rl_edit.errors import InputError
from rl_edit.rewards.concentration import Concentration
from rl_edit.rewards.custom import PythonReward
from rl_edit.rewards.editscore import EditScore
from rl_edit.rewards.judge import Judge
from rl_edit.rewards.preservation import Preservation
from rl_edit.rewards.term import RewardTerm
from rl_edit.types import Candidates, RewardTable, Score

__all__ = [
    "Concentration",
    "EditScore",
    "Judge",
    "Preservation",
    "PythonReward",
    "Reward",
    "RewardTerm",
    "available",
    "score_candidates",
]

Reward = Annotated[Judge | Preservation | Concentration | EditScore | PythonReward, Field(discriminator="kind")]

_LONGEST_REASON = 400


def available(terms: Sequence[Reward], fields: Collection[str]) -> tuple[tuple[Reward, ...], dict[str, str]]:
    """Which terms a dataset with these optional fields ("target", "caption", "regions") can feed.

    Returns:
        The usable terms, and why each left-out one was (by name). Only terms that say ``when: if_available`` are left
        out; a missing field is an error for the others.
    """
    _unique_names(terms)
    usable: list[Reward] = []
    left_out: dict[str, str] = {}
    for term in terms:
        missing = sorted(term.requires - set(fields))
        if not missing:
            usable.append(term)
            continue
        lacks = " and ".join(missing)
        if term.when == "if_available":
            left_out[term.name] = f"the data has no {lacks}"
            continue
        raise InputError(
            f"Reward {term.name!r} needs the field {lacks} of every task and the data does not have it, so nothing could be scored. "
            f"Add {lacks} to the data, set 'when: if_available' on this reward, or remove it."
        )
    if not usable:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "none is configured"
        raise InputError(f"No reward is left for this data ({reasons}), so there is nothing to learn from. Add one, such as preservation.")
    if all(term.weight == 0 for term in usable):
        names = ", ".join(term.name for term in usable)
        raise InputError(
            f"Every usable reward ({names}) has weight 0, so every advantage would be zero. Give at least one a positive weight."
        )
    return tuple(usable), left_out


def score_candidates(terms: Sequence[Reward], candidates: Candidates, *, group_id: str) -> RewardTable:
    """Every term of every candidate: raw values in each term's own unit, NaN exactly where there is no valid one.

    A term that raises, returns the wrong number of scores, or a value that is not finite or outside its declared
    range, is invalid there; the reason names the reward and the value. Parts of invalid scores are NaN too.
    """
    _unique_names(terms)
    began = time.perf_counter()
    num_candidates = len(candidates.images)
    values = torch.full((num_candidates, len(terms)), math.nan)
    reasons: dict[str, None] = {}
    components: dict[str, tuple[float, ...]] = {}
    broken = False
    for column, term in enumerate(terms):
        given = _scores(term, candidates)
        scores = [_checked(term, score) for score in given]
        broken = broken or any(before.ok and not after.ok for before, after in zip(given, scores, strict=True))
        for row, score in enumerate(scores):
            if score.value is None:
                reasons[score.reason] = None
            else:
                values[row, column] = score.value
        parts = dict.fromkeys(part for score in scores if score.ok for part in score.components)
        for part in parts:
            components[f"{term.name}.{part}"] = tuple(_number(score.components.get(part)) if score.ok else math.nan for score in scores)
    return RewardTable(
        group_id=group_id,
        names=tuple(term.name for term in terms),
        weights=tuple(term.weight for term in terms),
        values=values,
        valid=~values.isnan(),
        reasons=tuple(reasons),
        contract_broken=broken,
        components=components,
        seconds=time.perf_counter() - began,
    )


def _scores(term: Reward, candidates: Candidates) -> Sequence[Score]:
    """The term's scores, or one invalid score per candidate saying why there are none."""
    expected = len(candidates.images)
    try:
        scores = tuple(term.score(candidates))
    except Exception as error:
        # A broken term must cost its group, not the run, and must never look like a bad edit.
        return [Score(value=None, reason=f"raised {type(error).__name__}: {error}")] * expected
    if len(scores) != expected:
        return [Score(value=None, reason=f"returned {len(scores)} scores for {expected} candidates")] * expected
    return scores


def _checked(term: Reward, score: Score) -> Score:
    """The score if its value can be trusted, otherwise an invalid one without a number."""
    if score.value is None:
        return _refused(term, score.reason or "gave no value and no reason")
    value = float(score.value)
    # Single precision is what the table holds: a double beyond its range would become infinite there.
    if not math.isfinite(value) or not math.isfinite(torch.tensor(value, dtype=torch.float32).item()):
        return _refused(term, f"gave {score.value!r}, which is not a finite number")
    if not term.low <= value <= term.high:
        return _refused(term, f"gave {value:g}, outside its declared range {term.low:g}..{term.high:g}")
    return Score(value=value, components=score.components)


def _refused(term: Reward, reason: str) -> Score:
    text = " ".join(f"{term.name}: {reason}".split())
    return Score(value=None, reason=text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "...")


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _unique_names(terms: Sequence[Reward]) -> None:
    names = [term.name for term in terms]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(
            f"Two rewards are called {repeated[0]!r}, so their values could not be told apart. Give one of them another 'name'."
        )
