"""A person's own data: a JSON-lines file, or a plain folder of pictures with masks and instructions beside them.

**JSON lines** (``DIR/metadata.jsonl`` or any ``.jsonl`` file): one object a line; paths are relative to the file::

    {"source": "cat.jpg", "instruction": "give the cat a hat", "mask": "cat_mask.png"}

=============  =======================================  ==========================================================
key            also read as                             meaning
=============  =======================================  ==========================================================
source         image, input_image                       the picture to edit
instruction    prompt                                   what to do
mask                                                    where pixels may change; the size of the picture
target         edited_image                             optional: the right result, the size of the picture
caption                                                 optional: what the edited region should show
task_type      task                                     optional: the kind of edit, for tables; "edit" if missing
id             task_id                                  optional: unique; otherwise the source path and a count
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
from pathlib import Path
from typing import Any

from rl_edit.data.images import SUFFIXES
from rl_edit.data.rows import Row, refuse
from rl_edit.errors import InputError

_KEYS: dict[str, tuple[str, ...]] = {
    "source": ("source", "image", "input_image"),
    "instruction": ("instruction", "prompt"),
    "mask": ("mask",),
    "target": ("target", "edited_image"),
    "caption": ("caption",),
    "task_type": ("task_type", "task"),
    "id": ("id", "task_id"),
}
_REQUIRED = ("source", "instruction", "mask")
_ALIASES = {alias: key for key, aliases in _KEYS.items() for alias in aliases}
_SOURCE_FOLDERS = ("images", "sources")
_EXPECTED = (
    "metadata.jsonl; tasks/*/metadata.json (CompBench); or pictures NAME.jpg (here, in images/ or in sources/) with NAME_mask.png or "
    "masks/NAME.png and NAME.txt or instructions.json|csv"
)


def read_folder(path: Path) -> list[Row]:
    """Rows of a ``.jsonl`` file or of a folder in either of the two layouts above."""
    if path.is_file():
        if path.suffix.lower() != ".jsonl":
            raise InputError(
                f"{path} is a file but not .jsonl, so its rows cannot be read. Name a .jsonl file or a directory with {_EXPECTED}."
            )
        return _read_lines(path)
    if not path.is_dir():
        raise InputError(f"{path} does not exist. Name a .jsonl file or a directory with {_EXPECTED}; or use builtin:shapes.")
    if (path / "metadata.jsonl").is_file():
        return _read_lines(path / "metadata.jsonl")
    return _read_pairs(path)


def _read_lines(file: Path) -> list[Row]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as UTF-8 text ({error}). Save it as UTF-8 with one JSON object a line.") from error
    rows: list[Row] = []
    problems: list[str] = []
    num_entries = 0
    counts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        num_entries += 1
        where = f"{file.name} line {number}"
        entry = _entry(line)
        if isinstance(entry, str):
            problems.append(f"{where}: {entry}")
            continue
        source = entry["source"]
        name = source.removesuffix(Path(source).suffix)
        counts[name] = counts.get(name, 0) + 1
        repeat = f"#{counts[name]}" if counts[name] > 1 else ""
        rows.append(
            Row(
                task_id=entry.get("id") or name + repeat,
                task_type=entry.get("task_type") or "edit",
                where=where,
                group=source,
                instruction=" ".join(entry["instruction"].split()),
                source=file.parent / Path(source).expanduser(),
                mask=file.parent / Path(entry["mask"]).expanduser(),
                target=file.parent / Path(entry["target"]).expanduser() if entry.get("target") else None,
                caption=entry.get("caption") or None,
            )
        )
    refuse(problems, num_rows=num_entries, source=str(file))
    if not rows:
        raise InputError(f"{file} has no rows, so there is nothing to train on. Write one JSON object a line: source, instruction, mask.")
    return rows


def _entry(line: str) -> dict[str, str] | str:
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
    for key in _REQUIRED:
        if not entry.get(key, "").strip():
            return f"has no {key!r} (read from: {', '.join(_KEYS[key])})"
    return entry


def _read_pairs(root: Path) -> list[Row]:
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
                orphans.append(f"{path.relative_to(root)} is a mask or target, but its picture {base}.* is not beside it")
    if not sources:
        raise _nothing_found(root)
    instructions = _instructions(root)
    rows: list[Row] = []
    problems = list(orphans)
    for stem, paths in sorted(sources.items()):
        source = paths[0]
        where = str(source.relative_to(root))
        try:
            if len(paths) > 1:
                raise InputError(f"has the same name as {paths[1].relative_to(root)}: masks and instructions could belong to either")
            mask = _beside(root, source, "mask")
            target = _beside(root, source, "target")
            if mask is None:
                raise InputError(f"has no mask (looked for {stem}_mask.png, {stem}.mask.png and masks/{stem}.png, any picture ending)")
            instruction = _instruction(source, instructions)
        except InputError as problem:
            problems.append(f"{where}: {problem}")
            continue
        rows.append(
            Row(task_id=stem, task_type="edit", where=where, group=stem, instruction=instruction, source=source, mask=mask, target=target)
        )
    refuse(problems, num_rows=len(sources), source=str(root))
    return rows


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith("."))


def _base(stem: str) -> str | None:
    """The picture's name, if ``stem`` is that of a mask or a target; otherwise None."""
    for ending in ("_mask", ".mask", "_target", ".target"):
        if stem.endswith(ending) and stem != ending:
            return stem.removesuffix(ending)
    return None


