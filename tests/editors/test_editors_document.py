"""docs/editors.md shows every family and every check, and make-tiny makes what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_conformance
from families import FAMILIES
from table import place_of, table, written_table

from commands import Command, assert_refused
from rl_edit.editors import editor_config, inspect_editor

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "editors.md"
KINDS = tuple(family.kind for family in FAMILIES)


def checks_of_the_suite() -> set[str]:
    """Names of the checks that run over every family: those that take one of the fixtures."""
    return {
        name.removeprefix("test_").replace("_", " ")
        for name, test in vars(test_conformance).items()
        if name.startswith("test_")
        and {"family", "editor", "directory"} & set(test.__code__.co_varnames)
    }


def test_the_table_of_the_document_has_every_family_and_check_and_no_failure() -> None:
    """EDITORS_TABLE=docs/editors.md python -m pytest tests/editors writes it anew."""
    header, *rows = written_table(DOCUMENT)
    assert header == ["check", *(f"`{kind}`" for kind in KINDS)]
    assert {row[0] for row in rows} == checks_of_the_suite()
    assert {cell for row in rows for cell in row[1:]} <= {"yes", "does not apply"}


def test_outcomes_become_a_row_per_check_and_a_column_per_family() -> None:
    kinds = ("a_b", "c")
    nodes = {
        "x/test_conformance.py::test_one_thing[a_b-0]": "passed",
        "x/test_conformance.py::test_one_thing[False-a_b]": "failed",
        "x/test_conformance.py::test_one_thing[c]": "skipped",
        "x/test_conformance.py::test_without_family": "passed",
    }
    outcomes: dict[tuple[str, str], list[str]] = {}
    for node, outcome in nodes.items():
        if place := place_of(node, kinds):
            outcomes.setdefault(place, []).append(outcome)
    assert table(outcomes, kinds).splitlines()[-1] == "| one thing | **fails** | does not apply |"


@pytest.mark.parametrize("kind", KINDS)
def test_make_tiny_writes_an_editor_that_loads_as_a_real_one(
    rl_edit: Command, tmp_path: Path, kind: str
) -> None:
    code, out, _ = rl_edit("editors", "make-tiny", kind, tmp_path / "tiny")
    assert code == 0 and "rl-edit train" in out
    config = editor_config({"path": str(tmp_path / "tiny")})
    assert config.kind == kind and inspect_editor(config).pixels_per_token in (8, 16)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_make_tiny_refuses_an_unknown_family_and_a_directory_in_use(
    rl_edit: Command, tmp_path: Path
) -> None:
    place = tmp_path / "tiny"
    assert_refused(
        rl_edit("editors", "make-tiny", "flux2_clein", place),
        place,
        "no family 'flux2_clein', did you mean 'flux2_klein'?",
    )
    place.mkdir()
    (place / "photo.png").touch()
    assert_refused(rl_edit("editors", "make-tiny", "flux2_klein", place), None, "is there already")
    assert [path.name for path in place.iterdir()] == ["photo.png"]
