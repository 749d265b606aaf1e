"""Auditing rewards before training on them: known damages, the answers to them, and a verdict per check."""

from __future__ import annotations

from rl_edit.audit.audit import Audit, TermAudit, audit
from rl_edit.audit.checks import Check, Expectation, expected_of

__all__ = ["Audit", "Check", "Expectation", "TermAudit", "audit", "expected_of"]
