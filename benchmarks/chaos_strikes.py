"""What is done to a run: processes killed or stopped, disks filled, files damaged, ports disturbed.

Every function takes a scene and returns False when there was nothing left to hit.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from chaos_runs import Attempt


@dataclass(kw_only=True)
class Scene:
    """What a fault may touch.

    Attributes:
        draw: the fault's own random numbers.
        short: a directory with a short name, for sockets and homes.
        problems: what the fault itself saw go wrong.
        undo: what to do when the attempt has ended.
    """

    folder: Path
    run: Path
    short: Path
    draw: random.Random
    attempt: Attempt
    problems: list[str]
    undo: list[Callable[[], object]] = field(default_factory=list)


def kill_at_work(scene: Scene, *, call: str, number: int = signal.SIGKILL) -> bool:
    """Signals a worker in the middle of a call; with several, one of them by chance."""
    attempt, role = scene.attempt, call.partition(".")[0]
    while attempt.alive:
        pids = attempt.find(f"ray::{role}")
        scene.draw.shuffle(pids)
        # A call takes a tenth of a second, and to look at every process takes as long.
        until = time.monotonic() + 1
        while time.monotonic() < until:
            for pid in pids:
                if title_of(pid) == f"ray::{call}":
                    return sent(pid, number)
            time.sleep(0.002)
    return False


def title_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().strip(b"\0 ").decode()
    return ""


def kill_processes(scene: Scene, *titles: str) -> bool:
    """Kills every process with one of these titles."""
    hit = [sent(pid, signal.SIGKILL) for pid in scene.attempt.find(*titles)]
    return any(hit)


def sent(pid: int, number: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def paused(scene: Scene, *, titles: tuple[str, ...], seconds: float) -> bool:
    """Stops processes (the driver, without titles) and lets them go on."""
    pids = scene.attempt.find(*titles) if titles else [scene.attempt.process.pid]
    hit = scene.attempt.alive and any([sent(pid, signal.SIGSTOP) for pid in pids])
    time.sleep(seconds)
    for pid in pids:
        sent(pid, signal.SIGCONT)
    return hit


def signals(scene: Scene, *numbers: int) -> bool:
    """Sends the driver signals, one after another."""
    hit = scene.attempt.signal(numbers[0])
    for number in numbers[1:]:
        time.sleep(0.05)
        scene.attempt.signal(number)
    return hit


def interrupt_group(scene: Scene) -> bool:
    """Sends SIGINT to the process group, as Ctrl-C does."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(scene.attempt.process.pid, signal.SIGINT)
        return True
    return False


def fill(scene: Scene) -> Path:
    """Takes all that is left of the run directory's file system."""
    filler = scene.run.parent / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * size)
    return filler


def full_for_a_while(scene: Scene) -> bool:
    """Fills the disk until the run has shown its next update."""
    shown, size = scene.attempt.files[0], scene.attempt.files[0].stat().st_size
    alive, filler = scene.attempt.alive, fill(scene)
    scene.attempt.wait_for(lambda: b"update " in shown.read_bytes()[size:])
    filler.unlink()
    return alive


def full(scene: Scene) -> bool:
    """Fills the disk; it is freed once the attempt has ended."""
    alive, filler = scene.attempt.alive, fill(scene)
    scene.undo.append(partial(filler.unlink, missing_ok=True))
    return alive


def read_only(scene: Scene) -> bool:
    """Makes the disk read-only; it is writable again once the attempt has ended."""
    place = scene.run.parent
    scene.undo.append(partial(remount, place, "rw"))
    while scene.attempt.alive:
        # A file that is open for writing keeps the file system as it is.
        if remount(place, "ro"):
            return scene.attempt.alive
        time.sleep(0.002)
    return False


def remount(place: Path, how: str) -> bool:
    command = ["mount", "-o", f"remount,{how}", str(place)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def hang_up(scene: Scene) -> bool:
    scene.attempt.hang_up()
    return scene.attempt.alive


def removed(scene: Scene, *, name: str) -> bool:
    """Removes a file of the run directory under the run."""
    alive = scene.attempt.alive
    with contextlib.suppress(FileNotFoundError):
        (scene.run / name).unlink()
        return alive
    return False


def babble(scene: Scene) -> bool:
    """Sends random bytes and half a request to every port of the run, as a scanner does."""
    ports = scene.attempt.listening_ports("")
    for port in ports:
        for message in (scene.draw.randbytes(4096), b"GET / HTTP/1.1\r\n", b""):
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", port), 1) as it,
            ):
                it.sendall(message)
    return bool(ports) and scene.attempt.alive


