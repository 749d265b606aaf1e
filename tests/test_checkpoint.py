"""Checkpoints: whole or absent, verified byte by byte, and never a reason to lose a run."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import adapter_bytes, events_of, metrics_of, run_inline, small_config

from learner import checkpoint
from learner.checkpoint import MANIFEST, Checkpoint
from rl_edit.adapters import digest
from rl_edit.errors import InputError
from rl_edit.types import AdapterId, AdapterWeights


def weights(step: int) -> AdapterWeights:
    tensors = {"block.lora_A.weight": torch.full((2, 3), float(step)), "block.lora_B.weight": torch.arange(6.0).reshape(3, 2)}
    return AdapterWeights(id=AdapterId(step, digest(tensors)), tensors=tensors)


def example(step: int, identity: str = "c" * 64) -> Checkpoint:
    learner = {
        "parameter/block": torch.randn(3, 2),
        "optimizer/exp_avg/block": torch.randn(3, 2),
        "optimizer/step/block": torch.tensor(float(step)),
    }
    return Checkpoint(updates_done=step, identity=identity, learner=learner, acting=(weights(step - 1), weights(step)))


def steps(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class Heard:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, event: str, **details: Any) -> None:
        self.events.append((event, details))


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    given = example(7)
    checkpoint.write(tmp_path, given)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert (found.updates_done, found.identity) == (7, given.identity)
    assert found.learner.keys() == given.learner.keys()
    assert all(torch.equal(found.learner[name], given.learner[name]) for name in given.learner)
    assert [w.id for w in found.acting] == [w.id for w in given.acting]
    assert all(digest(w.tensors) == w.id.sha256 for w in found.acting)


def test_the_newest_step_is_read(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        checkpoint.write(tmp_path, example(step))
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.updates_done == 10


def test_without_checkpoints_there_is_nothing_to_read(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "absent") is None


@pytest.mark.parametrize("name", ["learner.safetensors", "state.json", "acting_000001.safetensors", MANIFEST])
@pytest.mark.parametrize("where", [0.0, 0.3, 0.7, 0.999])
def test_a_flipped_bit_in_any_file_is_found(tmp_path: Path, name: str, where: float) -> None:
    path = checkpoint.write(tmp_path, example(2))
    assert checkpoint.verify(path) is None
    content = bytearray((path / name).read_bytes())
    content[int(where * len(content))] ^= 0b1
    (path / name).write_bytes(content)
    assert checkpoint.verify(path) is not None


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


@pytest.mark.faults
@pytest.mark.parametrize("damage", [flip, truncate, lose_manifest, lose_a_file, empty_manifest])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path: Path, damage: Any) -> None:
    checkpoint.write(tmp_path, example(2))
    damage(checkpoint.write(tmp_path, example(4)))
    heard = Heard()
    found = checkpoint.newest(tmp_path, on_corrupt=heard)
    assert found is not None and found.updates_done == 2
    ((event, details),) = heard.events
    assert (event, details["path"]) == ("checkpoint_corrupt", "step_000004")
    assert details["problem"]
    assert steps(tmp_path) == [".corrupt-step_000004", "step_000002"]


@pytest.mark.faults
def test_the_same_step_may_be_damaged_twice(tmp_path: Path) -> None:
    for _ in range(2):
        flip(checkpoint.write(tmp_path, example(4)))
        assert checkpoint.newest(tmp_path) is None
    assert steps(tmp_path) == [".corrupt-step_000004", ".corrupt-step_000004-1"]


@pytest.mark.faults
def test_a_run_goes_on_from_the_last_sound_checkpoint_and_reports_the_bad_one(small_editor: str, tmp_path: Path) -> None:
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
def test_a_run_of_which_no_sound_checkpoint_is_left_is_not_started_over(small_editor: str, tmp_path: Path) -> None:
    config = small_config(small_editor, "train.updates=1")
    run_inline(config, tmp_path)
    flip(tmp_path / "checkpoints" / "step_000001")
    curves = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"no sound checkpoint is left .*\.corrupt-step_000001"):
        run_inline(config, tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == curves


def test_whose_a_run_is_says_its_newest_sound_checkpoint_and_nothing_is_moved_to_find_out(tmp_path: Path) -> None:
    assert checkpoint.newest_identity(tmp_path) is None
    checkpoint.write(tmp_path, example(2, "a" * 64))
    flip(checkpoint.write(tmp_path, example(4, "b" * 64)))
    assert checkpoint.newest_identity(tmp_path) == "a" * 64
    assert steps(tmp_path) == ["step_000002", "step_000004"]


def test_a_checkpoint_of_other_settings_is_refused(small_editor: str, tmp_path: Path) -> None:
    run_inline(small_config(small_editor, "train.updates=1"), tmp_path)
    with pytest.raises(InputError, match="belongs to another run"):
        run_inline(small_config(small_editor, "train.updates=1", "train.learning_rate=1e-4"), tmp_path, resume=True)


def test_more_updates_other_places_and_other_names_are_the_same_settings(small_editor: str) -> None:
    base = small_config(small_editor).sha256()
    same = (
        "train.updates=99", "name=other", "actors.num_rollout=2", "evaluation.num_tasks=5", "train.checkpoint_every=7",
        "train.keep_checkpoints=5", "train.max_dropped_groups=1", "data.path=elsewhere", "editor.path=elsewhere", "editor.device=auto",
    )  # fmt: skip
    other = ("seed=1", "train.learning_rate=1e-4", "rollout.group_size=5", "data.num_train=9", "lora.rank=2", "editor.guidance=1")
    assert all(small_config(small_editor, change).sha256() == base for change in same)
    assert all(small_config(small_editor, change).sha256() != base for change in other)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.write(tmp_path, example(step))
        checkpoint.prune(tmp_path, 2)
    assert steps(tmp_path) == ["step_000004", "step_000005"]


def test_a_checkpoint_is_safetensors_and_json_and_no_pickle_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint.write(tmp_path, example(3))
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    for name in ("learner.pt", "learner.pkl"):
        (path / name).write_bytes(pickle.dumps("whoever reads this trusts the disk"))

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was opened")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, opened)
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.updates_done == 3


@pytest.mark.faults
@pytest.mark.parametrize("moment", ["save_file", "_sync"])
def test_an_interrupted_write_leaves_neither_a_step_nor_a_remainder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    checkpoint.write(tmp_path, example(1))
    real, calls = getattr(checkpoint, moment), []

    def interrupted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(checkpoint, moment, interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(tmp_path, example(2))
    assert steps(tmp_path) == ["step_000001"]


@pytest.mark.faults
def test_the_remainder_of_a_killed_write_is_not_taken_for_a_checkpoint_and_is_replaced(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, example(2))
    os.rename(path, tmp_path / ".tmp-step_000002")
    assert checkpoint.newest(tmp_path) is None
    checkpoint.write(tmp_path, example(2))
    assert steps(tmp_path) == ["step_000002"]


def test_a_step_written_again_replaces_the_old_one(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, example(2, "a" * 64))
    checkpoint.write(tmp_path, example(2, "b" * 64))
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.identity == "b" * 64
    shutil.rmtree(tmp_path / "step_000002")
    assert checkpoint.newest(tmp_path) is None
