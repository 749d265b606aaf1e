"""Reads imports from sources, without running them."""

from __future__ import annotations

import ast
import importlib.util
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rl_edit.errors import InputError
from rl_edit.structure.floors import FLOORS, Room, room_of, runs_back_up

PACKAGES = ("rl_edit", "actors", "learner")


@dataclass(frozen=True, kw_only=True)
class Import:
    """One name that one line of a source imports.

    Example:
        ``Import(importer="actors.rollout", line=12, imported="rl_edit.types.EditTask")``
    """

    importer: str
    line: int
    imported: str

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


@dataclass(frozen=True, kw_only=True)
class ImportGraph:
    """Rooms that have sources, and the imports between them.

    Attributes:
        rooms: in the order of the floors, from the top.
        imports: of another room, by (importing room, imported room).
    """

    rooms: tuple[Room, ...]
    imports: Mapping[tuple[Room, Room], tuple[Import, ...]]

    @property
    def weights(self) -> Counter[tuple[Room, Room]]:
        """Numbers of importing lines, by (importing room, imported room)."""
        # A line may import several names from one module; it is one import.
        return Counter(
            {
                pair: len({(each.importer, each.line) for each in imports})
                for pair, imports in self.imports.items()
            }
        )

    @property
    def arrows_up(self) -> tuple[tuple[Room, Room], ...]:
        """Pairs whose imports do not lead down."""
        return tuple(pair for pair in self.imports if runs_back_up(*pair))

    @property
    def imports_up(self) -> tuple[Import, ...]:
        """All imports that do not lead down."""
        return tuple(each for pair in self.arrows_up for each in self.imports[pair])


def source_files(packages: tuple[str, ...] = PACKAGES) -> dict[str, Path]:
    """Finds the sources of packages, by dotted module name.

    They are looked up as Python would import them. That works in a checkout and for an installed
    project. The packages are not imported.
    """
    files: dict[str, Path] = {}
    # find_spec looks where an import would look, but runs nothing of a top-level package.
    for package in packages:
        spec = importlib.util.find_spec(package)
        roots = (spec and spec.submodule_search_locations) or ()
        if not roots:
            raise InputError(
                f"Package {package!r} was not found, so its imports cannot be read. "
                "Run the command where rl-edit is installed, or from its checkout."
            )
        for root in roots:
            for path in sorted(Path(root).rglob("*.py")):
                parts = path.relative_to(root).with_suffix("").parts
                # A package is named after its folder, as an import names it.
                files[".".join((package, *parts)).removesuffix(".__init__")] = path
    return files


def imports_of(path: Path, module: str) -> Iterator[Import]:
    """Yields everything a source imports.

    Imports inside functions and under ``TYPE_CHECKING`` count. ``from a import b`` gives ``a.b``,
    since b may be a module. ``import_module("a")`` counts too.

    Args:
        module: the source's dotted name, from which relative imports are resolved.
    """
    # The package that a single dot stands for.
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        for imported in _imported(node, package):
            yield Import(importer=module, line=getattr(node, "lineno", 0), imported=imported)


def import_graph(files: Mapping[str, Path] | None = None) -> ImportGraph:
    """Reads the imports between rooms.

    Args:
        files: sources by dotted module name, the project's own unless given.
    """
    files = source_files() if files is None else files
    rooms: set[Room] = set()
    # Imports within a room are its own affair and are not drawn.
    imports: dict[tuple[Room, Room], list[Import]] = {}
    for module, path in files.items():
        here = room_of(module)
        # The root package ``rl_edit`` is in no room.
        if here is None:
            continue
        rooms.add(here)
        for each in imports_of(path, module):
            there = room_of(each.imported)
            if there is not None and there != here:
                imports.setdefault((here, there), []).append(each)
    return ImportGraph(
        rooms=tuple(room for floor in FLOORS for room in floor if room in rooms),
        imports={pair: tuple(entries) for pair, entries in imports.items()},
    )


def _imported(node: ast.AST, package: list[str]) -> list[str]:
    """Lists the dotted names one syntax node imports."""
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            # One dot is the package itself, every further dot one package above it.
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            return [f"{origin}.{alias.name}" for alias in node.names]
        case ast.Call(
            func=ast.Name(id="import_module" | "__import__")
            | ast.Attribute(attr="import_module" | "__import__"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            return [name]
    return []
