"""Reads a user's data: a JSON-lines file, or a plain folder of images.

**JSON lines** (``DIR/metadata.jsonl`` or any ``.jsonl`` file) have one object a line. Paths are
relative to the file::

    {"source": "cat.jpg", "instruction": "give the cat a hat", "mask": "cat_mask.png"}

===========  ==================  ===============================================================
key          also read as        meaning
===========  ==================  ===============================================================
source       image, input_image  the image to edit
instruction  prompt              what to do
mask                             where pixels may change; the size of the image
region_map                       optional: a label map of the mask's places, 0 outside, 1..R
target       edited_image        optional: the right result, the size of the image
caption                          optional: what the edited region should show
task_type    task                optional: the kind of edit, for tables; "edit" if missing
id           task_id             optional: unique; otherwise the source path and a count
split_group                      optional: a split never separates rows that share it; otherwise
                                 the source path
===========  ==================  ===============================================================

**Plain folder**: for an image ``NAME.jpg`` in the folder itself, in ``images/`` or in ``sources/``

* mask: ``NAME_mask.png`` or ``NAME.mask.png`` beside it, or ``masks/NAME.png``;
* instruction: ``NAME.txt`` beside it, or an entry of ``instructions.json`` ({"NAME": "..."}) or
  ``instructions.csv`` (columns ``name``, ``instruction``), where NAME may carry its ending;
* target, optional: ``NAME_target.png`` or ``NAME.target.png`` beside it, or ``targets/NAME.png``.

Each of the three may have any ending of ``file_kinds.SUFFIXES``. Images are not opened here.
"""

from __future__ import annotations

import csv
import difflib
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rl_edit.data.file_kinds import SUFFIXES
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
    "metadata.jsonl; tasks/*/metadata.json (CompBench); or images NAME.jpg (here, in images/ or in "
    "sources/) with NAME_mask.png or masks/NAME.png and NAME.txt or instructions.json|csv"
)


def read_folder(path: Path) -> list[Row]:
    """Reads rows of a file or folder in the layouts above."""
    return [request for request in request_folder(path, masked=True) if isinstance(request, Row)]


def request_folder(path: Path, *, masked: bool = False) -> list[Request]:
    """Rows with or without a mask.

    Args:
        masked: every row must have a mask.
    """
    if path.is_file():
        if path.suffix.lower() != ".jsonl":
            raise InputError(
                f"{path} is a file but not .jsonl, so its rows cannot be read. Name a .jsonl file "
                f"or a directory with {_EXPECTED}."
            )
        return _read_lines(path, masked)
    if not path.is_dir():
        raise InputError(
            f"{path} does not exist. Name a .jsonl file or a directory with {_EXPECTED}; or use "
            "builtin:shapes."
        )
    # A list of rows says more than the names of files do, so it wins.
    if (path / "metadata.jsonl").is_file():
        return _read_lines(path / "metadata.jsonl", masked)
    return _read_pairs(path, masked)


