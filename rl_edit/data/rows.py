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
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from rl_edit.data import images
from rl_edit.data.causes import why_missing
from rl_edit.data.mask_evidence import (
    Evidence,
    MaskRecord,
    changed_side,
    evidence_of,
    shows_no_edit,
)
from rl_edit.data.mask_survey import Survey, survey
from rl_edit.data.masks import (
    Foreground,
    MaskFrom,
    MaskPolarity,
    Polarity,
    Reading,
    read_foreground,
    read_labels,
    read_mask,
)
from rl_edit.data.notices import NUM_EXAMPLES, Notice
from rl_edit.data.pixels import Conversion, conversion_notices
from rl_edit.data.problems import refuse
from rl_edit.errors import InputError
from rl_edit.types import EditTask, PairedRegionsTask, PairedTask, RegionsTask

EmptyMask = Literal["error", "skip"]

_NUM_COMPARED = 512
"""Rows whose target is compared with the source, which means reading both in full."""


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
        reading: how the mask is read. None until the rows of the dataset have decided it together.
    """

    mask: Path
    regions: Path | None = None
    reading: Reading | None = None

    def edit_mask(self) -> NDArray[np.bool_]:
        """Reads the mask as ``[height, width]``, True where pixels may change."""
        assert self.reading is not None, "rows are checked before their masks are read"
        return read_mask(self.mask, self.reading, where=self.where, source=self.source)

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
        masks: the reading of each row's mask, for people.
    """

    rows: tuple[Row, ...]
    skipped: int
    notices: tuple[Notice, ...] = ()
    masks: tuple[MaskRecord, ...] = ()


def check(
    rows: Sequence[Row],
    *,
    source: str,
    polarity: MaskPolarity,
    empty_mask: EmptyMask,
    mask_from: MaskFrom = "auto",
) -> CheckedRows:
    """Checks every file of every row.

    Rows with an empty or full mask are an error, or skipped and counted.

    Args:
        source: the dataset as the user named it.

    Raises:
        InputError: names the first problems and counts the rest.
    """
    problems, findings = _examined(rows, mask_from)
    if empty_mask == "error":
        problems += [
            _unusable(row)
            for row, finding in zip(rows, findings, strict=True)
            if finding.unusable_mask
        ]
    refuse(problems, num_rows=len(rows), source=source)
    pairs = [(row, f.evidence) for row, f in zip(rows, findings, strict=True) if f.evidence]
    if not pairs:
        raise InputError(
            f"{source}: every mask ({len(rows)}) is empty or full, so no row is left. Draw the "
            "regions; or set data.mask_from if the masks are stored in another form, and "
            "data.mask_polarity if they are the other way round."
        )
    usable, masks = _read_alike(pairs, source=source, polarity=polarity, mask_from=mask_from)
    # By file: several rows may show one image.
    converted = dict(
        pair for finding in findings if not finding.unusable_mask for pair in finding.conversions
    )
    return CheckedRows(
        rows=tuple(row for row in usable if isinstance(row, Row)),
        skipped=len(rows) - len(usable),
        notices=(
            *masks.notices,
            *_without_edit([row for row, f in zip(rows, findings, strict=True) if f.no_edit]),
            *conversion_notices([*converted.items()]),
        ),
        masks=masks.records,
    )


def _without_edit(rows: Sequence[Row]) -> list[Notice]:
    """Says which targets are copies of their sources."""
    if not rows:
        return []
    message = (
        f"{len(rows)} targets look like their sources, so they show no edit, and a reward that "
        "compares with them asks for none. Save the edited images as targets, or leave them out"
    )
    examples = tuple(str(row.target) for row in rows[:NUM_EXAMPLES])
    return [
        Notice(kind="targets-without-edit", count=len(rows), message=message, examples=examples)
    ]


def check_requests(
    requests: Sequence[Request],
    *,
    source: str,
    polarity: MaskPolarity,
    mask_from: MaskFrom = "auto",
) -> tuple[Request, ...]:
    """Checks every file of every row, with or without a mask.

    A row whose mask is empty or full becomes a row without one.
    """
    problems, findings = _examined(requests, mask_from)
    refuse(problems, num_rows=len(requests), source=source)
    pairs = [
        (request, finding.evidence)
        for request, finding in zip(requests, findings, strict=True)
        if isinstance(request, Row) and finding.evidence
    ]
    masked: dict[str, Request] = {}
    if pairs:
        rows, _ = _read_alike(pairs, source=source, polarity=polarity, mask_from=mask_from)
        masked = {row.task_id: row for row in rows}
    # Copying only the fields of Request drops the mask and the regions of a Row.
    return tuple(
        masked.get(request.task_id)
        or Request(**{field.name: getattr(request, field.name) for field in fields(Request)})
        for request in requests
    )


