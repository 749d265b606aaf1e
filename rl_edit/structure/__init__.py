"""Reads the project's own imports and draws them: rooms on floors, arrows between rooms.

The floors stand in ``floors``, once. The walls test, the command ``rl-edit structure`` and the
drawing in the docs all read them there. Only the standard library is used; no source is run.
"""

from __future__ import annotations

from rl_edit.structure.drawing import draw, summary
from rl_edit.structure.floors import FLOORS, MATHEMATICS, Room, floor_of, room_of, runs_back_up
from rl_edit.structure.imports import (
    PACKAGES,
    Import,
    ImportGraph,
    import_graph,
    imports_of,
    source_files,
)

__all__ = [
    "FLOORS",
    "MATHEMATICS",
    "PACKAGES",
    "Import",
    "ImportGraph",
    "Room",
    "draw",
    "floor_of",
    "import_graph",
    "imports_of",
    "room_of",
    "runs_back_up",
    "source_files",
    "summary",
]
