"""The right to write in a run directory: one attempt at a time has it.

A retried job may start while the attempt before it still runs. Each attempt therefore takes the
next epoch, and every commit asks whether that epoch is still the newest. A later attempt fences the
earlier one.

There are two kinds of file. ``.lease-N`` is created with O_EXCL and says that epoch N is taken: of
two attempts that start at the same moment only one can create it, on a local disk as on NFS.
(``fcntl`` locks depend on the NFS server, and end with the process that the lease is to outlive.)
``LEASE.json`` is replaced atomically and says which attempt has the newest epoch. Claims are never
removed; a slow taker could otherwise claim an old number again.

One gap is left: between a check and the rename that follows it another attempt may take over. Both
then write the same step from the same seeds, and the later one is complete.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Collection
from pathlib import Path

from rl_edit.errors import Fenced
from rl_edit.files import replace_file, write_new
from rl_edit.lease_holder import LEASE, Holder, read_holder

CLAIM = re.compile(r"\.lease-(\d+)")


class Lease:
    """One attempt's right to write in ``run_dir``; get it with ``Lease.take``.

    Attributes:
        holder: this attempt, as last written.
        previous: the attempt that was there before, None when this is the first.
    """

    def __init__(
        self, run_dir: Path, holder: Holder, previous: Holder | None, clock: Callable[[], float]
    ) -> None:
        self.run_dir, self.holder, self.previous = run_dir, holder, previous
        self._clock = clock

    @classmethod
    def take(cls, run_dir: Path, clock: Callable[[], float] = time.time) -> Lease:
        """Takes the next epoch.

        Of racing takers each gets an epoch of its own. All but the highest are fenced at their
        first check.
        """
        previous = read_holder(run_dir)
        epoch = max(_newest_claim(run_dir), previous.epoch if previous else 0) + 1
        # Each number that another taker has claimed in this moment is skipped.
        while not _claimed(run_dir, epoch):
            epoch += 1
        now = clock()
        holder = Holder(
            epoch=epoch,
            attempt=uuid.uuid4().hex[:8],
            host=socket.gethostname(),
            pid=os.getpid(),
            taken=now,
            renewed=now,
        )
        lease = cls(run_dir, holder, previous, clock)
        # A taker with a higher claim has overtaken this one; its record must not be replaced.
        if _newest_claim(run_dir) == epoch:
            try:
                lease._publish()
            except OSError:
                # A full disk. This attempt has written nothing, so its claim may go.
                _claim(run_dir, epoch).unlink(missing_ok=True)
                raise
        return lease

    @property
    def epoch(self) -> int:
        """The number of this attempt; later attempts have higher ones."""
        return self.holder.epoch

    def check(self) -> None:
        """Returns when this attempt may write.

        Raises:
            Fenced: another attempt took the run directory, or the lease (or the whole directory)
                was removed.
        """
        there, newest = read_holder(self.run_dir), _newest_claim(self.run_dir)
        if there is None or newest < self.epoch:
            problem = (
                f"{self.run_dir / LEASE} or its claim {_claim(self.run_dir, self.epoch).name} is "
                "missing or unreadable"
            )
        # A claim may be seen before its record, and a record (opened afresh on NFS) before its
        # claim (a cached listing).
        elif there.epoch > self.epoch or (
            there.epoch == self.epoch and there.attempt != self.holder.attempt
        ):
            problem = f"{self.run_dir} belongs to {there}"
        elif newest > self.epoch:
            problem = f"{self.run_dir} was just taken by an attempt of epoch {newest}"
        else:
            return
        raise Fenced(
            f"{problem}: {self.holder} writes nothing more there and ends with exit code 75, for "
            "two writers would mix their runs. Leave the run to the newer attempt, or resume it "
            "when no other attempt runs."
        )

    def renew(self) -> None:
        """Says that this attempt is alive. A full disk costs the sign of life, not the run.

        Raises:
            Fenced: as ``check``.
        """
        self.check()
        self.holder = self.holder.model_copy(update={"renewed": self._clock()})
        with contextlib.suppress(OSError):
            self._publish(self.check)

    def release(self) -> None:
        """Says that this attempt has ended. Does nothing when fenced, or on a full disk.

        The next attempt then takes over without a warning.
        """
        with contextlib.suppress(Fenced, OSError):
            self.check()
            self.holder = self.holder.model_copy(update={"ended": self._clock()})
            self._publish(self.check)

    def remove(self, names: Collection[str]) -> None:
        """Removes files of this attempt, and then its lease, when the directory has nothing else.

        Asked before each file: a newer attempt that comes meanwhile keeps what it wrote.

        Args:
            names: of the files that this attempt may have written.

        Raises:
            Fenced: as ``check``.
            OSError: a file cannot be removed.
        """
        claim = _claim(self.run_dir, self.epoch)
        if set(os.listdir(self.run_dir)) - {*names, LEASE, claim.name}:
            return
        for path in (*(self.run_dir / name for name in names), self.run_dir / LEASE):
            self.check()
            path.unlink(missing_ok=True)
        # Last: until it is gone, another attempt takes a higher epoch.
        claim.unlink(missing_ok=True)

    def taking_over(self) -> str:
        """Describes the attempt before, when it did not say that it ended; else ""."""
        if self.previous is None or self.previous.ended is not None:
            return ""
        # Clocks of two machines differ.
        age = max(0.0, self.holder.taken - self.previous.renewed)
        return (
            f"taking over from pid {self.previous.pid} on {self.previous.host}, "
            f"last renewed {age:.0f} s ago"
        )

    def _publish(self, check: Callable[[], None] = lambda: None) -> None:
        # Syncing takes long enough for another attempt to take over, so the check comes after it.
        text = self.holder.model_dump_json(indent=2) + "\n"
        replace_file(self.run_dir / LEASE, text, durable=True, check=check)


def _claim(run_dir: Path, epoch: int) -> Path:
    return run_dir / f".lease-{epoch}"


def _claimed(run_dir: Path, epoch: int) -> bool:
    """Creates a claim; True when this call, and no other, created it."""
    try:
        write_new(_claim(run_dir, epoch), b"")
    except FileExistsError:
        return False
    return True


def _newest_claim(run_dir: Path) -> int:
    names = os.listdir(run_dir) if run_dir.is_dir() else []
    return max((int(match[1]) for name in names if (match := CLAIM.fullmatch(name))), default=0)
