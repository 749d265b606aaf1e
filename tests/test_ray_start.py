"""Ray starts in whatever environment there is, or one line says what is missing."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.exceptions import RayActorError

from actors import ray_access, ray_start
from actors.ray_executor import RayExecutor, _of_actor
from actors.roles import WorkerSpec, make_workers
from rl_edit.errors import (
    ClusterUnreachable,
    InputError,
    ResourcesInfeasible,
    WorkerOutOfMemory,
)
from rl_edit.method.update import TrainingFailed

ROOT = Path(__file__).parent.parent
LONG = "x" * 120
MESSAGE = "a reason of many words " * 12 + "with its end"


class Refuses:
    """A role whose constructor raises what its argument names."""

    def __init__(self, kind: str) -> None:
        raise {"input": InputError, "key": KeyError, "memory": MemoryError}[kind](MESSAGE)

    def ready(self) -> None:
        """Never called."""


def spec(kind: str) -> dict[str, WorkerSpec]:
    return {"rollout": WorkerSpec(process="rollout", make=Refuses, arguments=(kind,))}


@pytest.mark.parametrize(
    ("kind", "raised"),
    [("input", InputError), ("key", TrainingFailed), ("memory", WorkerOutOfMemory)],
)
def test_a_constructor_that_raises_is_named_with_its_full_reason(
    kind: str, raised: type[Exception]
) -> None:
    with pytest.raises(raised) as refused:
        make_workers(spec(kind))
    assert type(refused.value) is raised and "with its end" in str(refused.value)
    if kind == "key":
        assert str(refused.value).startswith("the rollout could not be made: KeyError: ")
        assert "test_ray_start.py:" in str(refused.value)


def test_a_long_temporary_directory_is_replaced_by_a_short_one_of_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / LONG))
    folder, why = ray_start._temporary_folder()
    assert len(folder) <= ray_start.ROOM and "characters long" in why
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    os.rmdir(folder)
    assert not (tmp_path / LONG).exists()


def test_a_short_temporary_directory_stays() -> None:
    assert ray_start._problem("/tmp") == ""


def test_a_directory_that_cannot_be_written_to_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in ray_start._problem("/proc/rl-edit")


def test_without_a_home_the_token_lies_in_a_file_of_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that what is set ends with the test
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    notes: list[str] = []
    ray_access._keep_token(str(tmp_path), note=notes.append)
    path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(path.read_text()) >= 32
    assert path.read_text() not in notes[0] and str(path) in notes[0]


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (ValueError("object store size (9 GB) exceeds /dev/shm size"), 4, "--shm-size"),
        (OSError(errno.ENOSPC, "No space left on device"), 4, "RAY_TMPDIR"),
        (OSError(errno.EMFILE, "Too many open files"), 4, "ulimit -n"),
        (OSError(errno.EADDRINUSE, "Address already in use"), 5, "has a port"),
        (RuntimeError("Timed out waiting for file gcs_server_port"), 5, "ulimit|session_"),
    ],
)
def test_an_error_of_rays_start_has_a_cause_and_a_remedy(
    error: Exception, raised: int, words: str
) -> None:
    kind = {4: ResourcesInfeasible, 5: ClusterUnreachable}[raised]
    with pytest.raises(kind, match=words):
        raise ray_start._translated(error, "/tmp")


def test_the_death_of_an_actor_is_reported_without_rays_list_of_causes() -> None:
    detail = "Worker exit detail: Worker unexpectedly exits with code 2. End of file."
    died = RayActorError(
        error_msg="The actor died.\n\tclass_name: rollout\nThe actor is dead. "
        f"{detail} Some common causes include: (1) the process was killed"
    )
    assert str(_of_actor(died)) == (
        "RayActorError: Worker unexpectedly exits with code 2. End of file."
    )


@pytest.mark.ray
@pytest.mark.parametrize(("kind", "raised"), [("input", InputError), ("key", TrainingFailed)])
def test_on_ray_the_reason_of_a_constructor_arrives_whole(
    ray_cluster: None, kind: str, raised: type[Exception]
) -> None:
    import asyncio

    from ray import cloudpickle

    # A worker process does not find this module.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])

    async def call() -> None:
        executor = RayExecutor(spec(kind))
        try:
            await executor.spawn("rollout", 0).call("ready")
        finally:
            await executor.close()

    with pytest.raises(raised, match="with its end"):
        asyncio.run(call())


START = """
import os, sys
from actors import ray_cluster
from learner.controller.stop import Signals, Stop
from rl_edit.config import load_config
from rl_edit.errors import Interrupted
with Signals(Stop()) as signals:
    print("starting", flush=True)
    try:
        ray_cluster.connect(load_config(preset="tiny-rc-grpo"))
        signals.check()
        import ray
        print("nodes", len(ray.nodes()))
    except Interrupted as stopped:
        sys.exit(stopped.exit_code)
    finally:
        ray_cluster.disconnect()
"""


def start(**environment: str) -> subprocess.Popen[str]:
    names = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "TMPDIR")
    outside = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.Popen(
        [sys.executable, "-c", START],
        cwd=ROOT,
        env={**outside, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.ray
def test_ray_starts_with_a_long_temporary_directory_and_without_a_home(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    process = start(TMPDIR=str(tmp_path / LONG), HOME=str(tmp_path / "file"))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-4000:]
    _, first, second, nodes = out.splitlines()
    assert "characters long" in first and "home directory" in second and nodes == "nodes 1"


@pytest.mark.ray
def test_a_signal_while_ray_starts_ends_with_its_exit_code_and_no_traceback() -> None:
    process = start()
    assert process.stdout is not None and process.stdout.readline() == "starting\n"
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 143, err[-4000:]
    assert "Traceback" not in err and "never retrieved" not in err


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="needs root and unshare, to make a network namespace",
)
def test_a_machine_without_loopback_is_refused_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rl_edit", "train", "--preset", "tiny-rc-grpo"]
    done = subprocess.run(
        ["unshare", "--net", *command, "actors.runtime=ray", "--run-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 5, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("rl-edit: this machine cannot reach itself at 127.0.0.1 (")
    assert "ip link set lo up" in line
