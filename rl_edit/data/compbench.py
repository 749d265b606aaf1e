"""CompBench's layout on disk (arXiv 2505.12200): written for the built-in world, read for both.

::

    tasks/<type>/metadata.json                                    JSON array of {image_path, instruction, caption}
    tasks/<type>/{input_image,edited_image,mask}/<image_path>     PNG; mask white = edit
    tasks/<type>/regions/<image_path>                             ours, optional: label map, 0 background, 1..R regions

Our rows also carry ``task_id``. Without it the id is the type and the image path. Tasks of the benchmark that live in
other layouts (``implicit_reasoning``, ``act_loc_view``, ``multi_turn_editing``) have no metadata.json and are not read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rl_edit.data.rows import Request, Row, refuse
from rl_edit.errors import InputError
from rl_edit.files import new_directory
from rl_edit.types import PairedRegionsTask, PairedTask

_PATTERN = "tasks/*/metadata.json"
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


def is_compbench(directory: Path) -> bool:
    return any(directory.glob(_PATTERN))


def write_compbench(
    tasks: Iterable[PairedTask], directory: Path, progress: Callable[[int], None] | None = None
) -> int:
    """Write tasks; returns how many. Losslessly: reading gives equal records.

    The directory appears complete or not at all: files are written beside it and moved at the end. An existing directory
    must be empty. ``progress`` is called with the number of tasks written so far.
    """
    with new_dataset(directory) as partial:
        return _write(tasks, partial, progress)


@contextmanager
def new_dataset(directory: Path) -> Iterator[Path]:
    """A directory to write a dataset to, which takes its name when all went well and is gone when not."""
    directory = directory.expanduser()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(
            f"{directory} exists and is not an empty directory: writing there would mix two datasets. Name a new directory."
        )
    with new_directory(directory) as partial:
        yield partial


def read_compbench(directory: Path) -> list[Row]:
    """Rows of every task type, in the order of their files. Pictures are not opened."""
    return [
        request for request in request_compbench(directory, masked=True) if isinstance(request, Row)
    ]


def request_compbench(directory: Path, *, masked: bool = False) -> list[Request]:
    """The same for rows some of which have no mask; ``masked`` says that each has one, or its file is missed."""
    rows: list[Request] = []
    problems: list[str] = []
    num_entries = 0
    for metadata in sorted(directory.glob(_PATTERN)):
        folder = metadata.parent
        for number, entry in enumerate(_entries(metadata), start=1):
            num_entries += 1
            where = f"{metadata.relative_to(directory)} entry {number}"
            problem = _problem(entry)
            if problem:
                problems.append(f"{where}: {problem}")
                continue
            image_path = entry["image_path"]
            common: dict[str, Any] = {
                "task_id": entry.get("task_id")
                or f"{folder.name}/{image_path.removesuffix('.png')}",
                "task_type": folder.name,
                "where": where,
                # "001ca3cb/0/00003.png" is a frame of clip 001ca3cb, and other rows may show its neighbours.
                "group": image_path.split("/")[0],
                "instruction": " ".join(entry["instruction"].split()),
                "source": folder / "input_image" / image_path,
                "target": folder / "edited_image" / image_path,
                "caption": entry.get("caption") or None,
            }
            mask, regions = (folder / part / image_path for part in ("mask", "regions"))
            if not masked and not mask.is_file():
                rows.append(Request(**common))
            else:
                rows.append(
                    Row(**common, mask=mask, regions=regions if regions.is_file() else None)
                )
    refuse(problems, num_rows=num_entries, source=str(directory))
    if not rows:
        raise InputError(
            f"{directory} has {_PATTERN} files but no entries in them, so there is nothing to train on. Check the download."
        )
    return rows


def _write(tasks: Iterable[PairedTask], root: Path, progress: Callable[[int], None] | None) -> int:
    entries: dict[str, list[dict[str, str]]] = {}
    written: set[Path] = set()
    for task in tasks:
        image_path = f"{task.task_id}.png"
        folder = root / "tasks" / task.task_type
        if (
            not _SAFE_NAME.fullmatch(task.task_id)
            or not _SAFE_NAME.fullmatch(task.task_type)
            or "/" in task.task_type
        ):
            raise InputError(
                f"Task {task.task_id!r} of type {task.task_type!r} cannot name files: use letters, digits, '.', '_' and '-' "
                "(and '/' inside the id) and start each part with a letter or digit."
            )
        if folder / image_path in written:
            raise InputError(
                f"Task id {task.task_id!r} occurs twice in type {task.task_type!r}: one would overwrite the other. Make ids unique."
            )
        written.add(folder / image_path)
        _save(folder / "input_image" / image_path, task.source.numpy())
        _save(folder / "edited_image" / image_path, task.target.numpy())
        _save(folder / "mask" / image_path, task.edit_mask.numpy().astype(np.uint8) * 255)
        if isinstance(task, PairedRegionsTask):
            regions = task.regions.numpy()
            if len(regions) > 255 or regions.sum(axis=0).max() > 1:
                raise InputError(
                    f"Task {task.task_id!r} has regions that overlap or are too many: a label map holds up to 255 that do not."
                )
            labels = np.arange(1, len(regions) + 1, dtype=np.uint8)
            _save(
                folder / "regions" / image_path,
                (regions * labels[:, None, None]).sum(axis=0, dtype=np.uint8),
            )
        entry = {
            "image_path": image_path,
            "instruction": task.instruction,
            "caption": task.caption,
            "task_id": task.task_id,
        }
        entries.setdefault(task.task_type, []).append(entry)
        if progress is not None:
            progress(len(written))
    if not written:
        raise InputError(
            "There are no tasks to write: the directory would not be readable as a dataset. Ask for at least one task."
        )
    for task_type, rows in entries.items():
        text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
        (root / "tasks" / task_type / "metadata.json").write_text(text, encoding="utf-8")
    return len(written)


def _save(path: Path, pixels: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Level 1 is a third of the time of the default and, on these pictures, a few per cent larger.
    Image.fromarray(pixels).save(path, compress_level=1)


def _entries(metadata: Path) -> list[Any]:
    try:
        entries = json.loads(metadata.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{metadata} is not readable JSON ({error}), so its rows are unknown. Download or write it again."
        ) from error
    if not isinstance(entries, list):
        raise InputError(
            f"{metadata} holds a {type(entries).__name__}, not an array of rows. CompBench writes a JSON array of objects."
        )
    return entries


def _problem(entry: Any) -> str:
    if not isinstance(entry, dict):
        return f"is a {type(entry).__name__}, not an object"
    for key in ("image_path", "instruction"):
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            return f"has no {key!r}"
    for key in ("caption", "task_id"):
        if entry.get(key) is not None and not isinstance(entry[key], str):
            return f"{key!r} is a {type(entry[key]).__name__}, not text"
    if Path(entry["image_path"]).is_absolute() or ".." in Path(entry["image_path"]).parts:
        return f"image_path {entry['image_path']!r} leaves its folder"
    return ""
