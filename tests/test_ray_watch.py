"""A cluster that is gone ends its run in one line, and no process of a run outlives it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import actors.local_executor
from actors import ray_processes, ray_watch
from actors.ray_store import StoreRelay
from learner.controller.cluster_loss import unless_lost
from rl_edit.errors import ClusterLost, Fenced, InputError
from rl_edit.training import train
from runs import adapter_bytes, events_of, read_json, run_inline, small_config

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")
ROOT = Path(__file__).parent.parent
SLEEP = (sys.executable, "-c", "import time; time.sleep(600)")


def until(condition: Callable[[], object], limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


@contextlib.contextmanager
def sleeping(mark: str | None, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, **({ray_processes.MARK: mark} if mark else {})}
    process = subprocess.Popen(SLEEP, env=environment, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@linux
def test_processes_with_the_mark_end_and_no_others() -> None:
    with (
        sleeping("ours") as ours,
        sleeping("ours", start_new_session=True) as elsewhere,
        sleeping("oursalso") as similar,
        sleeping(None) as unmarked,
    ):
        until(lambda: len(list(ray_processes.marked("ours"))) == 2)
        assert ray_processes.end("ours") == 2
        assert ours.wait(5) == elsewhere.wait(5) == -signal.SIGKILL
        assert similar.poll() is None and unmarked.poll() is None


STARTER = """
import os, subprocess, sys, time
from actors.ray_processes import Reaper
reaper = Reaper()
with reaper.marking():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                             start_new_session=True)
print(reaper.mark, reaper._process.pid, child.pid, flush=True)
print("left", sorted(name for name in os.environ if name in ("RL_EDIT_CLUSTER", "SPT_NOENV")),
      flush=True)
sys.stdin.readline()
reaper.end(grace_s=0)
"""


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "by itself"])
@linux
def test_what_a_process_started_ends_with_it_however_it_ends(killed: bool) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert starter.stdin is not None and starter.stdout is not None
    mark, *pids = starter.stdout.readline().split()
    assert starter.stdout.readline() == "left []\n"
    until(lambda: list(ray_processes.marked(mark)) == [int(pids[1])])
    if killed:
        # The reaper is in no group that a terminal or a shell signals.
        assert os.getpgid(int(pids[0])) != os.getpgid(starter.pid)
        starter.kill()
    else:
        starter.communicate("\n", timeout=60)
    starter.wait(60)
    until(lambda: not any(_alive(int(pid)) for pid in pids), 10)


def _alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX"
    return False


class Cluster:
    """An executor's view of a cluster that may be gone."""

    def __init__(self, reason: str = "") -> None:
        self.reason = reason

    def problem(self) -> str:
        return self.reason


def test_work_without_an_end_ends_when_the_cluster_is_gone() -> None:
    cluster = Cluster()

    async def deaf() -> None:
        cluster.reason = "the raylet ended"
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()  # as a commit that waits for a lost blob

    began = time.monotonic()
    with pytest.raises(ClusterLost, match=r"the raylet ended\. .*--resume from update 7"):
        asyncio.run(unless_lost(deaf(), cluster, lambda: 7))  # type: ignore[arg-type]
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("reason", "error", "raised"),
    [
        ("the raylet ended", InputError("wrong"), ClusterLost),
        ("the raylet ended", Fenced("a newer attempt"), Fenced),
        ("", InputError("wrong"), InputError),
    ],
)
def test_a_failure_that_the_loss_caused_is_reported_as_the_loss_and_others_as_they_are(
    reason: str, error: Exception, raised: type[Exception]
) -> None:
    async def fails() -> None:
        raise error

    with pytest.raises(raised):
        asyncio.run(unless_lost(fails(), Cluster(reason), lambda: 0))  # type: ignore[arg-type]


class Losing:
    """Loses the cluster of an executor once so many updates are done."""

    def __init__(self, inside: Any, directory: Path, updates: int) -> None:
        self._inside, self._directory, self._updates = inside, directory, updates

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inside, name)

    async def fetch(self, ref: Any) -> Any:
        if self.problem():
            await asyncio.Event().wait()  # as an array of an object store that is gone
        return await self._inside.fetch(ref)

    def problem(self) -> str:
        if not (self._directory / "events.jsonl").is_file():
            return ""
        done = len(events_of(self._directory, "update_applied"))
        return "the raylet ended" if done >= self._updates else ""


def test_a_run_that_lost_its_cluster_continues_to_the_same_bytes(
    tmp_path: Path, small_editor: str
) -> None:
    config = small_config(small_editor, "actors.runtime=thread")
    with pytest.raises(ClusterLost, match=r"--resume from update [012]\."):
        run_inline(
            config, tmp_path / "run", executor=lambda inside: Losing(inside, tmp_path / "run", 2)
        )
    resumed = run_inline(config, tmp_path / "run", resume=True)
    assert adapter_bytes(resumed) == adapter_bytes(run_inline(config, tmp_path / "whole"))


