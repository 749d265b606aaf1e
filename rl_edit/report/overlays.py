"""Shows the masks of a dataset on their images, so that a wrong side is seen at once."""

from __future__ import annotations

import io
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rl_edit.data import RowsDataset
from rl_edit.data.images import read_rgb
from rl_edit.data.mask_evidence import MaskRecord
from rl_edit.data.rows import Row
from rl_edit.errors import InputError
from rl_edit.files import replace_file
from rl_edit.report.contact_sheet import FOUND, Example, Panel, contact_sheet

SHEET = "masks.png"
TABLE = "data_masks.json"
MASK_FILES = (SHEET, TABLE)
SCHEMA = "rl-edit/data-masks/1"

NUM_SHOWN = 24
"""Rows on the sheet: unusual ones first, then a fair sample."""

_TINT = 0.45
_LINE = 62
"""Characters that fit under two images."""


def write_mask_files(dataset: RowsDataset, directory: Path) -> None:
    """Writes ``masks.png`` and ``data_masks.json``, which holds the edit share of every row."""
    write_contact_sheet(dataset.rows, directory / SHEET, dataset.masks)
    content = {
        "schema": SCHEMA,
        "data": str(dataset.root),
        "median_edit_share": round(
            statistics.median(record.edit_share for record in dataset.masks), 4
        ),
        "rows": [record.content() for record in dataset.masks],
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    replace_file(directory / TABLE, text)


def write_contact_sheet(
    rows: Sequence[Row], path: Path, records: Sequence[MaskRecord] = ()
) -> None:
    """Writes a PNG of up to ``NUM_SHOWN`` rows: source with edit region, and the stored mask.

    Args:
        rows: of an opened dataset, whose masks have a reading.
        records: of the same dataset; rows with a remark come first.
    """
    by_id = {record.id: record for record in records}
    chosen = _chosen(rows, by_id)
    title = f"{len(chosen)} of {len(rows)} rows. Orange may change, the rest stays."
    sheet = contact_sheet(title, [_example(row, by_id.get(row.task_id)) for row in chosen])
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    replace_file(path, buffer.getvalue())


def _chosen(rows: Sequence[Row], records: dict[str, MaskRecord]) -> list[Row]:
    """Returns rows with a remark, then rows of every form, then the first of the others."""
    forms = Counter(record.form for record in records.values())
    usual = max(forms, key=forms.__getitem__, default=None)

    def rank(row: Row) -> int:
        record = records.get(row.task_id)
        if record is None:
            return 2
        return 0 if record.remark else 1 if record.form != usual else 2

    # Rows of a dataset are in the order of a hash, so any first part is a fair sample.
    return sorted(rows, key=rank)[:NUM_SHOWN]


def _example(row: Row, record: MaskRecord | None) -> Example:
    source, edit = read_rgb(row.source, where=row.where), row.edit_mask()
    assert row.reading is not None
    remark = record.remark if record else ""
    return Example(
        panels=[
            Panel(pixels=_tinted(source, edit), outlined=[(edit, FOUND)]),
            Panel(pixels=_stored(row, edit)),
        ],
        lines=[
            _cut(f"{row.task_id}: {row.instruction}"),
            _cut(f"{edit.mean():.0%} to edit; {row.reading.form}, {row.reading.polarity}"),
            _cut(remark),
        ],
    )


def _tinted(pixels: NDArray[np.uint8], edit: NDArray[np.bool_]) -> NDArray[np.uint8]:
    tinted = pixels.astype(np.float32)
    tinted[edit] = (1 - _TINT) * tinted[edit] + _TINT * np.array(FOUND, dtype=np.float32)
    return tinted.astype(np.uint8)


def _stored(row: Row, edit: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Returns the mask as a viewer shows it."""
    try:
        return read_rgb(row.mask, where=row.where)
    except InputError:
        # Values of a mask may have no meaning as colours, as those of a dark 16-bit file.
        return np.repeat(np.where(edit, 255, 0).astype(np.uint8)[:, :, None], 3, axis=2)


def _cut(line: str) -> str:
    return line if len(line) <= _LINE else f"{line[: _LINE - 3]}..."
