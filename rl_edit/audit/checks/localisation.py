"""Checks that a term responds to its own place only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rl_edit.audit.checks.case import Case
from rl_edit.audit.checks.order import AUROC_FAIL, AUROC_PASS
from rl_edit.audit.checks.ranks import finite, mean, win
from rl_edit.audit.checks.verdict import (
    Check,
    Verdict,
    failed,
    grade,
    not_applicable,
    passed,
    warned,
    worst,
)

# Response to patches elsewhere over response to equal patches at home. A windowed metric sees a few
# pixels across the mask's edge.
_SPILL_PASS, _SPILL_FAIL = 0.25, 0.5


@dataclass(frozen=True, kw_only=True)
class _Distances:
    """Changes of one task's score, by place of the patch."""

    task_id: str
    near: list[float]
    far: list[float]


def check_localisation(case: Case) -> Check:
    """Compares equal patches inside and outside the mask.

    A term of one side must respond to its own.
    """
    side = case.expected.one_side
    if side is None:
        return not_applicable(
            "localisation",
            "One number for the whole image has no place; see the response on either side.",
        )
    distances = _distances(case, part="")
    # Patches are recorded with the mask's inside as home.
    if side == "outside":
        distances = [
            _Distances(task_id=task.task_id, near=task.far, far=task.near) for task in distances
        ]
    return _check_place(
        case,
        "localisation",
        distances,
        near=f"corruption {side}",
        far="equally strong corruption on the other side",
    )


def check_parts(case: Case) -> list[Check]:
    """Checks every region's part against the other regions."""
    parts = sorted({part for response in case.scored for part in response.patches if part})
    return [
        _check_place(
            case,
            f"localisation of {part}",
            _distances(case, part=part),
            near=f"corruption in {'the background' if part == 'background' else part}",
            far="equally strong corruption elsewhere",
        )
        for part in parts
    ]


def _distances(case: Case, *, part: str) -> list[_Distances]:
    """Collects valid distances; tasks without any on one of the sides are left out."""
    tasks = [
        _Distances(
            task_id=response.task_id,
            # Each patch by itself: a missing score costs one patch and not its pair.
            near=finite(patch.home for patch in response.patches.get(part, ())),
            far=finite(patch.away for patch in response.patches.get(part, ())),
        )
        for response in case.scored
    ]
    return [task for task in tasks if task.near and task.far]


def _check_place(
    case: Case, name: str, tasks: Sequence[_Distances], *, near: str, far: str
) -> Check:
    """Grades the AUROC and the share of the response that leaks.

    The AUROC is computed within each task. It compares every patch at home with every patch
    elsewhere.
    """
    if not tasks:
        return not_applicable(name, "No task gave valid scores to compare.")
    auroc = case.interval(
        [mean([win(a, b) for a in task.near for b in task.far]) for task in tasks],
        [task.task_id for task in tasks],
    )
    # The spill is a ratio of means over all patches: a task without response weighs nothing.
    home = mean([distance for task in tasks for distance in task.near])
    away = mean([distance for task in tasks for distance in task.far])
    spill = away / home if home else math.inf
    numbers = {**{f"auroc_{key}": value for key, value in auroc.items()}, "spill": spill}
    verdict = worst(
        (
            grade(auroc["mean"], (AUROC_PASS, AUROC_FAIL)),
            grade(-spill, (-_SPILL_PASS, -_SPILL_FAIL)),
        )
    )
    shown = _shown(auroc, spill)
    # As far below chance as a fail may lie above it: the two sides are exchanged.
    if verdict != "pass" and auroc["mean"] < 1 - AUROC_FAIL:
        return failed(
            name,
            f"Inverted: {far} moves it more than {near} ({shown}). "
            "Is the mask the wrong way round?",
            numbers,
        )
    return _located(verdict, name, near=near, far=far, shown=shown, numbers=numbers)


def _located(
    verdict: Verdict, name: str, *, near: str, far: str, shown: str, numbers: dict[str, float]
) -> Check:
    if verdict == "pass":
        return passed(name, f"It responds to {near} and not to {far} ({shown}).", numbers)
    if verdict == "fail":
        return failed(
            name,
            f"Blind to the place: {far} moves it about as much as {near} ({shown}).",
            numbers,
        )
    sentence = f"It responds to {near}, but not always more than to {far} ({shown})."
    return warned(name, sentence, numbers)


def _shown(auroc: dict[str, float], spill: float) -> str:
    # Without any response at home there is nothing to take a share of.
    leak = (
        f"{spill:.0%} of the response leaks"
        if math.isfinite(spill)
        else "none of the response is where it belongs"
    )
    return f"AUROC {auroc['mean']:.2f} [{auroc['low']:.2f}, {auroc['high']:.2f}], {leak}"
