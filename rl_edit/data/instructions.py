"""Reads the instructions of a plain folder: a text beside each image, or one table for all.

One image may have several instructions, in the order in which they are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from rl_edit.data.listing import composed, is_visible
from rl_edit.data.tables import SUFFIXES, Entry, column, read_entries, read_text
from rl_edit.errors import InputError

TextLines = Literal["split", "join"]
"""Meaning of several lines in one text: several instructions, or one."""

_NAME = ("name", "file", "filename", "file_name", "image", "image_name", "image_path", "source")
_TEXT = ("instruction", "instructions", "prompt", "edit_instruction", "edit_prompt", "edit")


@dataclass(frozen=True, kw_only=True)
class NamedInstruction:
    """An instruction of a table for the image of that name.

    Attributes:
        name: as written, with forward slashes.
        where: its place, for messages.
    """

    name: str
    text: str
    where: str


def is_table(path: Path) -> bool:
    """True for a file that holds the instructions of its folder."""
    return path.stem.lower() == "instructions" and path.suffix.lower() in SUFFIXES


def read_instructions(file: Path) -> list[NamedInstruction]:
    """Reads a table of instructions.

    Raises:
        InputError: the table cannot be read, or an entry is none.
    """
    named = []
    for row in read_entries(file, (_NAME, _TEXT)):
        entries = row.problem or _of_entry(file, row)
        if isinstance(entries, str):
            raise InputError(f"{file}: {row.where} {entries}.")
        named += entries
    return named


def text_lines(file: Path, lines: TextLines) -> list[str]:
    """Reads the instructions of a text, without empty lines.

    Raises:
        InputError: it cannot be read.
    """
    try:
        text = read_text(file)
    except InputError as error:
        raise InputError(str(error).rstrip(".")) from error
    parts = [" ".join(line.split()) for line in text.splitlines()]
    parts = [part for part in parts if is_visible(part)]
    return [" ".join(parts)] if parts and lines == "join" else parts


def _of_entry(file: Path, entry: Entry) -> list[NamedInstruction] | str:
    """The instructions of one entry, or a sentence about its problem."""
    value = entry.value
    if not isinstance(value, dict):
        return _SHAPE
    # One object of all names is only a JSON file's own form; elsewhere an entry is one row.
    keys = {column(key): key for key in value}
    name = next((keys[key] for key in _NAME if key in keys), None)
    text = next((keys[key] for key in _TEXT if key in keys), None)
    if file.suffix.lower() == ".json" and entry.where == file.name:
        pairs: Sequence[tuple[Any, Any]] = list(value.items())
    elif name is not None and (text is not None or file.suffix.lower() in (".csv", ".tsv")):
        pairs = [(value[name], value.get(text or "", ""))]
    elif file.suffix.lower() in (".csv", ".tsv"):
        return "has no name, so its image is unknown"
    else:
        return _SHAPE
    named = []
    for key, texts in pairs:
        several = texts if isinstance(texts, list) else [texts]
        if not isinstance(key, str) or not all(isinstance(one, str) for one in several):
            return _SHAPE
        named += [
            NamedInstruction(name=_spelt(key), text=" ".join(one.split()), where=entry.where)
            for one in several
        ]
    return named


_SHAPE = 'must be one object of names and texts: {"NAME": "what to do"}, or {"NAME": ["a", "b"]}'


def _spelt(name: str) -> str:
    return composed(str(PurePosixPath(name.strip().replace("\\", "/"))))
