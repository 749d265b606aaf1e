"""The page of code that shows the algorithm trains the very adapter of ``rl-edit train``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from commands import Command

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "examples" / "one_process.py"
SMALL = (
    "train.updates=2",
    "train.groups_per_update=2",
    "data.num_train=16",
    "rollout.group_size=5",
    "rollout.num_steps=3",
    "actors.runtime=inline",
    "actors.threads=1",
)


def saved_in(folder: Path) -> dict[str, bytes]:
    """The files of the one adapter below a folder."""
    (record,) = folder.rglob("adapter.json")
    return {path.name: path.read_bytes() for path in record.parent.iterdir()}


def saved_by_the_page(folder: Path, *arguments: str) -> dict[str, bytes]:
    """Runs the page in a folder, as a reader would; returns the files of the adapter it saved."""
    ended = subprocess.run(
        [sys.executable, str(PAGE), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return saved_in(folder / "runs")


@pytest.mark.parametrize(
    ("preset", "more"),
    [
        ("tiny-rc-grpo", ("train.inner_epochs=2", "train.minibatches=2", "train.ema_decay=0.5")),
        ("tiny-diffusion-nft", ("train.minibatches=1",)),
    ],
    ids=["ratios, two epochs of two minibatches, an average saved", "an acting average"],
)
def test_one_page_gives_the_bytes_of_the_system(
    rl_edit: Command, tmp_path: Path, preset: str, more: tuple[str, ...]
) -> None:
    page, system = tmp_path / "page", tmp_path / "system"
    page.mkdir()
    verb = ("train", "--preset", preset, "--run-dir", system)
    assert rl_edit(*verb, *SMALL, *more)[0] == 0
    assert saved_by_the_page(page, preset, *SMALL, *more) == saved_in(system / "adapter")


def test_the_page_is_a_page() -> None:
    assert len(PAGE.read_text().splitlines()) <= 90
