"""Starts the Ray cluster of one machine, wherever the user's environment leaves room for it.

Ray needs a short temporary directory, a home directory to write a token to, and memory for its
object store. What is missing is replaced or named in one line.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.job_config import JobConfig

from actors import ray_access, ray_watch
from rl_edit.errors import ClusterUnreachable, ResourcesInfeasible, brief

SOCKET_LENGTH = 103 if sys.platform == "darwin" else 107
"""Bytes that the name of a Unix socket may have."""

SESSION_LENGTH = len(
    f"/ray-{os.getuid()}/r/session_2026-11-28_12-20-53_123456_4194304/sockets/plasma_store.9"
)
"""Bytes that follow the temporary directory in the name of Ray's longest socket."""

ROOM = SOCKET_LENGTH - SESSION_LENGTH
"""Bytes left for the temporary directory itself."""

ENOUGH_FILES = 1024
"""Open files that Ray's own processes get by with."""

LOOPBACK_S = 5.0

SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")

Note = Callable[[str], None]


def start(*, note: Note, **settings: Any) -> None:
    """Starts a cluster of this machine and connects to it.

    Args:
        note: takes a line about what was replaced.
        settings: arguments of ``ray.init``.

    Raises:
        ResourcesInfeasible: no room for sockets, or no memory for the object store.
        ClusterUnreachable: Ray did not come up, with its reason; or there is no loopback.
    """
    _require_loopback()
    folder, why = _temporary_folder()
    if why:
        note(f"{why}; Ray's session and logs are in {folder}")
    _keep_docstrings(note=note)
    # Ray opens its own directory to everyone, so it lies in one that is closed.
    settings["_temp_dir"] = session = f"{ray_access.close_to_others(folder, note=note)}/r"
    _say_slow_store(settings.get("object_store_memory"), folder, note=note)
    with quiet(), own_signals(), this_environment(note=note), ray_watch.starting():
        try:
            ray.init(job_config=Job(), _node_ip_address="127.0.0.1", **settings)
            ray_access.require_closed()
        except Exception as error:
            # Half a cluster would keep its processes, and the next try would join it.
            with contextlib.suppress(Exception):
                ray.shutdown()
            if isinstance(error, ClusterUnreachable):
                raise
            raise _translated(error, session) from error


class Job(JobConfig):
    """Lets the workers find modules where this process finds them.

    Ray puts the current directory first for the workers alone. A folder there called ``rl_edit`` or
    ``torch`` would then be imported by them, while the installed command does not search it.
    """

    def _serialize(self) -> Any:
        searched = {os.path.realpath(entry) for entry in sys.path}
        self._py_driver_sys_path = [
            entry for entry in self._py_driver_sys_path if os.path.realpath(entry) in searched
        ]
        self._cached_pb = None
        return super()._serialize()


@contextlib.contextmanager
def this_environment(*, note: Note) -> Iterator[None]:
    """Lets the workers use the environment of this process below ``uv run`` too.

    Ray would copy the working directory, whatever it holds, and start every worker by another ``uv
    run`` in the copy, where the project may not be.
    """
    if os.environ.get("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0").lower() in ("1", "true"):
        note(
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV is not followed: below uv run the workers use the "
            f"environment of this command, {sys.prefix}"
        )
    # Not by the variable: a program may have imported Ray before, which reads it once.
    constants = ray._private.ray_constants
    before, constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV, False
    try:
        yield
    finally:
        constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = before


def _require_loopback() -> None:
    """Connects to this machine by 127.0.0.1, without which Ray waits for minutes.

    Raises:
        ClusterUnreachable: a container or namespace whose loopback interface is down.
    """
    try:
        # Listening succeeds also where the interface is down. A connection shows it.
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=LOOPBACK_S).close()
    except OSError as error:
        raise ClusterUnreachable(
            f"this machine cannot reach itself at 127.0.0.1 ({error.strerror or error}), where "
            "Ray's processes talk to each other: bring its loopback interface up (ip link set lo "
            "up), or train in one process with actors.runtime=thread."
        ) from error


