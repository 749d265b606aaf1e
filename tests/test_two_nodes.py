"""Runs on two real nodes: the worker node is slowed, healed, cut off, killed and started again.

Both nodes are network namespaces of this machine (``benchmarks/two_nodes.py``). The worker node
holds a rollout actor with its groups, the reward actor and the learner rank that answers with the
newest weights and state. Whatever happens to it, the run ends with the bytes of a run in one
process where nothing happened.

Two runs share the first loss of the node, and a run and a reserved GPU share the second: to start a
run and to notice a loss takes most of the time.
"""

from __future__ import annotations

import contextlib
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
from two_nodes import ADDRESSES, HEALTH, PORT, TwoNodes, reason

pytestmark = [pytest.mark.ray, pytest.mark.faults]

UPDATES = 8
GRACE_S = 5.0
ON_NODES = (
    "actors.runtime=ray",
    # Few processes: each holds a rollout actor and a learner rank.
    "actors.placement=colocated",
    "actors.num_rollout=2",
    "actors.num_learner=2",
    "actors.deadline_s=30",
    f"train.grace_s={GRACE_S:g}",
)
ALONE = ("actors.num_rollout=1", "actors.num_learner=1", "train.checkpoint_every=4")
"""One rank, on the worker node, and no checkpoint when it is lost."""
PLACES = "learner-0,reward-0"
HEAD = f"{ADDRESSES[0]}:{PORT}"
LIMIT_S = 240.0
QUICK = {**HEALTH, "RAY_health_check_timeout_ms": "1500"}
"""A node that does not answer is dead after 3 x (1 + 1.5) s."""


