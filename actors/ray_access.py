"""Keeps others away from the Ray cluster of one machine.

Whoever reaches Ray's ports with the token runs code as this user. So the token is always asked for
and lies in a file of its owner, every socket is on loopback, and the session's files are in a
directory that other users cannot enter. A cluster that a run joins stays as its owner made it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants

from rl_edit.errors import ClusterUnreachable, InputError
from rl_edit.messages import ONE_MACHINE

TESTED = "2.60.0"
"""The version of Ray whose sockets the tests look at."""

OUTSIDE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's variable that decides whether a node's address may be one that other machines reach.

Ray sets it to 0 on Windows and macOS, and reads it on every system.
"""

Note = Callable[[str], None]

_core: Any = ray._raylet


def close_to_others(folder: str, *, note: Note) -> str:
    """Prepares this process, before ``ray.init``, to start a cluster of its own.

    Returns:
        a directory of ``folder`` for the session, which other users cannot enter.

    Args:
        folder: takes the token where the home directory cannot.
        note: takes a line about what was changed.

    Raises:
        InputError: the file of the token is another user's.
    """
    _require_token(note=note)
    _keep_token(folder, note=note)
    os.environ[OUTSIDE] = "0"
    # Read when Ray was imported. Without it Ray replaces 127.0.0.1 by the outward address.
    ray_constants.ENABLE_RAY_CLUSTER = False
    # Workers inherit it: their learner ranks need not leave the machine to meet.
    os.environ[ONE_MACHINE] = private = _private_directory(folder)
    return private


def require_closed() -> None:
    """Checks that a cluster just started is what ``close_to_others`` asked for.

    Raises:
        ClusterUnreachable: this version of Ray listens elsewhere, or asks for no token.
    """
    address = str(ray.nodes()[0]["NodeManagerAddress"])
    loopback = False
    with contextlib.suppress(ValueError):
        loopback = ipaddress.ip_address(address).is_loopback
    seen = f"listens on {address}" if not loopback else "" if _asks() else "asks for no token"
    if seen:
        raise ClusterUnreachable(
            f"Ray {ray.__version__} {seen}, where other users or machines could run code as this "
            f"user. Install the version that the tests look at (pip install ray=={TESTED}), or "
            "train in one process with actors.runtime=thread."
        )


def _private_directory(folder: str) -> str:
    """Returns a directory of ``folder`` that only this user can enter.

    Ray lets everyone write to its session: to the sockets of a running cluster, and to the code
    that workers import.
    """
    path = os.path.join(folder, f"ray-{os.getuid()}")
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        seen = os.lstat(path)
        if stat.S_ISDIR(seen.st_mode) and seen.st_uid == os.getuid():
            os.chmod(path, 0o700)
            return path
    except OSError:
        pass
    # Another user has the name in a directory that everyone writes to.
    return tempfile.mkdtemp(prefix="ray-", dir=folder)


def _asks() -> bool:
    """Checks that this process and those that it starts ask for a token."""
    mode: bool = _core.get_authentication_mode() == _core.AuthenticationMode.TOKEN
    return mode


def _require_token(*, note: Note) -> None:
    """Turns token authentication on, whatever Ray's default or the environment says."""
    chosen = os.environ.get("RAY_AUTH_MODE", "token")
    if chosen.lower() != "token":
        note(
            f"RAY_AUTH_MODE={chosen} does not hold for the run's own cluster: without a token "
            "every user of this machine could run code as you"
        )
    os.environ["RAY_AUTH_MODE"] = "token"
    # Ray's C++ part read the environment when it was imported.
    _core.Config.initialize("")


def _keep_token(folder: str, *, note: Note) -> None:
    """Sees to a token in a file of its owner, before Ray writes one that everyone can read."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    if named := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        _require_stored(named, note=note)
        return
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(_own_token(folder, note=note))
    _core.AuthenticationTokenLoader.instance().reset_cache()


def _require_stored(named: str, *, note: Note) -> None:
    """Checks the file that the user names for the token."""
    try:
        reason = "" if _stored(Path(named), note=note) else "holds no token"
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    if reason:
        raise InputError(
            f"RAY_AUTH_TOKEN_PATH names {named}, which {reason}: unset it, or write one "
            f'with (umask 077; openssl rand -hex 32 > "{named}")'
        )


def _own_token(folder: str, *, note: Note) -> Path:
    """Finds or makes the token of the home directory, or one of this run where that fails."""
    try:
        path = Path.home() / ".ray" / "auth_token"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _close_directory(path.parent, note=note)
        if not _stored(path, note=note):
            _write(path)
        return path
    except (OSError, RuntimeError):  # RuntimeError: this user has no home at all
        path = Path(tempfile.mkdtemp(prefix="rl-edit-", dir=folder)) / "auth_token"
    _write(path)
    note(f"the home directory cannot be written to: the token of this run's cluster is in {path}")
    return path


def _stored(path: Path, *, note: Note) -> bool:
    """Checks that a file holds a token, and takes it away from everyone but its owner.

    Raises:
        InputError: it is a link, or another user's; that user would know the token.
    """
    try:
        # A link is not followed, and a pipe is not waited for.
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError as error:
        if path.is_symlink():
            raise _not_ours(path, "is a link") from error
        raise
    try:
        seen = os.fstat(file)
        if not stat.S_ISREG(seen.st_mode):
            raise _not_ours(path, "is no file")
        if seen.st_uid != os.getuid():
            raise _not_ours(path, f"belongs to user {seen.st_uid}")
        mode = stat.S_IMODE(seen.st_mode)
        if mode & 0o077:
            os.fchmod(file, 0o600)
            note(
                f"{path} could be read by other users (mode {mode:o}) and is now yours only. "
                "Who has read it can still join your clusters: remove it for a new token"
            )
        return bool(os.read(file, 4096).strip())
    finally:
        os.close(file)


def _not_ours(path: Path, problem: str) -> InputError:
    return InputError(
        f"{path} {problem}: whoever it belongs to could run code as you on the run's cluster. "
        "Remove it for a token of your own, or name your file in RAY_AUTH_TOKEN_PATH."
    )


def _close_directory(directory: Path, *, note: Note) -> None:
    """Takes the right to replace the token away from other users."""
    seen = directory.stat()
    if seen.st_uid not in (os.getuid(), 0):
        raise _not_ours(directory, f"belongs to user {seen.st_uid}")
    if seen.st_mode & 0o022:
        directory.chmod(0o700)
        note(f"other users could write to {directory}: it is now yours only")


def _write(path: Path) -> None:
    """Writes a new token, complete and private from its first instant.

    Of two runs that start at once both use the first one's.
    """
    file, name = tempfile.mkstemp(prefix=".auth_token-", dir=path.parent)  # of mode 0600
    try:
        with os.fdopen(file, "w") as written:
            written.write(secrets.token_hex(32))
            written.flush()
            os.fsync(written.fileno())
        if path.exists() and not path.read_text().strip():
            path.unlink()
        # Unlike a rename, a link does not replace a token that a cluster may be using.
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        os.unlink(name)