class FoundMasks:
    """Writes rows with found masks, as JSON lines.

    Images are copied as they are.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._sources: dict[Path, str] = {}
        self._lines: list[str] = []

    def add(self, request: Request, regions: NDArray[np.bool_]) -> None:
        """Adds a row with its regions.

        Args:
            regions: ``[region, height, width]`` in pixels of the image, disjoint, at most 255.
        """
        row = len(self._lines)
        # Several rows may show one image, which is copied once.
        if request.source not in self._sources:
            self._sources[request.source] = self._copied(
                request.source, "sources", len(self._sources)
            )
        labels = np.zeros(regions.shape[1:], dtype=np.uint8)  # 0 is background, 1..R are regions
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
        """Writes the file that makes the directory a dataset."""
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
        # "utf-8-sig" also reads files of editors that begin with a byte order mark. Not
        # splitlines(), which would break a JSON string at a Unicode line separator.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file} cannot be read as UTF-8 text ({error}). Save it as UTF-8 with one JSON object "
            "a line."
        ) from error
    required = (*_REQUIRED, "mask") if masked else _REQUIRED
    rows: list[Request] = []
    problems: list[str] = []
    num_entries = 0
    counts: Counter[str] = Counter()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        num_entries += 1
        where, entry = f"{file.name} line {number}", _entry(line, required)
        if isinstance(entry, str):
            problems.append(f"{where}: {entry}")
            continue
        # Rows without an id are numbered per image, so that adding rows at the end renames none.
        name = entry["source"].removesuffix(Path(entry["source"]).suffix)
        counts[name] += 1
        repeat = f"#{counts[name]}" if counts[name] > 1 else ""
        rows.append(_row(file.parent, entry, where, default_id=name + repeat))
    refuse(problems, num_rows=num_entries, source=str(file))
    if not rows:
        raise InputError(
            f"{file} has no rows, so there is nothing to train on. Write one JSON object a line: "
            "source, instruction, mask."
        )
    return rows


def _row(folder: Path, entry: Mapping[str, str], where: str, *, default_id: str) -> Request:
    """The row of a line under canonical keys."""
    # Joining an absolute path to a folder gives the absolute path, so both kinds work.
    paths = {
        key: folder / Path(entry[key]).expanduser()
        for key in ("source", "mask", "target", "region_map")
        if entry.get(key)
    }
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


def _entry(line: str, required: Sequence[str]) -> dict[str, str] | str:
    """One line under canonical keys, or a sentence about its problem."""
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
            if nearest := _misspelt(name, raw):
                return f"has the unknown key {name!r} (did you mean {nearest!r}?)"
            continue
        if value is None:  # exporters write null for a missing cell
            continue
        if key == "id" and isinstance(value, int):
            value = str(value)
        if not isinstance(value, str):
            return f"{name!r} is a {type(value).__name__}, not text"
        if key in entry and entry[key] != value:
            names = " and ".join(alias for alias in _KEYS[key] if alias in raw)
            return f"gives {key!r} twice ({names}) with different values"
        entry[key] = value
    for key in required:
        if not entry.get(key, "").strip():
            return f"has no {key!r} (read from: {', '.join(_KEYS[key])})"
    return entry


def _misspelt(name: str, raw: Mapping[str, Any]) -> str | None:
    """The known key that a column probably means.

    Other columns are the user's business, but a misspelt key would silently drop, say, every
    target.
    """
    near = difflib.get_close_matches(name, _ALIASES, n=1, cutoff=0.8)
    present = {_ALIASES.get(other) for other in raw}
    return near[0] if near and _ALIASES[near[0]] not in present else None


def _read_pairs(root: Path, masked: bool) -> list[Request]:
    sources, problems = _sources(root)
    if not sources:
        raise _no_dataset(root)
    instructions = _instructions(root)
    rows: list[Request] = []
    for _, paths in sorted(sources.items()):
        where = str(paths[0].relative_to(root))
        try:
            if len(paths) > 1:
                raise InputError(
                    f"has the same name as {paths[1].relative_to(root)}: masks and instructions "
                    "could belong to either"
                )
            rows.append(_pair(root, paths[0], instructions, where=where, masked=masked))
        except InputError as problem:
            problems.append(f"{where}: {problem}")
    refuse(problems, num_rows=len(sources), source=str(root))
    return rows


def _sources(root: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Finds the images to edit, by stem.

    Each mask or target without its image is a problem.
    """
    # A folder of sources hides the images beside it, which are then something else.
    folders = [root / name for name in _SOURCE_FOLDERS if (root / name).is_dir()] or [root]
    sources: dict[str, list[Path]] = {}
    problems: list[str] = []
    for folder in folders:
        images = _images(folder)
        stems = {path.stem for path in images}
        for path in images:
            base = _base(path.stem)
            if base is None:
                sources.setdefault(path.stem, []).append(path)
            elif base not in stems:
                problems.append(
                    f"{path.relative_to(root)} is a mask or target, but its image {base}.* is not "
                    "beside it"
                )
    return sources, problems


def _pair(
    root: Path, source: Path, instructions: Mapping[str, str], *, where: str, masked: bool
) -> Request:
    """The row of one image of a plain folder."""
    stem = source.stem
    mask = _beside(root, source, "mask")
    target = _beside(root, source, "target")
    if mask is None and masked:
        raise InputError(
            f"has no mask (looked for {stem}_mask.png, {stem}.mask.png and masks/{stem}.png, any "
            "image ending)"
        )
    common: dict[str, Any] = {
        "task_id": stem,
        "task_type": "edit",
        "where": where,
        "group": stem,
        "instruction": _instruction(source, instructions),
        "source": source,
        "target": target,
    }
    return Request(**common) if mask is None else Row(**common, mask=mask)


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    )


