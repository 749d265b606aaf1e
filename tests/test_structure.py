"""The drawing of the imports shows today's rooms and arrows, and none of them leads back up."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer
from typer.testing import CliRunner

from rl_edit import structure
from rl_edit.cli import structure as command
from rl_edit.errors import InputError
from rl_edit.structure import FLOORS, Import, ImportGraph, draw, floor_of, import_graph, room_of

ROOT = Path(__file__).resolve().parent.parent
DRAWING = ROOT / "docs" / "images" / "structure.svg"
ROOMS = {room.name: room for floor in FLOORS for room in floor}


def shown_rooms(svg: str) -> set[tuple[str, str]]:
    return set(re.findall(r'data-room="([^"]+)" data-floor="([^"]+)"', svg))


def shown_arrows(svg: str) -> set[tuple[str, str]]:
    return set(re.findall(r'data-from="([^"]+)" data-to="([^"]+)"', svg))


def with_arrow(importer: str, imported: str) -> ImportGraph:
    """Adds one import to the project's own graph."""
    graph = import_graph()
    entry = Import(importer=importer, line=7, imported=imported)
    pair = (ROOMS[importer], ROOMS[imported])
    return ImportGraph(
        rooms=graph.rooms, imports={**graph.imports, pair: (*graph.imports.get(pair, ()), entry)}
    )


def test_no_arrow_of_the_project_runs_back_up() -> None:
    assert [str(entry) for entry in import_graph().imports_up] == []


def test_the_committed_drawing_shows_the_rooms_and_arrows_of_today() -> None:
    """Numbers of imports may differ: they change often, and only widths follow them."""
    committed, today = DRAWING.read_text(), draw(import_graph())
    assert shown_rooms(committed) == shown_rooms(today), "run: make structure"
    assert shown_arrows(committed) == shown_arrows(today), "run: make structure"
    assert "no arrow runs back up" in committed


def test_the_drawing_is_small_valid_and_draws_for_light_and_dark_pages() -> None:
    text = draw(import_graph())
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert len(text) <= 100_000
    assert "prefers-color-scheme: dark" in text and "<script" not in text


def test_the_same_sources_give_the_same_drawing() -> None:
    assert draw(import_graph()) == draw(import_graph())


def test_every_room_and_every_pair_of_importing_rooms_is_drawn() -> None:
    graph = import_graph()
    text = draw(graph)
    assert shown_rooms(text) == {(room.name, str(floor_of(room))) for room in graph.rooms}
    assert shown_arrows(text) == {(a.name, b.name) for a, b in graph.imports}


def test_an_arrow_back_up_is_red_on_the_left_and_counted() -> None:
    valid, broken = draw(import_graph()), draw(with_arrow("rl_edit/config", "rl_edit/evaluation"))
    assert '<g class="up"' not in valid
    assert '<g class="up" data-from="rl_edit/config" data-to="rl_edit/evaluation">' in broken
    assert "1 arrow runs back up" in broken


def test_an_import_into_another_room_of_the_same_floor_runs_back_up() -> None:
    assert structure.runs_back_up(ROOMS["actors"], ROOMS["learner"])
    assert not structure.runs_back_up(ROOMS["actors"], ROOMS["actors"])
    assert not structure.runs_back_up(ROOMS["rl_edit/rewards"], ROOMS["foundation"])


def test_the_most_precise_name_decides_the_room() -> None:
    assert room_of("learner.controller.loop") is ROOMS["learner/controller"]
    assert room_of("learner.learner.Learner") is ROOMS["learner"]
    assert room_of("rl_edit") is None and room_of("learners.x") is None


def test_labels_stay_inside_their_boxes() -> None:
    """Allows 7.9 px per character of a name, 6.7 px of a description, in a box of 250 px."""
    for room in ROOMS.values():
        assert len(room.name) * 7.9 < 230, room.name
        assert len(room.holds) * 6.7 < 230, room.holds


SOURCE = """
from __future__ import annotations
import rl_edit.types, rl_edit.wire as wire
from . import lora
from ..data import canvas, rows
def later():
    from rl_edit.cli.train import train_command
    import_module("learner.ranks")
"""


def test_imports_are_read_wherever_and_however_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "flux.py"
    path.write_text(SOURCE)
    names = [entry.imported for entry in structure.imports_of(path, "rl_edit.editors.flux")]
    assert sorted(names) == [
        "__future__.annotations",
        "learner.ranks",
        "rl_edit.cli.train.train_command",
        "rl_edit.data.canvas",
        "rl_edit.data.rows",
        "rl_edit.editors.lora",
        "rl_edit.types",
        "rl_edit.wire",
    ]


def test_a_line_is_one_import_however_many_names_it_has(tmp_path: Path) -> None:
    path = tmp_path / "flux.py"
    path.write_text("from rl_edit.types import EditTask, Score\nimport rl_edit.types\n")
    graph = import_graph({"rl_edit.editors.flux": path})
    assert graph.weights == {(ROOMS["rl_edit/editors"], ROOMS["rl_edit/types.py"]): 2}


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(InputError, match="'no_such_package' was not found"):
        structure.source_files(("no_such_package",))


app = typer.Typer()
app.command()(command.structure_command)


def test_the_command_writes_the_drawing_and_says_that_the_order_holds(tmp_path: Path) -> None:
    out = tmp_path / "images" / "structure.svg"
    result = CliRunner().invoke(app, ["--out", str(out)])
    assert result.exit_code == 0, result.output
    assert out.read_text() == draw(import_graph())
    assert "no arrow runs back up" in result.output


def test_the_command_exits_with_one_and_names_the_line_that_runs_back_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = with_arrow("rl_edit/config", "rl_edit/evaluation")
    monkeypatch.setattr(command, "import_graph", lambda: broken)
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "structure.svg")])
    assert result.exit_code == 1
    assert "rl_edit/config:7 imports rl_edit/evaluation" in result.output


def test_reading_the_imports_runs_none_of_the_sources() -> None:
    code = (
        "import sys, rl_edit.structure as s; s.draw(s.import_graph()); "
        "print([m for m in ('torch', 'ray', 'typer', 'actors', 'learner') if m in sys.modules])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert printed.strip() == "[]"


def test_the_table_of_rooms_in_the_docs_runs_down_the_floors() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text().split("## Rooms")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    names = [name.rstrip("/") for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    floors = [floor_of(ROOMS[name]) for name in names]
    assert len(floors) >= 10
    assert floors == sorted(floors, reverse=True)
