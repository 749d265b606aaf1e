"""``rl-edit`` in processes that fork from one which has imported everything: real processes with
real streams, signals and exit codes, in a second each.

At a given moment (a file is about to be opened for writing) something happens to such a process:
its disk fills up, becomes read-only, a signal comes, a newer attempt takes the directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When ``path`` is about to be opened for writing for the ``nth`` time, ``action`` happens.

    A newer attempt comes when the lease is about to be read: any two writes have such a moment
    between them.

    Attributes:
        path: end of the path, without the random part of a temporary name.
        action: "fill DIR", "read-only DIR", "signal NUMBER", "overtake RUN" or "raise"; several
            with ";" between them.
    """

    path: str
    action: str
    nth: int = 1


@dataclass(frozen=True, kw_only=True)
class Ended:
    code: int
    out: str
    err: str


class Forks:
    """The process that has imported everything."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )

    def close(self) -> None:
        self._socket.close()
        self.process.wait(60)

    def start(
        self,
        *arguments: object,
        streams: Sequence[int | None],
        moment: Moment | None = None,
        terminal: bool = False,
        ignored: Sequence[int] = (),
    ) -> int:
        """Starts ``rl-edit ARGUMENTS`` and returns its process id.

        Args:
            streams: descriptors for stdin, stdout and stderr; None is closed.
            terminal: make stdin the controlling terminal.
            ignored: signals that the process ignores from its start.
        """
        order = {
            "arguments": list(map(str, arguments)),
            "streams": [stream is not None for stream in streams],
            "moment": asdict(moment) if moment else None,
            "terminal": terminal,
            "ignored": list(ignored),
        }
        descriptors = [stream for stream in streams if stream is not None]
        socket.send_fds(self._socket, [json.dumps(order).encode()], descriptors)
        return int(self._socket.recv(1000))

    def wait(self, pid: int) -> int:
        """Returns the exit code of a process that was started, -N of one that signal N ended."""
        self._socket.send(json.dumps({"wait": pid}).encode())
        return int(self._socket.recv(1000))

    def run(self, *arguments: object, folder: Path, **more: Any) -> Ended:
        """Runs a command with its streams in files of ``folder``."""
        with (folder / "out").open("w+") as out, (folder / "err").open("w+") as err:
            with open(os.devnull) as nothing:
                streams = [nothing.fileno(), out.fileno(), err.fileno()]
                code = self.wait(self.start(*arguments, streams=streams, **more))
            out.seek(0)
            err.seek(0)
            return Ended(code=code, out=out.read(), err=err.read())


@contextlib.contextmanager
def small_disk(directory: Path, *, kilobytes: int = 4096) -> Iterator[Path]:
    """Mounts an empty disk of a few megabytes."""
    if os.geteuid() != 0:
        pytest.skip("mounting a disk needs root")
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(directory)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def fill(directory: Path) -> None:
    """Leaves not a byte on the disk of a directory."""
    with contextlib.suppress(OSError), (directory / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(b"\0" * 65536)


def until(condition: Any, *, seconds: float = 120) -> None:
    """Waits for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


# --- in the process that forks --------------------------------------------------------------------


def _happen(action: str) -> None:
    kind, _, target = action.partition(" ")
    if kind == "fill":
        fill(Path(target))
    elif kind == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", target], check=True)
    elif kind == "signal":
        os.kill(os.getpid(), int(target))
    elif kind == "overtake":
        from learner.controller.lease import Lease

        Lease.take(Path(target))
        for name in ("run.json", "config.yaml", "events.jsonl"):
            (Path(target) / name).write_text('{"of": "the newer attempt"}\n')
    else:
        raise KeyError("a fault of the program")


def _watch(moment: Moment) -> None:
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event != "open" or not isinstance(args[0], str | bytes | os.PathLike):
            return
        path, flags = os.fsdecode(args[0]), args[2]
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR))
        if moment.path not in path or writes == (moment.path == "/LEASE.json"):
            return
        seen += 1
        if seen == moment.nth:
            for action in moment.action.split(";"):
                _happen(action)

    sys.addaudithook(hook)


def _become(order: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    """Makes this process a command that was just started."""
    os.setsid()
    given = iter(descriptors)
    for number, there in enumerate(order["streams"]):
        if there:
            os.dup2(next(given), number)
        else:
            os.close(number)
    for descriptor in descriptors:
        os.close(descriptor)
    for name, number in (("stdout", 1), ("stderr", 2)):
        try:
            stream = open(number, "w", closefd=False)  # noqa: SIM115
            stream.reconfigure(line_buffering=stream.isatty() or number == 2)
            setattr(sys, name, stream)
        except OSError:
            setattr(sys, name, None)
    if order["terminal"]:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    # As in a shell: tests below nohup, or in the background, would hand on what they ignore.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    for number in order["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    sys.argv = ["rl-edit", *order["arguments"]]
    if order["moment"]:
        _watch(Moment(**order["moment"]))


def _serve(channel: socket.socket) -> bool:
    """Answers until the other side is gone (False), or this is a command to run (True)."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, 65536, 3)
        if not message:
            return False
        order = json.loads(message)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], 0)
            channel.send(str(os.waitstatus_to_exitcode(status)).encode())
            continue
        pid = os.fork()
        if pid == 0:
            channel.close()
            _become(order, descriptors)
            return True
        for descriptor in descriptors:
            os.close(descriptor)
        channel.send(str(pid).encode())


if __name__ == "__main__":
    import torch

    import actors.local_executor  # noqa: F401
    import learner.learner  # noqa: F401
    import rl_edit.cli.verbs
    import rl_edit.editors.tiny.architecture  # noqa: F401

    torch.set_num_threads(1)
    # diffusers imports its classes when they are asked for.
    from rl_edit.config import load_config
    from rl_edit.editors import inspect_editor

    inspect_editor(load_config(None, preset="tiny-rc-grpo").editor)
    if _serve(socket.socket(fileno=int(sys.argv[1]))):
        from rl_edit.cli import main

        main()
