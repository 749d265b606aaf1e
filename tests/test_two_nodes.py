"""A run on two real nodes: the worker node is cut off, slowed, healed, killed and started again.

Both nodes are network namespaces of this machine (``benchmarks/two_nodes.py``). The worker node
holds a rollout actor with its groups, the reward actor and the learner rank that answers with the
newest weights and state. Whatever happens to it, the run ends with the bytes of a run in one
process where nothing happened.
"""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runs import events_of, read_json, small_config

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
from two_nodes import ADDRESSES, PORT, TwoNodes, reason

pytestmark = [pytest.mark.ray, pytest.mark.faults]

UPDATES = 5
ON_NODES = (
    "actors.runtime=ray",
    # Few processes: each holds a rollout actor and a learner rank.
    "actors.placement=colocated",
    "actors.num_rollout=2",
    "actors.num_learner=2",
    "actors.deadline_s=30",
)
PLACES = "learner-0,reward-0"
HEAD = f"{ADDRESSES[0]}:{PORT}"
LIMIT_S = 240.0


class Runs:
    """Run directories of one configuration, and the adapter that each must end with."""

    def __init__(self, nodes: TwoNodes, folder: Path, editor: str) -> None:
        self.nodes, self.folder = nodes, folder
        small_config(editor, f"train.updates={UPDATES}", directory=folder)
        inline = [sys.executable, "-m", "rl_edit", "train", str(folder / "run.yaml")]
        subprocess.run(
            [*inline, f"train.updates={UPDATES}", "--run-dir", str(folder / "whole")],
            check=True,
            capture_output=True,
            timeout=LIMIT_S,
        )
        self.whole = adapter_hash(folder / "whole")

    def start(self, name: str, *more: str) -> Attempt:
        log = self.folder / f"{name}{len(more)}.log"
        words = (self.folder / "run.yaml", f"train.updates={UPDATES}", *ON_NODES, *more)
        run = self.folder / name
        process = self.nodes.train(*words, "--run-dir", run, log=log, places=PLACES)
        return Attempt(process, run, log)


class Attempt:
    def __init__(self, process: subprocess.Popen[bytes], run: Path, log: Path) -> None:
        self.process, self.run, self.log = process, run, log

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def wait_updates(self, number: int) -> None:
        """Waits until so many updates have been applied in the run directory."""
        self.wait_for(
            lambda: (
                (self.run / "events.jsonl").is_file()
                and len(events_of(self.run, "update_applied")) >= number
            )
        )

    def end(self) -> int:
        try:
            return self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"no end within {LIMIT_S:g} s: {self.log.read_text()}") from None


def adapter_hash(run: Path) -> str:
    (file,) = (run / "adapter").glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def runs(small_editor: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    if why := reason():
        pytest.skip(why)
    with TwoNodes() as nodes:
        yield Runs(nodes, tmp_path_factory.mktemp("nodes"), small_editor)


def test_a_run_whose_worker_node_is_cut_off_ends_with_the_undisturbed_adapter(runs: Runs) -> None:
    attempt = runs.start("cut")
    attempt.wait_updates(1)
    runs.nodes.cut()
    assert attempt.end() == 0, attempt.log.read_text()
    assert adapter_hash(attempt.run) == runs.whole
    # The node held a rank: without its loss this would prove nothing.
    assert events_of(attempt.run, "learner_lost")
    assert "Traceback" not in attempt.log.read_text()


def test_a_stop_while_the_node_is_cut_off_is_one_line_and_a_killed_node_later_costs_nothing(
    runs: Runs,
) -> None:
    nodes = runs.nodes
    nodes.kill_worker()
    nodes.heal()
    nodes.start_worker()
    attempt = runs.start("stop")
    attempt.wait_updates(1)
    nodes.slow(delay_s=0.05, loss=0.01)
    attempt.wait_updates(2)
    nodes.heal()
    nodes.cut()
    attempt.process.send_signal(signal.SIGTERM)
    assert attempt.end() == 143, attempt.log.read_text()
    assert "Traceback" not in attempt.log.read_text()
    assert read_json(attempt.run / "run.json")["status"] == "stopped"
    nodes.kill_worker()
    nodes.heal()
    nodes.start_worker()
    again = runs.start("stop", "--resume")
    again.wait_updates(3)
    nodes.kill_worker()
    assert again.end() == 0, again.log.read_text()
    assert adapter_hash(again.run) == runs.whole
    assert "Traceback" not in again.log.read_text()


RESERVED = """
import ray, sys, time
from ray.util.placement_group import placement_group
from actors.ray_cluster import place_lost

ray.init(log_to_driver=False)
group = placement_group([{"GPU": 1}], strategy="PACK")
assert group.wait(60)
print(place_lost(group, 0), flush=True)
sys.stdin.readline()
deadline = time.monotonic() + 100
while not place_lost(group, 0) and time.monotonic() < deadline:
    time.sleep(0.2)
print(place_lost(group, 0), flush=True)
"""


def test_the_loss_of_the_node_with_a_reserved_gpu_is_seen(runs: Runs) -> None:
    nodes = runs.nodes
    nodes.kill_worker()
    nodes.heal()
    nodes.start_worker(gpus=1)
    with subprocess.Popen(
        nodes.command(0, sys.executable, "-c", RESERVED),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**nodes.environment, "RAY_ADDRESS": HEAD},
    ) as driver:
        assert driver.stdin is not None and driver.stdout is not None
        try:
            # Ray writes lines of its own there.
            assert "False\n" in driver.stdout
            nodes.kill_worker()
            driver.stdin.write("\n")
            driver.stdin.flush()
            assert "True\n" in driver.stdout
        finally:
            driver.kill()
