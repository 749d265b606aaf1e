"""Two Ray nodes on one machine, each in a network namespace, with a cable between them.

The first node is the head, where the driver runs; the second is a worker node. The cable can be
cut, slowed and healed, and the worker node killed and started again, while a run goes on::

    with TwoNodes() as nodes:
        run = nodes.train("--preset", "tiny-rc-grpo", "--run-dir", "run", log=Path("run.log"))
        nodes.cut()                       # black hole: nothing arrives, nothing is refused
        nodes.heal()
        nodes.slow(delay_s=0.2, loss=0.02)
        nodes.kill_worker()               # kill -9 of every process of the node
        nodes.start_worker(gpus=2)
        run.wait()

``reason()`` says why a machine cannot do this, for a test to be skipped. Everything ends with the
``with`` block: processes, namespaces and folders, also when the caller itself is killed (then the
folder below /tmp stays). Several may run side by side; they share no port and no file.

Clusters are started with token authentication. Health checks of Ray are short here: a lost node is
known after about ten seconds (``HEALTH``), by default after about a minute; pass ``health={}`` for
the defaults.

Where actors without a GPU are placed is Ray's choice, at random. To have some on the worker node,
set ``RL_EDIT_TEST_PLACES=rollout-0,learner-1`` in the driver's environment and start it through
``python benchmarks/two_nodes.py train ...`` (``train`` below does so): the first process of each
named slot starts there, its replacement wherever Ray likes. Actors with ``actors.*_gpus`` go where
``gpus`` are claimed; nothing needs them to exist while ``editor.device`` is cpu.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from cable import ADDRESSES, kill_all, processes_in  # noqa: E402 - found by the path above

PORT = 6379
PLACES = "RL_EDIT_TEST_PLACES"
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}
"""A node that does not answer is dead after 3 x (1 + 3) s."""
START_S = 120
STORE_BYTES = 128 * 1024 * 1024


def reason() -> str:
    """Says why two nodes cannot be made here, or ""."""
    if not sys.platform.startswith("linux"):
        return "needs network namespaces of Linux"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if missing := [name for name in ("ip", "nsenter") if shutil.which(name) is None]:
        return f"needs the command {missing[0]}"
    if not os.path.exists("/dev/net/tun"):
        return "needs /dev/net/tun"
    try:
        with contextlib.closing(_Cable()):
            return ""
    except (OSError, RuntimeError) as error:
        return f"network namespaces cannot be made here ({error})"


class _Cable:
    """The process of ``cable.py``."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "benchmarks" / "cable.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.namespaces = self.process.stdout.readline().split()
        if len(self.namespaces) != 2:
            self.close()
            raise RuntimeError("the cable did not start")
        self.names = [os.readlink(path) for path in self.namespaces]

    def set(self, delay_s: float, loss: float) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"cable {delay_s} {loss}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


