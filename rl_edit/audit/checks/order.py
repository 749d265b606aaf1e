"""Checks that more corruption scores lower, by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rl_edit.audit.checks.case import Case, interval_over_tasks
from rl_edit.audit.checks.ranks import kendall, win
from rl_edit.audit.checks.response import FLAT
from rl_edit.audit.checks.verdict import Check, claim, failed, grade, not_applicable
from rl_edit.audit.corruptions import LEVELS, Side

# Mean Kendall tau between strength and score: 1 is perfect order, 0 none, -1 reversed.
_TAU_PASS, _TAU_FAIL = 0.8, 0.5
# A side's fall against the fall over all sides. Less is what leaks across the mask's edge.
_SHARE_FAIL = 0.1
# Share of pairs in which the better image scores higher; 0.5 is chance.
AUROC_PASS, AUROC_FAIL = 0.9, 0.75


def check_order(case: Case, side: Side) -> Check:
    """Checks Kendall's tau of strength against score."""
    # Check names and number names are keys of audit.json; they keep the words of its first version.
    name = f"order of damages {side}"
    if side not in case.expected.sides:
        return not_applicable(name, f"It is not expected to respond {side} the mask.")
    corruptions = case.corruptions(side)
    tau, by_corruption = _taus(case, corruptions, side)
    numbers = {f"tau_{key}": value for key, value in tau.items()}
    numbers |= {f"tau_{corruption}": value for corruption, value in by_corruption.items()}
    rewarded = [corruption for corruption in corruptions if _is_rewarded(case, corruption, side)]
    shown = f"Kendall tau {tau['mean']:.2f} [{tau['low']:.2f}, {tau['high']:.2f}]"
    # From the most to the least severe: a reader should see the worst finding.
    if tau["mean"] < 0 or len(rewarded) == len(corruptions):
        return failed(name, f"Inverted: more corruption {side} scores higher ({shown}).", numbers)
    if rewarded:
        return failed(
            name,
            f"It rewards {' and '.join(rewarded)} {side}: "
            f"with it an image scores higher than the correct edit ({shown}).",
            numbers,
        )
    share = numbers["share_of_fall"] = case.fall_on((side,)) / case.fall if case.fall else math.nan
    if share < _SHARE_FAIL:
        return failed(
            name,
            f"Corruption {side} hardly counts: "
            f"the worst costs {share:.1%} of the worst on the other side.",
            numbers,
        )
    verdict = grade(tau["mean"], (_TAU_PASS, _TAU_FAIL))
    sentence = claim(verdict, f"More corruption {side}", "score", f"lower ({shown})")
    return Check(name=name, verdict=verdict, sentence=sentence, numbers=numbers)


def check_separation(case: Case, side: Side) -> Check:
    """Compares the correct edit with the grossest corruptions."""
    name = f"damaged from clean {side}"
    if side not in case.expected.sides:
        return not_applicable(name, f"It is not expected to respond {side} the mask.")
    wins: list[float] = []
    tasks: list[str] = []
    for response in case.scored:
        for (_, where), row in response.graded.items():
            # The last level is the grossest.
            if where == side and math.isfinite(row[-1]):
                wins.append(win(response.clean, row[-1]))
                tasks.append(response.task_id)
    worse = f"the same edit grossly corrupted {side}"
    return check_wins(name, wins, tasks, worse, seed=case.seed)


def check_wins(
    name: str, wins: Sequence[float], tasks: Sequence[str], worse: str, *, seed: int
) -> Check:
    """Grades how often the correct edit beats ``worse``."""
    auroc = interval_over_tasks(wins, tasks, seed=seed)
    verdict = grade(auroc["mean"], (AUROC_PASS, AUROC_FAIL))
    shown = f"AUROC {auroc['mean']:.2f} [{auroc['low']:.2f}, {auroc['high']:.2f}]"
    return Check(
        name=name,
        verdict=verdict,
        sentence=claim(verdict, "The correct edit", "beat", f"{worse} ({shown})"),
        numbers={f"auroc_{key}": value for key, value in auroc.items()},
    )


def _taus(
    case: Case, corruptions: Sequence[str], side: Side
) -> tuple[dict[str, float], dict[str, float]]:
    """Computes tau over all corruptions, with its interval, and the mean tau of each."""
    taus: list[float] = []
    tasks: list[str] = []
    by_corruption: dict[str, float] = {}
    for corruption in corruptions:
        valid = _valid_taus(case, corruption, side)
        by_corruption[corruption] = case.interval(list(valid.values()), list(valid))["mean"]
        taus += valid.values()
        tasks += valid
    # A task has one tau per corruption, so whole tasks are resampled.
    return case.interval(taus, tasks), by_corruption


def _valid_taus(case: Case, corruption: str, side: Side) -> dict[str, float]:
    """Computes tau by task, with the correct edit as level 0."""
    taus = {
        response.task_id: kendall((response.clean, *response.graded[corruption, side]))
        for response in case.scored
        if (corruption, side) in response.graded
    }
    return {task: tau for task, tau in taus.items() if math.isfinite(tau)}


def _is_rewarded(case: Case, corruption: str, side: Side) -> bool:
    """Tests whether some level scores higher than the correct edit.

    The gain must be beyond doubt (its interval excludes zero) and more than a trifle.
    """
    rows = [
        (response, response.graded[corruption, side])
        for response in case.scored
        if (corruption, side) in response.graded
    ]
    # A level by itself may gain although the tau over all of them is positive.
    for level in range(LEVELS):
        gains = [
            (response.task_id, row[level] - response.clean)
            for response, row in rows
            if math.isfinite(row[level])
        ]
        gain = case.interval([gain for _, gain in gains], [task for task, _ in gains])
        if gain["low"] > 0 and gain["mean"] > FLAT * abs(case.fall):
            return True
    return False
