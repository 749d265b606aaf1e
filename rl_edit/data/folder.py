"""Reads a user's data: a table of rows, or a plain folder of images.

**Tables** (``DIR/metadata.jsonl`` or any ``.jsonl``, ``.json``, ``.csv`` or ``.tsv`` file) have one
row an entry. Paths are relative to the file::

    {"source": "cat.jpg", "instruction": "give the cat a hat", "mask": "cat_mask.png"}

===========  ==================  ===============================================================
key          also read as        meaning
===========  ==================  ===============================================================
source       image, input_image  the image to edit
instruction  prompt              what to do
mask                             where pixels may change; the size of the image
region_map                       optional: a label map of the mask's places, 0 outside, 1..R
target       edited_image        optional: the right result, the size of the image
caption                          optional: what the edited region should show
task_type    task                optional: the kind of edit, for tables; "edit" if missing
id           task_id             optional: unique; otherwise the source path and a count
split_group                      optional: a split never separates rows that share it; otherwise
                                 the source path
===========  ==================  ===============================================================

**Plain folder**: for an image ``NAME.jpg`` in the folder itself or a sub-folder, or in ``images/``
or ``sources/``

* mask: ``NAME_mask.png`` or ``NAME.mask.png`` beside it, or ``masks/NAME.png``;
* instructions: the lines of ``NAME.txt`` beside it, or entries of ``instructions.json`` ({"NAME":
  "..."}) or ``instructions.csv`` (columns ``name``, ``instruction``), where NAME may carry its
  ending; several make several tasks, ``NAME``, ``NAME#2`` and so on;
* target, optional: ``NAME_target.png`` or ``NAME.target.png`` beside it, or ``targets/NAME.png``.

Each of the three may have any ending of ``file_kinds.SUFFIXES``. Images are not opened here.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rl_edit.data.instructions import TextLines
from rl_edit.data.lines import read_table
from rl_edit.data.listing import Listing, unused_files
from rl_edit.data.pairs import read_pairs
from rl_edit.data.rows import Request
from rl_edit.data.tables import SUFFIXES
from rl_edit.errors import InputError

_EXPECTED = (
    "metadata.jsonl; tasks/*/metadata.json (CompBench); or images NAME.jpg (here, in images/ or in "
    "sources/) with NAME_mask.png or masks/NAME.png and NAME.txt or instructions.json|csv"
)


def list_folder(path: Path, *, masked: bool, lines: TextLines | None = None) -> Listing:
    """Lists the rows of a file or folder in the layouts above.

    Args:
        masked: every row must have a mask.
        lines: the meaning of several lines in one text of a plain folder.

    Raises:
        InputError: there is no such file or folder, or no row in it.
    """
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise InputError(
                f"{path} is a file but not {', '.join(SUFFIXES)}, so its rows cannot be read. Name "
                f"a table or a directory with {_EXPECTED}."
            )
        return read_table(path, masked=masked)
    if not path.is_dir():
        raise InputError(
            f"{path} does not exist. Name a .jsonl file or a directory with {_EXPECTED}; or use "
            "builtin:shapes."
        )
    # A list of rows says more than the names of files do, so it wins.
    for suffix in SUFFIXES:
        table = path / f"metadata{suffix}"
        if table.is_file():
            listing = read_table(table, masked=masked)
            unused = unused_files(path, listing.requests, kind="files-in-no-row")
            return replace(listing, notices=(*listing.notices, *unused))
    listing = read_pairs(path, masked=masked, lines=lines)
    if not listing.requests:
        raise _no_dataset(path, listing)
    return listing


class FoundMasks:
    """Writes rows with found masks, as JSON lines.

    Images are copied as they are.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._sources: dict[Path, str] = {}
        self._lines: list[str] = []

    def add(self, request: Request, regions: NDArray[np.bool_]) -> None:
        """Adds a row with its regions.

        Args:
            regions: ``[region, height, width]`` in pixels of the image, disjoint, at most 255.
        """
        row = len(self._lines)
        # Several rows may show one image, which is copied once.
        if request.source not in self._sources:
            self._sources[request.source] = self._copied(
                request.source, "sources", len(self._sources)
            )
        labels = np.zeros(regions.shape[1:], dtype=np.uint8)  # 0 is background, 1..R are regions
        for number, region in enumerate(regions, start=1):
            labels[region] = number
        entry = {
            "id": request.task_id,
            "task_type": request.task_type,
            "source": self._sources[request.source],
            "instruction": request.instruction,
            "mask": self._drawn(np.where(labels > 0, 255, 0).astype(np.uint8), "masks", row),
            "region_map": self._drawn(labels, "regions", row),
            "target": None
            if request.target is None
            else self._copied(request.target, "targets", row),
            "caption": request.caption,
            "split_group": request.group,
        }
        self._lines.append(
            json.dumps(
                {key: value for key, value in entry.items() if value is not None},
                ensure_ascii=False,
            )
            + "\n"
        )

    def finish(self) -> None:
        """Writes the file that makes the directory a dataset."""
        (self.root / "metadata.jsonl").write_text("".join(self._lines), encoding="utf-8")

    def _copied(self, file: Path, folder: str, number: int) -> str:
        name = f"{folder}/{number:06d}{file.suffix.lower()}"
        (self.root / folder).mkdir(exist_ok=True)
        shutil.copyfile(file, self.root / name)
        return name

    def _drawn(self, pixels: NDArray[np.uint8], folder: str, number: int) -> str:
        name = f"{folder}/{number:06d}.png"
        (self.root / folder).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(self.root / name)
        return name


def _no_dataset(root: Path, listing: Listing) -> InputError:
    """An error that lists what the directory holds."""
    entries = sorted(path.name + ("/" if path.is_dir() else "") for path in root.iterdir())
    more = f" and {len(entries) - 8} more" if len(entries) > 8 else ""
    listed = ", ".join(entries[:8]) + more if entries else "nothing"
    tables = [name for name in entries if name.lower().endswith(SUFFIXES)]
    hint = f" Is it data.path={root / tables[0]}?" if tables else ""
    reasons = "".join(f" {notice}." for notice in listing.notices if notice.kind != "other-files")
    return InputError(
        f"{root} holds no dataset.{reasons} Looked for {_EXPECTED}. Found {listed}.{hint}"
    )