class TwoNodes:
    """A cluster of a head and a worker node.

    Args:
        gpus: GPUs that the worker node claims to have.
        health: environment of Ray's processes that decides when a node counts as lost.
    """

    def __init__(self, *, gpus: float = 0, health: Mapping[str, str] = HEALTH) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="two-", dir="/tmp"))
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            **health,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            # Both nodes have this machine's name, and gloo would go to its loopback address.
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
        }
        self._gpus, self._workers = gpus, 0
        self._cable = _Cable()

    def __enter__(self) -> TwoNodes:
        try:
            self._ray_start(0, "--head", f"--port={PORT}", "--include-dashboard=false")
            self.start_worker(gpus=self._gpus)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._cable.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def command(self, node: int, *words: object) -> list[str]:
        """Returns a command line that runs in the namespace of a node (0 is the head)."""
        return ["nsenter", f"--net={self._cable.namespaces[node]}", "--", *map(str, words)]

    def start_worker(self, *, gpus: float = 0) -> None:
        """Starts the worker node, also again after it was killed or cut off."""
        self._workers += 1
        self._ray_start(1, f"--address={ADDRESSES[0]}:{PORT}", f"--num-gpus={gpus:g}")

    def _ray_start(self, node: int, *words: str) -> None:
        # Unix sockets are files: nodes in one folder would reach each other past the cable.
        folder = self.folder / f"n{node}{self._workers}"
        ray = Path(sys.executable).parent / "ray"
        subprocess.run(
            self.command(
                node,
                ray,
                "start",
                *words,
                f"--node-ip-address={ADDRESSES[node]}",
                f"--temp-dir={folder}",
                "--num-cpus=2",
                f"--object-store-memory={STORE_BYTES}",
                "--disable-usage-stats",
            ),
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            timeout=START_S,
            check=True,
        )

    def cut(self) -> None:
        """Lets every packet vanish, in both directions."""
        self._cable.set(0, 1)

    def slow(self, *, delay_s: float, loss: float = 0.0) -> None:
        """Delays every packet by so much each way, and loses this share of them."""
        self._cable.set(delay_s, loss)

    def heal(self) -> None:
        """Ends what ``cut`` and ``slow`` began."""
        self._cable.set(0, 0)

    def kill_worker(self) -> None:
        """Kills every process of the worker node at once."""
        kill_all(self._cable.names[1])

    def stop_in(self, node: int, title: str, limit_s: float) -> int:
        """Stops (SIGSTOP) a process of a node in the middle of what its title says; its id."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            pids, until = self.processes(node), time.monotonic() + 1
            # To look for processes takes longer than a call does.
            while time.monotonic() < until:
                for pid in pids:
                    if _title(pid) == title:
                        os.kill(pid, signal.SIGSTOP)
                        if _stands(pid) and _title(pid) == title:
                            return pid
                        os.kill(pid, signal.SIGCONT)
                time.sleep(0.002)
        raise TimeoutError(f"no process was {title} within {limit_s:g} s")

    def processes(self, node: int) -> list[int]:
        """Returns the ids of a node's processes; a driver belongs to the head (0)."""
        return processes_in(self._cable.names[node])

    def train(
        self,
        *arguments: object,
        log: Path,
        places: str = "",
        environment: Mapping[str, str] | None = None,
        errors: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Starts ``rl-edit train ARGUMENTS`` in the head's namespace; output goes to ``log``.

        Args:
            places: slots whose first process starts on the worker node ("rollout-0,learner-1").
            errors: where stderr goes, if not to ``log``.
        """
        with log.open("ab") as out, (errors or log).open("ab") as err:
            return subprocess.Popen(
                self.command(0, sys.executable, __file__, "train", *arguments),
                cwd=ROOT,
                env={
                    **self.environment,
                    "RAY_ADDRESS": f"{ADDRESSES[0]}:{PORT}",
                    PLACES: places,
                    **(environment or {}),
                },
                stdout=out,
                stderr=err,
                start_new_session=True,
            )


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().strip(b"\0 ").decode(errors="replace")
    except OSError:
        return ""


def _stands(pid: int) -> bool:
    """Waits until a process that was stopped stands still."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return True
        time.sleep(0.001)
    return False


def place_first_on_worker(slots: set[str]) -> None:
    """Lets the first process of some worker slots start on the worker node, if it is there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from actors import ray_executor

    waiting, spawn, options = (
        set(slots),
        ray_executor.RayExecutor.spawn,
        ray.actor.ActorClass.options,
    )
    wanted: list[str] = []

    def spawned(self: Any, role: str, worker_slot: int) -> Any:
        wanted[:] = [f"{role}-{worker_slot}"]
        return spawn(self, role, worker_slot)

    def placed(self: Any, **given: Any) -> Any:
        if wanted and wanted[0] in waiting:
            waiting.discard(wanted[0])
            for node in ray.nodes():
                if node["Alive"] and node["NodeManagerAddress"] == ADDRESSES[1]:
                    # Ray heeds a soft wish of no actor that reserves no CPU.
                    given["scheduling_strategy"] = NodeAffinitySchedulingStrategy(
                        node["NodeID"], soft=False
                    )
        return options(self, **given)

    ray_executor.RayExecutor.spawn = spawned  # type: ignore[method-assign]
    ray.actor.ActorClass.options = placed


def main() -> None:
    """``rl-edit`` with some processes on the worker node."""
    if slots := set(filter(None, os.environ.get(PLACES, "").split(","))):
        place_first_on_worker(slots)
    from rl_edit.cli import main as rl_edit

    sys.argv[0] = "rl-edit"
    rl_edit()


if __name__ == "__main__":
    main()
