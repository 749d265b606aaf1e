"""One row of data on disk: where its files are, what is wrong with them, and the record they make.

Layouts (``compbench.py``, ``folder.py``) produce rows; this file alone turns rows into records. Rows are checked when
a dataset is opened, all of them, so that bad data is found before anything is written.
"""

from __future__ import annotations

import os
import warnings
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
from rl_edit.data.images import MaskPolarity
from rl_edit.errors import InputError
from rl_edit.types import EditTask, PairedRegionsTask, PairedTask, RegionsTask

EmptyMask = Literal["error", "skip"]

_NUM_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Request:
    """An edit that is asked for, not read yet, whether or not anybody drew where it may change the picture.

    Attributes:
        where: where the row is written down, for errors ("metadata.jsonl line 3").
        group: rows of one group show the same picture; a split never separates them.
        target, caption: None when the row has none.
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
        return tuple(path for path in (self.source, self.target) if path is not None)


@dataclass(frozen=True, kw_only=True)
class Row(Request):
    """A request with a mask: what a task is made of.

    Attributes:
        regions: a label map, 0 background, 1..R regions; None when the row has none.
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
        """Which of "target", "caption" and "regions" the row has."""
        present = {"target": self.target, "caption": self.caption or None, "regions": self.regions}
        return frozenset(name for name, value in present.items() if value is not None)


@dataclass(frozen=True, kw_only=True)
class CheckedRows:
    """Rows whose files exist and fit together.

    Attributes:
        skipped: rows left out because their mask was empty or full.
    """

    rows: tuple[Row, ...]
    skipped: int


def check(
    rows: Sequence[Row], *, source: str, polarity: MaskPolarity, empty_mask: EmptyMask
) -> CheckedRows:
    """Look at every file of every row. One error names the first problems and counts the rest.

    ``source`` is the dataset as the user named it. Rows with an empty or full mask are an error or skipped and counted.
    """
    problems, findings = _examined(rows, polarity)
    if empty_mask == "error":
        problems += [
            _unusable(row)
            for row, finding in zip(rows, findings, strict=True)
            if finding.unusable_mask
        ]
    refuse(problems, num_rows=len(rows), source=source)
    kept = tuple(
        row for row, finding in zip(rows, findings, strict=True) if not finding.unusable_mask
    )
    if not kept:
        raise InputError(
            f"{source}: every mask ({len(rows)}) is empty or full, so no row is left. Black is read as "
            f"{'keep' if polarity == 'edit_white' else 'edit'}; set data.mask_polarity if yours are the other way round."
        )
    zero_one = [row for row, finding in zip(rows, findings, strict=True) if finding.zero_one]
    if zero_one:
        marked = "edit" if polarity == "edit_white" else "keep"
        warnings.warn(
            f"{source}: {len(zero_one)} masks hold only the values 0 and 1 (first: {zero_one[0].mask}); 1 is read as {marked}. "
            "Save masks as black and white to be sure.",
            stacklevel=3,
        )
    return CheckedRows(rows=kept, skipped=len(rows) - len(kept))


def check_requests(
    requests: Sequence[Request], *, source: str, polarity: MaskPolarity
) -> tuple[Request, ...]:
    """Look at every file of every row, with or without a mask. A row whose mask is empty or full is one without."""
    problems, findings = _examined(requests, polarity)
    refuse(problems, num_rows=len(requests), source=source)
    return tuple(
        Request(**{field.name: getattr(request, field.name) for field in fields(Request)})
        if finding.unusable_mask
        else request
        for request, finding in zip(requests, findings, strict=True)
    )


def refuse(problems: Sequence[str], *, num_rows: int, source: str) -> None:
    """Raise one InputError for all problems of a dataset, if there are any."""
    if not problems:
        return
    shown = "; ".join(
        f"({number}) {problem}" for number, problem in enumerate(problems[:_NUM_SHOWN], start=1)
    )
    more = f"; and {len(problems) - _NUM_SHOWN} more" if len(problems) > _NUM_SHOWN else ""
    raise InputError(
        f"{source}: {len(problems)} problems in {num_rows} rows. Correct or remove these rows: {shown}{more}"
    )


