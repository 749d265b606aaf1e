"""Faults on a real Ray cluster, in real processes: whatever dies, hangs or lies, the run ends with
the bytes of a run where nothing did.

Every crash point times every way to die is in ``benchmarks/golden.py``; here is one test for each
promise.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from actors.roles import Roles, worker_roles
from crashing import DeafRollout, Fault, Launched, crashing
from learner.controller import checkpoint
from learner.controller.lease import Lease
from learner.controller.loop import TrainingLoop
from learner.controller.run import Outcome
from learner.controller.run_log import Events
from learner.learner import Learner
from rl_edit.config import RunConfig, load_config
from rl_edit.errors import ClusterUnreachable, ResourcesInfeasible
from rl_edit.files import EVENTS
from runs import (
    SilentObserver,
    StopAfter,
    adapter_bytes,
    events_of,
    metrics_of,
    read_json,
    run_inline,
    run_of,
    small_config,
)

pytestmark = [
    pytest.mark.ray,
    pytest.mark.faults,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc"),
]

UPDATE = 1
"""The update with the fault: the last of two."""
SMALL = ("actors.runtime=ray", "train.updates=2", "editor.micro_batch=2", "rollout.chunk=2")
PRESET = (
    "train.groups_per_update=2",
    "rollout.group_size=4",
    "rollout.num_steps=3",
    "rollout.chunk=2",
    "editor.micro_batch=2",
    "algorithm.objective.inner.num_anchors=2",
    "data.num_train=16",
    "actors.num_rollout=1",
    "actors.num_learner=1",
    "actors.threads=1",
)
TOGETHER = ("actors.placement=colocated",)
"""One worker process instead of three, where it does not matter whose it is."""
HANGS_S = 20
"""Deadline of a call, where a worker hangs."""
CANARY = "canary5up3rs3cr3t"


def run_on_cluster(
    config: RunConfig,
    directory: Path,
    *,
    change: Callable[[Roles], Roles] = lambda roles: roles,
    observer: Any = None,
    resume: bool = False,
) -> Outcome:
    """As ``rl-edit train`` wires it, on the tests' cluster. ``change`` may give roles to other
    classes."""
    from ray import cloudpickle

    from actors import ray_cluster, ray_executor

    cloudpickle.register_pickle_by_value(
        sys.modules[Fault.__module__]
    )  # the actors cannot import from the tests
    run = run_of(config, directory)
    roles = change(worker_roles(config, run.dataset.fields, Learner))
    ray_cluster.connect(config)
    directory.mkdir(parents=True, exist_ok=True)
    executor, watcher = ray_executor.RayExecutor(roles), observer or SilentObserver()
    events = Events(directory / EVENTS)
    try:
        loop = TrainingLoop(
            run,
            executor,
            lease=Lease.take(directory),
            events=events,
            observer=watcher,
            stop=getattr(watcher, "stop", None),
        )
        return asyncio.run(loop.run(resume=resume))
    finally:
        asyncio.run(executor.close())


@pytest.fixture(scope="module")
def undisturbed(small_editor: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The adapter of the run in one process."""
    config = small_config(small_editor, *SMALL, "actors.runtime=inline")
    return adapter_bytes(run_inline(config, tmp_path_factory.mktemp("inline")))


@pytest.fixture
def fault(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Fault]:
    """The fault (point, kind) of a test's parameter; a process that it stopped is ended
    afterwards."""
    point, kind = request.param
    fault = Fault(point=point, kind=kind, update=UPDATE, marker=tmp_path / "struck")
    yield fault
    end_stopped(fault)


def end_stopped(fault: Fault) -> None:
    """Ends the process that a fault stopped."""
    if fault.kind == "SIGSTOP" and fault.marker.is_file():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(fault.marker.read_text()), signal.SIGKILL)


def updates_applied(directory: Path) -> list[int]:
    return [event["update"] for event in events_of(directory, "update_applied")]


@dataclass(frozen=True, kw_only=True)
class Struck:
    """A run in which workers failed, once each: its end, its directory, and the faults by point."""

    adapter: dict[str, bytes]
    directory: Path
    faults: dict[str, Fault]

    def lost(self, role: str) -> dict[str, Any]:
        """The one report about a lost actor of a role."""
        reports = events_of(self.directory, "actor_lost")
        (lost,) = [report for report in reports if report["role"] == role]
        return lost


