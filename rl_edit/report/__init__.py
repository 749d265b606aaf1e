"""The page and the figure of a run, made from its files. Nothing is trained or measured here."""

from __future__ import annotations

from rl_edit.report.figure import write_figure
from rl_edit.report.page import render_report

__all__ = ["render_report", "write_figure"]
