"""Ray's own processes are killed under real runs: each run ends in one line, leaves no process, and
continues to the bytes of a run where nothing happened.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from crashing import Ended, Launched
from rl_edit.config import load_config
from runs import events_of, read_json, run_inline

pytestmark = [
    pytest.mark.ray,
    pytest.mark.faults,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc"),
]

UPDATES = 5
PRESET = (
    f"train.updates={UPDATES}",
    "train.checkpoint_every=2",
    "train.groups_per_update=2",
    "rollout.chunk=4",
    "data.num_train=16",
    "actors.num_rollout=1",
    "actors.threads=1",
)
RAYS_OWN_S = 14.0
"""Seconds after which Ray ends the driver of a raylet that is gone, without Python."""


def launched(directory: Path, *more: str) -> Launched:
    return Launched(
        "train",
        *("--preset", "tiny-rc-grpo", "--run-dir", directory, "--auto-resume", *PRESET, *more),
        logs=directory.parent,
    )


def kill(run: Launched, name: str, when: Callable[[], object]) -> float:
    """Kills the process whose command line has a name, once the condition holds. Returns when."""
    while True:
        assert run.process.poll() is None, run.err.read_text()[-2000:]
        living = run.living() if when() else {}
        if found := [pid for pid, words in living.items() if re.search(name, words)]:
            os.kill(found[0], signal.SIGKILL)
            return time.time()
        time.sleep(0.05)


def require_one_line(run: Launched, directory: Path, killed: float, *names: str) -> Ended:
    """Waits for the end of a run whose cluster was just lost, and checks all that it left."""
    ended = run.ended()
    (line,) = ended.err.splitlines()
    assert all(name in line for name in (*names, "SIGKILL")), line
    assert (ended.code, ended.left) == (3, []), line
    assert "(raylet)" not in ended.out and "state-dump" not in ended.out
    record = read_json(directory / "run.json")
    assert record["status"] == "failed" and names[0] in record["reason"]
    assert record["finished"] - killed < RAYS_OWN_S
    return ended


# Two minutes on a machine with nothing else to do.
@pytest.mark.slow
def test_a_killed_raylet_or_gcs_ends_the_run_in_one_line_and_it_continues_to_the_same_bytes(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "run"

    def applied() -> int:
        return len(events_of(directory, "update_applied"))

    with launched(directory) as run:
        kill(run, r"^ray::rollout", lambda: applied() >= 1)
        at = kill(
            run, r"/gcs_server ", lambda: events_of(directory, "actor_lost") and applied() >= 2
        )
        ended = require_one_line(run, directory, at, "control service (GCS)", "gcs_server.out")
    assert re.search(r"--resume from update [024]\.$", ended.err)
    assert "control service" in events_of(directory, "failed")[-1]["reason"]
    with launched(directory) as run:
        at = kill(run, r"/raylet ", lambda: applied() >= 3)
        require_one_line(run, directory, at, "raylet ended", "raylet.out", "--resume")
    with launched(directory) as run:
        ended = run.ended()
    assert (ended.code, ended.left) == (0, []), ended.err[-2000:]
    assert events_of(directory, "resumed")
    assert [event["update"] for event in events_of(directory, "update_applied")] == [
        *range(UPDATES)
    ]
    config = load_config(
        preset="tiny-rc-grpo",
        overrides=[*PRESET, "actors.runtime=inline", "actors.preflight=false"],
    )
    golden = run_inline(config, tmp_path / "inline")
    assert golden.adapter is not None
    assert read_json(directory / "run.json")["adapter"] == str(golden.adapter.id)
    logs = re.findall(r"see (\S+)/raylet\.out", run_logs(tmp_path))
    assert logs and all(Path(folder, "raylet.out").is_file() for folder in logs)


def run_logs(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.glob("*.err"))


def test_a_raylet_killed_while_the_actors_start_ends_the_run_in_one_line(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with launched(directory) as run:
        at = kill(run, r"/raylet ", lambda: "ray::rollout" in " ".join(run.living().values()))
        ended = require_one_line(run, directory, at, "raylet ended", "raylet.out")
    assert ended.code == 3 and not events_of(directory, "update_applied")
