"""Checks that scores exist and keep the term's declaration."""

from __future__ import annotations

from rl_edit.audit.checks.case import Case
from rl_edit.audit.checks.verdict import Check, ended, failed, passed

# Share of images without a score. Training loses the group of each.
_INVALID_FAIL = 0.05


def check_validity(case: Case) -> Check:
    """Checks that every image got a score. Blank images may be refused and do not count."""
    session = case.session
    share = session.invalid / max(session.scored, 1)
    numbers = {"scored": float(session.scored), "invalid": float(session.invalid), "share": share}
    if not session.invalid:
        return passed("valid", f"All {session.scored} images got a score.", numbers)
    # One reason is enough for a sentence; the commonest costs the most groups.
    common = session.reasons.most_common(1)
    why = f": {common[0][0]}" if common else ""
    text = (
        f"{session.invalid} of {session.scored} images ({share:.1%}) got no score, "
        f"and each costs its whole group{why}"
    )
    return Check(
        name="valid",
        verdict="fail" if share > _INVALID_FAIL else "warn",
        sentence=ended(text),
        numbers=numbers,
    )


def check_range(case: Case) -> Check:
    """Checks that values are finite and in the declared range."""
    term, calls = case.session.term, case.session.out_of_contract
    declared = f"{term.low:g}..{term.high:g}"
    if not calls:
        return passed("range", f"Every value was a finite number in the declared range {declared}.")
    # Other reasons, such as a timeout, say nothing about the range.
    reason = next(
        (
            reason
            for reason in case.session.reasons
            if "outside" in reason or "not a finite" in reason
        ),
        "",
    )
    text = (
        f"{calls} call{'s' if calls > 1 else ''} returned values that the declaration rules out "
        f"(finite, {declared}, one per image)"
    )
    return failed("range", ended(f"{text}: {reason}" if reason else text), {"calls": float(calls)})
