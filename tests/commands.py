"""Commands of ``rl-edit`` in this process, and their refusals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

Outcome = tuple[int, str, Sequence[str]]
"""Exit code, stdout, and the lines of stderr."""
Command = Callable[..., Outcome]


def assert_refused(outcome: Outcome, run: Path | None, *words: str) -> None:
    """Checks for exit code 2, one line with these words, and no run directory."""
    code, _, err = outcome
    assert code == 2
    (line,) = err
    assert line.startswith("rl-edit: ")
    assert [word for word in words if word not in line] == []
    assert run is None or not run.exists()
