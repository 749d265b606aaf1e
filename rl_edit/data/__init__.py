"""Datasets: tasks by number, from the built-in world or from disk, in two splits.

``open_dataset(config, split)`` recognises ``config.path``:

* ``builtin:shapes``: the built-in world, drawn on demand;
* a directory with ``tasks/*/metadata.json``: CompBench's layout;
* a directory with ``train/`` and ``heldout/``, each a dataset: the splits are taken as they are;
* otherwise a folder or ``.jsonl`` file of the user's (``folder.py``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable
from urllib.parse import unquote, urlsplit

import torch

from rl_edit.data import shapes
from rl_edit.data.canvas import Fitting, fittings, leaves_no_token
from rl_edit.data.compbench import is_compbench, list_compbench
from rl_edit.data.config import BUILTIN_SHAPES
from rl_edit.data.config import DataConfig as DataConfig
from rl_edit.data.editor_text import TextReader, TooLong, check_text
from rl_edit.data.folder import list_folder
from rl_edit.data.listing import Listing, expanded
from rl_edit.data.mask_evidence import MaskRecord
from rl_edit.data.masks import Reading
from rl_edit.data.notices import Notice, require_none
from rl_edit.data.pixels import COLOUR_CHANGES
from rl_edit.data.problems import refuse
from rl_edit.data.rows import EmptyMask, Request, Row, check, check_requests, load
from rl_edit.data.splits import Split, divide, ordered, shared_images
from rl_edit.errors import InputError, did_you_mean
from rl_edit.types import EditTask, PairedRegionsTask


@runtime_checkable
class Dataset(Protocol):
    """Tasks by number.

    Reading is lazy. Every row was checked when the dataset was opened.
    """

    @property
    def fields(self) -> frozenset[str]:
        """Those of "target", "caption" and "regions" that every task has; rewards may need them."""

    @property
    def fingerprint(self) -> str:
        """sha256 in hex. Equal exactly when the rows are the same, in the same order."""

    @property
    def skipped(self) -> int:
        """Rows left out because their mask was empty or full."""

    @property
    def notices(self) -> tuple[Notice, ...]:
        """Findings about the rows that are used, to show before any work starts."""

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
    notices: tuple[Notice, ...] = ()

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(
            json.dumps(
                [BUILTIN_SHAPES, self.split, self.length, self.seed, self.task_types]
            ).encode()
        )
        # The first tasks stand for the generator: scenes drawn otherwise are another dataset.
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
        index = range(self.length)[index]  # raises IndexError past the end, which ends iteration
        task_type = self.task_types[index % len(self.task_types)] if self.task_types else None
        return shapes.task(self.split, index, seed=self.seed, task_type=task_type)


@dataclass(frozen=True, kw_only=True)
class RowsDataset:
    """Rows on disk, ordered by a hash of their ids.

    Any first part of them is a fair sample.

    Attributes:
        fittings: sizes of the images and of their canvas; empty before the canvas is known.
    """

    rows: tuple[Row, ...]
    root: Path
    skipped: int
    notices: tuple[Notice, ...] = ()
    masks: tuple[MaskRecord, ...] = ()
    fittings: tuple[Fitting, ...] = ()

    @property
    def fields(self) -> frozenset[str]:
        # A reward must be able to score every task, so one row without a field decides.
        return frozenset.intersection(*(row.fields for row in self.rows))

    @property
    def fingerprint(self) -> str:
        """Hash of words, relative file names and file sizes.

        Absolute paths and times do not enter, so a moved dataset is the same dataset.
        """
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
        # The readings belong to it: the same files then hold other masks. So do changes of colour,
        # which earlier versions left out: their runs saw other pixels. A usual dataset has the hash
        # of when there was one polarity for all.
        readings = [row.reading or Reading() for row in self.rows]
        polarity = readings[0].polarity
        usual = all(reading == Reading(polarity=polarity) for reading in readings)
        unusual = [] if usual else [[reading.form, reading.polarity] for reading in readings]
        colour = sorted({notice.kind for notice in self.notices} & COLOUR_CHANGES)
        parts = [polarity, content, *(part for part in (colour, unusual) if part)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def on_canvas(self, *, resolution: int, multiple: int, empty_mask: EmptyMask) -> RowsDataset:
        """The rows whose mask leaves a background on the editor's canvas.

        A mask that leaves a margin in a photograph may touch every token of a small canvas. Such
        rows are an error, or skipped and counted.
        """
        full, sizes = list[Row](), list[tuple[int, int]]()
        for row in self.rows:
            # Only the mask is read again; a large dataset keeps no image in memory.
            mask = torch.from_numpy(row.edit_mask())
            if leaves_no_token(mask, resolution=resolution, multiple=multiple):
                full.append(row)
            else:
                # The mask has the size of its image.
                sizes.append((mask.shape[0], mask.shape[1]))
        if full and empty_mask == "error":
            refuse(
                [
                    f"{row.where}: on a canvas of about {resolution}x{resolution} px the mask of "
                    f"{row.task_id!r} touches every {multiple} px token, so there is no background "
                    "to keep; draw a smaller region, raise editor.resolution, or set "
                    "data.empty_mask=skip"
                    for row in full
                ],
                num_rows=len(self.rows),
                source=str(self.root),
            )
        rows = tuple(row for row in self.rows if row not in full)
        if not rows:
            raise InputError(
                f"{self.root}: on a canvas of about {resolution} px every mask covers the image. "
                "Raise editor.resolution."
            )
        fitted = fittings(sizes, resolution=resolution, multiple=multiple)
        return replace(self, rows=rows, skipped=self.skipped + len(full), fittings=fitted)

    def with_text(self, reader: TextReader, *, too_long: TooLong) -> RowsDataset:
        """The rows whose instruction the editor reads, and what there is to say about them."""
        checked = check_text(self.rows, reader, too_long=too_long, source=str(self.root))
        rows = tuple(self.rows[index] for index in checked.retained)
        return replace(self, rows=rows, notices=(*self.notices, *checked.notices))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> EditTask:
        return load(self.rows[index])


def open_dataset(
    config: DataConfig,
    split: Split,
    *,
    resolution: int | None = None,
    multiple: int = 1,
    text: TextReader | None = None,
) -> Dataset:
    """Opens the tasks of a split and checks every row.

    Args:
        resolution: of the editor (``editor.resolution``). When given, masks are checked on its
            canvas.
        multiple: pixels per token of the editor.
        text: the editor's settings. When given, instructions are checked with its tokenizers.

    Raises:
        InputError: for all problems of the rows, in one message.
    """
    separate = split == "heldout" and config.heldout_path is not None
    path = str(config.heldout_path) if separate else config.path
    # The built-in world is split by construction; both splits come from the same path.
    if path == BUILTIN_SHAPES:
        return _open_shapes(config, split)
    root = located(path)
    # Where the two splits lie apart, no row has to be assigned to one.
    takes_all = config.heldout_path is not None
    if not takes_all and _holds_two_splits(root):
        root, takes_all = root / split, True
    listing = _list_rows(root, config, masked=True)
    checked = check(
        ordered(_of_types(listing.rows, config.task_types, root)),
        source=str(root),
        polarity=config.mask_polarity,
        mask_from=config.mask_from,
        empty_mask=config.empty_mask,
    )
    rows, notices = checked.rows, [*listing.notices, *checked.notices]
    if takes_all:
        notices += _shared_with_heldout(rows, split, config, root)
    else:
        divided = divide(rows, config.heldout_fraction, source=str(root))
        rows = divided.rows[split]
        notices += divided.notices
    dataset = RowsDataset(
        rows=rows,
        root=root if root.is_dir() else root.parent,
        skipped=checked.skipped,
        notices=tuple(notices),
        masks=checked.masks,
    )
    if text is not None:
        dataset = dataset.with_text(text, too_long=config.too_long)
    if config.strict:
        require_none(dataset.notices, source=str(root))
    if resolution is None:
        return dataset
    return dataset.on_canvas(resolution=resolution, multiple=multiple, empty_mask=config.empty_mask)


def open_requests(config: DataConfig) -> Listing:
    """Opens all rows of a dataset on disk.

    Rows without a mask are included. Any first part of the rows is a fair sample.

    Raises:
        InputError: for all problems of the rows, in one message; for the built-in world, and for a
            directory of two splits.
    """
    if config.path == BUILTIN_SHAPES:
        raise InputError(
            f"{config.path} has its masks, and no rows on disk: write some first with "
            "rl-edit dataset make-shapes DIR"
        )
    root = located(config.path)
    if _holds_two_splits(root):
        raise InputError(
            f"{root} holds two datasets, train and heldout: name one of them, "
            f"{root / 'train'} or {root / 'heldout'}."
        )
    # Rows of both splits: a mask is needed by either.
    listing = _list_rows(root, config, masked=False)
    if config.strict:
        require_none(listing.notices, source=str(root))
    checked = check_requests(
        ordered(_of_types(listing.requests, config.task_types, root)),
        source=str(root),
        polarity=config.mask_polarity,
        mask_from=config.mask_from,
    )
    return replace(listing, requests=checked)


def _open_shapes(config: DataConfig, split: Split) -> ShapesDataset:
    for task_type in config.task_types or ():
        if task_type not in shapes.TASK_TYPES:
            hint = did_you_mean(task_type, shapes.TASK_TYPES) or "."
            raise InputError(
                f"{BUILTIN_SHAPES} has no task type {task_type!r}{hint} "
                f"Use some of {', '.join(shapes.TASK_TYPES)} in data.task_types."
            )
    length = config.num_train if split == "train" else config.num_heldout
    return ShapesDataset(split=split, length=length, seed=config.seed, task_types=config.task_types)


def _holds_two_splits(root: Path) -> bool:
    return (root / "train").is_dir() and (root / "heldout").is_dir() and not is_compbench(root)


R = TypeVar("R", bound=Request)


def located(path: str) -> Path:
    """The directory or file that ``data.path`` names; also as "~/data" or "file:///data"."""
    return expanded(unquote(urlsplit(path).path) if path.startswith("file://") else path)


def _list_rows(root: Path, config: DataConfig, *, masked: bool) -> Listing:
    if is_compbench(root):
        return list_compbench(root, masked=masked)
    return list_folder(root, masked=masked, lines=config.text_lines)


def _shared_with_heldout(
    rows: tuple[Row, ...], split: Split, config: DataConfig, root: Path
) -> list[Notice]:
    """Counts the images of the other dataset that are in this one, which is trained on."""
    if split == "heldout" or config.heldout_path == BUILTIN_SHAPES:
        return []
    # A fault of that dataset is reported when it is opened itself.
    with contextlib.suppress(InputError):
        other = located(config.heldout_path) if config.heldout_path else root.parent / "heldout"
        return shared_images(rows, _list_rows(other, config, masked=True).rows)
    return []


def _of_types(rows: Sequence[R], task_types: tuple[str, ...] | None, root: Path) -> list[R]:
    if task_types is None:
        return list(rows)
    present = sorted({row.task_type for row in rows})
    absent = [task_type for task_type in task_types if task_type not in present]
    if absent:
        hint = did_you_mean(absent[0], present) or "."
        raise InputError(
            f"{root} has no task of type {', '.join(absent)}{hint} It has {', '.join(present)}: "
            "correct data.task_types."
        )
    return [row for row in rows if row.task_type in task_types]


def _relative(file: Path, root: Path) -> str:
    return str(file.relative_to(root)) if file.is_relative_to(root) else file.name
