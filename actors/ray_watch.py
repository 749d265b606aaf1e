"""Watches the Ray processes that a run depends on, and ends those that a run started.

Without the raylet of its machine, or without the cluster's control service (GCS), Ray's C++ part
waits without an end, or ends this process without Python, so without a record of the run. This is
noticed before, within a second.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray

from actors.ray_processes import Reaper
from actors.ray_store import StoreRelay
from rl_edit.errors import ClusterLost

ANSWER_S = 3.0
"""Seconds in which a GCS elsewhere accepts a connection."""

GCS_GRACE_S = 30.0
"""Seconds that a GCS elsewhere may be away: it can be restarted with its state. Ray itself ends
the driver after 60, or after what this setting says."""

RAYS_OWN_GRACE = "RAY_gcs_rpc_server_reconnect_timeout_s"

LOST_SHUTDOWN_S, SHUTDOWN_S, EXIT_GRACE_S = 3.0, 30.0, 3.0
"""Seconds for Ray's shutdown of a cluster that is gone, of one that is there, and for its processes
to end by themselves after that."""


_watch: RayWatch | None = None
_reaper: Reaper | None = None
"""As Ray itself, these exist once in a process."""


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Makes a cluster that is started meanwhile end with this process, however this one ends."""
    global _reaper
    if _reaper is None:
        _reaper = Reaper()
    try:
        with _reaper.marking():
            yield
    except BaseException:
        _end_started(grace_s=0)
        raise


def begin() -> None:
    """Begins to watch the cluster that this process has joined or started."""
    global _watch
    node = ray._private.worker._global_node
    # A client (ray://) is connected to a server and has no node.
    if node is not None:
        _watch = RayWatch(node)


def problem() -> str:
    """Returns what of the cluster has ended; "" while it is there."""
    return _watch.problem() if _watch is not None else ""


def check() -> None:
    """Ends work that comes before anything could be saved.

    Raises:
        ClusterLost: Ray's raylet or GCS is gone.
    """
    if reason := problem():
        raise ClusterLost(reason)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Names the loss of the cluster as the cause of whatever failed by it.

    Raises:
        ClusterLost: something failed, and Ray's raylet or GCS is gone.
    """
    try:
        yield
    except Exception as error:
        if reason := problem():
            raise ClusterLost(f"{reason}. Nothing was trained yet: start again.") from error
        raise


def leave() -> None:
    """Leaves the cluster. One that this process started ends, with every process of it."""
    global _watch
    lost = bool(problem())
    if _watch is not None:
        _watch.close()
    if lost:
        # Ray's own shutdown asks the others first, and waits for answers that cannot come.
        _end_started(grace_s=0)
    if ray.is_initialized():
        # In a thread: Ray may wait without an end for what has ended meanwhile.
        thread = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
        thread.start()
        thread.join(LOST_SHUTDOWN_S if lost else SHUTDOWN_S)
        if thread.is_alive():
            # It would be called, and wait, once more when the interpreter ends.
            atexit.unregister(ray.shutdown)
    if _watch is not None:
        # After Ray's last words to the store.
        _watch.relay.close()
        _watch = None
    _end_started(grace_s=EXIT_GRACE_S)


def end_processes() -> None:
    """Ends every process that was started here, at once and without asking Ray."""
    if _watch is not None:
        _watch.relay.close()
    _end_started(grace_s=0)


def _end_started(*, grace_s: float) -> None:
    """Ends the processes of the cluster that this process started."""
    global _reaper
    reaper, _reaper = _reaper, None
    if reaper is not None:
        reaper.end(grace_s=grace_s)


def silence() -> None:
    """Keeps what Ray's processes publish off the terminal, unless ``--debug`` asks for it.

    A dump of a raylet's state, a line for every actor that was killed: all of it is in Ray's logs.
    """
    if os.environ.get("RL_EDIT_DEBUG", "0") in ("", "0"):
        # Of several calls that fail together the first is handled, and Ray would print the others:
        # a traceback for each, when a learner rank is lost.
        os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
        # These come although log_to_driver is False. Ray has no setting for them.
        ray._private.worker.print_to_stdstream = lambda *_, **__: None


def gcs_grace_s() -> float:
    """Returns the seconds that a GCS elsewhere may be away: half of Ray's own, at most 30."""
    text = os.environ.get(RAYS_OWN_GRACE, "")
    return min(float(text) / 2, GCS_GRACE_S) if text.isdigit() else GCS_GRACE_S


