"""Audits rewards before anything is trained on them.

Correct edits are corrupted in known ways (``corruptions``, ``images``), every reward scores them
(``responses``), and checks turn the scores into verdicts (``checks``).
"""

from __future__ import annotations

from rl_edit.audit.audit import Audit, TermAudit, audit
from rl_edit.audit.checks import Check, Expectation, Verdict, expected_of
from rl_edit.audit.total import TotalAudit, audit_total

__all__ = [
    "Audit",
    "Check",
    "Expectation",
    "TermAudit",
    "TotalAudit",
    "Verdict",
    "audit",
    "audit_total",
    "expected_of",
]
