"""Checkpoints: whole or absent, verified byte by byte, and never a reason to lose a run."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.controller import checkpoint
from learner.controller.checkpoint import MANIFEST, Checkpoint, CorruptCheckpoint
from learner.controller.lease import Lease
from learner.controller.same_run import ABSENT, differences, require_same_run
from rl_edit import wire
from rl_edit.errors import Fenced, InputError
from rl_edit.messages import LearnerState
from rl_edit.types import AdapterId, AdapterWeights
from runs import adapter_bytes, events_of, metrics_of, run_inline, small_config

FILES = ("learner.safetensors", "acting_000001.safetensors", "state.json", MANIFEST)


@pytest.fixture
def lease(tmp_path: Path) -> Lease:
    return Lease.take(tmp_path)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def adapter(step: int) -> AdapterId:
    return AdapterId(step, f"{step:064x}")


def weights(step: int) -> np.ndarray:
    return wire.pack(
        AdapterWeights(
            id=adapter(step), tensors={"block.lora_A.weight": torch.full((2, 3), float(step))}
        )
    )


def example(step: int, name: str = "c") -> Checkpoint:
    tensors = {"parameter/block": torch.randn(3, 2), "optimizer/exp_avg/block": torch.randn(3, 2)}
    return Checkpoint(
        updates_done=step,
        settings={"seed": 0, "train": {"learning_rate": 1e-3}},
        code_version=name,
        ledger={"retries": 3},
        learner=wire.pack(LearnerState(updates_done=step, tensors=tensors)),
        acting={adapter(step - 1): weights(step - 1), adapter(step): weights(step)},
    )


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class EventLog:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, event: str, **details: Any) -> None:
        self.events.append((event, details))


def newest(directory: Path) -> Checkpoint | None:
    """The newest checkpoint, where all are sound."""
    log = EventLog()
    stored = checkpoint.newest(directory, log)
    assert log.events == []
    return stored


def test_what_is_read_is_what_was_written(directory: Path, lease: Lease) -> None:
    written = example(7)
    checkpoint.write(directory, written, lease=lease)
    stored = newest(directory)
    assert stored is not None
    assert replace(stored, learner=written.learner, acting=written.acting) == written
    assert stored.learner.tobytes() == written.learner.tobytes()
    assert [(name, packed.tobytes()) for name, packed in stored.acting.items()] == [
        (n, p.tobytes()) for n, p in written.acting.items()
    ]
    assert written.nbytes == sum(
        file.stat().st_size for file in (directory / "step_000007").glob("*.safetensors")
    )


def test_a_checkpoint_tells_its_parent_its_lease_and_that_seeds_are_keyed(
    directory: Path, lease: Lease
) -> None:
    states = [
        json.loads(
            (checkpoint.write(directory, example(step), lease=lease) / "state.json").read_text()
        )
        for step in (2, 4)
    ]
    assert [state["parent"] for state in states] == [None, "step_000002"]
    assert {state["lease_epoch"] for state in states} == {lease.epoch}
    assert "no generator state" in states[0]["seeds"]
    assert (states[0]["code_version"], states[0]["updates_done"]) == ("c", 2)


def test_settings_without_bounds_come_back_as_they_were(directory: Path, lease: Lease) -> None:
    written = replace(
        example(1), settings={"rewards": {"custom": {"low": -float("inf"), "high": float("inf")}}}
    )
    checkpoint.write(directory, written, lease=lease)
    stored = newest(directory)
    assert stored is not None and stored.settings == written.settings


@pytest.mark.parametrize("order", [(2, 10, 9), (999_999, 1_000_000)])
def test_the_newest_step_is_read(directory: Path, lease: Lease, order: tuple[int, ...]) -> None:
    for step in order:
        checkpoint.write(directory, example(step), lease=lease)
    stored = newest(directory)
    assert stored is not None and stored.updates_done == max(order)


def test_without_checkpoints_there_is_nothing_to_read(directory: Path) -> None:
    assert newest(directory) is None
    assert checkpoint.peek(directory) is None


@pytest.mark.faults
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_in_any_file_is_found(
    directory: Path, lease: Lease, name: str
) -> None:
    path = checkpoint.write(directory, example(2), lease=lease)
    valid = (path / name).read_bytes()
    assert checkpoint.read(path).updates_done == 2
    # Every byte of the manifest, of which no other file has a hash.
    for at in range(0, len(valid), 1 if name == MANIFEST else 23):
        (path / name).write_bytes(valid[:at] + bytes([valid[at] ^ 1]) + valid[at + 1 :])
        with pytest.raises(CorruptCheckpoint):
            checkpoint.read(path)


def truncate(path: Path) -> None:
    file = path / "learner.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def flip(path: Path) -> None:
    file = path / "learner.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 0b1000
    file.write_bytes(content)


def lose_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def lose_a_file(path: Path) -> None:
    (path / "state.json").unlink()


def empty_manifest(path: Path) -> None:
    (path / MANIFEST).write_text("{}")


def name_no_file(path: Path) -> None:
    renew_manifest(path, files={})


def state_of_another_version(path: Path) -> None:
    state = json.loads((path / "state.json").read_text())
    del state["ledger"]
    put(path, "state.json", json.dumps(state).encode())


def acting_adapter_outside_the_manifest(path: Path) -> None:
    state = json.loads((path / "state.json").read_text())
    state["acting"][0]["file"] = "../step_000002/learner.safetensors"
    put(path, "state.json", json.dumps(state).encode())


def renew_manifest(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def put(path: Path, name: str, content: bytes) -> None:
    """Puts a file into a checkpoint as someone does who knows the format: the manifest vouches for
    it."""
    (path / name).write_bytes(content)
    files = json.loads((path / MANIFEST).read_text())["files"]
    renew_manifest(
        path, files={**files, name: {"bytes": len(content), "sha256": sha256(content).hexdigest()}}
    )


@pytest.mark.faults
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip, "learner.safetensors does not have the bytes"),
        (truncate, "learner.safetensors does not have the bytes"),
        (lose_manifest, "MANIFEST.json is missing"),
        (lose_a_file, "state.json is missing"),
        (empty_manifest, "MANIFEST.json cannot be read at parent"),
        (name_no_file, "does not name learner.safetensors, state.json"),
        (state_of_another_version, "state.json cannot be read at ledger"),
        (acting_adapter_outside_the_manifest, "which MANIFEST.json does not"),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    directory: Path, lease: Lease, damage: Callable[[Path], None], says: str
) -> None:
    checkpoint.write(directory, example(2), lease=lease)
    damage(checkpoint.write(directory, example(4), lease=lease))
    before = checkpoint.peek(directory)
    assert before is not None and before.updates_done == 2
    assert names(directory) == ["step_000002", "step_000004"]
    log = EventLog()
    stored = checkpoint.newest(directory, log)
    assert stored is not None and stored.updates_done == 2
    ((event, details),) = log.events
    assert (event, details["path"]) == ("checkpoint_corrupt", "step_000004")
    assert says in details["problem"]
    assert names(directory) == [".corrupt-step_000004", "step_000002"]


@pytest.mark.faults
def test_the_same_step_may_be_damaged_twice(directory: Path, lease: Lease) -> None:
    for _ in range(2):
        flip(checkpoint.write(directory, example(4), lease=lease))
        assert checkpoint.newest(directory, EventLog()) is None
    assert names(directory) == [".corrupt-step_000004", ".corrupt-step_000004-1"]


@pytest.mark.faults
def test_a_disk_that_cannot_be_read_does_not_make_a_checkpoint_corrupt(
    directory: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.write(directory, example(4), lease=lease)

    def unreadable(*_: object, **__: object) -> np.ndarray:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(np, "fromfile", unreadable)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint.newest(directory, EventLog())
    assert names(directory) == ["step_000004"]


@pytest.mark.faults
def test_a_run_goes_on_from_the_last_sound_checkpoint_and_reports_the_bad_one(
    small_editor: str, tmp_path: Path
) -> None:
    config = small_config(small_editor, "train.updates=3")
    whole = run_inline(config, tmp_path)
    flip(tmp_path / "checkpoints" / "step_000003")
    again = run_inline(config, tmp_path, resume=True)
    assert adapter_bytes(again) == adapter_bytes(whole)
    (event,) = events_of(tmp_path, "checkpoint_corrupt")
    assert event["path"] == "step_000003"
    assert events_of(tmp_path, "resumed")[0]["updates_done"] == 2
    assert [line["update"] for line in metrics_of(tmp_path)] == [0, 1, 2]


@pytest.mark.faults
def test_a_run_of_which_no_sound_checkpoint_is_left_is_not_started_over(
    small_editor: str, tmp_path: Path
) -> None:
    config = small_config(small_editor, "train.updates=1")
    run_inline(config, tmp_path)
    flip(tmp_path / "checkpoints" / "step_000001")
    curves = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"no sound checkpoint is left .*\.corrupt-step_000001"):
        run_inline(config, tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == curves


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def as_zip(tmp_path: Path, content: bytes) -> bytes:
    with zipfile.ZipFile(tmp_path / "archive", "w") as archive:
        archive.writestr("archive/data.pkl", content)
    return (tmp_path / "archive").read_bytes()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "zipped", "says"),
    [
        ("learner.safetensors", False, "learner.safetensors is a pickle, not safetensors"),
        ("learner.safetensors", True, "learner.safetensors is a zip archive"),
        ("acting_000004.safetensors", False, "acting_000004.safetensors is a pickle"),
        ("state.json", False, "state.json cannot be read"),
        *(
            (f"extra{suffix}", False, f"names 'extra{suffix}': only")
            for suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt", "")
        ),
    ],
)
def test_a_pickle_in_a_checkpoint_is_refused_by_magic_and_by_name_and_never_runs(
    directory: Path, tmp_path: Path, lease: Lease, name: str, zipped: bool, says: str
) -> None:
    checkpoint.write(directory, example(2), lease=lease)
    mark = tmp_path / "executed"
    content = pickle.dumps(Payload(mark))
    put(
        checkpoint.write(directory, example(4), lease=lease),
        name,
        as_zip(tmp_path, content) if zipped else content,
    )
    log = EventLog()
    stored = checkpoint.newest(directory, log)
    assert stored is not None and stored.updates_done == 2
    assert says in log.events[0][1]["problem"]
    assert not mark.exists()
    pickle.loads(content)
    assert mark.exists(), "the payload would not have shown anything"


@pytest.mark.faults
def test_a_directory_of_pickles_is_not_a_checkpoint_and_the_problem_names_them(
    directory: Path, tmp_path: Path
) -> None:
    foreign, mark = directory / "step_000009", tmp_path / "executed"
    foreign.mkdir(parents=True)
    (foreign / "model.pt").write_bytes(pickle.dumps(Payload(mark)))
    log = EventLog()
    assert checkpoint.newest(directory, log) is None
    assert (
        log.events[0][1]["problem"]
        == "MANIFEST.json is missing; it holds model.pt, and pickles are never opened"
    )
    assert not mark.exists()


@pytest.mark.faults
@pytest.mark.parametrize(
    "name",
    ["../outside.json", "/etc/outside.json", "..", "sub/inside.json", "sub\\inside.json", ""],
)
def test_a_manifest_that_names_a_path_is_refused_before_any_file_is_read(
    directory: Path, lease: Lease, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint.write(directory, example(4), lease=lease)
    files = json.loads((path / MANIFEST).read_text())["files"]
    renew_manifest(path, files={**files, name: files["state.json"]})

    def read(*_: object, **__: object) -> np.ndarray:
        raise AssertionError("a file was read")

    monkeypatch.setattr(np, "fromfile", read)
    with pytest.raises(CorruptCheckpoint, match="names"):
        checkpoint.read(path)


def test_safetensors_that_begin_like_a_pickle_are_safetensors(
    directory: Path, lease: Lease
) -> None:
    """A header of 640 bytes has a length that reads as pickle protocol 2."""
    header = b"{}".ljust(0x0280)
    content = len(header).to_bytes(8, "little") + header
    assert content.startswith(b"\x80\x02")
    checkpoint.write(
        directory, replace(example(1), learner=np.frombuffer(content, dtype=np.uint8)), lease=lease
    )
    stored = newest(directory)
    assert stored is not None and stored.learner.tobytes() == content


def test_bytes_that_would_be_refused_when_read_are_not_written(
    directory: Path, lease: Lease
) -> None:
    with pytest.raises(AssertionError, match="only packed records"):
        checkpoint.write(
            directory, replace(example(1), learner=np.zeros(64, dtype=np.uint8)), lease=lease
        )
    assert names(directory) == []


def test_a_checkpoint_is_safetensors_and_json_and_no_pickle_beside_them_is_opened(
    directory: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint.write(directory, example(3), lease=lease)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    for name in ("learner.pt", "learner.pkl"):
        (path / name).write_bytes(pickle.dumps("whoever reads this trusts the disk"))

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was opened")

    for module, name in (
        (torch, "load"),
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
    ):
        monkeypatch.setattr(module, name, opened)
    stored = newest(directory)
    assert stored is not None and stored.updates_done == 3


def test_whose_a_run_is_says_its_newest_sound_checkpoint_and_nothing_is_moved_to_find_out(
    directory: Path, lease: Lease
) -> None:
    checkpoint.write(directory, example(2, "a"), lease=lease)
    flip(checkpoint.write(directory, example(4, "b"), lease=lease))
    stored = checkpoint.peek(directory)
    assert stored is not None and stored.code_version == "a"
    assert names(directory) == ["step_000002", "step_000004"]


def test_differences_are_dotted_and_say_what_one_side_lacks() -> None:
    there = {
        "seed": 1,
        "train": {"learning_rate": 0.001, "passes": 1},
        "rewards": {"judge": {"weight": 1.0}},
        "sizes": [1, 2],
    }
    here = {
        "seed": 1,
        "train": {"learning_rate": 0.0001, "passes": 1},
        "rewards": {"clip": {"weight": 1.0}},
        "sizes": [1, 3],
    }
    assert differences(there, here) == {
        "rewards.clip": (ABSENT, {"weight": 1.0}),
        "rewards.judge": ({"weight": 1.0}, ABSENT),
        "sizes": ([1, 2], [1, 3]),
        "train.learning_rate": (0.001, 0.0001),
    }
    assert differences(there, there) == {}


HERE = {"seed": 1, "train": {"learning_rate": 1e-4}}


def test_a_checkpoint_of_the_same_settings_is_accepted(tmp_path: Path) -> None:
    assert require_same_run(example(1), example(1).settings, tmp_path) is None


def test_a_checkpoint_of_another_run_is_refused_with_the_settings_that_differ(
    tmp_path: Path,
) -> None:
    with pytest.raises(
        InputError,
        match=r"belongs to another run \(seed: 0 there, 1 here; train.learning_rate: 0.001 there, "
        r"0.0001 here\)",
    ):
        require_same_run(example(1), HERE, tmp_path)


def test_a_setting_that_did_not_exist_when_the_checkpoint_was_made_is_accepted_at_its_default(
    tmp_path: Path,
) -> None:
    stored = example(1)
    section = stored.settings["train"]
    assert "minibatches" not in section
    here = {**stored.settings, "train": {**section, "minibatches": 1}}
    assert require_same_run(stored, here, tmp_path) is None
    here["train"]["minibatches"] = 2
    with pytest.raises(InputError, match=r"train.minibatches: absent there, 2 here"):
        require_same_run(stored, here, tmp_path)


def test_a_drift_is_accepted_only_for_the_settings_that_are_named(tmp_path: Path) -> None:
    allowed = frozenset({"train.learning_rate", "seed"})
    assert require_same_run(example(1), HERE, tmp_path, allowed) is None
    with pytest.raises(InputError, match=r"\(seed: 0 there, 1 here\).*--allow-config-drift seed"):
        require_same_run(example(1), HERE, tmp_path, frozenset({"train.learning_rate"}))


def test_a_checkpoint_of_other_settings_is_refused(small_editor: str, tmp_path: Path) -> None:
    run_inline(small_config(small_editor, "train.updates=1"), tmp_path)
    with pytest.raises(InputError, match="belongs to another run"):
        run_inline(
            small_config(small_editor, "train.updates=1", "train.learning_rate=1e-4"),
            tmp_path,
            resume=True,
        )


def test_more_updates_other_places_and_other_names_are_the_same_settings(
    small_editor: str, tmp_path: Path
) -> None:
    # A real copy: what is left out follows the configuration of the editor at that place.
    elsewhere = shutil.copytree(small_editor, tmp_path / "elsewhere")
    base = small_config(small_editor).sha256()
    same = (
        "train.updates=99", "name=other", "actors.num_rollout=2", "evaluation.num_tasks=5",
        "train.checkpoint_every=7", "train.keep_checkpoints=5", "train.max_dropped_groups=1",
        "data.path=elsewhere", f"editor.path={elsewhere}", "editor.device=auto",
    )  # fmt: skip
    other = (
        "seed=1",
        "train.learning_rate=1e-4",
        "rollout.group_size=5",
        "data.num_train=9",
        "lora.rank=2",
        "editor.guidance=1",
    )
    assert all(small_config(small_editor, change).sha256() == base for change in same)
    assert all(small_config(small_editor, change).sha256() != base for change in other)


def test_only_the_newest_checkpoints_are_kept(directory: Path, lease: Lease) -> None:
    for step in range(1, 6):
        checkpoint.write(directory, example(step), lease=lease)
        checkpoint.prune(directory, 2, lease=lease)
    assert names(directory) == ["step_000004", "step_000005"]


def test_pruning_removes_what_killed_attempts_left_but_not_what_a_newer_one_writes(
    directory: Path, tmp_path: Path
) -> None:
    Lease.take(tmp_path)
    lease = Lease.take(tmp_path)
    checkpoint.write(directory, example(1), lease=lease)
    for name in (
        ".tmp-1-step_000002",
        ".tmp-2-step_000002",
        ".tmp-3-step_000002",
        ".old-step_000001",
        ".corrupt-step_000002",
    ):
        shutil.copytree(directory / "step_000001", directory / name)
    checkpoint.prune(directory, 2, lease=lease)
    assert names(directory) == [
        ".corrupt-step_000002",
        ".tmp-2-step_000002",
        ".tmp-3-step_000002",
        "step_000001",
    ]


def test_a_step_written_again_replaces_the_old_one(directory: Path, lease: Lease) -> None:
    checkpoint.write(directory, example(2, "a"), lease=lease)
    checkpoint.write(directory, example(2, "b"), lease=lease)
    stored = newest(directory)
    assert stored is not None and stored.code_version == "b"
    assert names(directory) == ["step_000002"]


@pytest.mark.faults
def test_a_fenced_attempt_neither_writes_nor_removes(
    directory: Path, tmp_path: Path, lease: Lease
) -> None:
    for step in (1, 2):
        checkpoint.write(directory, example(step), lease=lease)
    Lease.take(tmp_path)
    for attempt in (
        lambda: checkpoint.write(directory, example(3), lease=lease),
        lambda: checkpoint.prune(directory, 1, lease=lease),
    ):
        with pytest.raises(Fenced):
            attempt()
    assert names(directory) == ["step_000001", "step_000002"]


@pytest.mark.faults
def test_an_attempt_fenced_while_it_writes_commits_nothing(
    directory: Path, tmp_path: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.write(directory, example(2, "a"), lease=lease)
    real = checkpoint.write_new

    def overtaken(path: Path, content: bytes | memoryview) -> None:
        real(path, content)
        if path.name == MANIFEST:
            Lease.take(tmp_path)

    monkeypatch.setattr(checkpoint, "write_new", overtaken)
    for step in (2, 4):
        with pytest.raises(Fenced):
            checkpoint.write(directory, example(step, "b"), lease=lease)
    stored = newest(directory)
    assert stored is not None and stored.code_version == "a"
    assert names(directory) == ["step_000002"]


@pytest.mark.faults
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()],
    ids=["disk full", "interrupted"],
)
@pytest.mark.parametrize("at", range(5))
def test_a_write_that_fails_leaves_neither_a_step_nor_a_remainder(
    directory: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int
) -> None:
    checkpoint.write(directory, example(1), lease=lease)
    real, calls = checkpoint.write_new, []

    def failing(path: Path, content: bytes | memoryview) -> None:
        calls.append(path.name)
        if len(calls) == at + 1:
            path.write_bytes(bytes(content)[: len(content) // 2])
            raise error
        real(path, content)

    monkeypatch.setattr(checkpoint, "write_new", failing)
    with pytest.raises(type(error)):
        checkpoint.write(directory, example(2), lease=lease)
    assert len(calls) == at + 1
    assert names(directory) == ["step_000001"]
    stored = newest(directory)
    assert stored is not None and stored.updates_done == 1


def killed_at(point: int, directory: Path, work: Callable[[], object]) -> bool:
    """Runs ``work`` in a process of its own that dies, without cleaning up, before its ``point``-th
    call that names a path in ``directory``; False when there were not as many."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if any(
                isinstance(part, str | os.PathLike) and str(part).startswith(str(directory))
                for part in arguments
            ):
                seen += 1
                if seen == point:
                    os._exit(9)

        sys.addaudithook(count)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), "the work failed by itself"
    return code == 9


