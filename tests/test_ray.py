"""The same run on a real Ray cluster.

It gives the same bytes, replaces lost actors, and refuses impossible places in seconds.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from actors.roles import worker_roles
from learner.controller.lease import Lease
from learner.controller.loop import TrainingLoop
from learner.controller.run import Outcome, Run
from learner.controller.run_log import Events
from learner.learner import Learner
from rl_edit.config import RunConfig
from rl_edit.errors import ClusterLost, InputError, ResourcesInfeasible
from rl_edit.files import EVENTS
from rl_edit.provenance import differences
from runs import (
    SilentObserver,
    adapter_bytes,
    events_of,
    metrics_of,
    run_inline,
    run_of,
    small_config,
)

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parent.parent
ON_RAY = ("actors.runtime=ray", "train.updates=2", "train.groups_per_update=3")


def run_on_ray(
    config: RunConfig, directory: Path, observer: Any = None, *, resume: bool = False
) -> Outcome:
    """As ``rl-edit train`` wires it, on the tests' cluster."""
    from actors import ray_cluster, ray_executor

    run = run_of(config, directory)
    roles = worker_roles(config, run.dataset.fields, Learner)
    ray_cluster.connect(config)
    directory.mkdir(parents=True, exist_ok=True)
    executor = ray_executor.RayExecutor(roles)
    try:
        events = Events(directory / EVENTS)
        loop = TrainingLoop(
            run,
            executor,
            lease=Lease.take(directory),
            events=events,
            observer=observer or SilentObserver(),
        )
        return asyncio.run(loop.run(resume=resume))
    finally:
        asyncio.run(executor.close())