STRANGER = """
import os, ray
ray.init(address="127.0.0.1:%d", logging_level="CRITICAL", log_to_driver=False)
print("INSIDE", ray.get(ray.remote(num_cpus=0)(lambda: sorted(os.environ)).remote(), timeout=20))
"""


def stranger(scene: Scene) -> bool:
    """Tries to join the run's cluster with Ray's own client and without the token."""
    ports = scene.attempt.listening_ports("gcs_server")
    home = scene.short / "stranger"
    home.mkdir(exist_ok=True)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    mode = scene.draw.choice(("disabled", "token"))
    credentials = {"RAY_AUTH_TOKEN": "0" * 64} if mode == "token" else {}
    around = {**kept, **credentials, "HOME": str(home), "RAY_AUTH_MODE": mode}
    for port in ports[:1]:
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                [sys.executable, "-c", STRANGER % port],
                env={**around, "RAY_TMPDIR": str(scene.short)},
                capture_output=True,
                text=True,
                timeout=45,
                check=False,
            )
            if "INSIDE" in done.stdout:
                scene.problems.append(f"a stranger's client (RAY_AUTH_MODE={mode}) ran a task")
    return bool(ports)


def newest_checkpoint(run: Path) -> list[Path]:
    """Files of the newest checkpoint; none where it is the only one."""
    steps = sorted((run / "checkpoints").glob("step_*"))
    return sorted(path for path in steps[-1].iterdir()) if len(steps) > 1 else []


def damaged(scene: Scene, *, how: str) -> bool:
    """Flips a bit of, cuts, or removes a file of the newest checkpoint."""
    files = newest_checkpoint(scene.run)
    if not files:
        return False
    path = scene.draw.choice(files)
    content = bytearray(path.read_bytes())
    place = scene.draw.randrange(len(content))
    if how == "flip":
        content[place] ^= 1 << scene.draw.randrange(8)
        path.write_bytes(content)
    elif how == "cut":
        path.write_bytes(content[:place])
    else:
        path.unlink()
    return True


def without_checkpoints(scene: Scene) -> bool:
    """Removes every checkpoint."""
    steps = list((scene.run / "checkpoints").glob("step_*"))
    for step in steps:
        for path in step.iterdir():
            path.unlink()
        step.rmdir()
    return bool(steps)


def bad_line(scene: Scene, *, name: str) -> bool:
    """Puts a line that is not UTF-8 somewhere into a file of lines."""
    path = scene.run / name
    if not path.is_file():
        return False
    lines = path.read_bytes().splitlines(keepends=True)
    lines.insert(scene.draw.randrange(len(lines) + 1), b'{"event": "\xff\xfe"}\n')
    path.write_bytes(b"".join(lines))
    return True


def torn_line(scene: Scene, *, name: str) -> bool:
    """Cuts a file of lines in the middle of its last one."""
    path = scene.run / name
    if not path.is_file() or not path.stat().st_size:
        return False
    content = path.read_bytes()
    begin = content.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(content[: begin + scene.draw.randrange(1, max(2, len(content) - begin - 1))])
    return True


def garbage(scene: Scene, *, name: str) -> bool:
    """Replaces a file by random bytes."""
    path = scene.run / name
    if path.is_file():
        path.write_bytes(scene.draw.randbytes(64))
    return path.is_file()


def shadowed(scene: Scene) -> Mapping[str, object]:
    """A current directory with folders named like our packages."""
    place = scene.folder / "shadows"
    for name in ("learner", "actors"):
        (place / name).mkdir(parents=True, exist_ok=True)
        (place / name / "notes.txt").write_text("a folder of the user\n")
    return {"cwd": place}


def surrounded(scene: Scene, **more: str) -> Mapping[str, object]:
    return {"environment": more}


def long_folder(scene: Scene) -> Mapping[str, object]:
    place = scene.folder / ("long" * 20)
    place.mkdir(exist_ok=True)
    return {"environment": {"TMPDIR": str(place)}, "missing": ("RAY_TMPDIR",)}


def root_and_mounts() -> str:
    """Why file systems cannot be mounted here; "" where they can."""
    if os.geteuid() != 0:
        return "only root mounts file systems"
    try:
        os.stat("/proc/self/mounts")
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""
