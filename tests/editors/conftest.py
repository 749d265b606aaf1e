"""Tiny editors of all families, each written and loaded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conformance import Family, loaded
from families import FAMILIES

from rl_edit.editors.tiny_families import write_tiny


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
