"""Audits reward terms with corrupted edits of real tasks."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rl_edit.audit.checks import Case, Check, Expectation, Verdict, run_checks, worst
from rl_edit.audit.corruptions import LEVELS, Side
from rl_edit.audit.images import Reference, TestImages, make_test_images, reference
from rl_edit.audit.responses import AuditSession, Responses
from rl_edit.audit.total import TotalAudit
from rl_edit.errors import InputError
from rl_edit.files import without_nan
from rl_edit.measures.intervals import bootstrap
from rl_edit.rewards import Reward
from rl_edit.types import EditTask

SCHEMA = "rl-edit/audit-reward/1"
# As many as the checks use: curves and verdicts then agree.
_RESAMPLES = 500


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Score by strength of one corruption on one side.

    Attributes:
        expected: whether the term should respond to it.
        mean, low, high: over tasks, with a 95 % interval, from level 0 (the correct edit) up. Empty
            when no task has a score at every level.
        tasks: with a score at every level.
    """

    corruption: str
    side: Side
    expected: bool
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    tasks: int


@dataclass(frozen=True, kw_only=True)
class TermAudit:
    """The audit of one term.

    Attributes:
        low, high: declared range.
        example: responses to the first task.
        seconds: spent in its scoring calls.
    """

    name: str
    kind: str
    low: float
    high: float
    expected: Expectation
    checks: tuple[Check, ...]
    curves: tuple[Curve, ...]
    example: Responses
    seconds: float

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of its checks."""
        return worst(check.verdict for check in self.checks)


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The audits of all terms.

    Attributes:
        example: the first task's images, for a person to look at.
        left_out: terms that were not audited, and the reasons.
        has_targets: whether correct edits are the data's own. Otherwise masks were painted and the
            instructions replaced to say so.
        total: the audit of the run's weighted sum; None where single terms were chosen.
    """

    terms: tuple[TermAudit, ...]
    left_out: dict[str, str]
    example: TestImages
    num_tasks: int
    seed: int
    has_targets: bool
    total: TotalAudit | None = None

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of its terms and of the weighted sum."""
        weighted_sum = () if self.total is None else (self.total.verdict,)
        return worst([*(term.verdict for term in self.terms), *weighted_sum])

    def to_json(self, **about: Any) -> str:
        """Writes the audit for machines; numbers that do not exist are null."""
        content = {
            "schema": SCHEMA,
            "verdict": self.verdict,
            **about,
            "num_tasks": self.num_tasks,
            "seed": self.seed,
            # Old readers know these two words; ``has_targets`` is the name in code.
            "reference": "target" if self.has_targets else "painted",
            "levels": LEVELS,
            "left_out": self.left_out,
            "total": None if self.total is None else _total_json(self.total),
            "terms": [_term_json(term) for term in self.terms],
        }
        return json.dumps(without_nan(content), indent=2, allow_nan=False) + "\n"


def audit(
    terms: Sequence[tuple[Reward, Expectation]],
    tasks: Sequence[EditTask],
    *,
    seed: int,
    left_out: dict[str, str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Audit:
    """Scores every task's test images with every term.

    The same seed gives the same audit, as far as the terms repeat themselves.

    Args:
        terms: each with what it is expected to respond to.
        tasks: at least one. Only with two or more instructions can the wrong one be given.
        progress: called after every task of every term with the number done and the total.
    """
    if not tasks:
        raise InputError(
            "There is no task to audit on. Use data with at least one, better sixteen."
        )
    # All at once: the first task already needs another task's instruction.
    references = [reference(task) for task in tasks]
    # One session per term counts invalid scores over all tasks.
    sessions = [AuditSession(term=term) for term, _ in terms]
    responses: list[list[Responses]] = [[] for _ in terms]
    seconds = [0.0 for _ in terms]
    # Tasks are the outer loop, so that only one task's images are in memory at a time.
    for number, correct in enumerate(references):
        images = make_test_images(correct, seed=seed)
        other = _other_instruction(references, number)
        for row, session in enumerate(sessions):
            # Only scoring is timed; making the images is the audit's own cost.
            began = time.perf_counter()
            responses[row].append(session.responses(images, other_instruction=other))
            seconds[row] += time.perf_counter() - began
            progress(number * len(terms) + row + 1, len(references) * len(terms))
    cases = [
        Case(session=session, expected=expected, responses=tuple(scores), seed=seed)
        for session, (_, expected), scores in zip(sessions, terms, responses, strict=True)
    ]
    return Audit(
        terms=tuple(_term_audit(case, spent) for case, spent in zip(cases, seconds, strict=True)),
        left_out=left_out or {},
        # Made again rather than kept: the same seed gives the same images.
        example=make_test_images(references[0], seed=seed),
        num_tasks=len(tasks),
        seed=seed,
        has_targets=all(
            correct.task is task for correct, task in zip(references, tasks, strict=True)
        ),
    )


def _other_instruction(references: Sequence[Reference], number: int) -> str | None:
    """Finds another task's instruction, None if all are equal.

    The next tasks come first, and after the last one the search goes on from the first.
    """
    instruction = references[number].task.instruction
    following = (
        references[(number + offset) % len(references)].task.instruction
        for offset in range(1, len(references))
    )
    return next((other for other in following if other != instruction), None)


def _term_audit(case: Case, seconds: float) -> TermAudit:
    term = case.session.term
    # Tasks without a score of the correct edit have no graded responses, and no curve.
    keys = list(dict.fromkeys(key for response in case.scored for key in response.graded))
    return TermAudit(
        name=term.name,
        kind=term.kind,
        low=term.low,
        high=term.high,
        expected=case.expected,
        checks=run_checks(case),
        curves=tuple(_curve(case, corruption, side) for corruption, side in keys),
        example=case.responses[0],
        seconds=seconds,
    )


def _curve(case: Case, corruption: str, side: Side) -> Curve:
    rows = [
        (response.clean, *response.graded[corruption, side])
        for response in case.scored
        if (corruption, side) in response.graded
    ]
    # Complete rows only: every level is then a mean over the same tasks.
    complete = [row for row in rows if all(math.isfinite(score) for score in row)]
    levels = range(LEVELS + 1) if complete else ()
    # Each level is resampled by itself: the band shows the spread of a mean, not of a difference.
    intervals = [
        bootstrap([row[level] for row in complete], seed=case.seed, resamples=_RESAMPLES)
        for level in levels
    ]
    return Curve(
        corruption=corruption,
        side=side,
        expected=side in case.expected.sides,
        mean=tuple(interval.mean for interval in intervals),
        low=tuple(interval.low for interval in intervals),
        high=tuple(interval.high for interval in intervals),
        tasks=len(complete),
    )


def _total_json(total: TotalAudit) -> dict[str, Any]:
    return {
        "verdict": total.verdict,
        "weights": total.weights,
        "unseen": total.unseen,
        "allowed": total.allowed,
        "checks": _checks_json(total.checks),
    }


def _checks_json(checks: Sequence[Check]) -> list[dict[str, Any]]:
    return [
        {
            "name": check.name,
            "verdict": check.verdict,
            "sentence": check.sentence,
            "numbers": check.numbers,
        }
        for check in checks
    ]


def _term_json(term: TermAudit) -> dict[str, Any]:
    return {
        "name": term.name,
        "kind": term.kind,
        "verdict": term.verdict,
        "range": [term.low, term.high],
        "expects": list(term.expected.sides),
        "reads_instruction": term.expected.reads_instruction,
        "seconds": term.seconds,
        "checks": _checks_json(term.checks),
        "curves": [
            {
                # The key of the schema's first version; readers of old files know no other.
                "damage": curve.corruption,
                "side": curve.side,
                "expected": curve.expected,
                "mean": curve.mean,
                "low": curve.low,
                "high": curve.high,
                "tasks": curve.tasks,
            }
            for curve in term.curves
        ],
    }
