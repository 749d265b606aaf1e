"""The user's own modules that settings name, and those that they import from the same folders."""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from rl_edit.provenance import SOURCES


def local_modules(names: Collection[str], *, folders: Sequence[Path]) -> dict[str, Path]:
    """Finds modules in folders, not among installed packages.

    A module that is in none of the folders is taken to be installed on the cluster; the job says so
    if it is not.

    Returns:
        files and package folders, by their name in the job's directory.
    """
    matches: dict[str, Path] = {}
    waiting = sorted({name.partition(".")[0] for name in names})
    while waiting:
        name = waiting.pop()
        path = _match(name, folders)
        if path is None or path.name in matches:
            continue
        matches[path.name] = path
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            waiting.extend(sorted(_imports(file)))
    return matches


def _match(name: str, folders: Sequence[Path]) -> Path | None:
    if name in SOURCES or name in sys.stdlib_module_names:
        return None
    for folder in folders:
        # A package comes before a module of the same name, as in Python.
        for path in (folder / name / "__init__.py", folder / f"{name}.py"):
            if path.is_file():
                return path.parent if path.name == "__init__.py" else path
        if (folder / name).is_dir() and any((folder / name).glob("*.py")):
            return folder / name
    return None


def _imports(file: Path) -> Iterator[str]:
    """Yields the first names of a source's absolute imports."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):  # the job says what is wrong with it
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
