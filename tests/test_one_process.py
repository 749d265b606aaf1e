"""The page of code that shows the algorithm trains the very adapter of ``rl-edit train``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "examples" / "one_process.py"
SMALL = (
    "train.updates=2",
    "train.groups_per_update=2",
    "data.num_train=16",
    "rollout.num_steps=3",
    "actors.runtime=inline",
    "actors.threads=1",
)


def saved_by(folder: Path, *arguments: str) -> dict[str, bytes]:
    """Runs a command of Python in a folder; returns the files of the adapter it saved."""
    ended = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    (record,) = (folder / "runs").rglob("adapter.json")
    return {path.name: path.read_bytes() for path in record.parent.iterdir()}


@pytest.mark.parametrize(
    ("preset", "more"),
    [
        ("tiny-rc-grpo", ("train.inner_epochs=2", "train.minibatches=2", "train.ema_decay=0.5")),
        ("tiny-diffusion-nft", ("train.minibatches=1",)),
    ],
    ids=["ratios, two epochs of two minibatches, an average saved", "an acting average"],
)
def test_one_page_gives_the_bytes_of_the_system(
    tmp_path: Path, preset: str, more: tuple[str, ...]
) -> None:
    for name in ("page", "system"):
        (tmp_path / name).mkdir()
    page = saved_by(tmp_path / "page", str(PAGE), preset, *SMALL, *more)
    verb = ("-m", "rl_edit", "train", "--preset", preset, "--run-dir", "runs/small")
    assert page == saved_by(tmp_path / "system", *verb, *SMALL, *more)


def test_the_page_is_a_page() -> None:
    assert len(PAGE.read_text().splitlines()) <= 90
