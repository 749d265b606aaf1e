"""Compares the correct edit with what deserves a lower score.

These are wrong images, and the correct image under a wrong question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rl_edit.audit.checks.case import Case
from rl_edit.audit.checks.order import check_wins
from rl_edit.audit.checks.ranks import finite, win
from rl_edit.audit.checks.verdict import Check, not_applicable, passed
from rl_edit.audit.corruptions import REVERTED


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """One comparison, made once per task.

    Attributes:
        wins: by task, 1 where the correct edit scores higher. NaN where a score is missing.
        worse: the image or question, in words.
        applies: whether the term is expected to score it lower.
        otherwise: the reason it is not.
    """

    name: str
    wins: Sequence[tuple[str, float]]
    worse: str
    applies: bool = True
    otherwise: str = ""


def check_comparisons(case: Case) -> list[Check]:
    """Checks missing and misplaced edits and contradicting inputs."""
    checks = []
    for comparison in _comparisons(case):
        valid = [(task, score) for task, score in comparison.wins if math.isfinite(score)]
        # A check that does not apply differs from one without data: only the second may be a fault.
        if not comparison.applies:
            checks.append(not_applicable(comparison.name, comparison.otherwise))
        elif not valid:
            sentence = "Nothing to compare: no valid scores, or no second instruction."
            checks.append(not_applicable(comparison.name, sentence))
        else:
            tasks, wins = [task for task, _ in valid], [score for _, score in valid]
            checks.append(
                check_wins(comparison.name, wins, tasks, comparison.worse, seed=case.seed)
            )
    return checks


def check_blank(case: Case) -> Check:
    """Checks that images without content score low.

    Refusing to score them is as good as a low score.
    """
    wins: list[float] = []
    tasks: list[str] = []
    for response in case.scored:
        for score in finite(response.blanks.values()):
            wins.append(win(response.clean, score))
            tasks.append(response.task_id)
    if not wins:
        return passed("blank image", "Every blank image was refused.")
    worse = "grey, black, white, negative and static images"
    return check_wins("blank image", wins, tasks, worse, seed=case.seed)


def _comparisons(case: Case) -> tuple[_Comparison, ...]:
    inside = "inside" in case.expected.sides
    reads = case.expected.reads_instruction
    reverted = [
        (response.task_id, win(response.clean, response.graded[REVERTED, "inside"][-1]))
        for response in case.scored
        if (REVERTED, "inside") in response.graded
    ]
    # The names are keys of audit.json.
    return (
        _Comparison(
            name="no edit",
            wins=reverted,
            worse="the untouched source",
            # Where only preservation counts, the untouched source is the best image of all.
            applies=inside,
            otherwise="An untouched source is perfect for what it measures.",
        ),
        _Comparison(
            name="edit elsewhere",
            wins=_single(case, "elsewhere"),
            worse="the same edit in the wrong place",
        ),
        _Comparison(
            name="wrong instruction",
            wins=_single(case, "other instruction"),
            worse="the same image under another task's instruction",
            applies=reads,
            otherwise="It is not expected to read the instruction: "
            "a target, a caption or the source says what is right.",
        ),
        _Comparison(
            name="image order",
            wins=_single(case, "swapped"),
            worse="the same pair with source and result exchanged",
            # A measure of similarity is the same for a pair and its exchange.
            applies=inside and reads,
            otherwise="It is not a judge of what changed from source to result.",
        ),
    )


def _single(case: Case, key: str) -> list[tuple[str, float]]:
    return [
        (response.task_id, win(response.clean, response.single[key]))
        for response in case.scored
        if key in response.single
    ]