@pytest.mark.faults
@pytest.mark.parametrize("step", [2, 4], ids=["a step written again", "a new step"])
def test_a_process_killed_at_any_point_of_a_write_leaves_the_old_checkpoint_or_the_new_one(
    tmp_path: Path, step: int
) -> None:
    outcomes, point = [], 0
    while not outcomes or outcomes[-1][0]:
        point += 1
        run = tmp_path / str(point)
        run.mkdir()
        lease, directory = Lease.take(run), run / "checkpoints"
        for valid in (1, 2):
            checkpoint.write(directory, example(valid, "a"), lease=lease)
        again = example(step, "b")
        killed = killed_at(
            point,
            directory,
            lambda directory=directory, again=again, lease=lease: checkpoint.write(
                directory, again, lease=lease
            ),
        )
        stored = newest(directory)
        assert stored is not None
        assert (stored.code_version, stored.updates_done) in {("a", 2), ("b", step)}
        outcomes.append((killed, stored.code_version))

        after = Lease.take(run)
        checkpoint.write(directory, example(step, "b"), lease=after)
        checkpoint.prune(directory, 2, lease=after)
        assert names(directory) == (
            ["step_000001", "step_000002"] if step == 2 else ["step_000002", "step_000004"]
        )
    assert len(outcomes) > 10
    identities = "".join(identity for _, identity in outcomes)
    assert identities == "a" * identities.count("a") + "b" * identities.count("b"), (
        "once committed, a checkpoint stays"
    )
    assert identities[0] == "a" and identities[-1] == "b"


@pytest.mark.faults
def test_the_remainder_of_a_killed_write_is_not_taken_for_a_checkpoint_and_is_replaced(
    directory: Path, lease: Lease
) -> None:
    os.rename(
        checkpoint.write(directory, example(2), lease=lease),
        directory / f".tmp-{lease.epoch}-step_000002",
    )
    assert newest(directory) is None
    checkpoint.write(directory, example(2), lease=lease)
    assert names(directory) == ["step_000002"]


def test_a_disk_without_space_for_two_checkpoints_is_reported_before_one_is_written(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested = []

    def usage(path: Path) -> Any:
        requested.append(path)
        return type("Usage", (), {"free": 3_000_000_000})

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert checkpoint.disk_space_problem(directory, 1_500_000_000) == ""
    assert "3.00 GB are free" in checkpoint.disk_space_problem(directory, 1_500_000_001)
    assert requested == [directory.parent, directory.parent]
