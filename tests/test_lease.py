"""The lease: one attempt writes in a run directory, a later one fences it, and no two ever hold the
same epoch."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from learner.controller import lease as module
from learner.controller.lease import Lease
from rl_edit.errors import Fenced
from rl_edit.lease_holder import LEASE, read_holder
from rl_edit.report.run_files import read_run
from rl_edit.run_record import RunRecord


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def on_disk(run_dir: Path) -> dict[str, object]:
    return dict(json.loads((run_dir / LEASE).read_text()))


def test_the_first_attempt_holds_epoch_1_and_the_file_says_who(tmp_path: Path) -> None:
    lease = Lease.take(tmp_path, Clock())
    assert lease.check() is None
    assert (lease.epoch, lease.previous, lease.taking_over()) == (1, None, "")
    written = on_disk(tmp_path)
    assert (written["epoch"], written["host"], written["pid"]) == (
        1,
        socket.gethostname(),
        os.getpid(),
    )
    assert (written["renewed"], written["ended"]) == (1000.0, None)
    assert written["attempt"] == lease.holder.attempt


@pytest.mark.faults
@pytest.mark.parametrize("call", ["renew", "release"])
def test_an_attempt_overtaken_while_it_writes_its_record_leaves_that_of_the_newer_one(
    tmp_path: Path, call: str
) -> None:
    newer: list[Lease] = []

    def clock() -> float:
        # Asked between the first check and the record's name.
        if newer or not (tmp_path / LEASE).is_file():
            return 1000.0
        newer.append(Lease.take(tmp_path, Clock(2000.0)))
        return 1500.0

    older = Lease.take(tmp_path, clock)
    with contextlib.suppress(Fenced):
        getattr(older, call)()
    assert on_disk(tmp_path)["attempt"] == newer[0].holder.attempt
    assert newer[0].check() is None


@pytest.mark.faults
def test_a_second_attempt_takes_over_and_the_first_is_fenced_for_good(tmp_path: Path) -> None:
    first, second = Lease.take(tmp_path, Clock()), Lease.take(tmp_path, Clock(2000.0))
    assert (second.epoch, second.previous) == (2, first.holder)
    assert second.check() is None
    there = on_disk(tmp_path)
    for call in (first.check, first.renew):
        with pytest.raises(Fenced) as error:
            call()
        for part in (
            second.holder.attempt,
            f"pid {os.getpid()} on {socket.gethostname()}",
            "since 1970-01-01 00:33:20 UTC",
            "exit code 75",
        ):
            assert part in str(error.value)
    first.release()
    assert on_disk(tmp_path) == there


def test_taking_over_from_an_attempt_that_did_not_end_is_said(tmp_path: Path) -> None:
    first = Lease.take(tmp_path, Clock())
    second = Lease.take(tmp_path, Clock(1003.0))
    assert (
        second.taking_over()
        == f"taking over from pid {os.getpid()} on {socket.gethostname()}, last renewed 3 s ago"
    )
    assert second.previous == first.holder
    earlier = Lease.take(tmp_path, Clock(900.0))
    assert "0 s ago" in earlier.taking_over(), "a clock that is behind gives no negative age"


def test_taking_over_from_an_attempt_that_ended_is_not_worth_a_warning(tmp_path: Path) -> None:
    clock = Clock()
    first = Lease.take(tmp_path, clock)
    clock.now = 1500.0
    first.release()
    assert (on_disk(tmp_path)["renewed"], on_disk(tmp_path)["ended"]) == (1000.0, 1500.0)
    second = Lease.take(tmp_path, clock)
    assert (second.epoch, second.taking_over()) == (2, "")


def test_renewing_changes_nothing_but_the_time(tmp_path: Path) -> None:
    clock = Clock()
    lease = Lease.take(tmp_path, clock)
    before = on_disk(tmp_path)
    clock.now = 1060.0
    lease.renew()
    assert on_disk(tmp_path) == {**before, "renewed": 1060.0}
    assert lease.check() is None


def remove_file(run_dir: Path) -> None:
    (run_dir / LEASE).unlink()


def garble_file(run_dir: Path) -> None:
    (run_dir / LEASE).write_text('{"epoch": 1')


def remove_claim(run_dir: Path) -> None:
    (run_dir / ".lease-1").unlink()


@pytest.mark.faults
@pytest.mark.parametrize("damage", [remove_file, garble_file, remove_claim, shutil.rmtree])
def test_an_attempt_whose_lease_or_directory_is_gone_is_fenced_and_does_not_bring_it_back(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    lease = Lease.take(run_dir)
    damage(run_dir)
    left = sorted(path.name for path in tmp_path.rglob("*"))
    for call in (lease.check, lease.renew):
        with pytest.raises(Fenced, match="missing or unreadable"):
            call()
    lease.release()
    assert sorted(path.name for path in tmp_path.rglob("*")) == left


@pytest.mark.faults
@pytest.mark.parametrize("damage", [remove_file, garble_file])
def test_an_epoch_is_never_used_again_even_when_the_file_is_lost(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    first = Lease.take(tmp_path)
    damage(tmp_path)
    second = Lease.take(tmp_path)
    assert (second.epoch, second.previous) == (2, None)
    assert second.check() is None
    with pytest.raises(Fenced):
        first.check()


@pytest.mark.faults
def test_a_claim_without_a_record_already_fences(tmp_path: Path) -> None:
    """The next attempt is between its two files; or was killed there."""
    first = Lease.take(tmp_path)
    (tmp_path / ".lease-2").touch()
    with pytest.raises(Fenced, match="epoch 2"):
        first.check()
    assert Lease.take(tmp_path).epoch == 3


@pytest.mark.faults
def test_a_record_fences_even_when_its_claim_is_not_seen_yet(tmp_path: Path) -> None:
    """A listing of the directory may come from a cache of NFS; the file is opened afresh."""
    first, second = Lease.take(tmp_path), Lease.take(tmp_path)
    (tmp_path / ".lease-2").unlink()
    with pytest.raises(Fenced, match=second.holder.attempt):
        first.check()


@pytest.mark.faults
def test_a_taker_that_was_overtaken_before_its_record_leaves_that_of_the_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module._claimed

    def overtaken(run_dir: Path, epoch: int) -> bool:
        monkeypatch.setattr(module, "_claimed", real)
        claimed = real(run_dir, epoch)
        Lease.take(run_dir)
        return claimed

    monkeypatch.setattr(module, "_claimed", overtaken)
    slow = Lease.take(tmp_path)
    assert slow.epoch == 1
    assert on_disk(tmp_path)["epoch"] == 2
    with pytest.raises(Fenced):
        slow.check()


@pytest.mark.faults
def test_a_slow_taker_that_was_overtaken_does_not_displace_the_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record of epoch 1 lands after that of epoch 2: the claims decide, and renewing repairs
    the file."""
    real, newer = os.replace, []

    def overtaken(source: Path, target: Path) -> None:
        monkeypatch.setattr(module.os, "replace", real)
        newer.append(Lease.take(tmp_path))
        real(source, target)

    monkeypatch.setattr(module.os, "replace", overtaken)
    slow = Lease.take(tmp_path)
    assert on_disk(tmp_path)["epoch"] == 1
    with pytest.raises(Fenced, match="just taken by an attempt of epoch 2"):
        slow.check()
    assert newer[0].check() is None
    newer[0].renew()
    assert on_disk(tmp_path)["epoch"] == 2