def _read_alike(
    pairs: Sequence[tuple[Row, Evidence]],
    *,
    source: str,
    polarity: MaskPolarity,
    mask_from: MaskFrom,
) -> tuple[tuple[Row, ...], Survey]:
    """Gives every row the reading of its mask that the rows decide together."""
    masks = survey(
        [row for row, _ in pairs],
        [evidence for _, evidence in pairs],
        source=source,
        polarity=polarity,
        mask_from=mask_from,
    )
    rows = tuple(
        replace(row, reading=reading)
        for (row, _), reading in zip(pairs, masks.readings, strict=True)
    )
    # Regions that fit the other side of the mask would be scored where nothing may change.
    turned = [
        _disagreeing_regions(row)
        for row, (_, evidence) in zip(rows, pairs, strict=True)
        if row.reading and evidence.regions not in (None, row.reading.polarity)
    ]
    refuse(turned, num_rows=len(rows), source=source)
    return rows, masks


def load(row: Row) -> EditTask:
    """Reads a row as the record that fits its files.

    It is a ``PairedTask`` with a target, a ``RegionsTask`` with regions, a ``PairedRegionsTask``
    with both, and an ``EditTask`` otherwise.
    """
    source = images.read_rgb(row.source, where=row.where)
    edit = row.edit_mask()
    # Files may have changed since the check when the dataset was opened.
    _same_size(row, row.mask, edit.shape, source.shape[:2])
    if not edit.any() or edit.all():
        raise InputError(_unusable(row))
    common: dict[str, Any] = {
        "task_id": row.task_id,
        "task_type": row.task_type,
        "source": torch.from_numpy(source),
        "instruction": row.instruction,
        "edit_mask": torch.from_numpy(edit),
    }
    if row.regions is not None:
        common["regions"] = torch.from_numpy(_regions(row, edit))
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
        no_edit: the target is a copy of the source.
        evidence: of the mask; None without a usable one.
    """

    problem: str = ""
    unusable_mask: bool = False
    evidence: Evidence | None = None
    conversions: tuple[tuple[Path, tuple[Conversion, ...]], ...] = ()
    no_edit: bool = False


def _examined(rows: Sequence[Request], mask_from: MaskFrom) -> tuple[list[str], list[_Finding]]:
    """All problems, and the finding of each row."""
    # Decoding images releases the interpreter lock, so threads use all cores.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        numbers = range(len(rows))
        findings = list(pool.map(lambda row, n: _examine(row, n, mask_from), rows, numbers))
    # An id seeds noises and names files, so two rows of one id would share both.
    repeated = [
        f"{row.where}: task id {row.task_id!r} is used more than once" for row in _repeated(rows)
    ]
    return repeated + [finding.problem for finding in findings if finding.problem], findings


def _examine(row: Request, number: int, mask_from: MaskFrom) -> _Finding:
    """Checks the ``number``-th row."""
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
        mask = read_foreground(row.mask, mask_from=mask_from, where=row.where, source=row.source)
        _same_size(row, row.mask, mask.marked.shape, size)
        # An unusable mask is refused or skipped anyway.
        if not mask.marked.any() or mask.marked.all():
            return _Finding(unusable_mask=True)
        evidence, no_edit = _evidence(row, mask, compares=number < _NUM_COMPARED)
        return _Finding(
            evidence=evidence,
            no_edit=no_edit,
            conversions=tuple((path, fact.conversions) for path, fact in facts),
        )
    except InputError as error:
        return _Finding(problem=str(error))


def _evidence(row: Row, mask: Foreground, *, compares: bool) -> tuple[Evidence, bool]:
    """Measures a mask beside the other files of its row; True where the target shows no edit.

    Args:
        compares: whether to read source and target in full.
    """
    target: Polarity | None = None
    no_edit = False
    if row.target is not None and compares:
        before = images.read_rgb(row.source, where=row.where)
        after = images.read_rgb(row.target, where=row.where)
        target, no_edit = changed_side(before, after, mask), shows_no_edit(before, after)
    regions = None if row.regions is None else _side_of_regions(row, mask)
    evidence = evidence_of(mask, instruction=row.instruction, target=target, regions=regions)
    return evidence, no_edit


def _side_of_regions(row: Row, mask: Foreground) -> Polarity:
    """Finds the polarity under which the regions are the mask's."""
    try:
        _regions(row, mask.edit("edit_white"))
        return "edit_white"
    except InputError as error:
        try:
            _regions(row, mask.edit("edit_black"))
        except InputError:
            raise error from None
        return "edit_black"


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
    labels = read_labels(row.regions, where=row.where)
    _same_size(row, row.regions, labels.shape, edit.shape)
    regions = labels[None] == np.arange(1, int(labels.max()) + 1, dtype=np.uint8)[:, None, None]
    if not np.array_equal(labels > 0, edit) or not regions.any(axis=(1, 2)).all():
        raise InputError(_disagreeing_regions(row))
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


def _disagreeing_regions(row: Row) -> str:
    return (
        f"{row.where}: {row.regions} does not agree with the mask: its labels 1..R must each occur "
        "and together cover the edit region and nothing else. Draw it again from the mask, or "
        "remove it."
    )


def _repeated(rows: Sequence[Request]) -> list[Request]:
    counts = Counter(row.task_id for row in rows)
    return [row for row in rows if counts[row.task_id] > 1]
