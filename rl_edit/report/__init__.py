"""The page a run leaves behind: one self-contained HTML file. It reads files; it trains and measures nothing."""

from __future__ import annotations

from rl_edit.report.page import render_report

__all__ = ["render_report"]
