"""Verdicts: each check turns the answers of one term into pass, warn, fail or n/a, one sentence, and the numbers behind it.

What a term ought to respond to is declared, never inferred from its answers: a check that takes the answers for the truth
cannot find an inverted one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from rl_edit.audit.corruptions import LEVELS, SIDES, UNDONE, Side
from rl_edit.audit.responses import Answers, AuditSession
from rl_edit.errors import InputError
from rl_edit.measures.intervals import Interval, bootstrap
from rl_edit.rewards import Reward

Verdict = Literal["pass", "warn", "fail", "n/a"]
SEVERITY: dict[Verdict, int] = {"n/a": 0, "pass": 1, "warn": 2, "fail": 3}
Expects = Literal["inside", "outside", "both"]

DECLARED: dict[str, Expects] = {
    "shapes_judge": "both",
    "editscore": "both",
    "region_judge": "both",
    "preservation": "outside",
    "psnr": "outside",
    "ssim": "outside",
    "lpips": "outside",
    "clip": "inside",
    "composite": "inside",
}
"""What the built-in kinds respond to. A class may say it itself, in an attribute ``expects``."""

# Mean Kendall tau between strength and score: 1 is perfect order, 0 none, -1 reversed.
_TAU_PASS, _TAU_FAIL = 0.8, 0.5
# A side's own fall against the whole: what leaks across the mask's edge is no response.
_SHARE_FAIL = 0.1
# Share of pairs in which the better picture scores higher; 0.5 is a coin.
_AUROC_PASS, _AUROC_FAIL = 0.9, 0.75
# How much of a dab at home shows when it is elsewhere. Windowed metrics see a few pixels across the mask's edge.
_SPILL_PASS, _SPILL_FAIL = 0.25, 0.5
# Share of the declared range between a right edit and the worst of its damages.
_USE_PASS, _USE_FAIL = 0.05, 0.01
# Of the whole fall: less than the first is hardly any, less than the second is a tie; and how many ties are too many.
_FLAT, _TIE, _TIES_FAIL = 0.01, 1e-4, 0.5
# Repeats: their deviation against that of differently damaged pictures, and the share that jumps by half the whole fall.
_REPEAT_PASS, _REPEAT_FAIL, _JUMPS_FAIL = 0.1, 0.5, 0.02
_INVALID_FAIL = 0.05
# Doubling every pixel may change a windowed metric a little; a sum over pixels grows fourfold.
_GROWTH_PASS, _GROWTH_FAIL = 1.5, 2.5
# A straight line through score against background PSNR, in dB.
_LINE_DB, _OFFSET_DB = 0.1, 0.15
_CHANNEL_SLIP_DB = -10 * math.log10(3)

_NOT: dict[Verdict, str] = {"pass": "", "warn": "not always: ", "fail": "not so: "}


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What a term is there for.

    Attributes:
        sides: where damage must lower it.
        reads_instruction: whether the same picture must score lower under another instruction.
    """

    sides: tuple[Side, ...]
    reads_instruction: bool

    @property
    def one_side(self) -> Side | None:
        return self.sides[0] if len(self.sides) == 1 else None


def expected_of(
    term: Reward, given: str | None, *, reads_instruction: bool | None = None
) -> Expectation:
    """From what is given, else the term's own attributes ``expects`` and ``reads_instruction``, else the built-in kinds.

    A term that answers for the inside must know what was asked: from the instruction, unless it reads a target or a caption.
    """
    said = given or getattr(term, "expects", None) or DECLARED.get(term.kind)
    if said not in get_args(Expects):
        what = f"is said to respond to {said!r}" if said else "does not say what it responds to"
        raise InputError(
            f"Reward {term.name!r} {what}, so right and wrong answers could not be told apart. "
            "Give --expects inside, outside or both, with --term NAME when the rewards differ."
        )
    sides: tuple[Side, ...] = (
        SIDES if said == "both" else ("inside",) if said == "inside" else ("outside",)
    )
    if reads_instruction is None:
        reads_instruction = bool(
            getattr(
                term,
                "reads_instruction",
                "inside" in sides and not term.requires & {"target", "caption"},
            )
        )
    return Expectation(sides=sides, reads_instruction=reads_instruction)


