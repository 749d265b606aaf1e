"""Records the result of a check: a verdict, one sentence, and the numbers behind it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["pass", "warn", "fail", "n/a"]
# A check that does not apply must not hide one that passes, so it is the least severe.
SEVERITY: dict[Verdict, int] = {"n/a": 0, "pass": 1, "warn": 2, "fail": 3}


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one check of one term.

    Attributes:
        name: of the check, the same in every audit. Machines may look it up.
        sentence: for a person.
        numbers: by name; NaN where one does not exist.
    """

    name: str
    verdict: Verdict
    sentence: str
    numbers: dict[str, float] = field(default_factory=dict)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Returns the most severe verdict, "n/a" of none."""
    return max(verdicts, key=SEVERITY.__getitem__, default="n/a")


def grade(value: float, limits: tuple[float, float]) -> Verdict:
    """Grades a value by two limits.

    It passes from the first limit up and fails below the second. NaN fails: both comparisons
    are false.
    """
    return "pass" if value >= limits[0] else "warn" if value >= limits[1] else "fail"


def passed(name: str, sentence: str, numbers: dict[str, float] | None = None) -> Check:
    """Makes a check that passes."""
    return Check(name=name, verdict="pass", sentence=sentence, numbers=numbers or {})


def warned(name: str, sentence: str, numbers: dict[str, float]) -> Check:
    """Makes a check that warns."""
    return Check(name=name, verdict="warn", sentence=sentence, numbers=numbers)


def failed(name: str, sentence: str, numbers: dict[str, float] | None = None) -> Check:
    """Makes a check that fails."""
    return Check(name=name, verdict="fail", sentence=sentence, numbers=numbers or {})


def not_applicable(name: str, sentence: str) -> Check:
    """Makes a check that does not apply."""
    return Check(name=name, verdict="n/a", sentence=sentence)


def claim(verdict: Verdict, subject: str, verb: str, rest: str) -> str:
    """Phrases a claim as the verdict confirms or denies it.

    ``claim("warn", "The correct edit", "beat", "noise")`` is "The correct edit does not always beat
    noise."
    """
    # "Not reliably", since a failing AUROC may still lie above chance.
    predicate = {
        "pass": f"{verb}s",
        "warn": f"does not always {verb}",
        "fail": f"does not reliably {verb}",
    }[verdict]
    return f"{subject} {predicate} {rest}."


def ended(text: str) -> str:
    """Ends ``text`` with one full stop."""
    return text if text.endswith(".") else f"{text}."