def load(row: Row, *, polarity: MaskPolarity) -> EditTask:
    """Read a row: ``PairedTask`` with a target, ``RegionsTask`` with regions, ``PairedRegionsTask`` with both, ``EditTask`` otherwise."""
    source = images.read_rgb(row.source, where=row.where)
    mask = images.read_mask(row.mask, polarity=polarity, where=row.where)
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
    common |= {"target": torch.from_numpy(target), "caption": row.caption or ""}
    return PairedTask(**common) if row.regions is None else PairedRegionsTask(**common)


@dataclass(frozen=True, kw_only=True)
class _Finding:
    problem: str = ""
    unusable_mask: bool = False
    zero_one: bool = False


def _examined(rows: Sequence[Request], polarity: MaskPolarity) -> tuple[list[str], list[_Finding]]:
    """Problems of the rows, and what was found of each."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        findings = list(pool.map(lambda row: _examine(row, polarity), rows))
    repeated = [
        f"{row.where}: task id {row.task_id!r} is used more than once" for row in _repeated(rows)
    ]
    return repeated + [finding.problem for finding in findings if finding.problem], findings


def _examine(row: Request, polarity: MaskPolarity) -> _Finding:
    try:
        missing = [str(path) for path in row.files if not path.is_file()]
        if missing:
            return _Finding(problem=f"{row.where}: {' and '.join(missing)} not found")
        size = images.upright_size(row.source, where=row.where)
        if row.target is not None:
            _same_size(row, row.target, images.upright_size(row.target, where=row.where), size)
        if not isinstance(row, Row):
            return _Finding()
        mask = images.read_mask(row.mask, polarity=polarity, where=row.where)
        _same_size(row, row.mask, mask.edit.shape, size)
        if row.regions is not None and mask.usable:
            _regions(row, mask.edit)
    except InputError as error:
        return _Finding(problem=str(error))
    return _Finding(unusable_mask=not mask.usable, zero_one=mask.zero_one)


def _regions(row: Row, edit: NDArray[np.bool_]) -> NDArray[np.bool_]:
    assert row.regions is not None
    labels = images.read_labels(row.regions, where=row.where)
    _same_size(row, row.regions, labels.shape, edit.shape)
    regions = labels[None] == np.arange(1, int(labels.max()) + 1, dtype=np.uint8)[:, None, None]
    if not np.array_equal(labels > 0, edit) or not regions.any(axis=(1, 2)).all():
        raise InputError(
            f"{row.where}: {row.regions} does not agree with the mask: its labels 1..R must each occur and together cover the "
            "edit region and nothing else. Draw it again from the mask, or remove it."
        )
    return np.asarray(regions)


def _same_size(
    row: Request, path: Path, size: tuple[int, ...], source_size: tuple[int, ...]
) -> None:
    if size == source_size:
        return
    (height, width), (source_height, source_width) = size, source_size
    turned = ""
    if size == source_size[::-1] and images.has_turn(row.source):
        turned = " The picture carries an EXIF rotation, which is applied: draw on the picture as viewers show it."
    raise InputError(
        f"{row.where}: {path} is {width}x{height} but {row.source} is {source_width}x{source_height}: pixels would not correspond, "
        f"and resizing silently would move the edges.{turned} Save both with the same width and height."
    )


def _unusable(row: Row) -> str:
    return (
        f"{row.where}: {row.mask} is empty or full: a mask must leave something to edit and something to keep. Draw the region, check "
        "data.mask_polarity, or set data.empty_mask=skip to leave such rows out"
    )


def _repeated(rows: Sequence[Request]) -> list[Request]:
    counts = Counter(row.task_id for row in rows)
    return [row for row in rows if counts[row.task_id] > 1]