@dataclass(frozen=True, kw_only=True)
class Check:
    name: str
    verdict: Verdict
    sentence: str
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything the checks of one term look at.

    Attributes:
        fall: mean over tasks of the score of the right edit minus that of its worst expected damage.
    """

    inquiry: AuditSession
    expected: Expectation
    answers: tuple[Answers, ...]
    seed: int

    @property
    def judged(self) -> tuple[Answers, ...]:
        """Tasks whose right edit has a score; nothing can be compared in the others."""
        return tuple(answer for answer in self.answers if math.isfinite(answer.clean))

    def curves(self, side: Side) -> list[str]:
        """Damages that exist on ``side``."""
        return list(
            dict.fromkeys(
                damage for answer in self.judged for damage, where in answer.graded if where == side
            )
        )

    @property
    def fall(self) -> float:
        return self.fall_on(self.expected.sides)

    def fall_on(self, sides: Sequence[Side]) -> float:
        falls = []
        for answer in self.judged:
            scores = _finite(
                score for (_, side), row in answer.graded.items() if side in sides for score in row
            )
            if scores:
                falls.append(answer.clean - min(scores))
        return _mean(falls)

    def interval(self, values: Sequence[float], tasks: Sequence[str]) -> dict[str, float]:
        if not values:
            return {"mean": math.nan, "low": math.nan, "high": math.nan, "tasks": 0.0}
        found: Interval = bootstrap(values, seed=self.seed, resamples=500, groups=tasks)
        return {"mean": found.mean, "low": found.low, "high": found.high, "tasks": float(found.n)}


def verdicts(case: Case) -> tuple[Check, ...]:
    """All checks of one term, in the order in which a reader should look at them."""
    checks = [_valid(case), _range(case)]
    if not case.judged:
        return (
            *checks,
            _fail("response", "No right edit has a valid score, so nothing else can be checked."),
        )
    checks += [
        _response(case),
        *(_monotone(case, side) for side in SIDES),
        *(_separates(case, side) for side in SIDES),
    ]
    checks += [
        _localised(case),
        *_localised_parts(case),
        _repeats(case),
        *_singles(case),
        _blank(case),
        _size(case),
        _decibel(case),
    ]
    return tuple(checks)


def worst(found: Iterable[Verdict]) -> Verdict:
    return max(found, key=SEVERITY.__getitem__, default="n/a")


def _valid(case: Case) -> Check:
    inquiry = case.inquiry
    share = inquiry.invalid / max(inquiry.scored, 1)
    numbers = {"scored": float(inquiry.scored), "invalid": float(inquiry.invalid), "share": share}
    if not inquiry.invalid:
        return _pass("valid", f"All {inquiry.scored} pictures got a score.", numbers)
    common = inquiry.reasons.most_common(1)
    why = f": {common[0][0]}" if common else ""
    text = f"{inquiry.invalid} of {inquiry.scored} pictures ({share:.1%}) got no score, and each costs its whole group{why}"
    return Check(
        name="valid",
        verdict="fail" if share > _INVALID_FAIL else "warn",
        sentence=_ended(text),
        numbers=numbers,
    )


def _range(case: Case) -> Check:
    term, broken = case.inquiry.term, case.inquiry.broken
    declared = f"{term.low:g}..{term.high:g}"
    if not broken:
        return _pass("range", f"Every value was a finite number in the declared range {declared}.")
    reason = next(
        (
            reason
            for reason in case.inquiry.reasons
            if "outside" in reason or "not a finite" in reason
        ),
        "",
    )
    text = f"{broken} call{'s' if broken > 1 else ''} returned what the declaration rules out (finite, {declared}, one a picture)"
    return _fail("range", _ended(f"{text}: {reason}" if reason else text), {"calls": float(broken)})


def _response(case: Case) -> Check:
    """Constant, hardly moving, blind to mild damage, or a step."""
    term, fall = case.inquiry.term, case.fall
    scores = _finite(
        s
        for a in case.judged
        for row in (*a.graded.values(), tuple(a.blanks.values()), (a.clean,))
        for s in row
    )
    width = term.high - term.low
    use = fall / width if math.isfinite(width) else math.nan
    numbers = {"fall": fall, "share_of_range": use, "lowest": min(scores), "highest": max(scores)}
    if min(scores) == max(scores):
        return _fail(
            "response",
            f"Constant: every picture scored {min(scores):g}, so every advantage would be zero.",
            numbers,
        )
    if math.isnan(fall):
        return _fail("response", "No damaged picture has a valid score.", numbers)
    if fall <= 0:
        return _fail(
            "response",
            f"No damage {' and '.join(case.expected.sides)} the mask lowers the score.",
            numbers,
        )
    levels = [
        _mean([(a.clean - row[level]) / fall for a, row in _expected_rows(case)])
        for level in range(LEVELS)
    ]
    numbers |= {f"fall_at_level_{level + 1}": value for level, value in enumerate(levels)}
    if use < _USE_FAIL:
        return _fail(
            "response",
            f"Flat: even the worst damage moves it by only {use:.2%} of its declared range.",
            numbers,
        )
    ties = [
        abs(a.clean - row[level]) < _TIE * fall
        for a, row in _expected_rows(case)
        for level in range(LEVELS // 2)
    ]
    numbers["ties_with_clean"] = sum(ties) / max(len(ties), 1)
    if numbers["ties_with_clean"] > _TIES_FAIL:
        return _fail(
            "response",
            f"Saturated: {numbers['ties_with_clean']:.0%} of mild damages (levels 1 to {LEVELS // 2}) tie with the right edit.",
            numbers,
        )
    if use < _USE_PASS:
        return _warn(
            "response",
            f"The worst damage moves it by only {use:.1%} of its declared range; declare the range it uses.",
            numbers,
        )
    if levels[0] < _FLAT:
        return _warn(
            "response",
            "The mildest damages hardly lower it: nearly right edits come close to a tie.",
            numbers,
        )
    if levels[0] > 1 - _FLAT:
        return _warn(
            "response",
            "The mildest damages already cost everything: it says right or wrong, not how wrong.",
            numbers,
        )
    return _pass(
        "response",
        f"Damage lowers it by up to {fall:.3g} and already shows at the mildest level.",
        numbers,
    )


def _monotone(case: Case, side: Side) -> Check:
    """Kendall's tau of strength against score, by damage and over all."""
    name = f"order of damages {side}"
    if side not in case.expected.sides:
        return _not_asked(name, f"It is not expected to respond {side} the mask.")
    taus: list[float] = []
    tasks: list[str] = []
    by_damage: dict[str, dict[str, float]] = {}
    for damage in case.curves(side):
        pairs = [
            (a.task_id, kendall((a.clean, *a.graded[damage, side])))
            for a in case.judged
            if (damage, side) in a.graded
        ]
        known = [(task, tau) for task, tau in pairs if math.isfinite(tau)]
        by_damage[damage] = case.interval([tau for _, tau in known], [task for task, _ in known])
        tasks += [task for task, _ in known]
        taus += [tau for _, tau in known]
    overall = case.interval(taus, tasks)
    numbers = {f"tau_{key}": value for key, value in overall.items()}
    numbers |= {f"tau_{damage}": found["mean"] for damage, found in by_damage.items()}
    told = f"Kendall tau {overall['mean']:.2f} [{overall['low']:.2f}, {overall['high']:.2f}]"
    pays = [damage for damage in by_damage if _pays(case, damage, side)]
    if overall["mean"] < 0 or len(pays) == len(by_damage):
        return _fail(name, f"Inverted: more damage {side} scores higher ({told}).", numbers)
    if pays:
        return _fail(
            name,
            f"It pays to add {' and '.join(pays)} {side}: the right edit scores less than with it ({told}).",
            numbers,
        )
    share = numbers["share_of_fall"] = case.fall_on((side,)) / case.fall if case.fall else math.nan
    if share < _SHARE_FAIL:
        return _fail(
            name,
            f"Damage {side} hardly counts: the worst costs {share:.1%} of what the worst on the other side does.",
            numbers,
        )
    found = _grade(overall["mean"], (_TAU_PASS, _TAU_FAIL))
    claim = f"{_NOT[found]}more damage {side} scores lower ({told})."
    return Check(name=name, verdict=found, sentence=_capital(claim), numbers=numbers)