def _temporary_folder() -> tuple[str, str]:
    """Chooses the directory of Ray's session.

    Returns:
        the directory, and why it is not the user's; "" where it is.
    """
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "")
    # On macOS Ray reads RAY_TMPDIR only.
    if not name or (name == "TMPDIR" and sys.platform == "darwin"):
        name, folder = "the temporary directory", "/tmp"
    else:
        folder = os.environ[name]
    problem = _problem(folder)
    if not problem:
        return folder, ""
    for other in SHORT_FOLDERS:
        if not _problem(other):
            # A new one for every run and for its owner only: a name that others can foresee in a
            # directory that everyone writes to could be theirs.
            return tempfile.mkdtemp(prefix="rl-edit-", dir=other), f"{name} {problem}"
    raise ResourcesInfeasible(
        f"Ray has no place for its files: {name} {problem}, and none of "
        f"{', '.join(SHORT_FOLDERS)} can be written to. Set RAY_TMPDIR to a directory that you may "
        f"write to, with at most {ROOM} characters."
    )


def _problem(folder: str) -> str:
    """Returns why Ray cannot keep its session in a directory; "" when it can."""
    try:
        os.path.abspath(folder).encode()
    except UnicodeEncodeError:  # Ray writes the name as UTF-8
        return "has letters that this locale cannot read (set LC_ALL=C.UTF-8)"
    length = len(os.fsencode(os.path.abspath(folder)))
    if length > ROOM:
        return f"is {length} characters long and Ray's sockets leave room for {ROOM}"
    try:
        os.makedirs(folder, exist_ok=True)
        # Asks the file system: permissions do not show one that is full or read-only.
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        return f"({folder}) cannot be written to ({error.strerror})"
    return ""


def _keep_docstrings(*, note: Note) -> None:
    """Lets Ray's processes read their docstrings; its dashboard fails without."""
    if (level := os.environ.get("PYTHONOPTIMIZE", "")).isdecimal() and int(level) > 1:
        os.environ["PYTHONOPTIMIZE"] = "1"
        note(f"PYTHONOPTIMIZE={level} strips texts that Ray reads: its processes start with 1")


def _say_slow_store(size: int | None, folder: str, *, note: Note) -> None:
    """Says that arrays between processes go through files, where shared memory is too small."""
    if size is None or not os.path.isdir("/dev/shm"):
        return  # Ray chooses the size by what there is, or has no such directory to choose
    free = shutil.disk_usage("/dev/shm").free
    if free < size:
        note(
            f"/dev/shm has {free / 2**20:.0f} MiB free and the object store wants "
            f"{size / 2**20:.0f}: it is in {folder}, which is slower. Free /dev/shm, or start the "
            "container with docker run --shm-size=8g"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Ray's advice about its own future off the terminal."""
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore", FutureWarning)
        logging.getLogger("ray").setLevel(logging.ERROR)
        ray_watch.silence()
        yield


@contextlib.contextmanager
def own_signals() -> Iterator[None]:
    """Keeps the process's answer to SIGTERM, which ``ray.init`` would replace.

    Ray's own exits in the middle of the start, and the half of a cluster then aborts.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    theirs = ray._private.utils.set_sigterm_handler
    ray._private.utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = theirs
        # Ray's C++ part has put its own before ours. None is one that Python did not install.
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _translated(error: Exception, folder: str) -> Exception:
    """Names cause and remedy of an error of Ray's start."""
    text = brief(error)
    number = error.errno if isinstance(error, OSError) else None
    if "/dev/shm" in text or "object store memory" in text:
        return ResourcesInfeasible(
            f"Ray's object store does not fit: {text} Free /dev/shm, or start the container with "
            "a larger one (docker run --shm-size=8g)."
        )
    if number == errno.ENOSPC:
        return ResourcesInfeasible(
            f"no space is left in {folder}, where Ray keeps its session: free some, or set "
            "RAY_TMPDIR to another directory."
        )
    if number in (errno.EMFILE, errno.ENFILE, errno.EAGAIN):
        return ResourcesInfeasible(
            f"this user may not open more files or processes ({text}): raise ulimit -n and "
            "ulimit -u, or end other programs."
        )
    if number == errno.EADDRINUSE or "ddress already in use" in text:
        remedy = "Another program has a port that a RAY_*_PORT gives to Ray: unset it."
    elif "RAY_RUNTIME_ENV_HOOK" in os.environ:
        remedy = "RAY_RUNTIME_ENV_HOOK is set and runs at Ray's start: unset it to try without."
    elif (limit := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < ENOUGH_FILES:
        remedy = f"A process may open {limit} files and Ray needs more: ulimit -n 65536."
    else:
        remedy = (
            f"See the newest session_*/logs in {folder}; end what other runs left (ray stop), "
            "or train in one process with actors.runtime=thread."
        )
    return ClusterUnreachable(f"Ray could not start on this machine ({text}). {remedy}")
