"""A cable between two network namespaces that can be cut, slowed and healed.

It is a process of its own: it makes the namespaces, forwards every frame between them, and takes
one command a line on stdin ("cable 0.2 0.05" is 200 ms of delay and 5 % loss, "cable 0 1" is cut).
It answers each with a line. When its stdin ends, also because its caller was killed, it kills every
process in both namespaces and ends; then nothing is left of them.

The kernel's own way (a veth pair with netem) needs a module that many machines lack. This needs
root and ``/dev/net/tun``.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import select
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
MTU = 9000
ADDRESSES = ("10.99.0.1", "10.99.0.2")
MACS = ("02:00:00:00:00:01", "02:00:00:00:00:02")


def processes_in(namespace: str) -> list[int]:
    """Returns the ids of all processes in a network namespace ("net:[INODE]")."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                inside = os.readlink(entry / "ns" / "net") == namespace
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if inside and state != "Z":
                found.append(int(entry.name))
    return found


def kill_all(namespace: str) -> None:
    """Kills every process in a namespace, until none is left."""
    deadline = time.monotonic() + 20
    while (left := processes_in(namespace)) and time.monotonic() < deadline:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def _namespace(own: int, other: int) -> tuple[int, int]:
    """Makes a namespace with one end of the cable; returns it and the end, as file descriptors."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    namespace = os.open("/proc/self/ns/net", os.O_RDONLY)
    end = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH", b"eth0", IFF_TAP | IFF_NO_PI))
    for words in (
        "link set lo up",
        f"link set dev eth0 address {MACS[own]} mtu {MTU}",
        f"addr add {ADDRESSES[own]}/24 dev eth0",
        "link set eth0 up",
        # Known for good: packets into a cut cable vanish, instead of "no route to host".
        f"neigh replace {ADDRESSES[other]} lladdr {MACS[other]} nud permanent dev eth0",
        # Ray asks which address leads to the Internet.
        f"route add default via {ADDRESSES[other]}",
    ):
        subprocess.run(["ip", *words.split()], check=True)
    return namespace, end


class Cable:
    """Forwards frames between two ends, late or not at all."""

    def __init__(self, ends: tuple[int, int]) -> None:
        self.ends, self.delay_s, self.loss = ends, 0.0, 0.0
        self._random = random.Random(0)
        self._on_the_way: list[tuple[float, int, int, bytes]] = []
        self._frames = 0

    def forward(self) -> None:
        """Forwards until stdin ends."""
        while True:
            wait_s = None
            if self._on_the_way:
                wait_s = max(0.0, self._on_the_way[0][0] - time.monotonic())
            ready, _, _ = select.select([sys.stdin, *self.ends], [], [], wait_s)
            for end in ready:
                if end is sys.stdin:
                    line = sys.stdin.readline()
                    if not line:
                        return
                    self._obey(line)
                else:
                    self._take(end)
            while self._on_the_way and self._on_the_way[0][0] <= time.monotonic():
                _, _, end, frame = heapq.heappop(self._on_the_way)
                os.write(end, frame)

    def _obey(self, line: str) -> None:
        word, *numbers = line.split()
        if word == "cable":
            self.delay_s, self.loss = map(float, numbers)
            if self.loss >= 1:
                self._on_the_way.clear()
        print("done", flush=True)

    def _take(self, end: int) -> None:
        frame = os.read(end, MTU + 100)
        if self._random.random() >= self.loss:
            self._frames += 1
            other = self.ends[1 - self.ends.index(end)]
            due = time.monotonic() + self.delay_s
            heapq.heappush(self._on_the_way, (due, self._frames, other, frame))


def main() -> None:
    # Only the end of stdin ends a cable: Ctrl-C is a signal to the caller's group too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sides = [_namespace(own, 1 - own) for own in (0, 1)]
    names = [os.readlink(f"/proc/self/fd/{namespace}") for namespace, _ in sides]
    # Out of both: whoever kills the processes of a node must not meet this one.
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open(f"/proc/{os.getppid()}/ns/net", os.O_RDONLY)
    libc.setns(home, CLONE_NEWNET)
    print(*(f"/proc/{os.getpid()}/fd/{namespace}" for namespace, _ in sides), flush=True)
    try:
        Cable((sides[0][1], sides[1][1])).forward()
    finally:
        for name in names:
            kill_all(name)


if __name__ == "__main__":
    main()