def _beside(root: Path, source: Path, kind: str) -> Path | None:
    stem = source.stem
    found = [path for path in _with_stems(source.parent, (f"{stem}_{kind}", f"{stem}.{kind}")) if path != source]
    found += _with_stems(root / f"{kind}s", (stem, f"{stem}_{kind}", f"{stem}.{kind}"))
    if len(found) > 1:
        names = " and ".join(str(path.relative_to(root)) for path in found)
        raise InputError(f"has more than one {kind} ({names}): keep one")
    return found[0] if found else None


def _with_stems(folder: Path, stems: tuple[str, ...]) -> list[Path]:
    return [path for stem in stems for path in _candidates(folder, stem)]


def _candidates(folder: Path, stem: str) -> list[Path]:
    # Asking for each name keeps a folder of 10,000 pictures linear; both cases, because cameras write .JPG.
    paths = (folder / f"{stem}{suffix}" for ending in SUFFIXES for suffix in (ending, ending.upper()))
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
        raise InputError(f"has no instruction (looked for {text_file.name}, instructions.json and instructions.csv)")
    return text


def _instructions(root: Path) -> dict[str, str]:
    """Instructions by file name or stem, from ``instructions.json`` or ``instructions.csv``; empty if there is neither."""
    as_json, as_csv = root / "instructions.json", root / "instructions.csv"
    try:
        if as_json.is_file():
            content = json.loads(as_json.read_text(encoding="utf-8-sig"))
            if not isinstance(content, dict) or not all(isinstance(text, str) for text in content.values()):
                raise InputError(f'{as_json} must be one object of names and texts: {{"NAME": "what to do"}}.')
            return dict(content)
        if as_csv.is_file():
            with as_csv.open(encoding="utf-8-sig", newline="") as stream:
                reader = csv.DictReader(stream)
                if not {"name", "instruction"} <= set(reader.fieldnames or ()):
                    raise InputError(f"{as_csv} needs the columns name and instruction in its first line; it has {reader.fieldnames}.")
                return {row["name"]: row["instruction"] or "" for row in reader}
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{root}: instructions.json or instructions.csv cannot be read ({error}). Save it as UTF-8.") from error
    return {}


def _nothing_found(root: Path) -> InputError:
    entries = sorted(path.name + ("/" if path.is_dir() else "") for path in root.iterdir())
    found = ", ".join(entries[:8]) + (f" and {len(entries) - 8} more" if len(entries) > 8 else "") if entries else "nothing"
    lines = [name for name in entries if name.lower().endswith(".jsonl")]
    hint = f" Is it data.path={root / lines[0]}?" if lines else ""
    return InputError(f"{root} holds no dataset. Looked for {_EXPECTED}. Found {found}.{hint}")
