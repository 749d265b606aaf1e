"""Reads tables of rows: JSON lines, a JSON array, or cells with a separator.

A table becomes entries in order, each with its place for messages. Their meaning is the reader's:
``lines.py`` makes rows of them, ``instructions.py`` texts for the images of a folder.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl_edit.errors import InputError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
"""File endings of tables, the most explicit first."""

_SEPARATORS = (",", ";", "\t", "|")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry of a table, or the reason why it is none.

    Attributes:
        where: its place ("rows.jsonl line 3").
        value: any JSON value; of a table of cells, texts by column.
        problem: a sentence without its subject, or "".
    """

    where: str
    value: Any = None
    problem: str = ""


def read_entries(file: Path, columns: Sequence[tuple[str, ...]]) -> list[Entry]:
    """Reads the entries of a table.

    Args:
        columns: for each column that must be there, its names; cells are separated by the
            character that gives them all.

    Raises:
        InputError: the file cannot be read, or has not these columns.
    """
    text = read_text(file)
    suffix = file.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _cells(file, text, columns)
    if suffix == ".json" and not _looks_like_lines(text):
        return _array(file, text)
    return _lines(file, text)


def read_text(file: Path) -> str:
    """Reads a text as UTF-8, or as UTF-16 or UTF-32 with a byte order mark.

    Raises:
        InputError: it cannot be read; names the first line that is no UTF-8.
    """
    try:
        content = file.read_bytes()
        # The mark of UTF-16 is also the beginning of that of UTF-32.
        if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
            return content.decode("utf-32")
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return content.decode("utf-16")
        if cause := _no_plain_text(content):
            raise InputError(f"{file} is no plain text: {cause}. Save it as UTF-8 text.")
        # "utf-8-sig" also reads files of programs that begin with a byte order mark.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file} cannot be read as UTF-8 text ({_foreign(content, error)}). Save it as UTF-8 "
            "(Excel: 'CSV UTF-8'; a terminal: iconv -f WINDOWS-1252 -t UTF-8)."
        ) from error
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror or error}).") from error


def column(name: object) -> str:
    """Spells a column's name in lower case with underscores."""
    return re.sub(r"[\s\-]+", "_", str(name).strip()).lower()


def _no_plain_text(content: bytes) -> str:
    """Names what stands in place of a text, or ""."""
    if content.startswith(b"{\\rtf"):
        return "it is rich text of a word processor (RTF)"
    if b"\0" in content:
        return "it has zero bytes, as UTF-16 without its mark and files of other programs have"
    return ""


def _foreign(content: bytes, error: UnicodeDecodeError) -> str:
    """Describes the first bytes that are no UTF-8."""
    number = content[: error.start].count(b"\n") + 1
    start = content.rfind(b"\n", 0, error.start) + 1
    line = content[start:].split(b"\n", 1)[0][:60]
    seen = f"line {number} has the byte 0x{content[error.start]:02x}"
    try:
        quoted = " ".join(line.decode("cp1252").split())
    except UnicodeDecodeError:
        return seen
    return f"{seen}; as Windows-1252 the line would read {quoted!r}"


def _looks_like_lines(text: str) -> bool:
    """True for several objects, one a line, under the name of a JSON file."""
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) < 2:
        return False
    try:
        return all(isinstance(json.loads(line), dict) for line in lines[:2])
    except ValueError:
        return False


def _lines(file: Path, text: str) -> list[Entry]:
    if text.lstrip().startswith("["):
        entries = _array_or_none(file, text)
        if entries is not None:
            return entries
    entries = []
    # Not splitlines(), which would break a JSON string at a Unicode line separator.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file.name} line {number}"
        try:
            entries.append(Entry(where=where, value=json.loads(line)))
        except (ValueError, RecursionError) as error:
            entries.append(Entry(where=where, problem=f"is not JSON ({error})"))
    return entries


def _array_or_none(file: Path, text: str) -> list[Entry] | None:
    """Reads one array of objects; None if the text is none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, list) or not all(isinstance(value, dict) for value in content):
        return None
    return [
        Entry(where=f"{file.name} entry {number}", value=value)
        for number, value in enumerate(content, start=1)
    ]


def _array(file: Path, text: str) -> list[Entry]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON ({error}). Correct it there.") from error
    if isinstance(content, list):
        return [
            Entry(where=f"{file.name} entry {number}", value=value)
            for number, value in enumerate(content, start=1)
        ]
    return [Entry(where=file.name, value=content)]


def _cells(file: Path, text: str, columns: Sequence[tuple[str, ...]]) -> list[Entry]:
    # Excel writes its separator into a first line of its own.
    declared = re.match(r"sep=(.)\r?\n", text)
    skipped = 0
    if declared:
        text, skipped = text[declared.end() :], 1
    try:
        tables = {mark: _parsed(text, mark) for mark in _SEPARATORS}
    except csv.Error as error:
        raise InputError(f"{file} cannot be read as cells ({error}). Save it as CSV.") from error
    fitting = [mark for mark, rows in tables.items() if rows and _has(rows[0][1], columns)]
    if not fitting:
        rows = max(tables.values(), key=lambda rows: len(rows[0][1]) if rows else 0)
        needed = " and ".join(names[0] for names in columns)
        listed = ", ".join(repr(cell) for cell in rows[0][1]) if rows else "nothing"
        raise InputError(
            f"{file} needs the columns {needed} in its first line; it has {listed}. Name the "
            "columns there; separate them by commas, semicolons or tabs."
        )
    try:
        (_, head), *body = _parsed(text, fitting[0], strict=True)
    except csv.Error as error:
        raise InputError(
            f"{file} has a quotation mark that is not closed or not doubled ({error}), so several "
            "lines would be read as one cell. Close each quoted cell, and write a mark inside it "
            f"twice ({_first_open(text, fitting[0], skipped)})."
        ) from error
    return [_row(file, number + skipped, head, cells) for number, cells in body if any(cells)]


def _first_open(text: str, mark: str, skipped: int) -> str:
    """Names the line where the row begins that the strict reader refuses."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    began = 0
    try:
        for _ in reader:
            began = reader.line_num
    except csv.Error:
        pass
    return f"the row that begins in line {began + 1 + skipped}"


def _parsed(text: str, mark: str, *, strict: bool = False) -> list[tuple[int, list[str]]]:
    """Reads cells with the number of the line where each row ends."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=strict)
    return [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(cells)]


def _has(head: Sequence[str], columns: Sequence[tuple[str, ...]]) -> bool:
    names = {column(cell) for cell in head}
    return all(names & {*one_of} for one_of in columns)


def _row(file: Path, number: int, head: Sequence[str], cells: Sequence[str]) -> Entry:
    where = f"{file.name} line {number}"
    # A comma in an instruction without quotes would cut its end off.
    if any(cells[len(head) :]):
        return Entry(
            where=where,
            problem=f"has {len(cells)} cells for {len(head)} columns: an instruction that holds "
            'the separator must stand in quotes ("...")',
        )
    row = {name: cell for name, cell in zip(head, cells, strict=False) if name and cell}
    return Entry(where=where, value=row)
