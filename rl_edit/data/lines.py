"""Makes rows of a table: JSON lines, a JSON array, or CSV.

One entry names its files and texts under the keys of ``KEYS``, listed in ``folder.py``. Paths are
relative to the table. Nothing is opened here but the table.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from rl_edit.data.listing import Listing, counted, expanded, is_unicode, is_visible
from rl_edit.data.notices import Notice
from rl_edit.data.problems import refuse
from rl_edit.data.rows import Request, Row
from rl_edit.data.tables import column, read_entries
from rl_edit.errors import InputError

KEYS: dict[str, tuple[str, ...]] = {
    "source": ("source", "image", "input_image"),
    "instruction": ("instruction", "prompt"),
    "mask": ("mask",),
    "region_map": ("region_map",),
    "target": ("target", "edited_image"),
    "caption": ("caption",),
    "task_type": ("task_type", "task"),
    "id": ("id", "task_id"),
    "split_group": ("split_group",),
}
"""Keys of a row, each with all its names."""

_OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "source": (
        "file_name",
        "filename",
        "image_path",
        "source_image",
        "source_img",
        "original_image",
    ),
    "instruction": ("edit_instruction", "edit_prompt", "edit"),
    "mask": ("mask_image", "mask_path", "mask_img"),
    "target": ("target_image", "target_img", "output_image", "edited"),
}
"""Names in other data sets. They are read, and said, where the key is under none of its names."""

_REQUIRED = ("source", "instruction")
_PATHS = ("source", "mask", "target", "region_map")
_ALIASES = {alias: key for key, aliases in KEYS.items() for alias in aliases}


def read_table(file: Path, *, masked: bool) -> Listing:
    """Reads the rows of a table.

    Args:
        masked: every row must have a mask.

    Raises:
        InputError: for all faulty entries, in one message.
    """
    required = (*_REQUIRED, "mask") if masked else _REQUIRED
    columns = [(*KEYS[key], *_OTHER_NAMES.get(key, ())) for key in required]
    entries = read_entries(file, columns)
    reader = _Reader(file.parent, required)
    problems = []
    for entry in entries:
        problem = entry.problem or reader.add(entry.value, entry.where)
        if problem:
            problems.append(f"{entry.where}: {problem}")
    refuse(problems, num_rows=len(entries), source=str(file))
    if not reader.rows:
        raise InputError(
            f"{file} has no rows, so there is nothing to train on. Write one JSON object a line: "
            "source, instruction, mask."
        )
    return Listing(requests=tuple(reader.rows), notices=tuple(reader.notices(file)))


class _Reader:
    """Turns entries into rows and counts what was read otherwise than it is written."""

    def __init__(self, folder: Path, required: Sequence[str]) -> None:
        self.rows: list[Request] = []
        self._folder = folder
        self._required = required
        self._counts: Counter[str] = Counter()
        self._renamed: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        self._backslashes: list[str] = []

    def add(self, value: Any, where: str) -> str:
        """Adds the row of an entry, or returns its problem."""
        entry = self._canonical(value, where)
        if isinstance(entry, str):
            return entry
        for key in self._required:
            if not is_visible(entry.get(key, "")):
                seen = ", ".join(map(repr, list(value)[:8]))
                return f"has no {key!r} (read from: {', '.join(KEYS[key])}; the row has: {seen})"
        for key, text in entry.items():
            if not is_unicode(text) or "\0" in text:
                return f"{key!r} holds a character that is none ({text[:60]!a})"
        for key in _PATHS:
            scheme = urlsplit(entry.get(key, "")).scheme
            if scheme in ("http", "https", "s3", "gs", "hf"):
                return f"{key!r} is a web address ({entry[key]}): download the file first"
            # No file system takes a longer name.
            if max(map(len, entry.get(key, "").split("/"))) > 255:
                return f"{key!r} is no path ({entry[key][:60]}...): name a file"
        # Rows without an id are numbered per image, so that adding rows at the end renames none.
        name = entry["source"].removesuffix(Path(entry["source"]).suffix)
        self._counts[name] += 1
        repeat = f"#{self._counts[name]}" if self._counts[name] > 1 else ""
        self.rows.append(self._row(entry, where, default_id=name + repeat))
        return ""

    def notices(self, file: Path) -> Iterable[Notice]:
        """Says which names and paths were read as others."""
        for (name, key), places in self._renamed.items():
            yield Notice(
                kind="other-key-names",
                count=len(places),
                message=f"{file.name}: {name!r} is read as {key!r}. Name it {key!r} to be sure",
            )
        yield from counted(
            "backslash-paths",
            self._backslashes,
            "1 path with backslashes is read with forward slashes",
            "{count} paths with backslashes are read with forward slashes",
        )

    def _canonical(self, value: Any, where: str) -> dict[str, str] | str:
        """One entry under canonical keys, or a sentence about its problem."""
        if not isinstance(value, dict):
            return f"is a JSON {type(value).__name__}, not an object"
        # The exact spelling comes last, so that it wins over others of the same name.
        raw = {column(name): name for name in sorted(value, key=lambda name: name in _ALIASES)}
        entry: dict[str, str] = {}
        for spelling, name in raw.items():
            key, text = _ALIASES.get(spelling), value[name]
            if key is None:
                key = self._other_key(spelling, raw)
                if key is None:
                    if nearest := _misspelt(spelling, raw):
                        return f"has the unknown key {name!r} (did you mean {nearest!r}?)"
                    continue
                self._renamed[name, key].append(where)
            if text is None:  # exporters write null for a missing cell
                continue
            if key == "id" and isinstance(text, int):
                text = str(text)
            if not isinstance(text, str):
                return f"{name!r} is a {type(text).__name__}, not text"
            if key in entry and entry[key] != text:
                names = " and ".join(alias for alias in KEYS[key] if alias in raw)
                return f"gives {key!r} twice ({names}) with different values"
            entry[key] = text
        return entry

    def _other_key(self, spelling: str, raw: Mapping[str, Any]) -> str | None:
        """The key that another data set's name stands for, if its own names are absent."""
        for key, names in _OTHER_NAMES.items():
            present = [name for name in (*KEYS[key], *names) if name in raw]
            if spelling in names and present[0] == spelling:
                return key
        return None

    def _row(self, entry: Mapping[str, str], where: str, *, default_id: str) -> Request:
        paths = {key: self._located(entry[key]) for key in _PATHS if entry.get(key)}
        common: dict[str, Any] = {
            "task_id": entry.get("id") or default_id,
            "task_type": entry.get("task_type") or "edit",
            "where": where,
            "group": entry.get("split_group") or entry["source"],
            "instruction": " ".join(entry["instruction"].split()),
            "source": paths["source"],
            "target": paths.get("target"),
            "caption": entry.get("caption") or None,
        }
        if "mask" not in paths:
            return Request(**common)
        return Row(**common, mask=paths["mask"], regions=paths.get("region_map"))

    def _located(self, text: str) -> Path:
        """The file that a path of the table names."""
        if text.startswith("file://"):
            text = unquote(urlsplit(text).path)
        # Joining an absolute path to a folder gives the absolute path, so both kinds work.
        path = self._folder / expanded(text)
        if path.exists():
            return path
        if "\\" in text and (turned := self._folder / text.replace("\\", "/")).exists():
            self._backslashes.append(text)
            return turned
        # macOS stores accents apart from their letters; a table typed elsewhere does not.
        for form in ("NFC", "NFD"):
            if (other := Path(unicodedata.normalize(form, str(path)))).exists():
                return other
        return path


def _misspelt(name: str, raw: Mapping[str, Any]) -> str | None:
    """The known key that a column probably means.

    Other columns are the user's business, but a misspelt key would silently drop, say, every
    target.
    """
    near = difflib.get_close_matches(name, _ALIASES, n=1, cutoff=0.8)
    present = {_ALIASES.get(other) for other in raw}
    return near[0] if near and _ALIASES[near[0]] not in present else None