@pytest.fixture(scope="module")
def undisturbed(small_editor: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The adapter of the run in one process."""
    config = small_config(small_editor, *ON_RAY, "actors.runtime=inline")
    return adapter_bytes(run_inline(config, tmp_path_factory.mktemp("inline")))


def processes_below(parent: int, title: str) -> list[int]:
    """Descendants of a process whose command line starts with ``title``."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit():
                status = (entry / "stat").read_text()
                parents[int(entry.name)] = int(status.rpartition(")")[2].split()[1])
                titles[int(entry.name)] = (entry / "cmdline").read_text()
        except OSError:
            continue

    def below(pid: int) -> bool:
        while pid in parents:
            pid = parents[pid]
            if pid == parent:
                return True
        return False

    return sorted(pid for pid, words in titles.items() if words.startswith(title) and below(pid))


def test_two_rollout_actors_on_ray_give_the_bytes_of_one_process(
    ray_cluster: None, small_editor: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    outcome = run_on_ray(small_config(small_editor, *ON_RAY, "actors.num_rollout=2"), tmp_path)
    assert adapter_bytes(outcome) == undisturbed
    lines = metrics_of(tmp_path)
    assert [line["ratio/max_deviation"] for line in lines] == [0.0, 0.0]
    assert [line["groups/used"] for line in lines] == [3, 3]
    assert events_of(tmp_path, "actor_lost") == []


class Assassin(SilentObserver):
    """Kills every rollout actor, once; test_faults_ray.py has those that hang.

    It does so when the first group of the second update is scored and others are under way.
    """

    def __init__(self) -> None:
        self.struck: list[int] = []

    def group_scored(self, update: int, done: int, total: int) -> None:
        if (update, done) == (1, 1):
            self.struck = processes_below(os.getpid(), "ray::rollout")
            for pid in self.struck:
                os.kill(pid, signal.SIGKILL)


@pytest.mark.faults
@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="finds the actor's process in /proc"
)
def test_a_lost_rollout_actor_is_replaced_and_the_run_ends_as_if_nothing_had_happened(
    ray_cluster: None,
    small_editor: str,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
) -> None:
    assassin = Assassin()
    outcome = run_on_ray(small_config(small_editor, *ON_RAY), tmp_path, assassin)
    assert len(assassin.struck) == 1
    (lost,) = events_of(tmp_path, "actor_lost")
    assert lost["during"].startswith(("rollout of ", "publishing "))
    assert "no answer within" not in lost["reason"]
    assert len(events_of(tmp_path, "actor_replaced")) == 1
    assert adapter_bytes(outcome) == undisturbed


def test_what_an_actor_refuses_at_its_start_is_the_users_error_and_is_not_retried(
    ray_cluster: None, small_editor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, inspected = Path(shutil.copytree(small_editor, tmp_path / "half_copied")), run_of

    def looked_at_and_then_broken(config: RunConfig, directory: Path) -> Run:
        run = inspected(config, directory)
        for weights in (half / "transformer").glob("*.safetensors"):
            weights.unlink()
        return run

    # The driver would refuse it first, and no actor would be asked.
    monkeypatch.setattr(sys.modules[__name__], "run_of", looked_at_and_then_broken)
    with pytest.raises(InputError, match=r"editor .*half_copied cannot be loaded"):
        run_on_ray(small_config(str(half), *ON_RAY, "actors.placement=colocated"), tmp_path)
    assert events_of(tmp_path, "actor_lost") == []


def test_actors_that_do_not_start_in_time_are_refused_with_what_is_free(
    ray_cluster: None, small_editor: str, tmp_path: Path
) -> None:
    with pytest.raises(
        ResourcesInfeasible,
        match=r"not all of 3 actors were running after 0\.01 s .*start_timeout_s.*free are .*CPU",
    ):
        run_on_ray(small_config(small_editor, *ON_RAY, "actors.start_timeout_s=0.01"), tmp_path)


@pytest.mark.faults
def test_a_gcs_that_hangs_ends_a_question_and_later_ones_are_answered(ray_cluster: None) -> None:
    import ray

    from actors.ray_queries import answered

    (gcs,) = [
        info.process.pid for info in ray._private.worker._global_node.all_processes["gcs_server"]
    ]
    os.kill(gcs, signal.SIGSTOP)
    try:
        with pytest.raises(ClusterLost, match=r"which GPUs it has \(no answer within 1 s\)"):
            answered("which GPUs it has", ray.cluster_resources, limit_s=1)
    finally:
        os.kill(gcs, signal.SIGCONT)
    assert answered("which GPUs it has", ray.cluster_resources)["CPU"] == 2


def test_more_gpus_than_a_cluster_has_are_refused_on_a_running_cluster(
    ray_cluster: None, small_editor: str
) -> None:
    from actors import ray_cluster

    config = small_config(small_editor, "actors.runtime=ray", "actors.rollout_gpus=64")
    with pytest.raises(
        ResourcesInfeasible, match=r"needs 64 GPUs \(1 rollout x 64, 1 reward x 0, 1 learner x 0\)"
    ):
        ray_cluster.reserve(config, worker_roles(config, frozenset(), Learner), note=print)


def test_nodes_are_compared_with_the_driver_and_a_difference_is_refused_unless_allowed(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actors import ray_cluster

    notes: list[str] = []
    ray_cluster.check_nodes(allow_skew=False, note=notes.append)
    assert notes == []
    here = {**ray_cluster.versions(), "torch": "1.0"}
    monkeypatch.setattr(ray_cluster, "differences", lambda nodes, _: differences(nodes, here))
    with pytest.raises(
        InputError,
        match=r"do not run the same code: .* has torch .*, here is 1\.0.*--allow-version-skew",
    ):
        ray_cluster.check_nodes(allow_skew=False, note=notes.append)
    ray_cluster.check_nodes(allow_skew=True, note=notes.append)
    assert len(notes) == 1


def rl_edit(*arguments: object, **environment: str) -> tuple[int, list[str], float]:
    """``rl-edit ARGUMENTS`` in a process of its own: exit code, lines of stderr, seconds."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "rl_edit", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stderr.splitlines(), time.monotonic() - began


def test_a_dead_cluster_address_is_refused_in_seconds_with_the_address(
    small_editor: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    small_config(small_editor, *ON_RAY, directory=tmp_path)
    code, err, seconds = rl_edit(
        "train",
        tmp_path / "run.yaml",
        "--run-dir",
        run,
        "actors.runtime=ray",
        RAY_ADDRESS="127.0.0.1:1",
    )
    assert code == 5
    (line,) = err
    assert "RAY_ADDRESS=127.0.0.1:1" in line and "ray start --head" in line
    assert seconds < 30
    assert not run.exists()


def test_more_gpus_than_this_machine_has_are_refused_in_seconds_with_the_counts(
    small_editor: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    small_config(small_editor, directory=tmp_path)
    settings = ("actors.runtime=ray", "actors.rollout_gpus=64", "actors.learner_gpus=1")
    code, err, seconds = rl_edit("train", tmp_path / "run.yaml", "--run-dir", run, *settings)
    assert code == 4
    assert (
        "the run needs 65 GPUs (1 rollout x 64, 1 reward x 0, 1 learner x 1), the cluster has"
        in err[-1]
    )
    assert seconds < 60
    assert not run.exists()


PROCESS = """
import asyncio, json, os, sys
from actors import ray_cluster
from actors.ray_executor import RayExecutor
from actors.roles import WorkerSpec
from rl_edit.config import load_config

class Process:
    def facts(self):
        variables = ("OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES")
        return {"nice": os.nice(0), **{name: os.environ.get(name) for name in variables}}

async def main():
    ray_cluster.connect(load_config(preset="tiny-rc-grpo"))
    executor = RayExecutor({"rollout": WorkerSpec(process="rollout", make=Process)})
    try:
        print(json.dumps(await executor.spawn("rollout", 0).call("facts")))
    finally:
        await executor.close()
        ray_cluster.disconnect()

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("environment", "policy", "nice"),
    [({}, "PASSIVE", 0), ({"OMP_WAIT_POLICY": "ACTIVE", "RAY_worker_niceness": "3"}, "ACTIVE", 3)],
    ids=["by default", "as the user set them"],
)
def test_workers_wait_without_spinning_and_at_normal_priority(
    environment: dict[str, str], policy: str, nice: int
) -> None:
    names = ("OMP_WAIT_POLICY", "RAY_worker_niceness")
    outside = {name: value for name, value in os.environ.items() if name not in names}
    ended = subprocess.run(
        [sys.executable, "-c", PROCESS],
        cwd=ROOT,
        env={**outside, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    facts = json.loads(ended.stdout.splitlines()[-1])
    assert facts == {
        "OMP_WAIT_POLICY": policy,
        "CUDA_VISIBLE_DEVICES": "",
        "nice": os.nice(0) + nice,
    }