def _pays(case: Case, damage: str, side: Side) -> bool:
    """Whether at some level the damaged picture scores higher than the right edit, beyond doubt and by more than a trifle."""
    rows = [(a, a.graded[damage, side]) for a in case.judged if (damage, side) in a.graded]
    for level in range(LEVELS):
        gains = [(a.task_id, row[level] - a.clean) for a, row in rows if math.isfinite(row[level])]
        found = case.interval([gain for _, gain in gains], [task for task, _ in gains])
        if found["low"] > 0 and found["mean"] > _FLAT * abs(case.fall):
            return True
    return False


def _separates(case: Case, side: Side) -> Check:
    """The right edit against the grossest damage."""
    name = f"damaged from clean {side}"
    if side not in case.expected.sides:
        return _not_asked(name, f"It is not expected to respond {side} the mask.")
    wins: list[float] = []
    tasks: list[str] = []
    for answer in case.judged:
        for (_, where), row in answer.graded.items():
            if where == side and math.isfinite(row[-1]):
                wins.append(_win(answer.clean, row[-1]))
                tasks.append(answer.task_id)
    return _compared(
        case, name, wins, tasks, f"the right edit beats the same edit grossly damaged {side}"
    )


def _localised(case: Case) -> Check:
    """Damage of equal strength inside and outside: a term with one side must feel its own."""
    side = case.expected.one_side
    if side is None:
        return _not_asked(
            "localisation",
            "One number for the whole picture has no place; see the response on either side.",
        )
    inside = side == "inside"
    pairs = [
        (a.task_id, [(d.home, d.away) if inside else (d.away, d.home) for d in a.dabs.get("", ())])
        for a in case.judged
    ]
    return _located(
        case, "localisation", pairs, f"damage {side}", "equally strong damage on the other side"
    )