def test_the_end_of_a_run_without_its_cluster_is_recorded_at_once_and_fetches_nothing(
    tmp_path: Path, small_editor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(small_editor, "actors.runtime=thread", "train.checkpoint_every=3")
    directory = tmp_path / "run"
    whole = actors.local_executor.LocalExecutor
    monkeypatch.setattr(
        actors.local_executor,
        "LocalExecutor",
        lambda *given, **more: Losing(whole(*given, **more), directory, 2),
    )
    with pytest.raises(ClusterLost, match=r"--resume from update 0\."):
        train(config, directory)
    record = read_json(directory / "run.json")
    assert record["status"] == "failed" and "the raylet ended" in record["reason"]
    assert record["seconds"] < 60


LISTENER = """
import socket, sys, time
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1])
listening.listen()
print("ready", flush=True)
held = [listening.accept() for _ in range(9)]
"""


def node(**more: Any) -> SimpleNamespace:
    here = {"get_logs_dir_path": lambda: "/tmp/ray/logs", "all_processes": {}, "gcs_address": ":0"}
    nowhere = {"raylet_socket_name": "/nowhere", "plasma_store_socket_name": "/nowhere"}
    return SimpleNamespace(**{**here, **nowhere, **more})


@contextlib.contextmanager
def listening_at(path: str, program: str = LISTENER) -> Iterator[subprocess.Popen[str]]:
    listener = subprocess.Popen(
        [sys.executable, "-c", program, path], stdout=subprocess.PIPE, text=True
    )
    assert listener.stdout is not None and listener.stdout.readline() == "ready\n"
    try:
        yield listener
    finally:
        listener.kill()
        listener.wait()


STORE = """
import os, socket, sys
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1])
listening.listen()
print("ready", flush=True)
connection = listening.accept()[0]
while word := connection.recv(1 << 20):
    memory = os.memfd_create("piece")
    os.write(memory, word)
    # As the object store: a reply, and then one byte with a descriptor.
    connection.sendall(b"r" * 100)
    socket.send_fds(connection, [b"d"], [memory])
    os.close(memory)
"""


def descriptors_from(store: socket.socket) -> int:
    """Reads a reply without asking for descriptors, and then the byte that carries one."""
    reply = b""
    while len(reply) < 100:
        reply += store.recv(100 - len(reply))
    assert reply == b"r" * 100
    byte, (number,), *_ = socket.recv_fds(store, 1, 4)
    assert byte == b"d"
    return number


@linux
def test_messages_and_descriptors_pass_and_a_store_that_ended_is_silent(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    kept, far = socket.socketpair()
    with (
        listening_at(path, STORE) as listener,
        socket.socket(socket.AF_UNIX) as store,
        kept,
        far,
    ):
        store.connect(path)
        # As in a driver with many open files: a number that select() does not take.
        number = fcntl.fcntl(store.fileno(), fcntl.F_DUPFD, 2000)
        os.close(store.detach())
        store = socket.socket(fileno=number)
        with contextlib.ExitStack() as many:
            for _ in range(1100):
                many.enter_context(open(os.devnull))
            relay = StoreRelay(path)
        assert relay.connections == 1
        for order in (b"one", b"two" * 3000):
            store.sendall(order)
            number = descriptors_from(store)
            assert os.pread(number, 1 << 20, 0) == order
            os.close(number)
        listener.kill()
        listener.wait()
        # Neither the end of a connection nor a broken pipe, then and after the relay.
        for _ in range(3):
            store.sendall(b"given back")
            time.sleep(0.05)
        store.settimeout(0.2)
        with pytest.raises(TimeoutError):
            store.recv(1)
        assert relay.problem() == ""
        process = relay._process
        assert process is not None
        process.kill()
        until(relay.problem, 10)
        store.sendall(b"given back later")
        with pytest.raises(TimeoutError):
            store.recv(1)
        # Other connections stay as they are.
        far.sendall(b"as before")
        assert kept.recv(9) == b"as before"
        relay.close()
        store.close()


@linux
def test_the_relay_ends_with_the_process_that_it_serves(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    program = (
        "import os, socket, sys, time\n"
        "from actors.ray_store import StoreRelay\n"
        "store = socket.socket(socket.AF_UNIX); store.connect(sys.argv[1])\n"
        "relay = StoreRelay(sys.argv[1]); print(relay._process.pid, flush=True); time.sleep(600)"
    )
    with listening_at(path, STORE):
        served = subprocess.Popen(
            [sys.executable, "-c", program, path], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert served.stdout is not None
        pid = int(served.stdout.readline())
        assert _alive(pid)
        served.kill()
        served.wait()
        until(lambda: not _alive(pid), 10)


STUCK = """
import os, signal, sys, threading
from pathlib import Path
import actors.local_executor
from rl_edit import last_resort, training
from rl_edit.last_resort import LastResort
from rl_edit.run_end import Attempt
from runs import small_config
last_resort.LIMIT_S = 1.0
directory, editor, kind = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
lost = threading.Event()

class Holding(actors.local_executor.LocalExecutor):
    def problem(self):
        applied = directory / "events.jsonl"
        text = applied.read_text() if applied.is_file() else ""
        if kind == "after a signal" and "update_applied" in text:
            os.kill(os.getpid(), signal.SIGTERM)
        if kind == "in the run" and "update_applied" in text:
            lost.set()
            threading.Lock().acquire() and threading.Event().wait()  # no signal, no exception
        return ""
    async def close(self):
        if kind in ("after it", "after a signal"):
            lost.set()
            threading.Event().wait()
        await super().close()

made = training._executor
def executor(attempt, **more):
    attempt.last_resort = LastResort(
        attempt, problem=lambda: "Ray's raylet ended" if lost.is_set() else "",
        end_processes=lambda: print("ended the processes", flush=True),
    )
    return made(attempt, **more)
training._executor = executor
actors.local_executor.LocalExecutor = Holding
training.train(small_config(editor, "actors.runtime=thread"), directory)
"""


@pytest.mark.parametrize(
    ("kind", "code", "status", "said"),
    [
        ("in the run", 3, "failed", r"rl-edit: Ray's raylet ended, .*1 s.*--resume from update"),
        (
            "after it",
            0,
            "done",
            r"rl-edit: could not leave Ray \(Ray's raylet ended\); the run is done",
        ),
        (
            "after a signal",
            143,
            "stopped",
            r"rl-edit: could not leave Ray \(Ray's raylet ended\); stopped after .*--resume$",
        ),
    ],
)
def test_a_run_whose_main_thread_waits_for_ever_is_recorded_and_ends(
    tmp_path: Path, small_editor: str, kind: str, code: int, status: str, said: str
) -> None:
    directory = tmp_path / "run"
    ended = subprocess.run(
        [sys.executable, "-c", STUCK, directory, small_editor, kind],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("rl-edit:")]
    assert re.match(said, line), ended.stderr
    assert ended.returncode == code and "Traceback" not in ended.stderr
    assert "ended the processes" in ended.stdout
    record = read_json(directory / "run.json")
    assert record["status"] == status
    if status == "failed":
        assert "Ray's raylet ended" in record["reason"]


def test_the_raylet_of_a_joined_cluster_is_missed_at_once_and_its_log_is_named(
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "raylet")
    with listening_at(path) as listener:
        watch = ray_watch.RayWatch(node(raylet_socket_name=path))
        assert watch.problem() == ""
        listener.kill()
        listener.wait()
        assert "raylet of this machine ended: see /tmp/ray/logs/raylet.out" in watch.problem()
        watch.close()


def test_a_gcs_elsewhere_may_come_back_within_its_grace_and_is_missed_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_watch, "ANSWER_S", 0.1)
    monkeypatch.setenv(ray_watch.RAYS_OWN_GRACE, "4")  # half of it is ours

    def listening(port: int) -> socket.socket:
        return socket.create_server(("127.0.0.1", port), reuse_port=True)

    server = listening(0)
    port = server.getsockname()[1]
    watch = ray_watch.RayWatch(node(gcs_address=f"127.0.0.1:{port}"))
    server.close()
    time.sleep(0.5)
    server = listening(port)
    time.sleep(2)
    assert watch.problem() == ""
    server.close()
    until(watch.problem, 10)
    assert f"127.0.0.1:{port} has not answered for 2 s" in watch.problem()
    watch.close()


@pytest.mark.parametrize(("debug", "printed"), [("", False), ("1", True)])
def test_failures_of_calls_that_failed_together_are_printed_for_debugging_only(
    debug: str, printed: bool
) -> None:
    program = (
        "from ray._private import worker\n"
        "from actors import ray_watch\n"
        "ray_watch.silence()\n"
        "class Lost:\n"
        "    def deserialize_objects(self, objects, refs): return [OSError('a rank is gone')]\n"
        "worker.Worker.raise_errors(Lost(), [], [])\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "RL_EDIT_DEBUG": debug},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("Unhandled error" in ended.stderr) is printed, ended.stderr
