"""Rows of data on disk: their files, the checks on them, and the records they make.

Layouts (``compbench.py``, ``folder.py``) produce rows. Only this file turns rows into records. All
rows are checked when a dataset is opened, so that bad data stops a command before it writes
anything.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from rl_edit.data import images
from rl_edit.data.causes import why_missing
from rl_edit.data.images import MaskPolarity
from rl_edit.data.notices import NUM_EXAMPLES, Notice
from rl_edit.data.pixels import Conversion, conversion_notices
from rl_edit.data.problems import refuse
from rl_edit.errors import InputError
from rl_edit.types import EditTask, PairedRegionsTask, PairedTask, RegionsTask

EmptyMask = Literal["error", "skip"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A requested edit, not read yet, with or without a mask.

    Attributes:
        where: the place of the row, for errors ("metadata.jsonl line 3").
        group: names the image. A split never separates rows that show the same one.
        target: None when the row has none.
        caption: None when the row has none.
    """

    task_id: str
    task_type: str
    where: str
    group: str
    instruction: str
    source: Path
    target: Path | None = None
    caption: str | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that the row names."""
        return tuple(path for path in (self.source, self.target) if path is not None)


@dataclass(frozen=True, kw_only=True)
class Row(Request):
    """A request with a mask, of which a task can be made.

    Attributes:
        regions: a label map, 0 background, 1..R regions. None when the row has none.
    """

    mask: Path
    regions: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(
            path for path in (self.source, self.mask, self.target, self.regions) if path is not None
        )

    @property
    def fields(self) -> frozenset[str]:
        """Those of "target", "caption" and "regions" that the row has."""
        present = {"target": self.target, "caption": self.caption or None, "regions": self.regions}
        return frozenset(name for name, value in present.items() if value is not None)


@dataclass(frozen=True, kw_only=True)
class CheckedRows:
    """Rows whose files exist and fit together.

    Attributes:
        skipped: rows left out because their mask was empty or full.
        notices: what there is to say about the rows that stay.
    """

    rows: tuple[Row, ...]
    skipped: int
    notices: tuple[Notice, ...] = ()


def check(
    rows: Sequence[Row], *, source: str, polarity: MaskPolarity, empty_mask: EmptyMask
) -> CheckedRows:
    """Checks every file of every row.

    Rows with an empty or full mask are an error, or skipped and counted.

    Args:
        source: the dataset as the user named it.

    Raises:
        InputError: names the first problems and counts the rest.
    """
    problems, findings = _examined(rows, polarity)
    if empty_mask == "error":
        problems += [
            _unusable(row)
            for row, finding in zip(rows, findings, strict=True)
            if finding.unusable_mask
        ]
    refuse(problems, num_rows=len(rows), source=source)
    usable = tuple(
        row for row, finding in zip(rows, findings, strict=True) if not finding.unusable_mask
    )
    black, one = ("keep", "edit") if polarity == "edit_white" else ("edit", "keep")
    if not usable:
        raise InputError(
            f"{source}: every mask ({len(rows)}) is empty or full, so no row is left. Black is "
            f"read as {black}; set data.mask_polarity if yours are the other way round."
        )
    # Such masks look black in a viewer, so the user may take them for empty.
    zero_one = [row for row, finding in zip(rows, findings, strict=True) if finding.zero_one]
    notice = Notice(
        kind="zero-one-masks",
        count=len(zero_one),
        message=f"{len(zero_one)} masks hold only the values 0 and 1; 1 is read as {one}. Save "
        "masks as black and white to be sure.",
        examples=tuple(str(row.mask) for row in zero_one[:NUM_EXAMPLES]),
    )
    # By file: several rows may show one image.
    converted = dict(
        pair for finding in findings if not finding.unusable_mask for pair in finding.conversions
    )
    return CheckedRows(
        rows=usable,
        skipped=len(rows) - len(usable),
        notices=(*((notice,) if zero_one else ()), *conversion_notices([*converted.items()])),
    )


def check_requests(
    requests: Sequence[Request], *, source: str, polarity: MaskPolarity
) -> tuple[Request, ...]:
    """Checks every file of every row, with or without a mask.

    A row whose mask is empty or full becomes a row without one.
    """
    problems, findings = _examined(requests, polarity)
    refuse(problems, num_rows=len(requests), source=source)
    # Copying only the fields of Request drops the mask and the regions of a Row.
    return tuple(
        Request(**{field.name: getattr(request, field.name) for field in fields(Request)})
        if finding.unusable_mask
        else request
        for request, finding in zip(requests, findings, strict=True)
    )


def load(row: Row, *, polarity: MaskPolarity) -> EditTask:
    """Reads a row as the record that fits its files.

    It is a ``PairedTask`` with a target, a ``RegionsTask`` with regions, a ``PairedRegionsTask``
    with both, and an ``EditTask`` otherwise.
    """
    source = images.read_rgb(row.source, where=row.where)
    mask = images.read_mask(row.mask, polarity=polarity, where=row.where)
    # Files may have changed since the check when the dataset was opened.
    _same_size(row, row.mask, mask.edit.shape, source.shape[:2])
    if not mask.usable:
        raise InputError(_unusable(row))
    common: dict[str, Any] = {
        "task_id": row.task_id,
        "task_type": row.task_type,
        "source": torch.from_numpy(source),
        "instruction": row.instruction,
        "edit_mask": torch.from_numpy(mask.edit),
    }
    if row.regions is not None:
        common["regions"] = torch.from_numpy(_regions(row, mask.edit))
    if row.target is None:
        return EditTask(**common) if row.regions is None else RegionsTask(**common)
    target = images.read_rgb(row.target, where=row.where)
    _same_size(row, row.target, target.shape[:2], source.shape[:2])
    # ``Row.fields`` does not count an empty caption, so no text reward reads it.
    common |= {"target": torch.from_numpy(target), "caption": row.caption or ""}
    return PairedTask(**common) if row.regions is None else PairedRegionsTask(**common)


@dataclass(frozen=True, kw_only=True)
class _Finding:
    """The result of checking one row.

    Attributes:
        problem: a sentence, or "" for a good row.
        conversions: what is converted in the source and in the target.
    """

    problem: str = ""
    unusable_mask: bool = False
    zero_one: bool = False
    conversions: tuple[tuple[Path, tuple[Conversion, ...]], ...] = ()


def _examined(rows: Sequence[Request], polarity: MaskPolarity) -> tuple[list[str], list[_Finding]]:
    """All problems, and the finding of each row."""
    # Decoding images releases the interpreter lock, so threads use all cores.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        findings = list(pool.map(lambda row: _examine(row, polarity), rows))
    # An id seeds noises and names files, so two rows of one id would share both.
    repeated = [
        f"{row.where}: task id {row.task_id!r} is used more than once" for row in _repeated(rows)
    ]
    return repeated + [finding.problem for finding in findings if finding.problem], findings


def _examine(row: Request, polarity: MaskPolarity) -> _Finding:
    try:
        if missing := _missing(row):
            return _Finding(problem=f"{row.where}: {missing}")
        # Sizes first, because most mistakes are about them.
        facts = [(row.source, images.examine_image(row.source, where=row.where))]
        size = facts[0][1].size
        if row.target is not None:
            facts.append((row.target, images.examine_image(row.target, where=row.where)))
            _same_size(row, row.target, facts[1][1].size, size)
        if not isinstance(row, Row):
            return _Finding()
        mask = images.read_mask(row.mask, polarity=polarity, where=row.where)
        _same_size(row, row.mask, mask.edit.shape, size)
        # Of an unusable mask the row is refused or skipped anyway.
        if row.regions is not None and mask.usable:
            _regions(row, mask.edit)
    except InputError as error:
        return _Finding(problem=str(error))
    return _Finding(
        unusable_mask=not mask.usable,
        zero_one=mask.zero_one,
        conversions=tuple((path, fact.conversions) for path, fact in facts),
    )


def _missing(row: Request) -> str:
    """Names the files that do not exist, with the reason; "" if all do."""
    reasons = {path: why_missing(path) for path in row.files if not path.is_file()}
    if set(reasons.values()) == {"not found"}:
        return f"{' and '.join(map(str, reasons))} not found"
    return " and ".join(f"{path} {reason}" for path, reason in reasons.items())


def _regions(row: Row, edit: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Reads regions as ``[region, height, width]`` and checks the mask."""
    assert row.regions is not None
    # One 8-bit channel holds up to 255 regions, numbered from 1.
    labels = images.read_labels(row.regions, where=row.where)
    _same_size(row, row.regions, labels.shape, edit.shape)
    regions = labels[None] == np.arange(1, int(labels.max()) + 1, dtype=np.uint8)[:, None, None]
    if not np.array_equal(labels > 0, edit) or not regions.any(axis=(1, 2)).all():
        raise InputError(
            f"{row.where}: {row.regions} does not agree with the mask: its labels 1..R must each "
            "occur and together cover the edit region and nothing else. Draw it again from the "
            "mask, or remove it."
        )
    return np.asarray(regions)


def _same_size(
    row: Request, path: Path, size: tuple[int, ...], source_size: tuple[int, ...]
) -> None:
    if size == source_size:
        return
    (height, width), (source_height, source_width) = size, source_size
    # An exchanged height and width with an EXIF turn has one cause, which the message names.
    turned = ""
    if size == source_size[::-1] and images.has_turn(row.source):
        turned = (
            " The image carries an EXIF rotation, which is applied: draw on the image as viewers "
            "show it."
        )
    raise InputError(
        f"{row.where}: {path} is {width}x{height} but {row.source} is "
        f"{source_width}x{source_height}: pixels would not correspond, and resizing silently would "
        f"move the edges.{turned} Save both with the same width and height."
    )


def _unusable(row: Row) -> str:
    return (
        f"{row.where}: {row.mask} is empty or full: a mask must leave something to edit and "
        "something to keep. Draw the region, check data.mask_polarity, or set data.empty_mask=skip "
        "to leave such rows out"
    )


def _repeated(rows: Sequence[Request]) -> list[Request]:
    counts = Counter(row.task_id for row in rows)
    return [row for row in rows if counts[row.task_id] > 1]
