"""Finds run directories: where a named one holds no run, the nearest that do.

The directory of a run is recognised by the ``config.yaml`` that training writes into it.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

CONFIG_FILE = "config.yaml"

_MOST_NAMED = 5


def holds_run(directory: Path) -> bool:
    """Returns True where training has written its configuration."""
    return (directory / CONFIG_FILE).is_file()


def no_run_at(path: Path) -> str:
    """Says why there is no run at a path, and which runs lie nearby."""
    if path.is_file():
        seen, near = f"no run at {path}: it is a file, not a directory.", _enclosing(path)
    elif (path / CONFIG_FILE).is_dir():
        seen = f"no run at {path}: {CONFIG_FILE} in it is a directory, where a run has a file."
        near = _enclosing(path) or _runs_in(path)
    elif path.is_dir():
        seen = f"no run at {path}: the directory has no {CONFIG_FILE}, which rl-edit train writes."
        near = _enclosing(path) or _runs_in(path)
    else:
        seen, near = f"no run at {path}: there is no such directory.", _beside(path)
    return " ".join([seen, *(near or ["Run rl-edit train to make one."])])


def _enclosing(path: Path) -> list[str]:
    """Suggests the run that a path lies in, such as RUN for RUN/adapter."""
    run = next((parent for parent in (path.parent, path.parent.parent) if holds_run(parent)), None)
    return [] if run is None else [f"It lies in the run {run}: did you mean that?"]


def _beside(path: Path) -> list[str]:
    """Suggests runs whose path differs from a missing one in a name."""
    missing = [part for part in (path, *path.parents) if not part.exists()]
    # The outermost name that is wrong; names below it may be right.
    wrong, rest = missing[-1], path.relative_to(missing[-1])
    similar = get_close_matches(wrong.name, _directories(wrong.parent), n=3)
    exact = [wrong.parent / name / rest for name in similar]
    if runs := [run for run in exact if holds_run(run)]:
        return [f"Did you mean {runs[0]}?"]
    # Two names are wrong: the runs of the nearest directory.
    for directory in (run.parent if rest.parts else run for run in exact):
        if directory.is_dir() and (runs_there := _runs_in(directory, near=path.name)):
            return runs_there
    return _runs_in(wrong.parent, near=wrong.name)


def _runs_in(directory: Path, *, near: str = "") -> list[str]:
    """Names the runs of a directory, the nearest or the newest first."""
    runs = [directory / name for name in _directories(directory) if holds_run(directory / name)]
    if not runs:
        return []
    close = get_close_matches(near, [run.name for run in runs], n=1)
    if close:
        return [f"Did you mean {directory / close[0]}?"]
    newest = sorted(runs, key=lambda run: (run / CONFIG_FILE).stat().st_mtime, reverse=True)
    listed = ", ".join(map(str, newest[:_MOST_NAMED]))
    more = f" and {len(runs) - _MOST_NAMED} more" if len(runs) > _MOST_NAMED else ""
    return [f"Runs are in {listed}{more}."]


def _directories(parent: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in parent.iterdir() if entry.is_dir())
    # A suggestion may be missing; the message it belongs to must not.
    except OSError:
        return []
