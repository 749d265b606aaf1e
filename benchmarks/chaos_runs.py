"""One attempt of a small real run, as a process: how it is started, watched, and examined.

Faults are in ``chaos_faults.py``, the drills in ``chaos.py``. Nothing here imports the project:
what is under test runs as ``rl-edit train``, and its files are read as any reader would.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

UPDATES = 6

SMALLEST = f"""\
name: chaos
editor: {{resolution: 32, max_text_tokens: 16, micro_batch: 4, device: cpu}}
lora: {{rank: 4, alpha: 8}}
data: {{num_train: 8, num_heldout: 4}}
algorithm:
  name: rc-grpo
  initial_noise: {{inside: 0.7, outside: 0.05}}
  credit: {{normalise: group}}
  objective: {{num_anchors: 2, num_steps: 1}}
rollout: {{group_size: 4, num_steps: 3}}
rewards: {{preservation: {{kind: preservation, weight: 1.0}}}}
train:
  updates: {UPDATES}
  groups_per_update: 2
  learning_rate: 5.0e-3
  ratio_tolerance: 0.0
  checkpoint_every: 1
  allow_unrewarded_edit: true
actors: {{runtime: inline, num_rollout: 1, threads: 1, backoff_s: 0, preflight: false}}
evaluation: {{num_tasks: 3, examples: 1, num_steps: 2}}
"""
"""RC-GRPO on the built-in editor at its smallest: an update takes a third of a second."""

TAG = "RL_EDIT_TEST_RUN"
"""Environment variable that every process of an attempt inherits, whichever process adopts it."""

APPLIED, TRACES = "update_applied", "rl-edit-traceback*"
"""An event, and the files that hold a traceback."""

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray's own agents of a node, which look for their parent now and then."""

LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
"""Loopback addresses as ``/proc/net/tcp`` and ``tcp6`` write them."""

LISTENING = "0A"
LONGEST_S = 300.0
"""Seconds after which an attempt hangs."""
GONE_S, AGENTS_GONE_S = 40.0, 120.0
"""Seconds that processes may outlive the driver, and Ray's agents after a killed one."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What an attempt is started with.

    Attributes:
        output: of stdout and stderr, where each goes: file, pipe (its reader goes when a fault
            says so), full (``/dev/full``) or closed.
        missing: environment variables that it does not have.
        program: the command, where it is not ``python -m rl_edit train``.
    """

    settings: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    output: tuple[str, str] = ("file", "file")
    cwd: Path | None = None
    program: tuple[str, ...] = ()


