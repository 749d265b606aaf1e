"""Divides rows on disk into training and held out, by a hash of their image's name.

Adding rows moves no other row, and no image is in both splits: names whose images have equal pixels
count as one.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from rl_edit.data.identity import equal_images
from rl_edit.data.notices import NUM_EXAMPLES, Notice
from rl_edit.data.rows import Request, Row

Split = Literal["train", "heldout"]

FEW_IMAGES = 5
"""Held-out images below which a result says little, and the sizes of the split are a notice."""

R = TypeVar("R", bound=Request)


@dataclass(frozen=True, kw_only=True)
class DividedRows:
    """Rows of both splits.

    Attributes:
        num_images: different images by split.
    """

    rows: Mapping[Split, tuple[Row, ...]]
    num_images: Mapping[Split, int]
    notices: tuple[Notice, ...] = ()


def ordered(rows: Sequence[R]) -> list[R]:
    """Orders rows by a hash of their ids.

    Any first part is then a fair sample.
    """
    return sorted(rows, key=lambda row: (_hash(row.task_id), row.task_id))


def divide(rows: tuple[Row, ...], heldout_fraction: float, *, source: str) -> DividedRows:
    """Divides rows by their images.

    Args:
        heldout_fraction: share of the images that is held out; at least one stays in each split.
        source: the dataset as the user named it.
    """
    names, notices = _names(rows, source)
    images = sorted(set(names.values()), key=lambda name: (_hash(name), name))
    if len(images) == 1:
        single = Notice(
            kind="single-image",
            count=1,
            message=f"{source} has a single image: it is used for training and for evaluation "
            "alike, so results say nothing about other images. Add images or set "
            "data.heldout_path.",
        )
        both: Mapping[Split, tuple[Row, ...]] = {"train": rows, "heldout": rows}
        one: Mapping[Split, int] = {"train": 1, "heldout": 1}
        return DividedRows(rows=both, num_images=one, notices=(*notices, single))
    # A hash is uniform below 2**64, so this share of the names lies below the fraction.
    num_heldout = sum(_hash(name) < heldout_fraction * 2**64 for name in images)
    num_heldout = min(max(num_heldout, 1), len(images) - 1)
    heldout = set(images[:num_heldout])
    sizes: Mapping[Split, int] = {"train": len(images) - num_heldout, "heldout": num_heldout}
    if num_heldout < FEW_IMAGES:
        notices.append(_few(sizes, heldout_fraction))
    return DividedRows(
        rows={
            "train": tuple(row for row in rows if names[row.group] not in heldout),
            "heldout": tuple(row for row in rows if names[row.group] in heldout),
        },
        num_images=sizes,
        notices=tuple(notices),
    )


def shared_images(train: Sequence[Row], heldout: Sequence[Row]) -> list[Notice]:
    """Counts held-out images that are also trained on, of two datasets that lie apart."""
    of_training = {row.source for row in train}
    of_heldout = {row.source for row in heldout}
    groups = equal_images([*of_training, *of_heldout])
    both = [*(of_training & of_heldout)]
    for group in groups:
        if of_training & {*group}:
            both += sorted((of_heldout & {*group}) - {*both})
    if not both:
        return []
    return [
        Notice(
            kind="images-in-both-splits",
            count=len(both),
            message=f"{len(both)} of {len(of_heldout)} held-out images are also trained on (equal "
            "pixels), so the held-out result is too good. Remove them from one side",
            examples=tuple(str(path) for path in both[:NUM_EXAMPLES]),
        )
    ]


def _few(sizes: Mapping[Split, int], heldout_fraction: float) -> Notice:
    train, heldout = sizes["train"], sizes["heldout"]
    return Notice(
        kind="few-held-out",
        count=heldout,
        message=f"{train} image{'s' if train > 1 else ''} train, {heldout} "
        f"{'is' if heldout == 1 else 'are'} held out "
        f"(data.heldout_fraction={heldout_fraction:g}): a result on so few says little. Raise "
        "data.heldout_fraction or set data.heldout_path",
    )


def _names(rows: Sequence[Row], source: str) -> tuple[dict[str, str], list[Notice]]:
    """The name of each group's image: of groups with equal images the first by hash."""
    groups: defaultdict[object, set[str]] = defaultdict(set)
    for row in rows:
        groups[row.source].add(row.group)
    parents = {row.group: row.group for row in rows}
    same = equal_images([row.source for row in rows])
    # The image with the least hash decides: what was held out stays held out when its twin comes.
    for paths in same:
        _join(parents, sorted(set().union(*(groups[path] for path in paths))))
    for names in groups.values():
        _join(parents, sorted(names))
    notices = []
    if same:
        num_paths = sum(map(len, same))
        images = f"{len(same)} different image{'s' if len(same) > 1 else ''}"
        notice = Notice(
            kind="equal-images",
            count=len(same),
            message=f"{num_paths} paths show only {images}; the split counts equal images as one",
            examples=tuple(
                " = ".join(sorted(os.path.relpath(path, source) for path in paths)[:2])
                for paths in same[:NUM_EXAMPLES]
            ),
        )
        notices.append(notice)
    return {name: _root(parents, name) for name in parents}, notices


def _root(parents: dict[str, str], name: str) -> str:
    while parents[name] != name:
        name = parents[name]
    return name


def _join(parents: dict[str, str], names: Sequence[str]) -> None:
    roots = {_root(parents, name) for name in names}
    first = min(roots, key=lambda name: (_hash(name), name))
    for root in roots:
        parents[root] = first


def _hash(text: str) -> int:
    # Not hash(), which differs from process to process.
    return int.from_bytes(
        hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest(), "little"
    )
