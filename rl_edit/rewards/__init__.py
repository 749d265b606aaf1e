"""Rewards: what a finished edit is worth, term by term, and the boundary that lets no invented number through.

A term turns ``Candidates`` into one ``Score`` each. ``score_candidates`` runs the terms of a run and checks every
value; what fails a check, or was never measured, has a status and a reason and is NaN in the table, where higher is always
better. Weights are carried, not applied: combining terms is the credit rule's business.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field

from rl_edit.errors import InputError
from rl_edit.measures.reward_statistics import REPEAT
from rl_edit.rewards.cache import ScoreCache
from rl_edit.rewards.clip import ClipSimilarity
from rl_edit.rewards.composite import Composite, Measure
from rl_edit.rewards.concentration import Concentration
from rl_edit.rewards.custom import PythonReward
from rl_edit.rewards.lpips import Lpips
from rl_edit.rewards.pixel_terms import Psnr, Ssim
from rl_edit.rewards.preservation import Preservation, Similarity
from rl_edit.rewards.shapes_judge import ShapesJudge
from rl_edit.rewards.term import RewardTerm
from rl_edit.rewards.vlm.editscore import EditScore
from rl_edit.rewards.vlm.region_judge import RegionJudge
from rl_edit.types import Candidates, RewardTable, Score

__all__ = [
    "ClipSimilarity",
    "Composite",
    "Concentration",
    "EditScore",
    "Lpips",
    "Preservation",
    "Psnr",
    "PythonReward",
    "RegionJudge",
    "Reward",
    "RewardTerm",
    "ShapesJudge",
    "Similarity",
    "Ssim",
    "available",
    "score_candidates",
]

Reward = Annotated[Measure | Composite, Field(discriminator="kind")]

_LONGEST_REASON = 400


def available(
    terms: Sequence[Reward], fields: Collection[str]
) -> tuple[tuple[Reward, ...], dict[str, str]]:
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
        reasons = (
            "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
            or "none is configured"
        )
        raise InputError(
            f"No reward is left for this data ({reasons}), so there is nothing to learn from. Add one, such as preservation."
        )
    if all(term.weight == 0 for term in usable):
        names = ", ".join(term.name for term in usable)
        raise InputError(
            f"Every usable reward ({names}) has weight 0, so every advantage would be zero. Give at least one a positive weight."
        )
    return tuple(usable), left_out


def score_candidates(
    terms: Sequence[Reward], candidates: Candidates, *, group_id: str
) -> RewardTable:
    """Every term of every candidate: values in each term's own unit, higher is better, NaN exactly where there is no valid one.

    A term that raises, returns the wrong number of scores, or a value that is not finite or outside its declared
    range, is invalid there (a ``TimeoutError`` is a timeout); the reason names the reward and the value. Parts of scores
    without a value are NaN too.
    """
    _unique_names(terms)
    began = time.perf_counter()
    values = torch.full((len(candidates.images), len(terms)), math.nan)
    reasons: dict[str, None] = {}
    components: dict[str, tuple[float, ...]] = {}
    counts: dict[str, int] = {}
    broken = False
    for index, term in enumerate(terms):
        column = _column(term, candidates)
        broken = broken or column.broken
        counts |= {f"{term.name}.{what}": number for what, number in column.counts.items()}
        for row, score in enumerate(column.scores):
            if score.value is None:
                reasons[score.reason] = None
            else:
                values[row, index] = score.value
        parts = dict.fromkeys(part for score in column.scores for part in score.components)
        components |= {
            f"{term.name}.{part}": tuple(
                _number(score.components.get(part)) for score in column.scores
            )
            for part in parts
        }
        if (twice := _row_to_repeat(term, group_id, len(values))) is not None:
            again = _column(
                term.reseeded().model_copy(update={"cache": None}), _rows(candidates, [twice])
            ).scores[0]
            difference = _number(again.value) - _number(column.scores[twice].value)
            components[f"{term.name}.{REPEAT}"] = tuple(
                difference if row == twice else math.nan for row in range(len(values))
            )
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
        counts=counts,
    )


@dataclass(frozen=True, kw_only=True)
class _Column:
    """One term's scores as the table holds them, whether it broke its contract, and how often what happened."""

    scores: tuple[Score, ...]
    broken: bool
    counts: dict[str, int]


