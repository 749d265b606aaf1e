"""A method in one file of the user's trains, by the example.

The file is ``examples/own_method.py``. Nothing else knows it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

from runs import metrics_of

ROOT = Path(__file__).parent.parent


def test_the_example_trains_two_updates_on_its_objective(tmp_path: Path) -> None:
    # A process of its own, as a user starts it; it imports the file as ``own_method`` by itself.
    ended = subprocess.run(
        [sys.executable, ROOT / "examples" / "own_method.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    run = tmp_path / "runs" / "own_method"
    lines = metrics_of(run)
    assert [line["update"] for line in lines] == [0, 1]
    assert all("best_of/error" in str(line) for line in lines)
    algorithm = yaml.safe_load((run / "config.yaml").read_text())["algorithm"]
    assert algorithm["credit"]["normalise"] == "group"
    assert algorithm["objective"]["kind"] == "own_method:BestOf"
    assert algorithm["objective"]["pull"] == 0.05 and algorithm["step_noise"]["level"] == 0.3
