"""A person's own data: a JSON-lines file, or a plain folder of pictures with masks and instructions beside them.

**JSON lines** (``DIR/metadata.jsonl`` or any ``.jsonl`` file): one object a line; paths are relative to the file::

    {"source": "cat.jpg", "instruction": "give the cat a hat", "mask": "cat_mask.png"}

=============  =======================================  ==========================================================
key            also read as                             meaning
=============  =======================================  ==========================================================
source         image, input_image                       the picture to edit
instruction    prompt                                   what to do
mask                                                    where pixels may change; the size of the picture
region_map                                              optional: a label map of the mask's separate places, 0 outside, 1..R
target         edited_image                             optional: the right result, the size of the picture
caption                                                 optional: what the edited region should show
task_type      task                                     optional: the kind of edit, for tables; "edit" if missing
id             task_id                                  optional: unique; otherwise the source path and a count
split_group                                             optional: rows that share it are never on different sides of a split;
                                                        otherwise the source path
=============  =======================================  ==========================================================

**Plain folder**: for a picture ``NAME.jpg`` in the folder itself, in ``images/`` or in ``sources/``

* mask: ``NAME_mask.png`` or ``NAME.mask.png`` beside it, or ``masks/NAME.png``;
* instruction: ``NAME.txt`` beside it, or an entry of ``instructions.json`` ({"NAME": "..."}) or ``instructions.csv``
  (columns ``name``, ``instruction``), where NAME may carry its ending;
* target, optional: ``NAME_target.png`` or ``NAME.target.png`` beside it, or ``targets/NAME.png``.

Any ending of ``images.SUFFIXES`` will do for each of the three. Pictures are not opened here.
"""

from __future__ import annotations

import csv
import difflib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rl_edit.data.images import SUFFIXES
from rl_edit.data.rows import Request, Row, refuse
from rl_edit.errors import InputError