def _localised_parts(case: Case) -> list[Check]:
    """Every part that a term reports for a region must feel that region and no other."""
    parts = sorted({part for a in case.judged for part in a.dabs if part})
    return [
        _located(
            case,
            f"localisation of {part}",
            [(a.task_id, [(d.home, d.away) for d in a.dabs.get(part, ())]) for a in case.judged],
            f"damage in {part}",
            "equally strong damage elsewhere",
        )
        for part in parts
    ]


def _located(
    case: Case,
    name: str,
    pairs: Sequence[tuple[str, list[tuple[float, float]]]],
    here: str,
    there: str,
) -> Check:
    """AUROC within each task (every dab here against every dab there) and how much of the response leaks."""
    wins: list[float] = []
    tasks: list[str] = []
    homes: list[float] = []
    aways: list[float] = []
    for task, dabs in pairs:
        near, far = _finite(home for home, _ in dabs), _finite(away for _, away in dabs)
        if near and far:
            wins.append(_mean([_win(a, b) for a in near for b in far]))
            tasks.append(task)
            homes += near
            aways += far
    if not wins:
        return _not_asked(name, "No task gave valid scores to compare.")
    auroc = case.interval(wins, tasks)
    spill = _mean(aways) / _mean(homes) if _mean(homes) else math.inf
    numbers = {**{f"auroc_{key}": value for key, value in auroc.items()}, "spill": spill}
    leaks = (
        f"{spill:.0%} of the response leaks"
        if math.isfinite(spill)
        else "none of the response is where it belongs"
    )
    told = f"AUROC {auroc['mean']:.2f} [{auroc['low']:.2f}, {auroc['high']:.2f}], {leaks}"
    found = worst(
        (
            _grade(auroc["mean"], (_AUROC_PASS, _AUROC_FAIL)),
            _grade(-spill, (-_SPILL_PASS, -_SPILL_FAIL)),
        )
    )
    if found == "pass":
        return _pass(name, f"It feels {here} and not {there} ({told}).", numbers)
    if auroc["mean"] < 1 - _AUROC_FAIL:
        return _fail(
            name,
            f"Inverted: {there} moves it more than {here} ({told}). Is the mask the wrong way round?",
            numbers,
        )
    if found == "fail":
        return _fail(
            name, f"Blind to the place: {there} moves it about as much as {here} ({told}).", numbers
        )
    return _warn(name, f"Not always: it feels {here} and not {there} ({told}).", numbers)


def _repeats(case: Case) -> Check:
    """The same picture, again, alone and in company; random draws get other seeds."""
    rows = [row for a in case.judged for picture in a.repeats if len(row := _finite(picture)) > 1]
    spread = [
        float(np.std(_finite((a.clean, *(s for _, row in _rows_of(case, a) for s in row)))))
        for a in case.judged
    ]
    if not rows:
        return _not_asked("repeats", "No picture was scored twice.")
    noise = math.sqrt(_mean([float(np.var(row)) for row in rows]))
    signal = _mean(spread)
    largest = max(max(row) - min(row) for row in rows)
    jumps = [
        abs(score - float(np.median(row))) > 0.5 * abs(case.fall) for row in rows for score in row
    ]
    share = sum(jumps) / len(jumps)
    ratio = noise / signal if signal else (math.inf if noise else 0.0)
    numbers = {
        "noise": noise,
        "signal": signal,
        "noise_to_signal": ratio,
        "largest_gap": largest,
        "jumps": share,
    }
    # What single precision rounds differently in another company is no noise.
    if ratio < 1e-5 and not share:
        return _pass(
            "repeats", "The same picture always gets the same score, alone and in company.", numbers
        )
    told = f"repeats differ by {noise:.3g} (deviation) where damages differ by {signal:.3g}"
    if largest and share > _JUMPS_FAIL:
        return _fail(
            "repeats",
            f"The same picture jumps by half the scale in {share:.1%} of repeats: {told}.",
            numbers,
        )
    found = _grade(-ratio, (-_REPEAT_PASS, -_REPEAT_FAIL))
    return Check(
        name="repeats",
        verdict=found,
        sentence=f"The same picture gets different scores: {told}.",
        numbers=numbers,
    )