def _base(stem: str) -> str | None:
    """The image's name, if ``stem`` is that of a mask or a target; otherwise None."""
    # A file that is called just "_mask.png" is an image, for there is no name before the ending.
    for ending in ("_mask", ".mask", "_target", ".target"):
        if stem.endswith(ending) and stem != ending:
            return stem.removesuffix(ending)
    return None


def _beside(root: Path, source: Path, kind: str) -> Path | None:
    """The mask or target of an image."""
    stem = source.stem
    files = [
        path
        for path in _with_stems(source.parent, (f"{stem}_{kind}", f"{stem}.{kind}"))
        if path != source
    ]
    files += _with_stems(root / f"{kind}s", (stem, f"{stem}_{kind}", f"{stem}.{kind}"))
    if len(files) > 1:
        names = " and ".join(str(path.relative_to(root)) for path in files)
        raise InputError(f"has more than one {kind} ({names}): keep one")
    return files[0] if files else None


def _with_stems(folder: Path, stems: tuple[str, ...]) -> list[Path]:
    return [path for stem in stems for path in _candidates(folder, stem)]


def _candidates(folder: Path, stem: str) -> list[Path]:
    # Asking for each name keeps a folder of 10,000 images linear. Both cases are asked for, because
    # cameras write .JPG.
    paths = (
        folder / f"{stem}{suffix}" for ending in SUFFIXES for suffix in (ending, ending.upper())
    )
    files: list[Path] = []
    for path in paths:
        # On a file system that ignores case both names are one file.
        if path.is_file() and not any(path.samefile(other) for other in files):
            files.append(path)
    return files


def _instruction(source: Path, instructions: Mapping[str, str]) -> str:
    # A text beside the image wins over a table, for it is the more particular.
    text_file = source.with_suffix(".txt")
    text = instructions.get(source.name) or instructions.get(source.stem) or ""
    if text_file.is_file():
        try:
            text = text_file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{text_file.name} cannot be read as UTF-8 text ({error})") from error
    text = " ".join(text.split())  # line breaks of a text file are no part of the instruction
    if not text:
        raise InputError(
            f"has no instruction (looked for {text_file.name}, instructions.json and "
            "instructions.csv)"
        )
    return text


def _instructions(root: Path) -> dict[str, str]:
    """Instructions by file name or stem; empty if the folder has no such file."""
    as_json, as_csv = root / "instructions.json", root / "instructions.csv"
    try:
        if as_json.is_file():
            return _json_instructions(as_json)
        return _csv_instructions(as_csv) if as_csv.is_file() else {}
    except InputError:  # a ValueError, but one that says what to do
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(
            f"{root}: instructions.json or instructions.csv cannot be read ({error}). Save it as "
            "UTF-8."
        ) from error


def _json_instructions(file: Path) -> dict[str, str]:
    content = json.loads(file.read_text(encoding="utf-8-sig"))
    if not isinstance(content, dict) or not all(isinstance(text, str) for text in content.values()):
        raise InputError(f'{file} must be one object of names and texts: {{"NAME": "what to do"}}.')
    return dict(content)


def _csv_instructions(file: Path) -> dict[str, str]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        if not {"name", "instruction"} <= set(reader.fieldnames or ()):
            raise InputError(
                f"{file} needs the columns name and instruction in its first line; it has "
                f"{reader.fieldnames}."
            )
        return {row["name"]: row["instruction"] or "" for row in reader}


def _no_dataset(root: Path) -> InputError:
    """An error that lists what the directory holds."""
    entries = sorted(path.name + ("/" if path.is_dir() else "") for path in root.iterdir())
    more = f" and {len(entries) - 8} more" if len(entries) > 8 else ""
    listed = ", ".join(entries[:8]) + more if entries else "nothing"
    lines = [name for name in entries if name.lower().endswith(".jsonl")]
    hint = f" Is it data.path={root / lines[0]}?" if lines else ""
    return InputError(f"{root} holds no dataset. Looked for {_EXPECTED}. Found {listed}.{hint}")
