"""Finds the images that are equal whatever their names are, so that a split can keep them together.

Two files are one image if their upright pixels are equal. Decoding everything twice would be dear,
so small copies are compared first, and only likely pairs are decoded in full.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from rl_edit.data import images
from rl_edit.errors import InputError

_GRID = 8
"""Cells a side of a small copy."""
_TOLERANCE = 4
"""Levels of 255 by which small copies of equal images may differ.

A JPEG is shrunk as it is decoded, its copy as PNG afterwards."""
_SMALL_SIDE = 128


@dataclass(frozen=True, kw_only=True)
class _SmallCopy:
    path: Path
    size: tuple[int, int]
    cells: NDArray[np.int16]


def equal_images(paths: Sequence[Path]) -> list[list[Path]]:
    """Groups the files that show equal pixels; files unlike all others are left out.

    A file that cannot be read is unlike all others.
    """
    # Several spellings of one path are one file.
    spellings: defaultdict[str, list[Path]] = defaultdict(list)
    for path in dict.fromkeys(paths):
        spellings[os.path.realpath(path)].append(path)
    # Decoding releases the interpreter lock, so threads use all cores.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        copies = [copy for copy in pool.map(_small_copy, map(Path, spellings)) if copy is not None]
    likely = {path for pair in _alike(copies) for path in pair}
    by_content: defaultdict[str, list[Path]] = defaultdict(list)
    for name, same in spellings.items():
        path = Path(name)
        content = (_digest(path) if path in likely else None) or name
        by_content[content] += same
    return [group for group in by_content.values() if len(group) > 1]


def _small_copy(path: Path) -> _SmallCopy | None:
    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.format == "JPEG":
                # libjpeg shrinks as it decodes, at a fraction of the time.
                image.draft(None, (max(width // 8, _SMALL_SIDE), max(height // 8, _SMALL_SIDE)))
            small = ImageOps.exif_transpose(image)
            size = (
                (height, width)
                if (small.width > small.height) != (width > height)
                else (width, height)
            )
            cells = small.convert("RGB").resize((_GRID, _GRID), Image.Resampling.BOX)
    except Exception:  # any damage of a file: opening the dataset reports it, row by row
        return None
    return _SmallCopy(path=path, size=size, cells=np.asarray(cells, dtype=np.int16).ravel())


def _alike(copies: Sequence[_SmallCopy]) -> Iterator[tuple[Path, Path]]:
    """Yields pairs of one size whose small copies are nearly equal."""
    by_size: defaultdict[tuple[int, int], list[_SmallCopy]] = defaultdict(list)
    for copy in copies:
        by_size[copy.size].append(copy)
    for group in by_size.values():
        # Sorted by mean, a copy has to be compared with its neighbours only.
        group.sort(key=lambda copy: float(copy.cells.mean()))
        means = np.array([copy.cells.mean() for copy in group])
        cells = np.stack([copy.cells for copy in group])
        for first, mean in enumerate(means):
            end = int(np.searchsorted(means, mean + _TOLERANCE, side="right"))
            apart = np.abs(cells[first + 1 : end] - cells[first]).max(axis=1)
            for other in np.flatnonzero(apart <= _TOLERANCE):
                yield group[first].path, group[first + 1 + int(other)].path


def _digest(path: Path) -> str | None:
    """sha256 of an image's upright pixels; None if it cannot be read."""
    try:
        pixels = images.read_rgb(path, where=str(path))
    except InputError:
        return None
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