def _singles(case: Case) -> list[Check]:
    """Pictures and questions that deserve less than the right edit, each asked once a task."""
    inside = "inside" in case.expected.sides
    reads = case.expected.reads_instruction
    undone = [
        (a.task_id, _win(a.clean, a.graded[UNDONE, "inside"][-1]))
        for a in case.judged
        if (UNDONE, "inside") in a.graded
    ]

    def single(key: str) -> list[tuple[str, float]]:
        return [(a.task_id, _win(a.clean, a.single[key])) for a in case.judged if key in a.single]

    planned: tuple[tuple[str, bool, list[tuple[str, float]], str, str], ...] = (
        (
            "no edit",
            inside,
            undone,
            "the right edit beats the untouched source",
            "An untouched source is perfect for what it measures.",
        ),
        (
            "edit elsewhere",
            True,
            single("elsewhere"),
            "the right edit beats the same edit in the wrong place",
            "",
        ),
        (
            "wrong instruction",
            reads,
            single("other instruction"),
            "the right edit beats the same picture under another task's instruction",
            "It is not expected to read the instruction: a target, a caption or the source says what is right.",
        ),
        (
            "image order",
            inside and reads,
            single("swapped"),
            "the right edit beats the same pair with source and result exchanged",
            "It is not a judge of what changed from source to result.",
        ),
    )
    checks = []
    for name, asked, wins, claim, why_not in planned:
        known = [(task, win) for task, win in wins if math.isfinite(win)]
        if not asked or not known:
            checks.append(
                _not_asked(
                    name,
                    why_not
                    if not asked
                    else "Nothing to compare: no valid scores, or no second instruction.",
                )
            )
        else:
            checks.append(
                _compared(case, name, [win for _, win in known], [task for task, _ in known], claim)
            )
    return checks


def _blank(case: Case) -> Check:
    """A judge that is shown nothing must not be pleased; refusing is as good as a low score."""
    wins: list[float] = []
    tasks: list[str] = []
    for answer in case.judged:
        for score in _finite(answer.blanks.values()):
            wins.append(_win(answer.clean, score))
            tasks.append(answer.task_id)
    if not wins:
        return _pass("blank image", "Every blank picture was refused.")
    return _compared(
        case,
        "blank image",
        wins,
        tasks,
        "the right edit beats grey, black, white, negative and static pictures",
    )


def _size(case: Case) -> Check:
    growth = [
        (small, large)
        for a in case.judged
        for small, large in (a.growth,)
        if math.isfinite(small) and math.isfinite(large)
    ]
    small, large = _mean([pair[0] for pair in growth]), _mean([pair[1] for pair in growth])
    if not growth or abs(small) < _FLAT * abs(case.fall) or not small:
        return _not_asked("image size", "The tint used here does not move the score.")
    factor = large / small
    numbers = {"factor": factor}
    told = f"the same damage costs {factor:.2f} times as much when every pixel is doubled"
    found = _grade(
        -max(factor, 1 / factor) if factor > 0 else -math.inf, (-_GROWTH_PASS, -_GROWTH_FAIL)
    )
    if found == "pass":
        return _pass("image size", f"Independent of the picture's size: {told}.", numbers)
    cause = (
        "it grows with the picture, as a sum over pixels does"
        if factor > 1
        else "it changes with the picture's size"
    )
    return Check(
        name="image size", verdict=found, sentence=f"Not a mean: {cause}; {told}.", numbers=numbers
    )