class Attempt:
    """A run on the two nodes, as a process of the head."""

    def __init__(self, nodes: TwoNodes, folder: Path, name: str, *more: str) -> None:
        self.run, files = folder / name, folder / f"{name}{len(more)}"
        self.log, self.errors = files.with_suffix(".log"), files.with_suffix(".err")
        words = (folder / "run.yaml", f"train.updates={UPDATES}", *ON_NODES, *more)
        self.process = nodes.train(
            *words, "--run-dir", self.run, log=self.log, errors=self.errors, places=PLACES
        )

    @property
    def output(self) -> str:
        return self.log.read_text() + self.errors.read_text()

    @property
    def applied(self) -> list[int]:
        """Updates that were applied in the run directory."""
        there = (self.run / "events.jsonl").is_file()
        return [line["update"] for line in events_of(self.run, "update_applied")] if there else []

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def wait_updates(self, number: int) -> None:
        self.wait_for(lambda: len(self.applied) >= number)

    def hold(self) -> None:
        """Lets the driver stand still, until ``go_on``."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> int:
        try:
            return self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"no end within {LIMIT_S:g} s: {self.output}") from None


class Runs:
    """Two nodes, and run directories of one configuration."""

    def __init__(self, nodes: TwoNodes, folder: Path, inline: subprocess.Popen[bytes]) -> None:
        self.nodes, self.folder, self._inline = nodes, folder, inline

    @property
    def whole(self) -> str:
        """The adapter of the run in one process, which each must end with."""
        assert self._inline.wait(LIMIT_S) == 0
        return adapter_hash(self.folder / "whole")

    def start(self, name: str, *more: str) -> Attempt:
        return Attempt(self.nodes, self.folder, name, *more)


def adapter_hash(run: Path) -> str:
    (file,) = (run / "adapter").glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def runs(small_editor: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    if why := reason():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("nodes")
    small_config(small_editor, f"train.updates={UPDATES}", directory=folder)
    command = [sys.executable, "-m", "rl_edit", "train", str(folder / "run.yaml")]
    inline = [*command, f"train.updates={UPDATES}", "--run-dir", str(folder / "whole")]
    with subprocess.Popen(inline, stdout=subprocess.DEVNULL) as whole:
        try:
            with TwoNodes(health=QUICK) as nodes:
                yield Runs(nodes, folder, whole)
        finally:
            whole.kill()


class Cut:
    """Two runs when the worker node is cut off: one goes on, one is stopped.

    Attributes:
        stop_s: seconds from SIGTERM to the end of the stopped one.
    """

    def __init__(self, runs: Runs) -> None:
        nodes = runs.nodes
        self.going, self.stopped = runs.start("cut"), runs.start("stop", *ALONE)
        # Neither goes far while the other still starts.
        waiting, deadline = [self.going, self.stopped], time.monotonic() + LIMIT_S
        while waiting:
            assert time.monotonic() < deadline, self.going.output + self.stopped.output
            for attempt in list(waiting):
                assert attempt.process.poll() is None, attempt.output
                if attempt.applied:
                    attempt.hold()
                    waiting.remove(attempt)
            time.sleep(0.02)
        nodes.slow(delay_s=0.05, loss=0.01)
        self.stopped.go_on()
        self.stopped.wait_updates(2)
        nodes.heal()
        # An update that no checkpoint holds yet is half done by the rank on the worker node.
        nodes.stop_in(1, "ray::learner.learn", LIMIT_S)
        nodes.cut()
        self.going.go_on()
        began = time.monotonic()
        self.stopped.process.send_signal(signal.SIGTERM)
        self.stop_code = self.stopped.end()
        self.stop_s = time.monotonic() - began
        self.code = self.going.end()


@pytest.fixture(scope="module")
def cut(runs: Runs) -> Cut:
    return Cut(runs)


def test_a_run_whose_worker_node_is_cut_off_ends_with_the_undisturbed_adapter(
    runs: Runs, cut: Cut
) -> None:
    assert cut.code == 0, cut.going.output
    assert adapter_hash(cut.going.run) == runs.whole
    # The node held a rank: without its loss this would prove nothing.
    assert events_of(cut.going.run, "learner_lost")
    assert cut.going.errors.read_text() == ""


def test_a_stop_with_an_update_on_the_lost_node_ends_in_time_and_keeps_every_update_before(
    cut: Cut,
) -> None:
    stopped = cut.stopped
    assert cut.stop_code == 143, stopped.output
    # Its grace, and what two cores need to commit and to leave.
    assert cut.stop_s < GRACE_S + 15
    assert stopped.errors.read_text() == ""
    (line,) = [line for line in stopped.log.read_text().splitlines() if "stopped" in line]
    assert "--resume" in line
    newest = max((stopped.run / "checkpoints").glob("step_*")).name
    assert newest == f"step_{len(stopped.applied):06d}" and len(stopped.applied) >= 2
    record = read_json(stopped.run / "run.json")
    assert record["status"] == "stopped"
    assert record["adapter"].startswith(f"{len(stopped.applied)}:")


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


class Killed:
    """The stopped run, resumed on a new worker node that is killed, beside a reserved GPU.

    Attributes:
        lost: whether the reserved GPU's place was lost, before and after.
    """

    def __init__(self, runs: Runs, cut: Cut) -> None:
        nodes, before = runs.nodes, len(cut.stopped.applied)
        nodes.kill_worker()
        nodes.heal()
        nodes.start_worker(gpus=1)
        self.again = runs.start("stop", "--resume")
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
                words = (line.strip() for line in driver.stdout)
                answers = (word for word in words if word in ("True", "False"))
                self.lost = [next(answers, "")]
                self.again.wait_updates(before + 1)
                nodes.kill_worker()
                driver.stdin.write("\n")
                driver.stdin.flush()
                self.code = self.again.end()
                self.lost.append(next(answers, ""))
            finally:
                with contextlib.suppress(ProcessLookupError):
                    driver.kill()


@pytest.fixture(scope="module")
def killed(runs: Runs, cut: Cut) -> Killed:
    return Killed(runs, cut)


def test_a_stopped_run_continues_to_the_same_adapter_although_its_new_node_is_killed(
    runs: Runs, killed: Killed
) -> None:
    again = killed.again
    assert killed.code == 0, again.output
    assert adapter_hash(again.run) == runs.whole
    assert events_of(again.run, "learner_lost")
    assert sorted(again.applied) == list(range(UPDATES))
    assert again.errors.read_text() == ""


def test_the_loss_of_the_node_with_a_reserved_gpu_is_seen(killed: Killed) -> None:
    assert killed.lost == ["False", "True"]
