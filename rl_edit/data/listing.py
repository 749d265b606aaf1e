"""Carries the rows that a layout lists, with what there is to say about other files."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rl_edit.data.file_kinds import is_ignored
from rl_edit.data.notices import NUM_EXAMPLES, Notice
from rl_edit.data.rows import Request, Row
from rl_edit.data.tables import SUFFIXES


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Rows of a dataset, not opened yet.

    Attributes:
        notices: files that are in no row, and readings that were a choice.
    """

    requests: tuple[Request, ...]
    notices: tuple[Notice, ...] = ()

    @property
    def rows(self) -> list[Row]:
        """The requests that have a mask."""
        return [request for request in self.requests if isinstance(request, Row)]


def counted(kind: str, items: Sequence[str], one: str, many: str) -> list[Notice]:
    """Makes one notice about items, or none without items.

    Args:
        one: the message about a single item.
        many: the message about several, with ``{count}``.
    """
    if not items:
        return []
    message = one if len(items) == 1 else many.format(count=len(items))
    # A name that is no UTF-8 is shown with escapes.
    shown = [item.encode(errors="backslashreplace").decode() for item in items[:NUM_EXAMPLES]]
    return [Notice(kind=kind, count=len(items), message=message, examples=tuple(shown))]


def files_below(root: Path) -> Iterator[Path]:
    """Yields the files of a directory and its sub-folders, as relative paths, in order.

    Hidden files and those of operating systems are left out. Links to directories are followed
    once each.
    """
    seen: set[str] = set()
    for directory, folders, names in os.walk(root, followlinks=True):
        # A link to a folder above would never end.
        real = os.path.realpath(directory)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_ignored(name))
        below = Path(directory).relative_to(root)
        yield from (below / name for name in sorted(names) if not is_ignored(name))


def unused_files(root: Path, requests: Iterable[Request], *, kind: str) -> list[Notice]:
    """Counts files below a directory that no row names.

    Args:
        kind: of the notice.
    """
    used = {os.path.normpath(file) for request in requests for file in request.files}
    # Written beside the rows by find-masks and dataset check.
    tables = tuple(f"metadata{suffix}" for suffix in SUFFIXES)
    made = (*tables, "agreement.json", "masks.png", "problems.txt")
    left = [
        file.as_posix()
        for file in files_below(root)
        if os.path.normpath(root / file) not in used and file.name not in made
    ]
    return counted(
        kind,
        left,
        "1 file is in no row, so it is not used",
        "{count} files are in no row, so they are not used",
    )


def composed(text: str) -> str:
    """Spells accents in the composed form: macOS stores file names in the other one."""
    return unicodedata.normalize("NFC", text)


def expanded(text: str) -> Path:
    """Replaces "~" by the home directory, if there is one."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # an unknown user, or a process without a home
        return Path(text)


def is_visible(text: str) -> bool:
    """True for text with more than blanks and marks without width."""
    return any(letter.isprintable() and not letter.isspace() for letter in text)


def is_unicode(text: str) -> bool:
    """True for text without halves of characters, which no file can hold as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
