"""Evaluated examples on disk: a directory each, with ``task.json`` and one PNG per image.

``evaluate`` writes them, the report and the figure read them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rl_edit.errors import InputError
from rl_edit.evaluation.record import SIDES, ExampleRecord
from rl_edit.files import validated

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One task with both edited images.

    Attributes:
        record: its instruction and metrics.
        source: image to edit, ``[height, width, 3]``; ``target`` is the correct result if known.
        mask: edit mask, ``[height, width]``: True where the instruction may change pixels.
        edited: the result of each side of ``SIDES``.
        attention: text-to-image attention of a side, ``[rows, columns]`` of the token grid,
            relative to the largest value of both sides. A side without attention is absent.
    """

    record: ExampleRecord
    source: Pixels
    mask: NDArray[np.bool_]
    target: Pixels | None
    edited: Mapping[str, Pixels]
    attention: Mapping[str, Pixels]


class ExampleQuota:
    """Spreads the examples over task types, in order of appearance."""

    def __init__(self, *, num_examples: int, num_types: int) -> None:
        self._total = num_examples
        # Rounded up, so that the quotas of all types together reach the total.
        self._per_type = max(1, math.ceil(num_examples / num_types))
        self._taken: Counter[str] = Counter()

    def take(self, task_type: str) -> bool:
        """Returns True, and counts it, if a task of this type is still to be written."""
        if self._taken.total() >= self._total or self._taken[task_type] >= self._per_type:
            return False
        self._taken[task_type] += 1
        return True


def write_example(images: Path, example: Example) -> None:
    """Writes an example below ``images``, in a directory named by its task."""
    directory = images / _folder_name(example.record.task_id)
    directory.mkdir(parents=True, exist_ok=True)
    # PNG is lossless: differences are computed from these files.
    panels = {
        "source": example.source,
        "mask": example.mask.astype(np.uint8) * 255,
        **({} if example.target is None else {"target": example.target}),
        **example.edited,
        **{f"attention_{side}": heat for side, heat in example.attention.items()},
    }
    for name, pixels in panels.items():
        Image.fromarray(pixels).save(directory / f"{name}.png")
    (directory / "task.json").write_text(json.dumps(example.record.model_dump(), indent=2) + "\n")


def read_example(directory: Path) -> Example:
    """Reads what :func:`write_example` wrote.

    Raises:
        InputError: an image is missing, unreadable, or not of the source's size, or ``task.json``
            is damaged.
    """
    record = _read_record(directory)
    source = _open(directory / "source.png", "RGB")
    edited = {side: _open(directory / f"{side}.png", "RGB") for side in SIDES}
    # Written as 0 or 255.
    mask = _open(directory / "mask.png", "L") > 127
    # The difference is taken pixel by pixel; the target is only shown, whatever its size.
    for name, pixels in {"mask": mask, **edited}.items():
        if pixels.shape[:2] != source.shape[:2]:
            raise InputError(
                f"{name}.png is {_size(pixels)} but source.png is {_size(source)}: "
                "pixels cannot be compared. Evaluate again."
            )
    # Absent for tasks without a known result, and for editors without attention maps.
    target = directory / "target.png"
    maps = {side: directory / f"attention_{side}.png" for side in SIDES}
    return Example(
        record=record,
        source=source,
        mask=mask,
        target=_open(target, "RGB") if target.is_file() else None,
        edited=edited,
        attention={side: _open(path, "L") for side, path in maps.items() if path.is_file()},
    )


def _read_record(directory: Path) -> ExampleRecord:
    path = directory / "task.json"
    if not path.is_file():
        raise InputError(
            "task.json is missing: it has the instruction and numbers. Evaluate again."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"task.json is not readable JSON ({error}). Evaluate again.") from error
    try:
        record = validated(ExampleRecord, content)
    except ValueError as error:
        raise InputError(f"task.json is damaged ({error}). Evaluate again.") from error
    return record if record.task_id else record.model_copy(update={"task_id": directory.name})


def _open(path: Path, mode: Literal["RGB", "L"]) -> Pixels:
    if not path.is_file():
        raise InputError(
            f"{path.name} is missing: the strip cannot be drawn without it. Evaluate again."
        )
    try:
        # Pillow decodes lazily: errors of the content appear in ``convert``, not in ``open``.
        with Image.open(path) as image:
            return np.asarray(image.convert(mode), dtype=np.uint8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{path.name} is not a readable image ({error}): the strip cannot be drawn. "
            "Evaluate again."
        ) from error


def _size(pixels: NDArray[Any]) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


def _folder_name(task_id: str) -> str:
    """Writes a task id as one folder name."""
    # Ids come from users' data and may hold slashes; most file systems end names at 255 bytes.
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in task_id)[:120]
