"""Nobody else reaches the cluster of a run: its sockets, its token, its session, its processes."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from actors import ray_access
from rl_edit.errors import InputError
from runs import small_config

ROOT = Path(__file__).parent.parent
PATIENCE_S = 240.0
NOBODY = 65534

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="becoming another user needs root")


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the token of a new user belongs."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that what the test sets ends with it
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".ray" / "auth_token"


@pytest.fixture
def keep(tmp_path: Path, token: Path) -> Callable[[], list[str]]:
    def kept() -> list[str]:
        notes: list[str] = []
        os.environ["RAY_AUTH_TOKEN_PATH"] = ""
        ray_access._keep_token(str(tmp_path), note=notes.append)
        return notes

    return kept


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_token_is_its_owners_from_the_first_instant_and_stays(
    token: Path, keep: Callable[[], list[str]]
) -> None:
    before = os.umask(0)
    try:
        assert keep() == []
    finally:
        os.umask(before)
    written = token.read_text()
    assert mode(token) == 0o600 and mode(token.parent) == 0o700 and len(written) == 64
    assert keep() == [] and token.read_text() == written
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]


def test_a_token_that_others_could_read_or_replace_is_closed_with_a_note(
    token: Path, keep: Callable[[], list[str]]
) -> None:
    token.parent.mkdir()
    token.parent.chmod(0o777)
    token.write_text("secret")
    token.chmod(0o644)
    directory, file = keep()
    assert "other users could write to" in directory
    assert "mode 644" in file and "secret" not in file
    assert mode(token) == 0o600 and mode(token.parent) == 0o700 and token.read_text() == "secret"


def test_an_empty_token_is_replaced(token: Path, keep: Callable[[], list[str]]) -> None:
    token.parent.mkdir(mode=0o700)
    token.touch(mode=0o600)
    assert keep() == [] and len(token.read_text()) == 64 and mode(token) == 0o600


def test_a_token_that_is_a_link_is_refused_and_nothing_is_written_through_it(
    tmp_path: Path, token: Path, keep: Callable[[], list[str]]
) -> None:
    token.parent.mkdir(mode=0o700)
    token.symlink_to(tmp_path / "theirs")
    with pytest.raises(InputError, match="is a link"):
        keep()
    assert not (tmp_path / "theirs").exists()


@needs_root
def test_a_token_of_another_user_is_refused(token: Path, keep: Callable[[], list[str]]) -> None:
    token.parent.mkdir(mode=0o700)
    token.write_text("theirs")
    os.chown(token, NOBODY, NOBODY)
    with pytest.raises(InputError, match="belongs to user 65534"):
        keep()


def test_a_token_path_that_names_no_token_is_refused(
    tmp_path: Path, token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    with pytest.raises(InputError, match="holds no token"):
        ray_access._keep_token(str(tmp_path), note=print)


@needs_root
def test_a_session_directory_that_somebody_else_has_is_not_used(tmp_path: Path) -> None:
    own = Path(ray_access._private_directory(str(tmp_path)))
    assert mode(own) == 0o700 and ray_access._private_directory(str(tmp_path)) == str(own)
    os.chown(own, NOBODY, NOBODY)
    other = Path(ray_access._private_directory(str(tmp_path)))
    assert other != own and mode(other) == 0o700


# --- a real run ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Running:
    """A run with two learner ranks and a dashboard, while it trains."""

    process: subprocess.Popen[str]
    home: Path
    processes: list[psutil.Process]

    @property
    def token(self) -> str:
        return (self.home / ".ray" / "auth_token").read_text()

    def sockets(self) -> list[tuple[str, int, str]]:
        """Address, port and process of everything that others could send to."""
        found = []
        for process in self.processes:
            try:
                name = " ".join(process.cmdline())[:120]
                for each in process.net_connections(kind="inet"):
                    if each.status in (psutil.CONN_LISTEN, psutil.CONN_NONE) and each.laddr:
                        found.append((each.laddr.ip, each.laddr.port, name))
            except psutil.NoSuchProcess:
                continue
        return found


@pytest.fixture(scope="module")
def running(small_editor: str) -> Iterator[Running]:
    # Unix sockets allow about 100 characters, so this cannot lie below pytest's directory.
    home = Path(tempfile.mkdtemp(prefix="rs-", dir="/tmp"))
    settings = ("actors.num_learner=2", "actors.dashboard=true", "train.updates=500")
    small_config(small_editor, directory=home)
    inherited = {name: value for name, value in os.environ.items() if "RAY_AUTH" not in name}
    with (home / "output").open("w") as output:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "rl_edit",
                "train",
                home / "run.yaml",
                "--run-dir",
                home / "run",
                "actors.runtime=ray",
                *settings,
            ],
            cwd=ROOT,
            env={
                **inherited,
                "HOME": str(home),
                "RAY_TMPDIR": str(home),
                "RAY_AUTH_MODE": "disabled",
            },
            stdout=output,
            stderr=output,
            text=True,
        )
    try:
        metrics, deadline = home / "run" / "metrics.jsonl", time.monotonic() + PATIENCE_S
        while not (metrics.exists() and metrics.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, (
                home / "output"
            ).read_text()[-4000:]
            time.sleep(0.5)
        me = psutil.Process(process.pid)
        yield Running(process=process, home=home, processes=[me, *me.children(recursive=True)])
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.ray
def test_every_socket_of_a_run_is_on_loopback(running: Running) -> None:
    sockets = running.sockets()
    names = " ".join(name for *_, name in sockets)
    for part in ("gcs_server", "raylet", "dashboard", "Agent", "ray::learner"):
        assert part in names, names
    assert [
        each for each in sockets if each[0] not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
    ] == []


@pytest.mark.ray
def test_a_users_wish_for_no_token_is_overruled_with_a_note(running: Running) -> None:
    assert "RAY_AUTH_MODE=disabled does not hold" in (running.home / "output").read_text()


CLIENT = """
import sys
import ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
ray.get(ray.remote(num_cpus=0)(lambda path=sys.argv[2]: open(path, "w").close()).remote())
"""


def client_runs(running: Running, home: Path, *, token: str, timeout_s: float) -> bool:
    """Joins the run's cluster from another home and runs a task that leaves a file."""
    (port,) = {port for _, port, name in running.sockets() if "gcs_server" in name}
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, f"127.0.0.1:{port}", home / "ran"],
        env={
            **outside,
            **auth,
            "HOME": str(home),
            "RAY_TMPDIR": str(running.home),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        client.wait(timeout_s)  # without a token Ray's client tries on for minutes
    except subprocess.TimeoutExpired:
        client.kill()
    client.wait()
    return (home / "ran").exists()


@pytest.mark.ray
def test_a_foreign_client_runs_nothing_and_one_with_the_token_does(
    running: Running, tmp_path: Path
) -> None:
    homes = {name: tmp_path / name for name in ("none", "wrong", "right")}
    for home in homes.values():
        home.mkdir()
    began = time.monotonic()
    assert client_runs(running, homes["right"], token=running.token, timeout_s=PATIENCE_S)
    timeout_s = 2 * (time.monotonic() - began)
    assert not client_runs(running, homes["wrong"], token="0" * 64, timeout_s=timeout_s)
    assert not client_runs(running, homes["none"], token="", timeout_s=timeout_s)
    assert running.process.poll() is None


@pytest.mark.ray
def test_the_dashboard_submits_jobs_for_the_token_only(running: Running) -> None:
    (port,) = {
        port
        for _, port, name in running.sockets()
        if "dashboard.py" in name and port in range(8265, 8300)
    }

    def status(token: str) -> int:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/jobs/",
            headers={"Authorization": f"Bearer {token}"} if token else {},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    assert [status(""), status("0" * 64), status(running.token)] == [401, 403, 200]


@pytest.mark.ray
@needs_root
def test_another_user_reads_neither_the_token_nor_the_session(running: Running) -> None:
    token = running.home / ".ray" / "auth_token"
    running.home.chmod(0o755)
    session = running.home / f"ray-{os.getuid()}"
    for path in (token, session):
        seen = subprocess.run(
            [sys.executable, "-c", f"import os; os.setuid({NOBODY}); os.listdir({str(session)!r})"]
            if path == session
            else [sys.executable, "-c", f"import os; os.setuid({NOBODY}); open({str(token)!r})"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "PermissionError" in seen.stderr


@pytest.mark.ray
def test_no_process_shows_the_token_in_its_arguments(running: Running) -> None:
    shown = [" ".join(p.cmdline()) for p in running.processes if p.is_running()]
    assert len(shown) > 5 and [line for line in shown if running.token in line] == []
