"""Tiny editors of all families, each written and loaded once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from conformance import Family, loaded
from families import FAMILIES
from table import place_of, replace_table, table

from rl_edit.editors.tiny_families import write_tiny

KINDS = tuple(family.kind for family in FAMILIES)


@pytest.fixture(scope="session", params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest) -> Family:
    """Every family in turn."""
    return request.param


@pytest.fixture(scope="session")
def directory(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the family's tiny editor. No test changes it."""
    path = tmp_path_factory.mktemp(family.kind) / "editor"
    write_tiny(family.kind, path)
    return path


@pytest.fixture(scope="session")
def editor(family: Family, directory: Path) -> Any:
    """The family's tiny editor without an adapter. No test changes it."""
    return loaded(family, directory)


_OUTCOMES: dict[tuple[str, str], list[str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Notes what came of each check for each family."""
    # A skip is reported by the call or, by a fixture, by the setup.
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        place = place_of(report.nodeid, KINDS)
        if place is not None:
            _OUTCOMES.setdefault(place, []).append(report.outcome)


def pytest_sessionfinish() -> None:
    """Writes the table of docs/editors.md where EDITORS_TABLE names the document."""
    document = os.environ.get("EDITORS_TABLE")
    # Of several processes only the one that sees all outcomes writes.
    if document and "PYTEST_XDIST_WORKER" not in os.environ:
        replace_table(Path(document), table(_OUTCOMES, KINDS))
