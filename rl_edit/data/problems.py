"""Refuses faulty rows: the first few in one line, all of them in a file."""

from __future__ import annotations

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rl_edit.data.notices import Notice
from rl_edit.errors import InputError
from rl_edit.files import replace_file

_NUM_SHOWN = 5
"""Problems that one message spells out."""


class FaultyRows(InputError):
    """Rows that cannot be used.

    Attributes:
        problems: one sentence for each, all of them.
    """

    def __init__(self, message: str, problems: Sequence[str]) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


def refuse(
    problems: Sequence[str], *, num_rows: int, source: str, notices: Sequence[Notice] = ()
) -> None:
    """Raises one error for all problems, if any.

    More problems than one line can hold are also written to a file in the temporary directory,
    which the message names.

    Args:
        notices: findings that may explain the problems; the message ends with them.

    Raises:
        FaultyRows: there is at least one problem.
    """
    if not problems:
        return
    # Rows are checked in the order of a hash; a user mends them in the order of the file.
    problems = sorted(problems, key=_by_number)
    shown = "; ".join(
        f"({number}) {problem}" for number, problem in enumerate(problems[:_NUM_SHOWN], start=1)
    )
    more = ""
    if len(problems) > _NUM_SHOWN:
        more = f"; and {len(problems) - _NUM_SHOWN} more{_all_in_file(problems)}"
    also = "".join(f". Also: {notice}" for notice in notices)
    raise FaultyRows(
        f"{source}: {len(problems)} problem{'s' if len(problems) > 1 else ''} in {num_rows} "
        f"row{'s' if num_rows != 1 else ''}. Correct or remove these rows: {shown}{more}{also}",
        problems,
    )


def _by_number(problem: str) -> list[tuple[int, str]]:
    """Orders "line 9" before "line 10"."""
    parts = re.split(r"(\d+)", problem)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def problem_list(problems: Sequence[str]) -> str:
    """Writes problems as lines of a text."""
    return "".join(f"{problem}\n" for problem in problems)


def _all_in_file(problems: Sequence[str]) -> str:
    """Writes all problems to a file, and names it; "" if none can be written."""
    text = problem_list(problems)
    # Named by its content: a second try with the same problems writes the same file.
    name = f"rl-edit-problems-{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:8]}.txt"
    with contextlib.suppress(OSError):
        path = Path(tempfile.gettempdir()) / name
        replace_file(path, text.encode(errors="replace"))
        return f", all in {path}"
    return ""
