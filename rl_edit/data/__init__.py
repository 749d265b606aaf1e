"""Datasets: tasks by number, from the built-in world or from disk, split into training and held-out tasks.

``open_dataset(config, split)`` finds out what ``config.path`` is:

* ``builtin:shapes``: the built-in world, drawn on demand;
* a directory with ``tasks/*/metadata.json``: CompBench's layout;
* a directory with ``train/`` and ``heldout/``, each a dataset: the splits are taken as they are;
* otherwise a folder or ``.jsonl`` file of a person's own (``folder.py``).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, TypeVar, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from rl_edit.data import shapes
from rl_edit.data.canvas import leaves_no_token
from rl_edit.data.compbench import is_compbench, read_compbench, request_compbench
from rl_edit.data.folder import read_folder, request_folder
from rl_edit.data.images import MaskPolarity, read_mask
from rl_edit.data.rows import EmptyMask, Request, Row, check, check_requests, load, refuse
from rl_edit.errors import InputError
from rl_edit.types import EditTask, PairedRegionsTask

BUILTIN_SHAPES = "builtin:shapes"

Split = Literal["train", "heldout"]


class DataConfig(BaseModel):
    """Where tasks come from.

    Attributes:
        path: ``builtin:shapes``, a directory or a ``.jsonl`` file.
        seed, num_train, num_heldout: of the built-in world; data on disk has the rows it has.
        task_types: only these kinds of edit; None is all.
        mask_polarity: whether white marks the edit (CompBench, MagicBrush) or what to keep (CoCoEdit). Data on disk only.
        empty_mask: whether a row with an empty or full mask is an error, or skipped and counted. Data on disk only.
        heldout_fraction: share of the pictures on disk held out when ``heldout_path`` is not given.
        heldout_path: a dataset of its own for evaluation; ``path`` is then wholly for training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    path: str = BUILTIN_SHAPES
    seed: int = 0
    num_train: int = Field(default=4096, ge=1)
    num_heldout: int = Field(default=256, ge=1)
    task_types: tuple[str, ...] | None = None
    mask_polarity: MaskPolarity = "edit_white"
    empty_mask: EmptyMask = "error"
    heldout_fraction: float = Field(default=0.1, gt=0, lt=1)
    heldout_path: str | None = None

    @field_validator("path", "heldout_path")
    @classmethod
    def _known_builtin(cls, path: str | None) -> str | None:
        if path is not None and path.startswith("builtin:") and path != BUILTIN_SHAPES:
            raise InputError(
                f"There is no built-in dataset {path!r}. Use {BUILTIN_SHAPES} or the path of a directory or .jsonl file."
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


@runtime_checkable
class Dataset(Protocol):
    """Tasks by number. Reading is lazy; everything that can be wrong with a row was looked for when it was opened."""

    @property
    def fields(self) -> frozenset[str]:
        """Which of "target", "caption" and "regions" every task has: what rewards may ask for."""

    @property
    def fingerprint(self) -> str:
        """sha256 hex: equal exactly when the rows, in order, are the same."""

    @property
    def skipped(self) -> int:
        """Rows left out because their mask was empty or full."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> EditTask: ...


@dataclass(frozen=True, kw_only=True)
class ShapesDataset:
    """The first ``length`` tasks of a split of the built-in world."""

    split: Split
    length: int
    seed: int
    task_types: tuple[str, ...] | None
    fields: frozenset[str] = frozenset({"target", "caption", "regions"})
    skipped: int = 0

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(
            json.dumps(
                [BUILTIN_SHAPES, self.split, self.length, self.seed, self.task_types]
            ).encode()
        )
        # The first tasks stand for the generator: a change in how scenes are drawn is another dataset.
        for index in range(min(self.length, 16)):
            task = self[index]
            digest.update(
                task.instruction.encode()
                + task.source.numpy().tobytes()
                + task.target.numpy().tobytes()
            )
        return digest.hexdigest()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> PairedRegionsTask:
        index = range(self.length)[index]
        task_type = self.task_types[index % len(self.task_types)] if self.task_types else None
        return shapes.task(self.split, index, seed=self.seed, task_type=task_type)


@dataclass(frozen=True, kw_only=True)
class RowsDataset:
    """Rows on disk, in the order of a hash of their ids, so that any first part is a fair sample."""

    rows: tuple[Row, ...]
    root: Path
    mask_polarity: MaskPolarity
    skipped: int

    @property
    def fields(self) -> frozenset[str]:
        return frozenset.intersection(*(row.fields for row in self.rows))

    @property
    def fingerprint(self) -> str:
        """Of the words, the file names relative to the dataset and the file sizes; not of paths or times."""
        content = [
            [
                row.task_id,
                row.task_type,
                row.instruction,
                row.caption,
                [[_relative(file, self.root), file.stat().st_size] for file in row.files],
            ]
            for row in self.rows
        ]
        return hashlib.sha256(json.dumps([self.mask_polarity, content]).encode()).hexdigest()

    def on_canvas(self, *, resolution: int, multiple: int, empty_mask: EmptyMask) -> RowsDataset:
        """The rows whose mask leaves a background on the editor's canvas; the others are an error or skipped and counted.

        A mask that leaves a margin in a photograph may touch every token of a small canvas.
        """
        full = [
            row
            for row in self.rows
            if leaves_no_token(
                torch.from_numpy(
                    read_mask(row.mask, polarity=self.mask_polarity, where=row.where).edit
                ),
                resolution=resolution,
                multiple=multiple,
            )
        ]
        if full and empty_mask == "error":
            refuse(
                [
                    f"{row.where}: on a canvas of about {resolution}x{resolution} px the mask of {row.task_id!r} "
                    f"touches every {multiple} px token, so there is no background to keep; "
                    "draw a smaller region, raise editor.resolution, or set data.empty_mask=skip"
                    for row in full
                ],
                num_rows=len(self.rows),
                source=str(self.root),
            )
        kept = tuple(row for row in self.rows if row not in full)
        if not kept:
            raise InputError(
                f"{self.root}: on a canvas of about {resolution} px every mask covers the picture. Raise editor.resolution."
            )
        return replace(self, rows=kept, skipped=self.skipped + len(full))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> EditTask:
        return load(self.rows[index], polarity=self.mask_polarity)


def open_dataset(
    config: DataConfig, split: Split, *, resolution: int | None = None, multiple: int = 1
) -> Dataset:
    """The training or held-out tasks of ``config``. Every row is checked here; problems are one InputError.

    Args:
        resolution, multiple: the editor's canvas (``editor.resolution`` and pixels per token); given, masks are checked on it.
    """
    path = config.path
    own_heldout = config.heldout_path is not None
    if split == "heldout" and config.heldout_path is not None:
        path = config.heldout_path
    if path == BUILTIN_SHAPES:
        for task_type in config.task_types or ():
            if task_type not in shapes.TASK_TYPES:
                raise InputError(
                    f"{path} has no task type {task_type!r}. Use some of {', '.join(shapes.TASK_TYPES)} in data.task_types."
                )
        length = config.num_train if split == "train" else config.num_heldout
        return ShapesDataset(
            split=split, length=length, seed=config.seed, task_types=config.task_types
        )
    root = Path(path).expanduser()
    if (
        not own_heldout
        and (root / "train").is_dir()
        and (root / "heldout").is_dir()
        and not is_compbench(root)
    ):
        root, own_heldout = root / split, True
    rows = read_compbench(root) if is_compbench(root) else read_folder(root)
    rows = sorted(
        _of_types(rows, config.task_types, root), key=lambda row: (_hash(row.task_id), row.task_id)
    )
    checked = check(
        rows, source=str(root), polarity=config.mask_polarity, empty_mask=config.empty_mask
    )
    kept = (
        checked.rows if own_heldout else _side(checked.rows, split, config.heldout_fraction, root)
    )
    found = RowsDataset(
        rows=kept,
        root=root if root.is_dir() else root.parent,
        mask_polarity=config.mask_polarity,
        skipped=checked.skipped,
    )
    return (
        found
        if resolution is None
        else found.on_canvas(resolution=resolution, multiple=multiple, empty_mask=config.empty_mask)
    )


def open_requests(config: DataConfig) -> tuple[Request, ...]:
    """Every row of a dataset on disk, in an order of which any first part is a fair sample; those without a mask are there too.

    Raises:
        InputError: for problems of the rows, all in one; for the built-in world, and for a directory of two splits.
    """
    if config.path == BUILTIN_SHAPES:
        raise InputError(
            f"{config.path} has its masks, and no rows on disk: write some first with rl-edit dataset make-shapes DIR"
        )
    root = Path(config.path).expanduser()
    if (root / "train").is_dir() and (root / "heldout").is_dir() and not is_compbench(root):
        raise InputError(
            f"{root} holds two datasets, train and heldout: name one of them, {root / 'train'} or {root / 'heldout'}."
        )
    requests = request_compbench(root) if is_compbench(root) else request_folder(root)
    requests = sorted(
        _of_types(requests, config.task_types, root),
        key=lambda request: (_hash(request.task_id), request.task_id),
    )
    return check_requests(requests, source=str(root), polarity=config.mask_polarity)


R = TypeVar("R", bound=Request)


def _of_types(rows: list[R], task_types: tuple[str, ...] | None, root: Path) -> list[R]:
    if task_types is None:
        return rows
    present = sorted({row.task_type for row in rows})
    absent = [task_type for task_type in task_types if task_type not in present]
    if absent:
        raise InputError(
            f"{root} has no task of type {', '.join(absent)}; it has {', '.join(present)}. Correct data.task_types."
        )
    return [row for row in rows if row.task_type in task_types]


def _side(
    rows: tuple[Row, ...], split: Split, heldout_fraction: float, root: Path
) -> tuple[Row, ...]:
    """Rows of one split. By a hash of the picture's name: adding rows moves none, and no picture is on both sides."""
    groups = sorted({row.group for row in rows}, key=lambda group: (_hash(group), group))
    if len(groups) == 1:
        warnings.warn(
            f"{root} has a single picture: it is used for training and for evaluation alike, so results say nothing about other "
            "pictures. Add pictures or set data.heldout_path.",
            stacklevel=3,
        )
        return rows
    num_heldout = sum(_hash(group) < heldout_fraction * 2**64 for group in groups)
    heldout = set(groups[: min(max(num_heldout, 1), len(groups) - 1)])
    return tuple(row for row in rows if (row.group in heldout) == (split == "heldout"))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _relative(file: Path, root: Path) -> str:
    return str(file.relative_to(root)) if file.is_relative_to(root) else file.name
