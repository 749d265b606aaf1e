"""The place where the learner's ranks find each other, closed to everyone else.

torch's own store on TCP lets anyone who reaches its port set and delete keys. On one machine the
ranks meet in a file of a closed directory; across machines they meet in a store that answers only
who knows a secret. Rank 0 makes the secret, and it travels as an answer of Ray's.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]  # its module lists no names

from rl_edit.messages import ONE_MACHINE

POLL_S = 0.02
LONGEST_MESSAGE = 2**20
BACKLOG = 128


def open_place() -> str:
    """Opens a new place and returns its address: of a file, or of a port with its secret.

    Every start of the ranks has a place of its own, so nothing of an earlier start is in it.
    """
    if directory := os.environ.get(ONE_MACHINE):
        return f"file:{tempfile.mkdtemp(prefix='ranks-', dir=directory)}/store"
    secret = secrets.token_hex(32)
    listener = Listener((_host(), 0), backlog=BACKLOG)
    threading.Thread(target=_serve, args=(listener, secret), daemon=True).start()
    host, port = listener.address
    return f"{host}:{port}#{secret}"


def store_at(address: str, *, world: int, timeout_s: float) -> dist.Store:
    """Returns a rank's access to a place.

    Ranks of one machine talk over loopback from here on.
    """
    if address.startswith("file:"):
        # By default gloo and NCCL listen where the machine's name leads.
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback
        return FileStore(address.removeprefix("file:"), world)
    return SecretStore(address, timeout_s=timeout_s)


class SecretStore(dist.Store):  # type: ignore[misc]  # torch's C++ part has no types
    """A rank's connection to the store of ``open_place`` on another machine."""

    def __init__(self, address: str, *, timeout_s: float) -> None:
        super().__init__()
        self._address, self._timeout_s, self._lock = address, timeout_s, threading.Lock()
        self._clones: list[SecretStore] = []
        place, _, secret = address.partition("#")
        host, _, port = place.rpartition(":")
        self._peer = Client((host, int(port)))
        self._peer.send_bytes(_proof(secret, self._peer.recv_bytes(LONGEST_MESSAGE)))

    def _ask(self, *request: Any) -> Any:
        with self._lock:
            self._peer.send_bytes(json.dumps(request).encode())
            return json.loads(self._peer.recv_bytes(LONGEST_MESSAGE))

    def set(self, key: str, value: bytes | str) -> None:
        self._ask("set", key, _hex(value))

    def get(self, key: str) -> bytes:
        self.wait([key])
        return bytes.fromhex(self._ask("get", key))

    def add(self, key: str, amount: int) -> int:
        return int(self._ask("add", key, amount))

    def check(self, keys: list[str]) -> bool:
        return bool(self._ask("check", keys))

    def compare_set(self, key: str, expected: bytes | str, value: bytes | str) -> bytes:
        return bytes.fromhex(self._ask("compare_set", key, _hex(expected), _hex(value)))

    def delete_key(self, key: str) -> bool:
        return bool(self._ask("delete", key))

    def num_keys(self) -> int:
        return int(self._ask("count"))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        patience = self._timeout_s if timeout is None else timeout.total_seconds()
        deadline = time.monotonic() + patience
        while not self.check(keys):
            if time.monotonic() > deadline:
                raise dist.DistStoreError(f"no rank has set {keys} in {patience:g} s")
            time.sleep(POLL_S)

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout_s = timeout.total_seconds()

    @property
    def timeout(self) -> timedelta:
        return timedelta(seconds=self._timeout_s)

    def clone(self) -> SecretStore:
        clone = SecretStore(self._address, timeout_s=self._timeout_s)
        # torch's C++ part holds half of the object only.
        self._clones.append(clone)
        return clone

    def has_extended_api(self) -> bool:
        return False


def _serve(listener: Listener, secret: str) -> None:
    """Answers every connection in a thread of its own, so that none holds up another."""
    keys: dict[str, str] = {}
    lock = threading.Lock()

    def answer(request: list[Any]) -> Any:
        with lock:
            return _ANSWERS[request[0]](keys, *request[1:])

    while True:
        try:
            peer = listener.accept()
        except ConnectionError:  # it left before it was answered
            continue
        threading.Thread(target=_converse, args=(peer, secret, answer), daemon=True).start()


def _converse(peer: Connection, secret: str, answer: Callable[[list[Any]], Any]) -> None:
    """Answers one connection once it has proved that it knows the secret."""
    challenge = secrets.token_bytes(32)
    try:
        peer.send_bytes(challenge)
        if hmac.compare_digest(peer.recv_bytes(len(challenge)), _proof(secret, challenge)):
            while True:
                request = json.loads(peer.recv_bytes(LONGEST_MESSAGE))
                peer.send_bytes(json.dumps(answer(request)).encode())
    except (EOFError, OSError):
        pass
    finally:
        peer.close()


def _proof(secret: str, challenge: bytes) -> bytes:
    return hmac.digest(secret.encode(), challenge, "sha256")


def _set(keys: dict[str, str], key: str, value: str) -> None:
    keys[key] = value


def _add(keys: dict[str, str], key: str, amount: int) -> int:
    # torch's stores keep numbers as decimal text.
    total = int(bytes.fromhex(keys.get(key, _hex("0")))) + amount
    keys[key] = _hex(str(total))
    return total


def _compare_set(keys: dict[str, str], key: str, expected: str, value: str) -> str:
    if keys.get(key, "") == expected:
        keys[key] = value
    return keys.get(key, expected)


_ANSWERS: dict[str, Callable[..., Any]] = {
    "set": _set,
    "get": lambda keys, key: keys[key],
    "add": _add,
    "check": lambda keys, requested: all(key in keys for key in requested),
    "compare_set": _compare_set,
    "delete": lambda keys, key: keys.pop(key, None) is not None,
    "count": len,
}


def _hex(value: bytes | str) -> str:
    return (value.encode() if isinstance(value, str) else value).hex()


def _host() -> str:
    """Returns the machine's address on the network, or loopback where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # This names the outgoing interface. A datagram socket sends nothing here, and the
            # address is one of documentation's (RFC 5737).
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
