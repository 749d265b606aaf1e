"""Scores candidates with the terms of a run, and lets no invented number through.

Every value is checked against its term's declaration. A value that fails a check, or was never
measured, has a status and a reason and is NaN in the table. Higher is always better there. Weights
are carried along and not applied: combining terms is the task of the credit rule.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from rl_edit.errors import InputError, ModelUnusable
from rl_edit.rewards.cache import ScoreCache
from rl_edit.rewards.term import RewardTerm
from rl_edit.scores import PerCandidate, RegionTable
from rl_edit.types import Candidates, RewardTable, Score

_LONGEST_REASON = 400


def score_candidates(
    terms: Sequence[RewardTerm], candidates: Candidates, *, group_id: str
) -> RewardTable:
    """Scores every candidate with every term, in each term's own unit.

    Higher is better, and NaN stands exactly where there is no valid score. A term is invalid where
    it raises, returns a wrong number of scores, or returns a value that is not finite or outside
    its declared range. A ``TimeoutError`` is a timeout. The reason names the reward and the value.
    Components and regions of scores without a value are NaN too.

    Raises:
        ModelUnusable: the model of a term cannot be loaded.
    """
    require_distinct_names(terms)
    started = time.perf_counter()
    checked = {term.name: _scores_of(term, candidates) for term in terms}
    repeats = {term.name: _repeated(term, candidates, checked, group_id) for term in terms}
    components = {name: _components(scored.scores) for name, scored in checked.items()}
    regions = {name: _regions(scored.scores) for name, scored in checked.items()}
    values = _values(checked.values(), num_candidates=len(candidates.images))
    missing = [s.reason for scored in checked.values() for s in scored.scores if s.value is None]
    return RewardTable(
        group_id=group_id,
        names=tuple(checked),
        weights=tuple(term.weight for term in terms),
        values=values,
        valid=~values.isnan(),
        # Without repeats, in the order of the terms.
        reasons=tuple(dict.fromkeys(missing)),
        out_of_contract=any(scored.out_of_contract for scored in checked.values()),
        components={name: columns for name, columns in components.items() if columns},
        regions={name: table for name, table in regions.items() if table is not None},
        repeats={name: column for name, column in repeats.items() if column is not None},
        seconds=time.perf_counter() - started,
        counts={
            f"{name}.{status}": number
            for name, scored in checked.items()
            for status, number in scored.counts.items()
        },
        notes=tuple(f"{term.name}: {note}" for term in terms for note in term.notes()),
    )


def require_distinct_names(terms: Sequence[RewardTerm]) -> None:
    """Refuses two terms of one name.

    Raises:
        InputError: with the name.
    """
    names = [term.name for term in terms]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(
            f"Two rewards are called {repeated[0]!r}, so nothing could separate their values. "
            "Give one of them another 'name'."
        )


@dataclass(frozen=True, kw_only=True)
class _CheckedScores:
    """One term's scores after the checks.

    Attributes:
        out_of_contract: whether the term returned something its declaration rules out.
        counts: scores by status, and of a term with a cache those recalled and those not stored.
    """

    scores: tuple[Score, ...]
    out_of_contract: bool
    counts: dict[str, int]


class _WrongCount(Exception):
    """A term returned more or fewer scores than there are candidates."""


def _scores_of(term: RewardTerm, candidates: Candidates) -> _CheckedScores:
    try:
        if term.cache is not None:
            return _recalled(term, candidates)
        return _checked(term, _computed(term, candidates))
    except ModelUnusable:
        # No other group would fare better, and each would load the model again.
        raise
    except Exception as error:
        # A broken term must cost its group, not the run, and must never look like a bad edit.
        wrong_count = isinstance(error, _WrongCount)
        failed = _refused(
            term,
            Score(
                value=None,
                reason=str(error) if wrong_count else f"raised {type(error).__name__}: {error}",
                status="timeout" if isinstance(error, TimeoutError) else "invalid",
            ),
        )
        # The error concerns the call, so no candidate has a score.
        number = len(candidates.images)
        return _CheckedScores(
            scores=(failed,) * number, out_of_contract=wrong_count, counts={failed.status: number}
        )


def _recalled(term: RewardTerm, candidates: Candidates) -> _CheckedScores:
    """Recalls scores from the cache, computes the missing ones and stores them."""
    assert term.cache is not None
    store = ScoreCache(term.cache, term.fingerprint(), reads_attention=term.needs_attention)
    keys = store.keys(candidates)
    scores = {row: score for row, key in enumerate(keys) if (score := store.get(key)) is not None}
    missing = [row for row in range(len(keys)) if row not in scores]
    if missing:
        scores |= zip(missing, _computed(term, _rows(candidates, missing)), strict=True)
    checked = _checked(term, [scores[row] for row in range(len(keys))])
    # Stored as the term gave them, before the sign of a "lower is better" term is turned.
    not_stored = [
        row for row in missing if checked.scores[row].ok and not store.put(keys[row], scores[row])
    ]
    counts = {"cached": len(keys) - len(missing), "uncached": len(not_stored)}
    return replace(checked, counts=checked.counts | counts)


def _computed(term: RewardTerm, candidates: Candidates) -> tuple[Score, ...]:
    scores = tuple(term.score(candidates))
    if len(scores) != len(candidates.images):
        raise _WrongCount(f"returned {len(scores)} scores for {len(candidates.images)} candidates")
    return scores


def _checked(term: RewardTerm, scores: Sequence[Score]) -> _CheckedScores:
    """Checks every score; those that fail have no number afterwards."""
    checked = tuple(_checked_score(term, score) for score in scores)
    return _CheckedScores(
        scores=checked,
        out_of_contract=any(
            before.ok and not after.ok for before, after in zip(scores, checked, strict=True)
        ),
        counts=dict(Counter(score.status for score in checked)),
    )


def _checked_score(term: RewardTerm, score: Score) -> Score:
    if score.value is None:
        return _refused(term, score)
    value = float(score.value)
    # The table holds single precision, in which a large double would become infinite.
    if not math.isfinite(value) or not math.isfinite(
        torch.tensor(value, dtype=torch.float32).item()
    ):
        reason = f"gave {score.value!r}, which is not a finite number"
        return _refused(term, Score(value=None, reason=reason))
    if not term.low <= value <= term.high:
        reason = f"gave {value:g}, outside its declared range {term.low:g}..{term.high:g}"
        return _refused(term, Score(value=None, reason=reason))
    return replace(score, value=-value if term.lower_is_better else value, reason="")


def _refused(term: RewardTerm, score: Score) -> Score:
    """Removes number, components and regions, and names the term in the reason."""
    text = " ".join(f"{term.name}: {score.reason or 'gave no value and no reason'}".split())
    # Reasons go into events and error messages, one line each.
    short = text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."
    return Score(value=None, reason=short, status=score.status)


def _values(
    checked: Iterable[_CheckedScores], *, num_candidates: int
) -> Float[Tensor, "group reward"]:
    columns = [[_number(score.value) for score in scored.scores] for scored in checked]
    rows = torch.tensor(columns, dtype=torch.float32).reshape(len(columns), num_candidates)
    # Contiguous, so that a product with the weights has the same bits as after the wire.
    return rows.T.contiguous()


def _components(scores: Sequence[Score]) -> dict[str, PerCandidate]:
    """Arranges the components of all candidates by name."""
    names = dict.fromkeys(name for score in scores for name in score.components)
    return {name: tuple(_number(score.components.get(name)) for score in scores) for name in names}


def _regions(scores: Sequence[Score]) -> RegionTable | None:
    """Arranges the region scores of all candidates; None where no candidate has any."""
    by_row = {row: s.regions for row, s in enumerate(scores) if s.regions is not None}
    if not by_row:
        return None
    width = max(len(regions.areas) for regions in by_row.values())
    areas = torch.full((len(scores), width), math.nan, dtype=torch.float64)
    background = torch.full((len(scores),), math.nan, dtype=torch.float64)
    for row, regions in by_row.items():
        areas[row, : len(regions.areas)] = torch.tensor(regions.areas, dtype=torch.float64)
        background[row] = regions.background
    return RegionTable(areas=areas, background=background)


def _repeated(
    term: RewardTerm,
    candidates: Candidates,
    checked: Mapping[str, _CheckedScores],
    group_id: str,
) -> PerCandidate | None:
    """Scores one candidate a second time, and subtracts its first score.

    NaN for the other candidates; None where this group repeats nothing.
    """
    # Drawn from the group's id, so that a resumed run repeats the same candidates.
    draw = int.from_bytes(hashlib.sha256(f"repeat {group_id}".encode()).digest()[:8])
    if not term.repeat_every or draw % term.repeat_every:
        return None
    repeated_row = draw // term.repeat_every % len(candidates.images)
    # A cached score would repeat itself and hide the noise.
    other = term.reseeded().model_copy(update={"cache": None})
    second = _scores_of(other, _rows(candidates, [repeated_row])).scores[0]
    difference = _number(second.value) - _number(checked[term.name].scores[repeated_row].value)
    return tuple(
        difference if row == repeated_row else math.nan for row in range(len(candidates.images))
    )


def _rows(candidates: Candidates, rows: list[int]) -> Candidates:
    return replace(candidates, images=candidates.images[rows], attention=candidates.attention[rows])


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
