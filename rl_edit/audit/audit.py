"""The audit of reward terms: right edits of real tasks, damaged in known ways, scored by every term, and judged."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rl_edit.audit.checks import Case, Check, Expectation, Verdict, verdicts, worst
from rl_edit.audit.corruptions import LEVELS, Side, TestImages, exhibits, reference
from rl_edit.audit.responses import Answers, AuditSession
from rl_edit.errors import InputError
from rl_edit.measures.intervals import bootstrap
from rl_edit.rewards import Reward
from rl_edit.types import EditTask

SCHEMA = "rl-edit/audit-reward/1"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """How a score falls with one damage on one side: mean and 95 % interval over tasks, from level 0, the right edit, up."""

    damage: str
    side: Side
    expected: bool
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    tasks: int


@dataclass(frozen=True, kw_only=True)
class TermAudit:
    """One term: its verdict is the worst of its checks."""

    name: str
    kind: str
    low: float
    high: float
    expected: Expectation
    checks: tuple[Check, ...]
    curves: tuple[Curve, ...]
    example: Answers
    seconds: float

    @property
    def verdict(self) -> Verdict:
        return worst(check.verdict for check in self.checks)


@dataclass(frozen=True, kw_only=True)
class Audit:
    """All terms, and the first task with all its pictures, so that a person sees what was asked.

    Attributes:
        left_out: terms that were not audited, and why.
        has_targets: whether right edits were the data's own; otherwise the mask was painted and the instruction said so.
    """

    terms: tuple[TermAudit, ...]
    left_out: dict[str, str]
    example: TestImages
    num_tasks: int
    seed: int
    has_targets: bool

    @property
    def verdict(self) -> Verdict:
        return worst(term.verdict for term in self.terms)

    def to_json(self, **about: Any) -> str:
        """Machine-readable; numbers that do not exist are null."""
        content = {
            "schema": SCHEMA,
            "verdict": self.verdict,
            **about,
            "num_tasks": self.num_tasks,
            "seed": self.seed,
            "reference": "target" if self.has_targets else "painted",
            "levels": LEVELS,
            "left_out": self.left_out,
            "terms": [_term(term) for term in self.terms],
        }
        return json.dumps(_plain(content), indent=2, allow_nan=False) + "\n"


def audit(
    terms: Sequence[tuple[Reward, Expectation]],
    tasks: Sequence[EditTask],
    *,
    seed: int,
    left_out: dict[str, str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Audit:
    """Shows every term the damages of every task. Deterministic by ``seed``, as far as the terms are.

    Args:
        terms: each with what it is expected to respond to.
        tasks: at least one; two or more with different instructions to ask the wrong one.
    """
    if not tasks:
        raise InputError(
            "There is no task to audit on. Use data with at least one, better sixteen."
        )
    references = [reference(task) for task in tasks]
    inquiries = [AuditSession(term=term) for term, _ in terms]
    answers: list[list[Answers]] = [[] for _ in terms]
    seconds = [0.0 for _ in terms]
    example: TestImages | None = None
    for number, right in enumerate(references):
        shown = exhibits(right, seed=seed)
        example = example or shown
        said = right.task.instruction
        following = (
            references[(number + step) % len(references)].task.instruction
            for step in range(1, len(references))
        )
        other = next((instruction for instruction in following if instruction != said), None)
        for row, inquiry in enumerate(inquiries):
            began = time.perf_counter()
            answers[row].append(inquiry.answers(shown, other_instruction=other))
            seconds[row] += time.perf_counter() - began
            progress(number * len(terms) + row + 1, len(references) * len(terms))
    assert example is not None
    cases = [
        Case(inquiry=inquiry, expected=expected, answers=tuple(found), seed=seed)
        for inquiry, (_, expected), found in zip(inquiries, terms, answers, strict=True)
    ]
    return Audit(
        terms=tuple(_audited(case, taken) for case, taken in zip(cases, seconds, strict=True)),
        left_out=left_out or {},
        example=example,
        num_tasks=len(tasks),
        seed=seed,
        has_targets=all(right.task is task for right, task in zip(references, tasks, strict=True)),
    )


def _audited(case: Case, seconds: float) -> TermAudit:
    term = case.inquiry.term
    keys = list(dict.fromkeys(key for answer in case.judged for key in answer.graded))
    return TermAudit(
        name=term.name,
        kind=term.kind,
        low=term.low,
        high=term.high,
        expected=case.expected,
        checks=verdicts(case),
        curves=tuple(_curve(case, damage, side) for damage, side in keys),
        example=case.answers[0],
        seconds=seconds,
    )


def _curve(case: Case, damage: str, side: Side) -> Curve:
    rows = [(a.clean, *a.graded[damage, side]) for a in case.judged if (damage, side) in a.graded]
    whole = [row for row in rows if all(math.isfinite(score) for score in row)]
    ends = (
        [
            bootstrap([row[level] for row in whole], seed=case.seed, resamples=500)
            for level in range(LEVELS + 1)
        ]
        if whole
        else []
    )
    return Curve(
        damage=damage,
        side=side,
        expected=side in case.expected.sides,
        mean=tuple(end.mean for end in ends),
        low=tuple(end.low for end in ends),
        high=tuple(end.high for end in ends),
        tasks=len(whole),
    )


def _term(term: TermAudit) -> dict[str, Any]:
    return {
        "name": term.name,
        "kind": term.kind,
        "verdict": term.verdict,
        "range": [term.low, term.high],
        "expects": list(term.expected.sides),
        "reads_instruction": term.expected.reads_instruction,
        "seconds": term.seconds,
        "checks": [
            {
                "name": check.name,
                "verdict": check.verdict,
                "sentence": check.sentence,
                "numbers": check.numbers,
            }
            for check in term.checks
        ],
        "curves": [
            {
                "damage": curve.damage,
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


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