_KEYS: dict[str, tuple[str, ...]] = {
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
_REQUIRED = ("source", "instruction")
_ALIASES = {alias: key for key, aliases in _KEYS.items() for alias in aliases}
_SOURCE_FOLDERS = ("images", "sources")
_EXPECTED = (
    "metadata.jsonl; tasks/*/metadata.json (CompBench); or pictures NAME.jpg (here, in images/ or in sources/) with NAME_mask.png or "
    "masks/NAME.png and NAME.txt or instructions.json|csv"
)


def read_folder(path: Path) -> list[Row]:
    """Rows of a ``.jsonl`` file or of a folder in either of the two layouts above."""
    return [request for request in request_folder(path, masked=True) if isinstance(request, Row)]


def request_folder(path: Path, *, masked: bool = False) -> list[Request]:
    """The same for rows some of which have no mask; ``masked`` says that each must have one."""
    if path.is_file():
        if path.suffix.lower() != ".jsonl":
            raise InputError(
                f"{path} is a file but not .jsonl, so its rows cannot be read. Name a .jsonl file or a directory with {_EXPECTED}."
            )
        return _read_lines(path, masked)
    if not path.is_dir():
        raise InputError(
            f"{path} does not exist. Name a .jsonl file or a directory with {_EXPECTED}; or use builtin:shapes."
        )
    if (path / "metadata.jsonl").is_file():
        return _read_lines(path / "metadata.jsonl", masked)
    return _read_pairs(path, masked)


class FoundMasks:
    """Writes rows with masks that were found for them, in the JSON-lines layout. Pictures are copied as they are."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._sources: dict[Path, str] = {}
        self._lines: list[str] = []

    def add(self, request: Request, regions: NDArray[np.bool_]) -> None:
        """A row with its regions, ``[region, height, width]`` in pixels of the picture, disjoint and at most 255."""
        row = len(self._lines)
        if request.source not in self._sources:
            # One copy of a picture that several rows show.
            self._sources[request.source] = self._copied(
                request.source, "sources", len(self._sources)
            )
        labels = np.zeros(regions.shape[1:], dtype=np.uint8)
        for number, region in enumerate(regions, start=1):
            labels[region] = number
        entry = {
            "id": request.task_id,
            "task_type": request.task_type,
            "source": self._sources[request.source],
            "instruction": request.instruction,
            "mask": self._drawn(np.where(labels > 0, 255, 0).astype(np.uint8), "masks", row),
            "region_map": self._drawn(labels, "regions", row),
            "target": None
            if request.target is None
            else self._copied(request.target, "targets", row),
            "caption": request.caption,
            "split_group": request.group,
        }
        self._lines.append(
            json.dumps(
                {key: value for key, value in entry.items() if value is not None},
                ensure_ascii=False,
            )
            + "\n"
        )

    def finish(self) -> None:
        """Writes the file that makes it a dataset."""
        (self.root / "metadata.jsonl").write_text("".join(self._lines), encoding="utf-8")

    def _copied(self, file: Path, folder: str, number: int) -> str:
        name = f"{folder}/{number:06d}{file.suffix.lower()}"
        (self.root / folder).mkdir(exist_ok=True)
        shutil.copyfile(file, self.root / name)
        return name

    def _drawn(self, pixels: NDArray[np.uint8], folder: str, number: int) -> str:
        name = f"{folder}/{number:06d}.png"
        (self.root / folder).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(self.root / name)
        return name


def _read_lines(file: Path, masked: bool) -> list[Request]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file} cannot be read as UTF-8 text ({error}). Save it as UTF-8 with one JSON object a line."
        ) from error
    rows: list[Request] = []
    problems: list[str] = []
    num_entries = 0
    counts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        num_entries += 1
        where = f"{file.name} line {number}"
        entry = _entry(line, (*_REQUIRED, "mask") if masked else _REQUIRED)
        if isinstance(entry, str):
            problems.append(f"{where}: {entry}")
            continue
        source = entry["source"]
        name = source.removesuffix(Path(source).suffix)
        counts[name] = counts.get(name, 0) + 1
        repeat = f"#{counts[name]}" if counts[name] > 1 else ""
        paths = {
            key: file.parent / Path(entry[key]).expanduser()
            for key in ("source", "mask", "target", "region_map")
            if entry.get(key)
        }
        common: dict[str, Any] = {
            "task_id": entry.get("id") or name + repeat,
            "task_type": entry.get("task_type") or "edit",
            "where": where,
            "group": entry.get("split_group") or source,
            "instruction": " ".join(entry["instruction"].split()),
            "source": paths["source"],
            "target": paths.get("target"),
            "caption": entry.get("caption") or None,
        }
        if "mask" in paths:
            rows.append(Row(**common, mask=paths["mask"], regions=paths.get("region_map")))
        else:
            rows.append(Request(**common))
    refuse(problems, num_rows=num_entries, source=str(file))
    if not rows:
        raise InputError(
            f"{file} has no rows, so there is nothing to train on. Write one JSON object a line: source, instruction, mask."
        )
    return rows


def _entry(line: str, required: Sequence[str]) -> dict[str, str] | str:
    """One line under canonical keys, or what is wrong with it."""
    try:
        raw: Any = json.loads(line)
    except ValueError as error:
        return f"is not JSON ({error})"
    if not isinstance(raw, dict):
        return f"is a JSON {type(raw).__name__}, not an object"
    entry: dict[str, str] = {}
    for name, value in raw.items():
        key = _ALIASES.get(name)
        if key is None:
            # Other columns are the user's business, but a misspelt key would silently drop, say, every target.
            close = difflib.get_close_matches(name, _ALIASES, n=1, cutoff=0.8)
            if close and _ALIASES[close[0]] not in {_ALIASES.get(other) for other in raw}:
                return f"has the unknown key {name!r} (did you mean {close[0]!r}?)"
            continue
        if value is None:
            continue
        if key == "id" and isinstance(value, int):
            value = str(value)
        if not isinstance(value, str):
            return f"{name!r} is a {type(value).__name__}, not text"
        if key in entry and entry[key] != value:
            return f"gives {key!r} twice ({' and '.join(alias for alias in _KEYS[key] if alias in raw)}) with different values"
        entry[key] = value
    for key in required:
        if not entry.get(key, "").strip():
            return f"has no {key!r} (read from: {', '.join(_KEYS[key])})"
    return entry


def _read_pairs(root: Path, masked: bool) -> list[Request]:
    folders = [root / name for name in _SOURCE_FOLDERS if (root / name).is_dir()] or [root]
    sources: dict[str, list[Path]] = {}
    orphans: list[str] = []
    for folder in folders:
        pictures = _pictures(folder)
        stems = {path.stem for path in pictures}
        for path in pictures:
            base = _base(path.stem)
            if base is None:
                sources.setdefault(path.stem, []).append(path)
            elif base not in stems:
                orphans.append(
                    f"{path.relative_to(root)} is a mask or target, but its picture {base}.* is not beside it"
                )
    if not sources:
        raise _nothing_found(root)
    instructions = _instructions(root)
    rows: list[Request] = []
    problems = list(orphans)
    for stem, paths in sorted(sources.items()):
        source = paths[0]
        where = str(source.relative_to(root))
        try:
            if len(paths) > 1:
                raise InputError(
                    f"has the same name as {paths[1].relative_to(root)}: masks and instructions could belong to either"
                )
            mask = _beside(root, source, "mask")
            target = _beside(root, source, "target")
            if mask is None and masked:
                raise InputError(
                    f"has no mask (looked for {stem}_mask.png, {stem}.mask.png and masks/{stem}.png, any picture ending)"
                )
            instruction = _instruction(source, instructions)
        except InputError as problem:
            problems.append(f"{where}: {problem}")
            continue
        common: dict[str, Any] = {
            "task_id": stem,
            "task_type": "edit",
            "where": where,
            "group": stem,
        }
        common |= {"instruction": instruction, "source": source, "target": target}
        rows.append(Request(**common) if mask is None else Row(**common, mask=mask))
    refuse(problems, num_rows=len(sources), source=str(root))
    return rows


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    )


def _base(stem: str) -> str | None:
    """The picture's name, if ``stem`` is that of a mask or a target; otherwise None."""
    for ending in ("_mask", ".mask", "_target", ".target"):
        if stem.endswith(ending) and stem != ending:
            return stem.removesuffix(ending)
    return None


def _beside(root: Path, source: Path, kind: str) -> Path | None:
    stem = source.stem
    found = [
        path
        for path in _with_stems(source.parent, (f"{stem}_{kind}", f"{stem}.{kind}"))
        if path != source
    ]
    found += _with_stems(root / f"{kind}s", (stem, f"{stem}_{kind}", f"{stem}.{kind}"))
    if len(found) > 1:
        names = " and ".join(str(path.relative_to(root)) for path in found)
        raise InputError(f"has more than one {kind} ({names}): keep one")
    return found[0] if found else None


def _with_stems(folder: Path, stems: tuple[str, ...]) -> list[Path]:
    return [path for stem in stems for path in _candidates(folder, stem)]


def _candidates(folder: Path, stem: str) -> list[Path]:
    # Asking for each name keeps a folder of 10,000 pictures linear; both cases, because cameras write .JPG.
    paths = (
        folder / f"{stem}{suffix}" for ending in SUFFIXES for suffix in (ending, ending.upper())
    )
    found: list[Path] = []
    for path in paths:
        if path.is_file() and not any(path.samefile(other) for other in found):
            found.append(path)
    return found


def _instruction(source: Path, instructions: dict[str, str]) -> str:
    text_file = source.with_suffix(".txt")
    text = instructions.get(source.name) or instructions.get(source.stem) or ""
    if text_file.is_file():
        try:
            text = text_file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{text_file.name} cannot be read as UTF-8 text ({error})") from error
    text = " ".join(text.split())
    if not text:
        raise InputError(
            f"has no instruction (looked for {text_file.name}, instructions.json and instructions.csv)"
        )
    return text


def _instructions(root: Path) -> dict[str, str]:
    """Instructions by file name or stem, from ``instructions.json`` or ``instructions.csv``; empty if there is neither."""
    as_json, as_csv = root / "instructions.json", root / "instructions.csv"
    try:
        if as_json.is_file():
            content = json.loads(as_json.read_text(encoding="utf-8-sig"))
            if not isinstance(content, dict) or not all(
                isinstance(text, str) for text in content.values()
            ):
                raise InputError(
                    f'{as_json} must be one object of names and texts: {{"NAME": "what to do"}}.'
                )
            return dict(content)
        if as_csv.is_file():
            with as_csv.open(encoding="utf-8-sig", newline="") as stream:
                reader = csv.DictReader(stream)
                if not {"name", "instruction"} <= set(reader.fieldnames or ()):
                    raise InputError(
                        f"{as_csv} needs the columns name and instruction in its first line; it has {reader.fieldnames}."
                    )
                return {row["name"]: row["instruction"] or "" for row in reader}
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{root}: instructions.json or instructions.csv cannot be read ({error}). Save it as UTF-8."
        ) from error
    return {}


def _nothing_found(root: Path) -> InputError:
    entries = sorted(path.name + ("/" if path.is_dir() else "") for path in root.iterdir())
    found = (
        ", ".join(entries[:8]) + (f" and {len(entries) - 8} more" if len(entries) > 8 else "")
        if entries
        else "nothing"
    )
    lines = [name for name in entries if name.lower().endswith(".jsonl")]
    hint = f" Is it data.path={root / lines[0]}?" if lines else ""
    return InputError(f"{root} holds no dataset. Looked for {_EXPECTED}. Found {found}.{hint}")
