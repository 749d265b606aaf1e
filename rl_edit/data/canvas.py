"""Fits a task to the size an editor works at.

Source, result, mask and metrics then share one pixel grid.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor

from rl_edit.data.notices import NUM_EXAMPLES
from rl_edit.errors import InputError
from rl_edit.types import EditTask, PairedTask, RegionsTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitting:
    """Says to which canvas images of one size are fitted.

    Attributes:
        size, canvas: (height, width).
        tasks: how many tasks have the size.
    """

    size: tuple[int, int]
    canvas: tuple[int, int]
    tasks: int

    def record(self) -> dict[str, Any]:
        """Returns it as ``run.json`` has it: sizes are WIDTHxHEIGHT."""
        return {"size": _shown(self.size), "canvas": _shown(self.canvas), "tasks": self.tasks}


def fittings(
    sizes: Iterable[tuple[int, int]], *, resolution: int, multiple: int
) -> tuple[Fitting, ...]:
    """Counts tasks by their size, the commonest first."""
    # Cameras and datasets repeat few sizes, so this is short where the data is long.
    return tuple(
        Fitting(size=size, canvas=canvas_size(*size, resolution, multiple), tasks=tasks)
        for size, tasks in Counter(sizes).most_common()
    )


def fittings_line(fitted: Sequence[Fitting]) -> str:
    """Says which images are resized, in one line; "" where none is."""
    resized = [each for each in fitted if each.size != each.canvas]
    if not resized:
        return ""
    changed, total = (sum(each.tasks for each in part) for part in (resized, fitted))
    # Each canvas is a shape of its own, which compiled kernels and batches care about.
    canvases = len({each.canvas for each in fitted})
    examples = [
        f"{each.tasks} of {_shown(each.size)} to {_shown(each.canvas)}"
        for each in resized[:NUM_EXAMPLES]
    ]
    more = f", and {len(resized) - NUM_EXAMPLES} other sizes" * (len(resized) > NUM_EXAMPLES)
    return (
        f"{changed} of {total} images are resized to the editor's canvas "
        f"({', '.join(examples)}{more}); {canvases} canvas{'es' * (canvases > 1)} in all"
    )


def _shown(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def canvas_size(height: int, width: int, resolution: int, multiple: int) -> tuple[int, int]:
    """(height, width) of the canvas for an image, in steps of ``multiple``.

    The area is about ``resolution**2`` and the aspect ratio that of the image. Each side is at
    least two steps. The aspect ratio gives way only when that floor binds.
    """
    if resolution < 2 * multiple:
        raise InputError(
            f"resolution({resolution}) is below two steps of {multiple} pixels, the smallest "
            f"canvas of this editor. Set resolution to {2 * multiple} or more."
        )
    # side * scale keeps the aspect ratio, and (height * scale) * (width * scale) = resolution**2.
    scale = resolution / math.sqrt(height * width)
    sides = [max(round(side * scale / multiple), 2) * multiple for side in (height, width)]
    # Where the floor binds, the area decides the other side: memory must not depend on the oddest
    # image of a dataset.
    for this, other in ((0, 1), (1, 0)):
        if sides[this] == 2 * multiple:
            sides[other] = min(
                sides[other], max(math.ceil(resolution**2 / sides[this] / multiple), 2) * multiple
            )
    return sides[0], sides[1]


def fit(task: EditTask, *, resolution: int, multiple: int) -> EditTask:
    """Fits a task to its canvas.

    The record class and the id stay. The very same object returns when its size is right already.
    Images are resized with Lanczos. A pixel of the mask, and of each region, is set when it covers
    any set pixel of the original, so thin strokes never vanish. A pair that agreed exactly outside
    its mask still does.
    """
    height, width = task.edit_mask.shape
    size = canvas_size(height, width, resolution, multiple)
    # Resizing to the same size would still filter the image and change its bytes.
    if size == (height, width):
        return task
    mask = _cover(task.edit_mask, size)
    if bool(mask.all()):
        raise InputError(
            f"Task {task.task_id!r}: at {size[1]}x{size[0]} its mask covers every pixel, so "
            f"nothing would be left to keep. Raise the resolution({resolution}) or draw a smaller "
            "region."
        )
    changes: dict[str, Any] = {"edit_mask": mask, "source": _resize(task.source, size)}
    if isinstance(task, PairedTask):
        target = _resize(task.target, size)
        if torch.equal(task.source[~task.edit_mask], task.target[~task.edit_mask]):
            # Lanczos carries the edit a few pixels across the mask's edge, so the source's pixels
            # are put back there.
            target = torch.where(mask[:, :, None], target, changes["source"])
        changes["target"] = target
    if isinstance(task, RegionsTask):
        changes["regions"] = torch.stack([_cover(region, size) for region in task.regions])
    return dataclasses.replace(task, **changes)


def task_without_mask(
    source: UInt8[Tensor, "height width 3"],
    instruction: str,
    *,
    task_id: str,
    resolution: int,
    multiple: int,
    task_type: str = "edit",
) -> EditTask:
    """Makes a task on its canvas of an image that has no mask.

    A task needs a mask that is neither empty nor full, so one pixel is marked. It is marked on the
    canvas: an image of one pixel has one too.
    """
    height, width, _ = source.shape
    size = canvas_size(height, width, resolution, multiple)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[0, 0] = True
    return EditTask(
        task_id=task_id,
        task_type=task_type,
        # Resizing to the same size would still filter the image and change its bytes.
        source=source if size == (height, width) else _resize(source, size),
        instruction=instruction,
        edit_mask=mask,
    )


def leaves_no_token(mask: Bool[Tensor, "height width"], *, resolution: int, multiple: int) -> bool:
    """True when a mask touches every token of its canvas.

    Nothing is background then. A token covers ``multiple`` x ``multiple`` pixels.
    """
    original_height, original_width = mask.shape
    height, width = canvas_size(original_height, original_width, resolution, multiple)
    # First to the canvas, then to tokens: a token is set when any of its canvas pixels is, as in
    # training.
    tokens = _cover(_cover(mask, (height, width)), (height // multiple, width // multiple))
    return bool(tokens.all())


def _resize(
    image: UInt8[Tensor, "height width 3"], size: tuple[int, int]
) -> UInt8[Tensor, "new_height new_width 3"]:
    height, width = size
    resized = Image.fromarray(image.numpy()).resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized, dtype=np.uint8))


def _cover(
    mask: Bool[Tensor, "height width"], size: tuple[int, int]
) -> Bool[Tensor, "new_height new_width"]:
    """True where a new pixel overlaps a set pixel."""
    pixels = mask.numpy()
    for axis, new in enumerate(size):
        old = pixels.shape[axis]
        # New pixel i covers [i * old / new, (i + 1) * old / new) of the original. Bounds are whole
        # numbers, rounded outwards, so that nothing depends on floating-point rounding.
        start = np.arange(new) * old // new
        stop = -(-(np.arange(1, new + 1) * old) // new)
        # A difference of running sums counts the set pixels between the bounds.
        sums = np.concatenate(
            [np.zeros_like(pixels.take([0], axis), dtype=np.int64), np.cumsum(pixels, axis=axis)],
            axis=axis,
        )
        pixels = sums.take(stop, axis) > sums.take(start, axis)
    return torch.from_numpy(np.ascontiguousarray(pixels))