class Attempt:
    """``rl-edit train`` on a run directory, and every process that it starts."""

    def __init__(
        self, folder: Path, run: Path, launch: Launch, *, name: str, short: Path, resume: bool
    ) -> None:
        self.run, self.name, self.tag, self.resume = run, name, uuid.uuid4().hex, resume
        self.files = (folder / f"{name}.out", folder / f"{name}.err")
        self.launch, self.ports = launch, set[str]()
        self.readers: list[int] = []
        self.unsafe, self.applied = set[str](), set[int]()
        self._known: dict[tuple[str, str], bool] = {}
        self.traces = {*run.glob(TRACES), *short.glob(TRACES)}
        config = folder / "run.yaml"
        config.write_text(SMALLEST)
        words = list(launch.program) or [sys.executable, "-m", "rl_edit", "train"]
        if launch.cwd is not None:
            words = [str(Path(sys.executable).parent / "rl-edit"), "train"]
        words += [str(config), "--run-dir", str(run), *(["--resume"] if resume else [])]
        self.command = [*words, *launch.settings]
        streams = [
            self._stream(where, path) for where, path in zip(launch.output, self.files, strict=True)
        ]
        # Times of events are rounded to hundredths: one from just before may lie after this moment.
        self.began, self.halted = time.time() + 0.01, 0.0
        try:
            self.process = subprocess.Popen(
                self.command,
                cwd=launch.cwd or folder,
                env=environment(launch, short, self.tag),
                stdin=subprocess.DEVNULL,
                stdout=streams[0],
                stderr=streams[1],
                start_new_session=True,
                preexec_fn=self._as_from_a_shell,
            )
        finally:
            for number in streams:
                os.close(number)

    def _as_from_a_shell(self) -> None:
        # In the background of a script, or below nohup, signals are ignored: children inherit it.
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        for number, where in enumerate(self.launch.output, 1):
            if where == "closed":
                os.close(number)

    def _stream(self, where: str, path: Path) -> int:
        path.touch()
        if where == "pipe":
            reader, writer = os.pipe()
            os.set_inheritable(writer, True)
            self.readers.append(reader)
            return writer
        return os.open("/dev/full" if where == "full" else path, os.O_WRONLY | os.O_APPEND)

    def hang_up(self) -> None:
        """Closes the reading ends of its output."""
        while self.readers:
            os.close(self.readers.pop())

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def processes(self) -> dict[int, str]:
        """Command lines of the attempt's processes that are not zombies, the driver's included."""
        living = {}
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    words = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
                    if words[0] != "Z" and self._is_ours(entry.name, words[19]):
                        line = Path(entry.path, "cmdline").read_bytes()
                        living[int(entry.name)] = line.decode().replace("\0", " ").strip()
        return living

    def _is_ours(self, pid: str, began: str) -> bool:
        # A process is asked once, but while it has not called exec yet it shows its parent's tag.
        key = (pid, began)
        if not self._known.get(key):
            expected = f"{TAG}={self.tag}".encode()
            content = Path("/proc", pid, "environ").read_bytes()
            self._known[key] = expected in content.split(b"\0")
        return self._known[key]

    def find(self, *beginnings: str) -> list[int]:
        """Processes whose command line contains one of these texts, oldest first."""
        return sorted(
            pid
            for pid, line in self.processes().items()
            if any(text in line for text in beginnings)
        )

    def wait_for(self, condition: Callable[[], Any], poll_s: float = 0.01) -> Any:
        """Waits while the attempt lives; returns what the condition did, or None at its end."""
        deadline = time.monotonic() + LONGEST_S
        while time.monotonic() < deadline:
            if result := condition():
                return result
            if not self.alive:
                return None
            time.sleep(poll_s)
        return None

    def wait_updates(self, number: int) -> bool:
        """Waits until this attempt has applied so many updates; with 0, until it begins."""

        def there() -> bool:
            events = self.events()
            if number == 0:
                return any(line["event"] in ("started", "resumed") for line in events)
            # Remembered, because a fault may remove the file.
            self.applied |= {line["update"] for line in events if line["event"] == APPLIED}
            return bool(self.applied) and max(self.applied) - min(self.applied) + 1 >= number

        return bool(self.wait_for(there)) and self.alive

    def events(self) -> list[dict[str, Any]]:
        """What this attempt, and one that runs beside it, wrote to ``events.jsonl``."""
        return [
            line for line in event_lines(self.run / "events.jsonl") if line["time"] > self.began
        ]

    def look_at_sockets(self) -> None:
        """Notes every listening socket, and each that other machines could reach."""
        sockets = listening()
        for pid, title in self.processes().items():
            with contextlib.suppress(OSError):
                for entry in os.scandir(f"/proc/{pid}/fd"):
                    with contextlib.suppress(OSError):
                        inode = os.readlink(entry.path).removeprefix("socket:[").rstrip("]")
                        if inode in sockets:
                            self.ports.add(inode)
                            if sockets[inode][0] not in LOOPBACK:
                                port = sockets[inode][1]
                                self.unsafe.add(f"{title[:60]} listens on every address: {port}")

    def listening_ports(self, *beginnings: str) -> list[int]:
        """Ports on which processes with these titles listen."""
        sockets, ports = listening(), set[int]()
        for pid in self.find(*beginnings):
            with contextlib.suppress(OSError):
                for entry in os.scandir(f"/proc/{pid}/fd"):
                    with contextlib.suppress(OSError):
                        inode = os.readlink(entry.path).removeprefix("socket:[").rstrip("]")
                        if inode in sockets:
                            ports.add(int(sockets[inode][1], 16))
        return sorted(ports)

    def signal(self, number: int) -> bool:
        """Sends the driver a signal; False when it is gone."""
        with contextlib.suppress(ProcessLookupError):
            if self.alive:
                self.process.send_signal(number)
                return True
        return False

    def halt(self) -> None:
        """Stops the driver, and returns when none of its threads writes any more."""
        self.signal(signal.SIGSTOP)
        self.wait_for(self._stands_still, poll_s=0.001)
        self.halted = time.time()

    def _stands_still(self) -> bool:
        states = {
            path.read_text().rpartition(")")[2].split()[0]
            for path in Path(f"/proc/{self.process.pid}/task").glob("*/stat")
        }
        return states <= {"T", "Z"}

    def end(self) -> int | None:
        """Waits for the driver's end; None when it hangs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(LONGEST_S)
        return None

    def remaining(self, wait_s: float) -> list[str]:
        """Command lines of processes that outlive the driver by more than ``wait_s``."""
        deadline = time.monotonic() + wait_s
        while (left := self._without_agents()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def _without_agents(self) -> list[str]:
        return sorted(line for line in self.processes().values() if line not in AGENTS)

    def still_listening(self, wait_s: float = 10) -> set[str]:
        """Sockets of the attempt that listen although none of its processes is left."""
        deadline = time.monotonic() + wait_s
        # Threads of a process that is ending keep its sockets for a moment.
        while (still := self.ports & listening().keys()) and not self.processes():
            if time.monotonic() > deadline:
                return still
            time.sleep(0.2)
        return set()

    def destroy(self) -> None:
        """Kills what is left."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        self.hang_up()


def environment(launch: Launch, short: Path, tag: str) -> dict[str, str]:
    """The environment of an attempt: its own home and temporary directory, and the tag."""
    dropped = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    # Ray's workers rename themselves, by default over the environment that they show.
    given = {
        "SPT_NOENV": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(ROOT),
        "HOME": str(short / "home"),
        "TMPDIR": str(short),
        "RAY_TMPDIR": str(short),
        **launch.environment,
        TAG: tag,
    }
    return {
        name: value for name, value in {**inherited, **given}.items() if name not in launch.missing
    }


def listening() -> dict[str, tuple[str, str]]:
    """Address and port of every listening TCP socket, by inode."""
    sockets = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == LISTENING:
                    address, _, port = words[1].partition(":")
                    sockets[words[9]] = (address, port)
    return sockets


def event_lines(path: Path) -> list[dict[str, Any]]:
    """Every line that is an event."""
    records = []
    with contextlib.suppress(OSError):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and "event" in record:
                    records.append(record)
    return records


def contents(directory: Path) -> dict[str, str]:
    """Hash and time of every file below a directory, by name."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        + f" {path.stat().st_mtime_ns}"
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def adapter_of(run: Path) -> str:
    """The hash of a run's final adapter; "" without one."""
    files = sorted((run / "adapter").glob("*.safetensors"))
    return hashlib.sha256(files[0].read_bytes()).hexdigest() if files else ""


def status_of(run: Path) -> str:
    """What ``run.json`` says of the run; "none" without a readable one."""
    with contextlib.suppress(OSError, ValueError):
        return str(json.loads((run / "run.json").read_text()).get("status"))
    return "none"
