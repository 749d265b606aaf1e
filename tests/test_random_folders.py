"""Random faulty folders: no traceback, and no wrong mask or image without a word.

``benchmarks/fuzz_folders.py`` runs 2,000 of them; here as many as fit into seconds.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from fuzz_folders import outcome
from random_folders import FAULTS, faulty_folder, good_folder
from rl_edit.data import open_dataset
from rl_edit.data.config import DataConfig

NUM_FOLDERS, MAX_SECONDS = 400, 45.0


@pytest.mark.parametrize("part", range(4))
def test_no_random_fault_ends_in_a_traceback_or_a_silent_wrong_row(
    part: int, tmp_path: Path
) -> None:
    began, ends = time.monotonic(), Counter[str]()
    for seed in range(part, NUM_FOLDERS, 4):
        # A busy machine runs fewer folders, never none.
        if time.monotonic() - began > MAX_SECONDS / 4 and ends.total() >= 10:
            break
        result = outcome(seed, tmp_path / str(seed))
        assert result.end not in ("wrong", "traceback"), result
        ends[result.end] += 1
    assert ends["read"] and ends["refused"], ends


def test_good_folders_are_read_without_a_notice(tmp_path: Path) -> None:
    for seed in range(20):
        root = tmp_path / str(seed)
        good_folder(random.Random(seed), 12).write(root)
        config = DataConfig(path=str(root), heldout_fraction=0.4)
        for split in ("train", "heldout"):
            kinds = {notice.kind for notice in open_dataset(config, split).notices}
            assert kinds <= {"few-held-out"}, seed


def test_every_fault_occurs_in_the_long_run() -> None:
    seen = {fault for seed in range(2000) for fault in faulty_folder(seed).faults}
    assert seen == set(FAULTS)
