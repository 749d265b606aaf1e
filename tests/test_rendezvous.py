"""The learner's ranks meet where no stranger can set, read or delete a key."""

from __future__ import annotations

import json
import os
import socket
import stat
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn

from learner.ranks import Ranks
from learner.rendezvous import SecretStore, open_place, store_at
from rl_edit.messages import ONE_MACHINE

PATIENCE_S = 120.0


@pytest.fixture
def across(monkeypatch: pytest.MonkeyPatch) -> str:
    """A place for ranks of several machines."""
    monkeypatch.delenv(ONE_MACHINE, raising=False)
    return open_place()


def stranger(address: str) -> dist.TCPStore:
    host, _, port = address.partition("#")[0].rpartition(":")
    return dist.TCPStore(
        host,
        int(port),
        is_master=False,
        timeout=timedelta(seconds=2),
        wait_for_workers=False,
    )


def test_a_stranger_with_torchs_own_client_sets_and_deletes_no_key(across: str) -> None:
    store = SecretStore(across, timeout_s=5)
    store.set("rank", b"0")

    def attack() -> None:
        client = stranger(across)
        client.set("rank", "1")
        client.delete_key("rank")
        client.get("rank")

    with pytest.raises((dist.DistError, RuntimeError)):
        attack()
    assert store.get("rank") == b"0" and store.num_keys() == 1


def test_a_wrong_secret_is_refused_and_a_silent_stranger_holds_nobody_up(across: str) -> None:
    place, _, secret = across.partition("#")
    host, _, port = place.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5):  # says nothing
        wrong = SecretStore(f"{place}#{secret[::-1]}", timeout_s=1)
        with pytest.raises((EOFError, OSError)):
            wrong.set("rank", b"1")
        right = SecretStore(across, timeout_s=1)
        assert right.num_keys() == 0
        with pytest.raises(dist.DistStoreError, match="no rank has set"):
            right.get("rank")


def test_the_store_counts_and_compares_as_torchs_own_does(across: str, tmp_path: Path) -> None:
    def story(store: dist.Store) -> list[object]:
        return [
            store.add("count", 2),
            store.add("count", 3),
            store.get("count"),
            store.compare_set("key", "", "first"),
            store.compare_set("key", "other", "second"),
            store.compare_set("key", "first", "third"),
            store.check(["key", "count"]),
            store.check(["absent"]),
            store.delete_key("key"),
            store.delete_key("key"),
        ]

    assert story(SecretStore(across, timeout_s=5)) == story(dist.HashStore())
    assert SecretStore(across, timeout_s=5).clone().get("count") == b"5"


def test_on_one_machine_each_start_meets_in_a_new_file_of_a_closed_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ONE_MACHINE, str(tmp_path))
    first, second = open_place(), open_place()
    assert first != second
    file = Path(first.removeprefix("file:"))
    assert file.is_relative_to(tmp_path)
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def meet(rank: int, address: str, directory: str) -> None:
    """Runs in a process of the test: joins, adds a number over the ranks, and lists its sockets."""
    ranks = Ranks(rank, 2, address, device=torch.device("cpu"), timeout_s=PATIENCE_S)
    total = ranks.total(torch.tensor([rank + 1.0]))
    texts = ranks.exchange(f"rank {rank}")
    layer = nn.Linear(2, 2)
    ranks.shard(layer, unsharded=())
    listening = [
        list(each.laddr)
        for each in psutil.Process().net_connections(kind="inet")
        if each.status == psutil.CONN_LISTEN
    ]
    said = {"total": float(total), "texts": texts, "listening": listening}
    Path(directory, f"{rank}.json").write_text(json.dumps(said))
    ranks.exchange("written")


@pytest.mark.parametrize("where", ["one machine", "several machines"])
def test_ranks_meet_and_on_one_machine_listen_on_loopback_only(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ONE_MACHINE, raising=False)
    if where == "one machine":
        monkeypatch.setenv(ONE_MACHINE, str(tmp_path))
    context, address = multiprocessing.get_context("spawn"), open_place()
    processes = [
        context.Process(target=meet, args=(rank, address, str(tmp_path)), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_S)
        process.kill()
    for rank in range(2):
        said = json.loads((tmp_path / f"{rank}.json").read_text())
        assert said["total"] == 3.0 and said["texts"] == ["rank 0", "rank 1"]
        if where == "one machine":
            assert [host for host, _ in said["listening"] if host != "127.0.0.1"] == []
    assert "store" in address or "#" in address


def test_a_place_of_the_file_form_is_opened_by_torchs_own_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "eth9")
    monkeypatch.setenv(ONE_MACHINE, str(tmp_path))
    store = store_at(open_place(), world=1, timeout_s=5)
    assert isinstance(store, dist.FileStore)
    assert os.environ["GLOO_SOCKET_IFNAME"].startswith("lo")
