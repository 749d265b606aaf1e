"""Opens random faulty folders and checks that nothing is read wrongly without a word.

    python benchmarks/fuzz_folders.py --folders 2000 [--first 0] [--fault masks/hole/one]

A folder ends in one of five ways. ``read``: every row agrees with what was drawn. ``said``: some
row does not or is missing, and a notice about its kind of fault says so. ``refused``: an
InputError. ``wrong``: a row disagrees or is missing and nothing is said, or an image is in both
splits. ``traceback``: any other exception. The last two are defects, and the command then exits
with 1. Folders are numbered, so a defect can be repeated with ``--first``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from random_folders import FAULTS, Folder, Row, faulty_folder
from rl_edit.data import Dataset, Split, open_dataset
from rl_edit.data.config import DataConfig
from rl_edit.errors import InputError
from rl_edit.types import EditTask

SPLITS: tuple[Split, ...] = ("train", "heldout")

MIN_IOU = 0.9
"""Agreement of a mask with the true one, below which something must be said."""

MASK_NOTICES = frozenset(
    ("mask-form", "mask-forms-differ", "mask-share", "soft-masks", "label-maps")
)
"""Notices of which one must be there when a mask is not the true one."""

MAX_SHIFT = 25.0
"""Difference of mean brightness (0..255), above which something must be said."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of one folder.

    Attributes:
        end: read, said, refused, wrong or traceback.
        detail: the message or the disagreement.
    """

    seed: int
    faults: tuple[str, ...]
    end: str
    detail: str = ""


def outcome(seed: int, root: Path) -> Outcome:
    """Writes the folder of ``seed`` into ``root`` and opens both of its splits."""
    folder = faulty_folder(seed)
    folder.write(root)
    end, detail = _end(folder, root)
    return Outcome(seed=seed, faults=tuple(folder.faults), end=end, detail=detail)


def _end(folder: Folder, root: Path) -> tuple[str, str]:
    try:
        splits = [open_dataset(DataConfig(path=str(root)), split) for split in SPLITS]
        ends = [_compared(folder, dataset) for dataset in splits]
        ends.append(_complete(folder, splits))
    except InputError as error:
        return "refused", str(error)
    # Whatever a reader raises is the finding here.
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    # "wrong" before "said" before "read".
    return max(ends, key=lambda end: ("read", "said", "wrong").index(end[0]))


def _complete(folder: Folder, splits: Sequence[Dataset]) -> tuple[str, str]:
    """Checks that no row is missing without a word, and no image on both sides of the split."""
    notices = {str(notice) for dataset in splits for notice in dataset.notices}
    tasks = [[dataset[index] for index in range(len(dataset))] for dataset in splits]
    names = {_name(task) for side in tasks for task in side}
    missing = ({row.name for row in folder.rows} | set(folder.hidden)) - names
    if missing and not notices and not any(dataset.skipped for dataset in splits):
        return "wrong", f"rows {sorted(missing)} are missing and nothing is said"
    train, heldout = ({task.source.numpy().tobytes() for task in side} for side in tasks)
    if train & heldout and not any("single image" in notice for notice in notices):
        return "wrong", "an image is in both splits"
    return ("said", f"{sorted(missing)} missing") if missing else ("read", "")


def _name(task: EditTask) -> str:
    return Path(task.task_id.split("#")[0]).name


def _compared(folder: Folder, dataset: Dataset) -> tuple[str, str]:
    rows = {row.name: row for row in folder.rows}
    said = {notice.kind for notice in dataset.notices}
    detail = ""
    for task in (dataset[index] for index in range(len(dataset))):
        row = rows.get(_name(task))
        if row is None:
            continue  # a row of a stray file, whose truth nobody drew
        for about, problem in _disagreements(row, task):
            if not (said & MASK_NOTICES if about == "mask" else any("pixel" in k for k in said)):
                return "wrong", f"{task.task_id}: {problem}; notices: {sorted(said) or 'none'}"
            detail = problem
    return ("said", detail) if detail else ("read", "")


def _disagreements(row: Row, task: EditTask) -> list[tuple[str, str]]:
    """Returns (mask or pixel, what disagrees)."""
    found = []
    edit = task.edit_mask.numpy()
    if edit.shape != row.truth.shape:
        return [("pixel", f"size {edit.shape} instead of {row.truth.shape}")]
    iou = (edit & row.truth).sum() / (edit | row.truth).sum()
    if iou < MIN_IOU:
        found.append(("mask", f"mask IoU {iou:.2f}"))
    shift = abs(task.source.float().mean().item() - float(np.mean(row.pixels)))
    if shift > MAX_SHIFT:
        found.append(("pixel", f"mean brightness off by {shift:.0f}"))
    return found


def main() -> int:
    """Runs the folders, prints a table by fault and every defect."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folders", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--fault", help="only folders with this fault", choices=sorted(FAULTS))
    arguments = parser.parse_args()
    began, outcomes = time.time(), []
    for seed in range(arguments.first, arguments.first + arguments.folders):
        if arguments.fault and arguments.fault not in faulty_folder(seed).faults:
            continue
        with tempfile.TemporaryDirectory() as root:
            outcomes.append(outcome(seed, Path(root) / "data"))
        if sys.stderr.isatty() and len(outcomes) % 20 == 0:
            print(f"\r{len(outcomes)} folders", end="", file=sys.stderr)
    by_fault: dict[str, Counter[str]] = defaultdict(Counter)
    for result in outcomes:
        for fault in result.faults:
            by_fault[fault][result.end] += 1
    ends = ("read", "said", "refused", "wrong", "traceback")
    print(f"| fault | {' | '.join(ends)} |\n|---|{'---|' * len(ends)}")
    for fault, counts in sorted(by_fault.items()):
        print(f"| {fault} | {' | '.join(str(counts[end]) for end in ends)} |")
    total = Counter(result.end for result in outcomes)
    print(f"| all {len(outcomes)} folders | {' | '.join(str(total[end]) for end in ends)} |")
    print(f"\n{time.time() - began:.0f} s")
    defects = [result for result in outcomes if result.end in ("wrong", "traceback")]
    for result in defects:
        print(f"{result.end}: --first {result.seed} --folders 1 {result.faults} {result.detail}")
    return int(bool(defects))


if __name__ == "__main__":
    sys.exit(main())