class _WrongCount(Exception):
    """A term answered for more or fewer candidates than it was asked about."""


def _column(term: Reward, candidates: Candidates) -> _Column:
    try:
        return (
            _kept(term, candidates)
            if term.cache is not None
            else _checked(term, _given(term, candidates))
        )
    except Exception as error:
        # A broken term must cost its group, not the run, and must never look like a bad edit.
        broken = isinstance(error, _WrongCount)
        reason = str(error) if broken else f"raised {type(error).__name__}: {error}"
        failed = _refused(
            term,
            Score(
                value=None,
                reason=reason,
                status="timeout" if isinstance(error, TimeoutError) else "invalid",
            ),
        )
        number = len(candidates.images)
        return _Column(scores=(failed,) * number, broken=broken, counts={failed.status: number})


def _kept(term: Reward, candidates: Candidates) -> _Column:
    """Scores recalled where there are any, asked for where not, and then kept."""
    assert term.cache is not None
    store = ScoreCache(term.cache, term.fingerprint(), reads_attention=term.needs_attention)
    keys = store.keys(candidates)
    known = {row: score for row, key in enumerate(keys) if (score := store.get(key)) is not None}
    missing = [row for row in range(len(keys)) if row not in known]
    if missing:
        known |= zip(missing, _given(term, _rows(candidates, missing)), strict=True)
    column = _checked(term, [known[row] for row in range(len(keys))])
    lost = [
        row for row in missing if column.scores[row].ok and not store.put(keys[row], known[row])
    ]
    return replace(
        column, counts=column.counts | {"cached": len(keys) - len(missing), "uncached": len(lost)}
    )


def _given(term: Reward, candidates: Candidates) -> tuple[Score, ...]:
    scores = tuple(term.score(candidates))
    if len(scores) != len(candidates.images):
        raise _WrongCount(f"returned {len(scores)} scores for {len(candidates.images)} candidates")
    return scores


def _checked(term: Reward, given: Sequence[Score]) -> _Column:
    """Scores whose value can be trusted, the others without a number."""
    scores = tuple(_trusted(term, score) for score in given)
    broken = any(before.ok and not after.ok for before, after in zip(given, scores, strict=True))
    return _Column(
        scores=scores, broken=broken, counts=dict(Counter(score.status for score in scores))
    )


def _trusted(term: Reward, score: Score) -> Score:
    if score.value is None:
        return _refused(term, score)
    value = float(score.value)
    # Single precision is what the table holds: a double beyond its range would become infinite there.
    if not math.isfinite(value) or not math.isfinite(
        torch.tensor(value, dtype=torch.float32).item()
    ):
        return _refused(
            term, Score(value=None, reason=f"gave {score.value!r}, which is not a finite number")
        )
    if not term.low <= value <= term.high:
        return _refused(
            term,
            Score(
                value=None,
                reason=f"gave {value:g}, outside its declared range {term.low:g}..{term.high:g}",
            ),
        )
    return replace(score, value=-value if term.lower_is_better else value, reason="")


def _refused(term: Reward, score: Score) -> Score:
    """Without number and parts, and with a reason that names the term."""
    text = " ".join(f"{term.name}: {score.reason or 'gave no value and no reason'}".split())
    short = text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."
    return Score(value=None, reason=short, status=score.status)


def _row_to_repeat(term: Reward, group_id: str, num_candidates: int) -> int | None:
    """Which candidate to score again: drawn from the group's id, so that a resumed run repeats the same ones."""
    draw = int.from_bytes(hashlib.sha256(f"repeat {group_id}".encode()).digest()[:8])
    if not term.repeat_every or draw % term.repeat_every:
        return None
    return draw // term.repeat_every % num_candidates


def _rows(candidates: Candidates, rows: list[int]) -> Candidates:
    return replace(candidates, images=candidates.images[rows], attention=candidates.attention[rows])


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _unique_names(terms: Sequence[Reward]) -> None:
    names = [term.name for term in terms]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(
            f"Two rewards are called {repeated[0]!r}, so their values could not be told apart. Give one of them another 'name'."
        )
