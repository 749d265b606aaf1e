"""Reads and writes CompBench's layout on disk (arXiv 2505.12200).

::

    tasks/<type>/metadata.json                  JSON array of {image_path, instruction, caption}
    tasks/<type>/input_image/<image_path>       PNG, as are the others
    tasks/<type>/edited_image/<image_path>
    tasks/<type>/mask/<image_path>              white = edit
    tasks/<type>/regions/<image_path>           ours, optional: a label map of 0, 1..R

Our rows also carry ``task_id``. Without it the id is the type and the image path. Tasks of the
benchmark in other layouts (``implicit_reasoning``, ``act_loc_view``, ``multi_turn_editing``) have
no metadata.json and are not read.
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

from rl_edit.data.listing import Listing, unused_files
from rl_edit.data.problems import refuse
from rl_edit.data.rows import Request, Row
from rl_edit.errors import InputError
from rl_edit.files import new_directory
from rl_edit.types import PairedRegionsTask, PairedTask

_PATTERN = "tasks/*/metadata.json"
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


def is_compbench(directory: Path) -> bool:
    """True for a directory in this layout."""
    return any(directory.glob(_PATTERN))


def write_compbench(
    tasks: Iterable[PairedTask], directory: Path, progress: Callable[[int], None] | None = None
) -> int:
    """Writes tasks without loss, and returns their number.

    The directory appears complete or not at all. An existing directory must be empty.

    Args:
        progress: called with the number of tasks written so far.
    """
    with new_dataset(directory) as partial:
        return _write(tasks, partial, progress)


@contextmanager
def new_dataset(directory: Path) -> Iterator[Path]:
    """Gives a directory to write a dataset to.

    It takes its name when all went well, and is removed when not.
    """
    directory = directory.expanduser()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(
            f"{directory} exists and is not an empty directory: writing there would mix two "
            "datasets. Name a new directory."
        )
    with new_directory(directory) as partial:
        yield partial


def list_compbench(directory: Path, *, masked: bool = False) -> Listing:
    """Lists the rows of every task type, in the order of their files. Images are not opened.

    Args:
        masked: every row has a mask; a missing mask file is then a problem of the row.
    """
    rows: list[Request] = []
    problems: list[str] = []
    num_entries = 0
    for metadata in sorted(directory.glob(_PATTERN)):
        for number, entry in enumerate(_entries(metadata), start=1):
            num_entries += 1
            where = f"{metadata.relative_to(directory)} entry {number}"
            if problem := _problem(entry):
                problems.append(f"{where}: {problem}")
            else:
                rows.append(_row(metadata.parent, entry, where, masked=masked))
    # All problems at once: a dataset is mended in one go.
    refuse(problems, num_rows=num_entries, source=str(directory))
    if not rows:
        raise InputError(
            f"{directory} has {_PATTERN} files but no entries in them, so there is nothing to "
            "train on. Check the download."
        )
    unused = unused_files(directory, rows, kind="files-in-no-row")
    return Listing(requests=tuple(rows), notices=tuple(unused))


def _row(folder: Path, entry: dict[str, Any], where: str, *, masked: bool) -> Request:
    image_path = entry["image_path"]
    common: dict[str, Any] = {
        "task_id": entry.get("task_id") or f"{folder.name}/{image_path.removesuffix('.png')}",
        "task_type": folder.name,
        "where": where,
        # "001ca3cb/0/00003.png" is a frame of clip 001ca3cb, and other rows may show its
        # neighbours. Rows of one clip must not be split between training and evaluation.
        "group": image_path.split("/")[0],
        "instruction": " ".join(entry["instruction"].split()),
        "source": folder / "input_image" / image_path,
        "target": folder / "edited_image" / image_path,
        "caption": entry.get("caption") or None,
    }
    mask, regions = (folder / part / image_path for part in ("mask", "regions"))
    if not masked and not mask.is_file():
        return Request(**common)
    return Row(**common, mask=mask, regions=regions if regions.is_file() else None)


def _write(tasks: Iterable[PairedTask], root: Path, progress: Callable[[int], None] | None) -> int:
    entries: dict[str, list[dict[str, str]]] = {}
    written: set[Path] = set()
    for task in tasks:
        image_path = f"{task.task_id}.png"
        folder = root / "tasks" / task.task_type
        _require_file_names(task)
        if folder / image_path in written:
            raise InputError(
                f"Task id {task.task_id!r} occurs twice in type {task.task_type!r}: one would "
                "overwrite the other. Make ids unique."
            )
        written.add(folder / image_path)
        _write_images(task, folder, image_path)
        entries.setdefault(task.task_type, []).append(
            {
                "image_path": image_path,
                "instruction": task.instruction,
                "caption": task.caption,
                "task_id": task.task_id,  # ours: another reader finds the id in the path
            }
        )
        if progress is not None:
            progress(len(written))
    if not written:
        raise InputError(
            "There are no tasks to write: the directory would not be readable as a dataset. Ask "
            "for at least one task."
        )
    # Last, because metadata.json is what makes the directory a dataset.
    for task_type, rows in entries.items():
        text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
        (root / "tasks" / task_type / "metadata.json").write_text(text, encoding="utf-8")
    return len(written)


def _write_images(task: PairedTask, folder: Path, image_path: str) -> None:
    _save(folder / "input_image" / image_path, task.source.numpy())
    _save(folder / "edited_image" / image_path, task.target.numpy())
    _save(folder / "mask" / image_path, task.edit_mask.numpy().astype(np.uint8) * 255)
    if isinstance(task, PairedRegionsTask):
        _save(folder / "regions" / image_path, _label_map(task))


def _require_file_names(task: PairedTask) -> None:
    """Refuses an id or type that cannot name a file."""
    if (
        not _SAFE_NAME.fullmatch(task.task_id)
        or not _SAFE_NAME.fullmatch(task.task_type)
        or "/" in task.task_type
    ):
        raise InputError(
            f"Task {task.task_id!r} of type {task.task_type!r} cannot name files: use letters, "
            "digits, '.', '_' and '-' (and '/' inside the id) and start each part with a letter "
            "or digit."
        )


def _label_map(task: PairedRegionsTask) -> NDArray[np.uint8]:
    """The regions as one image: 0 background, 1..R regions."""
    regions = task.regions.numpy()
    if len(regions) > 255 or regions.sum(axis=0).max() > 1:
        raise InputError(
            f"Task {task.task_id!r} has regions that overlap or are too many: a label map holds up "
            "to 255 that do not."
        )
    labels = np.arange(1, len(regions) + 1, dtype=np.uint8)  # 0 is background
    return np.asarray((regions * labels[:, None, None]).sum(axis=0, dtype=np.uint8))


def _save(path: Path, pixels: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Level 1 takes a third of the default's time and, on these images, a few per cent more space.
    Image.fromarray(pixels).save(path, compress_level=1)


def _entries(metadata: Path) -> list[Any]:
    try:
        # "utf-8-sig" also reads files that begin with a byte order mark.
        entries = json.loads(metadata.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{metadata} is not readable JSON ({error}), so its rows are unknown. Download or "
            "write it again."
        ) from error
    if not isinstance(entries, list):
        raise InputError(
            f"{metadata} holds a {type(entries).__name__}, not an array of rows. CompBench writes "
            "a JSON array of objects."
        )
    return entries


def _problem(entry: Any) -> str:
    """A sentence without its subject, or "" for a good entry."""
    if not isinstance(entry, dict):
        return f"is a {type(entry).__name__}, not an object"
    for key in ("image_path", "instruction"):
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            return f"has no {key!r}"
    for key in ("caption", "task_id"):
        if entry.get(key) is not None and not isinstance(entry[key], str):
            return f"{key!r} is a {type(entry[key]).__name__}, not text"
    # A path from a downloaded file must not reach files outside the dataset.
    if Path(entry["image_path"]).is_absolute() or ".." in Path(entry["image_path"]).parts:
        return f"image_path {entry['image_path']!r} leaves its folder"
    return ""
