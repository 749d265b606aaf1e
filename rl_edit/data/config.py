"""Settings of the data: the source of tasks, and how rows on disk are read."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from rl_edit.data.editor_text import TooLong
from rl_edit.data.instructions import TextLines
from rl_edit.data.masks import MaskFrom, MaskPolarity
from rl_edit.data.rows import EmptyMask
from rl_edit.errors import InputError

BUILTIN_SHAPES = "builtin:shapes"


class DataConfig(BaseModel):
    """The source of tasks.

    Attributes:
        path: ``builtin:shapes``, a directory or a ``.jsonl`` file.
        seed: of the built-in world.
        num_train: training tasks of the built-in world. Data on disk has the rows it has.
        num_heldout: held-out tasks of the built-in world.
        task_types: only these kinds of edit. None is all.
        mask_polarity: the meaning of white in masks on disk, and of all that stands for it (opaque
            pixels, labels, paint). "edit_white" marks the edit (CompBench), "edit_black" marks
            what should stay (CoCoEdit; MagicBrush, whose hole is to be edited). "auto" takes what
            the rows agree on, white to edit where nothing contradicts it, or refuses.
        mask_from: the form of masks on disk: their "luminance", "alpha" (transparency), "labels"
            (every value but 0), or what is "painted" on a copy of the source. "auto" recognises
            the form of each.
        empty_mask: treatment of a row on disk whose mask is empty or full. "error" stops, "skip"
            leaves it out and counts it.
        text_lines: the meaning of several lines in an image's .txt file. "split" makes each an
            instruction of its own, "join" makes them one. None splits them, and says so.
        heldout_fraction: share of the images on disk that is held out without ``heldout_path``.
        strict: whether a notice is an error: files that are not used, masks that were guessed, text
            that was cut.
        without_regions: treatment of data in which no task has regions, where a reward or credit
            scores region by region. "error" stops, "mask" takes each mask as the one region.
        too_long: treatment of a row on disk whose instruction is longer than the editor reads.
            "cut" trains on its beginning, as the editor cuts it, and says so; "skip" leaves the row
            out and counts it; "error" stops.
        heldout_path: a separate dataset for evaluation. All of ``path`` is then for training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    path: str = BUILTIN_SHAPES
    seed: int = 0
    # Tasks of the built-in world are drawn on demand, so their number costs nothing.
    num_train: int = Field(default=4096, ge=1)
    num_heldout: int = Field(default=256, ge=1)
    task_types: tuple[str, ...] | None = None
    mask_polarity: MaskPolarity = "auto"
    mask_from: MaskFrom = "auto"
    empty_mask: EmptyMask = "error"
    text_lines: TextLines | None = None
    # Where nothing else divides the two splits.
    heldout_fraction: float = Field(default=0.1, gt=0, lt=1)
    heldout_path: str | None = None
    strict: bool = False
    without_regions: Literal["error", "mask"] = "error"
    # Runs of earlier versions cut in silence; a default that refuses would end them.
    too_long: TooLong = "cut"

    @field_validator("path", "heldout_path")
    @classmethod
    def _known_builtin(cls, path: str | None) -> str | None:
        if path is not None and path.startswith("builtin:") and path != BUILTIN_SHAPES:
            raise InputError(
                f"There is no built-in dataset {path!r}. Use {BUILTIN_SHAPES} or the path of a "
                "directory or .jsonl file."
            )
        return path

    @field_validator("task_types")
    @classmethod
    def _some_types(cls, task_types: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if task_types is not None and not task_types:
            raise InputError(
                "task_types is empty, so no task is left. Name some, or leave it out for all."
            )
        return task_types