def struck(kind: str, points: tuple[str, ...], editor: str, folder: Path, *more: str) -> Struck:
    """Two rollout actors, a reward actor and a learner, and a failure at each point."""
    faults = {
        point: Fault(point=point, kind=kind, update=UPDATE, marker=folder / point)
        for point in points
    }
    try:
        outcome = run_on_cluster(
            small_config(editor, *SMALL, "actors.num_rollout=2", *more),
            folder / "run",
            change=lambda roles: crashing(roles, *faults.values()),
        )
    finally:
        for fault in faults.values():
            end_stopped(fault)
    return Struck(adapter=adapter_bytes(outcome), directory=folder / "run", faults=faults)


@pytest.fixture(scope="module")
def killed(
    ray_cluster: None, small_editor: str, tmp_path_factory: pytest.TempPathFactory
) -> Struck:
    """A worker of every role is killed in the last update of one run."""
    points = ("rollout", "reward", "post-step")
    return struck("SIGKILL", points, small_editor, tmp_path_factory.mktemp("killed"))


@pytest.fixture(scope="module")
def hung(ray_cluster: None, small_editor: str, tmp_path_factory: pytest.TempPathFactory) -> Struck:
    """A rollout actor and the reward actor hang in the last update of one run."""
    folder, limit = tmp_path_factory.mktemp("hung"), f"actors.deadline_s={HANGS_S}"
    return struck("SIGSTOP", ("rollout", "reward"), small_editor, folder, limit)


def test_a_rollout_actor_killed_while_denoising_costs_its_chunk_and_no_other(
    killed: Struck, undisturbed: dict[str, bytes]
) -> None:
    assert killed.adapter == undisturbed
    lost, fault = killed.lost("rollout"), killed.faults["rollout"]
    begun = Counter(fault.rollouts.read_text().split())
    assert len(begun) == 2 * 2 * 2  # updates, groups, chunks
    assert {work_id for work_id, times in begun.items() if times > 1} == {
        lost["during"].removeprefix("rollout of ")
    }
    assert max(begun.values()) == 2


def test_one_of_two_rollout_actors_that_hangs_is_killed_at_its_deadline(
    hung: Struck, undisturbed: dict[str, bytes]
) -> None:
    assert hung.adapter == undisturbed
    lost = hung.lost("rollout")
    assert (
        lost["during"].startswith("rollout of ")
        and f"no answer within {HANGS_S} s, killed" in lost["reason"]
    )
    replaced = events_of(hung.directory, "actor_replaced")
    assert [event["role"] for event in replaced].count("rollout") == 1


@pytest.mark.parametrize("kind", ["killed", "hung"])
def test_a_lost_reward_actor_is_replaced_and_every_group_keeps_its_score(
    request: pytest.FixtureRequest, undisturbed: dict[str, bytes], kind: str
) -> None:
    run: Struck = request.getfixturevalue(kind)
    assert run.adapter == undisturbed
    lost = run.lost("reward")
    assert lost["during"].startswith("scoring of ")
    assert ("no answer within" in lost["reason"]) == (kind == "hung")
    assert [line["groups/used"] for line in metrics_of(run.directory)] == [2, 2]


def test_a_learner_killed_after_its_step_is_rebuilt_and_the_update_is_applied_once(
    killed: Struck, undisturbed: dict[str, bytes]
) -> None:
    assert killed.faults["post-step"].marker.is_file()
    assert killed.adapter == undisturbed
    (rebuilt,) = events_of(killed.directory, "learner_rebuilt")
    assert rebuilt["updates_done"] == UPDATE
    assert updates_applied(killed.directory) == [0, 1]


@pytest.mark.parametrize("fault", [("mid-accumulate", "SIGKILL")], indirect=True)
def test_a_learner_rank_killed_in_an_update_ends_all_ranks_and_the_replay_has_the_bytes_of_one_rank(
    ray_cluster: None,
    small_editor: str,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    fault: Fault,
) -> None:
    config = small_config(small_editor, *SMALL, "actors.num_learner=2", "actors.deadline_s=60")
    outcome = run_on_cluster(config, tmp_path / "run", change=lambda roles: crashing(roles, fault))
    assert fault.marker.is_file()
    assert adapter_bytes(outcome) == undisturbed
    assert [event["ranks"] for event in events_of(tmp_path / "run", "learner_rebuilt")] == [2]
    assert updates_applied(tmp_path / "run") == [0, 1]


