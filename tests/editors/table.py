"""The table of families and checks in docs/editors.md, from the outcomes of the suite itself.

``EDITORS_TABLE=docs/editors.md python -m pytest tests/editors`` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

BEGIN = "<!-- table: written by tests/editors -->"
END = "<!-- end of the table -->"

MODULE = "test_conformance.py"
_NODE = re.compile(rf"{MODULE}::test_(?P<check>\w+)\[(?P<parameters>[^\]]+)\]$")

Outcomes = Mapping[tuple[str, str], list[str]]
"""Outcomes of all runs of a check for a family, by (check, kind)."""


def place_of(node: str, kinds: tuple[str, ...]) -> tuple[str, str] | None:
    """Returns the check and the family of a test, by its node id."""
    match = _NODE.search(node)
    if match is None:
        return None
    parts = match["parameters"].split("-")
    return next(((match["check"], kind) for kind in kinds if kind in parts), None)


def table(outcomes: Outcomes, kinds: tuple[str, ...]) -> str:
    """Writes the table: a row per check in the order in which they ran, a column per family."""
    checks = list(dict.fromkeys(check for check, _ in outcomes))
    rows = [["check", *(f"`{kind}`" for kind in kinds)], ["---"] * (1 + len(kinds))]
    for check in checks:
        words = check.replace("_", " ")
        rows.append([words, *(_cell(outcomes.get((check, kind), [])) for kind in kinds)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(outcomes: list[str]) -> str:
    if "failed" in outcomes:
        return "**fails**"
    return "yes" if "passed" in outcomes else "does not apply" if outcomes else "not run"


def replace_table(document: Path, text: str) -> None:
    """Puts the table between its two marks."""
    before, _, rest = document.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    document.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def written_table(document: Path) -> list[list[str]]:
    """Reads the cells of the table, without its line of dashes."""
    _, _, rest = document.read_text().partition(BEGIN)
    lines = [line for line in rest.partition(END)[0].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if set(row) != {"---"}]
