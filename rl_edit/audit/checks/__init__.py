"""Turns the responses of a term into verdicts.

Every other file of this folder is one kind of check.
What a term is expected to respond to is declared, never inferred from its scores: a check that
takes the scores for the truth cannot find an inverted one.
"""

from __future__ import annotations

from rl_edit.audit.checks.case import Case, Expectation, expected_of
from rl_edit.audit.checks.comparisons import check_blank, check_comparisons
from rl_edit.audit.checks.localisation import check_localisation, check_parts
from rl_edit.audit.checks.order import check_order, check_separation
from rl_edit.audit.checks.repeats import check_repeats
from rl_edit.audit.checks.response import check_response
from rl_edit.audit.checks.scale import check_image_size, check_psnr_convention
from rl_edit.audit.checks.validity import check_range, check_validity
from rl_edit.audit.checks.verdict import Check, Verdict, failed, worst
from rl_edit.audit.corruptions import SIDES

__all__ = ["Case", "Check", "Expectation", "Verdict", "expected_of", "run_checks", "worst"]


def run_checks(case: Case) -> tuple[Check, ...]:
    """Runs all checks of one term, the most basic first."""
    # These two explain most failures of the others, so a reader should see them first.
    checks = [check_validity(case), check_range(case)]
    if not case.scored:
        sentence = "No correct edit has a valid score, so nothing else can be checked."
        return (*checks, failed("response", sentence))
    return (
        *checks,
        check_response(case),
        *(check_order(case, side) for side in SIDES),
        *(check_separation(case, side) for side in SIDES),
        check_localisation(case),
        *check_parts(case),
        check_repeats(case),
        *check_comparisons(case),
        check_blank(case),
        check_image_size(case),
        check_psnr_convention(case),
    )