@pytest.mark.faults
def test_takers_that_race_get_different_epochs_and_one_holds_the_lease(tmp_path: Path) -> None:
    num_takers, rounds = 6, 5
    leases: list[Lease] = []
    barrier = threading.Barrier(num_takers)

    def take() -> None:
        for _ in range(rounds):
            barrier.wait()
            leases.append(Lease.take(tmp_path))

    threads = [threading.Thread(target=take) for _ in range(num_takers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    leases.sort(key=lambda lease: lease.epoch)
    assert [lease.epoch for lease in leases] == list(range(1, num_takers * rounds + 1))
    for lease in leases[:-1]:
        with pytest.raises(Fenced):
            lease.check()
    leases[-1].renew()
    assert on_disk(tmp_path)["attempt"] == leases[-1].holder.attempt


@pytest.mark.faults
def test_takers_that_read_the_same_epoch_claim_different_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race at its narrowest: the second taker reads before the first claims."""
    real, others = module._claimed, []

    def late(run_dir: Path, epoch: int) -> bool:
        monkeypatch.setattr(module, "_claimed", real)
        others.append(Lease.take(run_dir))
        return real(run_dir, epoch)

    monkeypatch.setattr(module, "_claimed", late)
    lease = Lease.take(tmp_path)
    assert (others[0].epoch, lease.epoch) == (1, 2)
    assert lease.check() is None
    with pytest.raises(Fenced):
        others[0].check()


def test_an_attempt_has_ended_when_it_says_so_or_its_process_is_gone(tmp_path: Path) -> None:
    lease = Lease.take(tmp_path)
    held = read_holder(tmp_path)
    assert held == lease.holder and not held.has_ended()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    ended: list[dict[str, object]] = [
        {"ended": held.taken},
        {"pid": gone.pid},
        # The number of a process that started after the attempt: the machine was restarted.
        {"taken": held.taken - 1e6},
    ]
    assert all(held.model_copy(update=changed).has_ended() for changed in ended)
    # Of another machine only its own word is known.
    elsewhere = held.model_copy(update={"host": "elsewhere", "pid": gone.pid})
    assert not elsewhere.has_ended()
    lease.release()
    released = read_holder(tmp_path)
    assert released is not None and released.has_ended()


def test_a_run_is_reported_as_running_while_its_attempt_holds_the_lease_and_no_longer(
    tmp_path: Path,
) -> None:
    record = RunRecord(name="young", status="running", updates=10)
    record.write(tmp_path)
    lease = Lease.take(tmp_path)
    assert read_run(tmp_path).run == record
    lease.release()
    assert read_run(tmp_path).run.status == "ended without a record"
    (tmp_path / LEASE).unlink()
    assert read_run(tmp_path).run.status == "ended without a record"
    record.model_copy(update={"status": "done"}).write(tmp_path)
    assert read_run(tmp_path).run.status == "done"
