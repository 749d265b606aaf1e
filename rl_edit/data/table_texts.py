"""Finds the image that each entry of an instruction table names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from rl_edit.data.folder_files import FolderFiles, key_of
from rl_edit.data.instructions import NamedInstruction, read_instructions
from rl_edit.data.listing import composed, counted
from rl_edit.data.notices import Notice
from rl_edit.errors import InputError

_FIRST = (".json", ".jsonl", ".csv", ".tsv")
"""Of several tables in one folder the first of these is read."""


class TableTexts:
    """Instructions of tables by image.

    An entry names its image by path or name, with or without ending. Tables of a sub-folder are
    about its images only.

    Attributes:
        texts: instructions of each source, in the order of their entries.
    """

    def __init__(self, files: FolderFiles) -> None:
        self.texts: defaultdict[Path, list[str]] = defaultdict(list)
        self._files = files
        self._without_image: list[str] = []
        self._unread: list[str] = []
        for folder, tables in files.tables.items():
            first, *others = sorted(tables, key=lambda file: _FIRST.index(file.suffix.lower()))
            self._unread += [file.as_posix() for file in others]
            self._assign(folder, read_instructions(files.root / first), first)

    def notices(self) -> Iterator[Notice]:
        """Counts entries without an image, and tables that another one replaces."""
        yield from counted(
            "entries-without-image",
            self._without_image,
            "1 instruction of a table names an image that is not here, so it is not used",
            "{count} instructions of a table name images that are not here, so they are not used",
        )
        yield from counted(
            "tables-not-read",
            self._unread,
            "1 table is not read, because another instructions file of its folder is: keep one",
            "{count} tables are not read, because another instructions file is: keep one a folder",
        )

    def _assign(self, folder: Path, named: list[NamedInstruction], table: Path) -> None:
        exact, loose = self._names(folder)
        for entry in named:
            sources = exact.get(entry.name) or loose.get(entry.name) or []
            if not sources:
                self._without_image.append(f"{entry.name} in {entry.where}")
            elif entry.name not in exact and len(sources) > 1:
                could_be = " or ".join(source.as_posix() for source in sources[:2])
                raise InputError(
                    f"{self._files.root / table}: {entry.where} names {entry.name!r}, which could "
                    f"be {could_be}. Write the path of the image there."
                )
            for source in sources:
                self.texts[source].append(entry.text)

    def _names(self, folder: Path) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
        """Sources below a folder by the paths, and by the bare names, that may mean them."""
        exact: defaultdict[str, list[Path]] = defaultdict(list)
        loose: defaultdict[str, list[Path]] = defaultdict(list)
        for source in self._files.images():
            if not source.is_relative_to(folder):
                continue
            path = source.relative_to(folder)
            key = key_of(path)
            spellings = (path.as_posix(), str(path.with_suffix("")), key, key + path.suffix)
            for spelling in dict.fromkeys(map(composed, spellings)):
                exact[spelling].append(source)
            for spelling in dict.fromkeys(map(composed, (path.name, path.stem))):
                loose[spelling].append(source)
        return exact, loose