@pytest.mark.slow
def test_an_actor_that_ignores_an_update_is_found_out_by_its_first_item(
    ray_cluster: None, small_editor: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    def with_a_deaf_one(roles: Roles) -> Roles:
        spec = roles["rollout"]
        return {
            **roles,
            "rollout": replace(
                spec, make=DeafRollout, arguments=(tmp_path / "struck", *spec.arguments)
            ),
        }

    outcome = run_on_cluster(
        small_config(small_editor, *SMALL), tmp_path / "run", change=with_a_deaf_one
    )
    assert adapter_bytes(outcome) == undisturbed
    (stale,) = events_of(tmp_path / "run", "result_stale")
    assert stale["update"] == 1 and stale["wanted"] != stale["loaded"]
    (lost,) = events_of(tmp_path / "run", "actor_lost")
    assert lost["reason"] == "a weight update did not reach it"


def test_two_colocated_processes_give_the_bytes_of_separate_ones(
    ray_cluster: None, small_editor: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    places = ("actors.placement=colocated", "actors.num_rollout=2", "actors.num_learner=2")
    assert (
        adapter_bytes(run_on_cluster(small_config(small_editor, *SMALL, *places), tmp_path))
        == undisturbed
    )


@pytest.mark.slow
def test_a_run_resumed_on_more_rollout_actors_and_learner_ranks_gives_the_same_bytes(
    ray_cluster: None, small_editor: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    stopped = run_on_cluster(small_config(small_editor, *SMALL), tmp_path, observer=StopAfter(1))
    assert stopped.updates_done == 1
    resumed = run_on_cluster(
        small_config(small_editor, *SMALL, "actors.num_rollout=2", "actors.num_learner=2"),
        tmp_path,
        resume=True,
    )
    assert adapter_bytes(resumed) == undisturbed
    assert updates_applied(tmp_path) == [0, 1]


def test_groups_that_do_not_fit_the_object_store_are_refused_with_the_arithmetic(
    ray_cluster: None, small_editor: str, tmp_path: Path
) -> None:
    config = small_config(
        small_editor,
        *SMALL,
        "train.groups_per_update=20000",
        "train.max_lag=1",
        "actors.preflight=true",
        *TOGETHER,
    )
    with pytest.raises(
        ResourcesInfeasible,
        match=r"20000 groups x 2 updates x \d+ MiB = \d+ MiB in flight exceed half of the "
        "object store",
    ):
        run_on_cluster(config, tmp_path)
    assert updates_applied(tmp_path) == []


def launched(
    directory: Path,
    *overrides: str,
    fault: Fault | None = None,
    resume: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Launched:
    """``rl-edit train --preset tiny-rc-grpo``, scaled down, on a cluster of its own."""
    more = ("--resume",) if resume else ()
    directory.parent.mkdir(parents=True, exist_ok=True)
    settings = ("train.checkpoint_every=2", *PRESET, *overrides)
    return Launched(
        "train",
        "--preset",
        "tiny-rc-grpo",
        "--run-dir",
        directory,
        *more,
        *settings,
        fault=fault,
        logs=directory.parent,
        environment=environment,
    )


def wait_for(run: Launched, condition: Callable[[], object]) -> None:
    """Returns when the condition holds; fails when the run ends before."""
    while not condition():
        assert run.process.poll() is None, run.err.read_text()[-2000:]
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("send", "code", "places"),
    [
        (lambda pid: os.kill(pid, signal.SIGTERM), 143, TOGETHER),
        (lambda pid: os.killpg(pid, signal.SIGINT), 130, ()),
        pytest.param(
            *(lambda pid: os.killpg(pid, signal.SIGQUIT), 131, TOGETHER), marks=pytest.mark.slow
        ),
    ],
    ids=["SIGTERM to the driver", "Ctrl-C, to its process group", "Ctrl-\\, likewise"],
)
def test_a_first_signal_commits_the_newest_update_and_leaves_no_process(
    tmp_path: Path, send: Callable[[int], None], code: int, places: tuple[str, ...]
) -> None:
    directory = tmp_path / "run"
    endless = ("train.updates=1000", "train.checkpoint_every=1000")
    with launched(directory, *endless, *places) as run:
        wait_for(run, lambda: len(updates_applied(directory)) >= 1)
        send(run.process.pid)
        ended = run.ended()
    assert ended.code == code
    assert ended.left == []
    (finished,) = events_of(directory, "finished")
    assert finished["status"] == "stopped"
    (step,) = (directory / "checkpoints").iterdir()
    assert (
        checkpoint.read(step).updates_done
        == finished["updates_done"]
        == len(updates_applied(directory))
    )
    assert f"--run-dir {directory} --resume" in " ".join(ended.out.split())


@pytest.mark.slow
def test_a_second_signal_ends_the_driver_at_once(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    hung = Fault(point="post-step", kind="SIGSTOP", update=0, marker=tmp_path / "struck")
    with launched(directory, "train.updates=2", "train.grace_s=3600", fault=hung) as run:
        wait_for(run, hung.marker.is_file)
        os.kill(run.process.pid, signal.SIGTERM)
        with contextlib.suppress(Exception):
            run.process.wait(3)
        assert run.process.poll() is None, "the update under way has its grace"
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.process.wait(300) == 143
    assert not (directory / "checkpoints").exists()


def test_a_killed_driver_leaves_no_process_and_its_run_continues_to_the_same_bytes(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "run"
    with launched(directory, "train.updates=6") as run:
        wait_for(run, lambda: len(updates_applied(directory)) >= 3)
        assert {"ray::rollout", "ray::learner"} <= {
            title.partition(".")[0] for title in run.living().values()
        }
        os.kill(run.process.pid, signal.SIGKILL)
        ended = run.ended()
    assert (ended.code, ended.left) == (-signal.SIGKILL, [])
    with launched(directory, "train.updates=6", *TOGETHER, resume=True) as run:
        ended = run.ended()
    assert (ended.code, ended.left) == (0, []), ended.err[-2000:]
    (resumed,) = events_of(directory, "resumed")
    assert 2 <= resumed["updates_done"] < 6
    assert updates_applied(directory) == [0, 1, 2, 3, 4, 5]
    config = load_config(
        preset="tiny-rc-grpo",
        overrides=[*PRESET, "train.updates=6", "actors.runtime=inline", "actors.preflight=false"],
    )
    golden = run_inline(config, tmp_path / "inline")
    assert golden.adapter is not None
    assert read_json(directory / "run.json")["adapter"] == str(golden.adapter.id)


def test_no_secret_of_the_environment_reaches_the_run_directory_the_output_or_rays_logs(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "run"
    transport = "{model: none, base_url: 'http://127.0.0.1:9/v1', api_key_env: JUDGE_KEY}"
    judge = f"{{kind: editscore, transport: {transport}, retries: 0}}"
    secrets = {name: f"{CANARY}-{name}" for name in ("HF_TOKEN", "WANDB_API_KEY", "JUDGE_KEY")}
    secrets["PIP_INDEX_URL"] = f"https://me:{CANARY}@packages.invalid/simple"
    # Ray's sockets live below its folder, and a socket's path has at most 107 characters.
    rays = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    try:
        with launched(
            directory,
            "train.updates=1",
            f"rewards.editscore={judge}",
            *TOGETHER,
            environment={**secrets, "RAY_TMPDIR": str(rays)},
        ) as run:
            ended = run.ended()
        assert ended.code == 3, ended.err[-2000:]
        assert "editscore" in ended.err
        files = [path for place in (directory, rays) for path in place.rglob("*") if path.is_file()]
        assert (
            any(path.name.startswith("worker-") for path in files)
            and (directory / "events.jsonl") in files
        )
        assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
        assert CANARY not in ended.out + ended.err
    finally:
        shutil.rmtree(rays, ignore_errors=True)


def test_a_password_in_the_address_of_a_dead_cluster_is_not_printed(
    monkeypatch: pytest.MonkeyPatch, small_editor: str
) -> None:
    from actors import ray_cluster

    for scheme in ("ray", "http"):
        monkeypatch.setenv("RAY_ADDRESS", f"{scheme}://me:{CANARY}@127.0.0.1:1")
        with pytest.raises(ClusterUnreachable) as error:
            ray_cluster.join_or_start(small_config(small_editor, "actors.runtime=ray"))
        assert "127.0.0.1:1" in str(error.value) and CANARY not in str(error.value)