def _connected(path: str) -> socket.socket | None:
    """Connects to a raylet's socket; None where none listens."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        return None
    connection.setblocking(False)
    return connection


def _ending(code: int) -> str:
    """Says how a process ended, by the exit code of its handle."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    hint = ", as the system does when memory is short" if name == "SIGKILL" else ""
    return f"by {name}{hint}"


class RayWatch:
    """Looks after the raylet of this machine and the GCS of its cluster, from a thread.

    Attributes:
        logs: Ray's log directory on this machine.
        relay: what stands between this process and the object store.
    """

    def __init__(self, node: Any) -> None:
        self.logs: str = node.get_logs_dir_path()
        self._node = node
        # One that this process started is looked at as a child.
        started = "raylet" in node.all_processes
        self._raylet = None if started else _connected(node.raylet_socket_name)
        self.relay = StoreRelay(node.plasma_store_socket_name)
        self._gcs: str = node.gcs_address
        self._problem = ""
        # The end of a run and its last resort ask from two threads.
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._watch_gcs, name="ray-watch", daemon=True).start()

    def problem(self) -> str:
        """Returns what has ended and where its reason is; "" while the cluster is there."""
        with self._lock:
            if not self._problem and not self._ended.is_set():
                self._problem = (
                    self._started_ended() or self._raylet_ended() or self.relay.problem()
                )
            return self._problem

    def close(self) -> None:
        """Stops watching."""
        with self._lock:
            self._ended.set()
        if self._raylet is not None:
            self._raylet.close()

    def _started_ended(self) -> str:
        """Looks at the processes that this process started."""
        for kind, words in (("raylet", "raylet"), ("gcs_server", "control service (GCS)")):
            for info in self._node.all_processes.get(kind, ()):
                code = info.process.poll()
                if code is not None:
                    return (
                        f"Ray's {words} ended ({_ending(code)}): see {self.logs}/{kind}.out and "
                        f"{kind}.err"
                    )
        return ""

    def _raylet_ended(self) -> str:
        """Looks at a connection to the raylet, which closes when that ends."""
        if self._raylet is None:
            return ""
        try:
            if self._raylet.recv(1, socket.MSG_PEEK):
                return ""
        except BlockingIOError:
            return ""
        except OSError:
            pass  # reset: it has ended too
        # A raylet may close a connection that it does not know; one that has ended takes no other.
        self._raylet.close()
        self._raylet = _connected(self._node.raylet_socket_name)
        if self._raylet is not None:
            return ""
        return f"Ray's raylet of this machine ended: see {self.logs}/raylet.out and raylet.err"

    def _watch_gcs(self) -> None:
        """Connects to the GCS of a cluster elsewhere, again and again."""
        if "gcs_server" in self._node.all_processes:
            return
        answered = time.monotonic()
        host, _, port = self._gcs.rpartition(":")
        while not self._ended.wait(ANSWER_S):
            with contextlib.suppress(OSError):
                socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
                answered = time.monotonic()
            if (silent_s := time.monotonic() - answered) >= gcs_grace_s():
                self._problem = self._problem or (
                    f"Ray's control service (GCS) at {self._gcs} has not answered for "
                    f"{silent_s:.0f} s: see gcs_server.out and gcs_server.err in Ray's logs on the "
                    "head node"
                )
                return