def _decibel(case: Case) -> Check:
    """Where the score is a straight line in background PSNR, whether its zero is where PSNR's is."""
    name = "PSNR convention"
    if case.expected.one_side != "outside":
        return _not_asked(name, "It is not a measure of the background alone.")
    points = np.array(
        [
            (db, s)
            for a in case.judged
            for damage, row in a.decibel.items()
            for db, s in _points(a, damage, row)
        ]
    )
    if len(points) < 8 or np.ptp(points[:, 1]) == 0:
        return _not_asked(name, "Too few different scores.")
    # The ends of a clipped scale are no part of the line.
    inner = points[(points[:, 1] > points[:, 1].min()) & (points[:, 1] < points[:, 1].max())]
    if len(inner) < 8 or np.ptp(inner[:, 0]) == 0:
        return _not_asked(name, "Too few scores between its ends.")
    slope, zero = np.polyfit(inner[:, 0], inner[:, 1], 1)
    if not slope or float(np.std(inner[:, 1] - slope * inner[:, 0] - zero)) / abs(slope) > _LINE_DB:
        return _not_asked(name, "The score is no straight line in background PSNR.")
    offset = float(zero / slope)
    numbers = {"offset_db": offset, "score_per_db": float(slope)}
    if abs(offset - _CHANNEL_SLIP_DB) < _OFFSET_DB:
        text = f"{offset:.2f} dB off the masked PSNR: a squared error summed over three channels and divided by one channel's pixels."
        return _warn(
            name,
            f"{text} Advantages are the same; clipping points and published numbers are not.",
            numbers,
        )
    if abs(offset) < _OFFSET_DB:
        return _pass(name, f"It is the masked PSNR ({float(slope):.3g} a dB).", numbers)
    return _pass(name, f"It is a straight line in masked PSNR, zero at {-offset:.2f} dB.", numbers)


def kendall(scores: Sequence[float]) -> float:
    """Tau-b between strength (the position) and falling score: 1 when every step lowers it, 0 when none changes it.

    Positions without a score are left out; NaN when fewer than two remain.
    """
    known = _finite(scores)
    if len(known) < 2:
        return math.nan
    steps = [
        np.sign(known[i] - known[j]) for i in range(len(known)) for j in range(i + 1, len(known))
    ]
    untied = sum(step != 0 for step in steps)
    return float(sum(steps) / math.sqrt(len(steps) * untied)) if untied else 0.0


def _compared(
    case: Case, name: str, wins: Sequence[float], tasks: Sequence[str], claim: str
) -> Check:
    found = case.interval(wins, tasks)
    verdict = _grade(found["mean"], (_AUROC_PASS, _AUROC_FAIL))
    sentence = f"{_NOT[verdict]}{claim} (AUROC {found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}])."
    return Check(
        name=name,
        verdict=verdict,
        sentence=_capital(sentence),
        numbers={f"auroc_{key}": value for key, value in found.items()},
    )


def _expected_rows(case: Case) -> list[tuple[Answers, tuple[float, ...]]]:
    return [
        (a, row)
        for a in case.judged
        for _, row in _rows_of(case, a)
        if all(math.isfinite(score) for score in row)
    ]


def _rows_of(case: Case, answer: Answers) -> list[tuple[str, tuple[float, ...]]]:
    return [
        (damage, row)
        for (damage, side), row in answer.graded.items()
        if side in case.expected.sides
    ]


def _points(answer: Answers, damage: str, decibel: Sequence[float]) -> list[tuple[float, float]]:
    return [
        (db, s)
        for db, s in zip(decibel, answer.graded[damage, "outside"], strict=True)
        if math.isfinite(s) and math.isfinite(db)
    ]


def _win(better: float, worse: float) -> float:
    if not (math.isfinite(better) and math.isfinite(worse)):
        return math.nan
    return float(better > worse) + 0.5 * float(better == worse)


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _grade(value: float, limits: tuple[float, float]) -> Verdict:
    """``limits``: passes from the first up, fails below the second."""
    return "pass" if value >= limits[0] else "warn" if value >= limits[1] else "fail"


def _pass(name: str, sentence: str, numbers: dict[str, float] | None = None) -> Check:
    return Check(name=name, verdict="pass", sentence=sentence, numbers=numbers or {})


def _warn(name: str, sentence: str, numbers: dict[str, float]) -> Check:
    return Check(name=name, verdict="warn", sentence=sentence, numbers=numbers)


def _fail(name: str, sentence: str, numbers: dict[str, float] | None = None) -> Check:
    return Check(name=name, verdict="fail", sentence=sentence, numbers=numbers or {})


def _not_asked(name: str, sentence: str) -> Check:
    return Check(name=name, verdict="n/a", sentence=sentence)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _ended(text: str) -> str:
    return text if text.endswith(".") else f"{text}."
