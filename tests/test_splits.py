"""Splits share no image, and the fingerprint follows the content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from data_files import assert_equal_tasks, task_ids, write_folder, write_lines
from rl_edit.data import DataConfig, open_dataset, shapes
from rl_edit.data.compbench import write_compbench
from rl_edit.errors import InputError


def test_the_split_is_a_partition_that_stays_when_rows_are_added(tmp_path: Path) -> None:
    write_folder(tmp_path, num_rows=30, height=8, width=9)
    train, heldout = (
        task_ids(tmp_path, "train", heldout_fraction=0.3),
        task_ids(tmp_path, "heldout", heldout_fraction=0.3),
    )
    assert not train & heldout and len(train | heldout) == 30 and 3 <= len(heldout) <= 16
    write_folder(tmp_path, num_rows=40, height=8, width=9)
    assert train <= task_ids(tmp_path, "train", heldout_fraction=0.3)
    assert heldout <= task_ids(tmp_path, "heldout", heldout_fraction=0.3)


def test_rows_of_one_image_are_on_one_side(tmp_path: Path) -> None:
    write_folder(tmp_path, num_rows=6)
    rows = (
        {"source": f"p{index % 6}.png", "instruction": "x", "mask": f"p{index % 6}_mask.png"}
        for index in range(24)
    )
    path = write_lines(tmp_path, *rows)
    sides = [
        {task_id.split("#")[0] for task_id in task_ids(path, split, heldout_fraction=0.5)}
        for split in ("train", "heldout")
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_tiny_data_keeps_a_row_on_each_side(tmp_path: Path, fraction: float) -> None:
    write_folder(tmp_path, num_rows=2)
    assert len(task_ids(tmp_path, "train", heldout_fraction=fraction)) == 1
    assert len(task_ids(tmp_path, "heldout", heldout_fraction=fraction)) == 1


def test_a_single_image_serves_both_sides_with_a_warning(tmp_path: Path) -> None:
    write_folder(tmp_path, num_rows=1)
    for split in ("train", "heldout"):
        assert task_ids(tmp_path, split) == {"p0"}
        (notice,) = open_dataset(DataConfig(path=str(tmp_path)), split).notices
        assert notice.kind == "single-image" and "data.heldout_path" in notice.message


def test_strict_makes_a_notice_an_error(tmp_path: Path) -> None:
    write_folder(tmp_path, num_rows=1)
    with pytest.raises(InputError, match=r"a single image.*because of data\.strict"):
        open_dataset(DataConfig(path=str(tmp_path), strict=True), "train")


def test_train_and_heldout_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    for split, count in (("train", 9), ("heldout", 5)):
        write_compbench([shapes.task(split, index) for index in range(count)], tmp_path / split)
    for split, count in (("train", 9), ("heldout", 5)):
        assert task_ids(tmp_path, split) == {f"{split}-{index:06d}" for index in range(count)}


def test_a_heldout_path_leaves_all_of_path_for_training(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", num_rows=3)
    write_folder(tmp_path / "b", num_rows=2)
    options = {"heldout_path": str(tmp_path / "b")}
    assert (
        len(task_ids(tmp_path / "a", "train", **options)),
        len(task_ids(tmp_path / "a", "heldout", **options)),
    ) == (3, 2)


def test_the_builtin_world_obeys_its_configuration() -> None:
    config = DataConfig(seed=4, num_train=10, num_heldout=6, task_types=("remove", "add"))
    train, heldout = open_dataset(config, "train"), open_dataset(config, "heldout")
    assert (len(train), len(heldout)) == (10, 6)
    assert [train[index].task_type for index in range(4)] == ["remove", "add", "remove", "add"]
    assert_equal_tasks(train[3], shapes.task("train", 3, seed=4, task_type="add"))
    assert heldout[2].task_id == "heldout-000002" and heldout.fields == {
        "target",
        "caption",
        "regions",
    }
    with pytest.raises(IndexError):
        train[10]


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    prints = [
        open_dataset(DataConfig(seed=seed), split).fingerprint
        for seed in (0, 1)
        for split in ("train", "heldout")
    ]
    assert len(set(prints)) == 4 and prints[0] == open_dataset(DataConfig(), "train").fingerprint
    path = write_folder(tmp_path / "a")
    before = open_dataset(DataConfig(path=str(path)), "train").fingerprint
    moved = path.rename(tmp_path / "b")
    assert open_dataset(DataConfig(path=str(moved)), "train").fingerprint == before
    for file in moved.glob("*.txt"):
        file.write_text("something else")
    assert open_dataset(DataConfig(path=str(moved)), "train").fingerprint != before


def test_task_types_choose_rows_on_disk_and_must_exist(tmp_path: Path) -> None:
    write_compbench([shapes.task("train", index) for index in range(27)], tmp_path / "data")
    dataset = open_dataset(
        DataConfig(heldout_path=str(tmp_path / "data"), task_types=("replace",)), "heldout"
    )
    assert len(dataset) == 6 and {dataset[index].task_type for index in range(6)} == {"replace"}
    with pytest.raises(InputError, match=r"no task of type rotate. It has add, recolour"):
        open_dataset(DataConfig(path=str(tmp_path / "data"), task_types=("rotate",)), "train")
    with pytest.raises(InputError, match=r"no task type 'rotate'. Use some of add"):
        open_dataset(DataConfig(task_types=("rotate",)), "train")


@pytest.mark.parametrize(
    "bad",
    [
        {"pth": "x"},
        {"path": "builtin:mnist"},
        {"num_train": 0},
        {"heldout_fraction": 1.0},
        {"task_types": ()},
    ],
)
def test_impossible_configurations_are_refused_at_construction(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DataConfig(**bad)
