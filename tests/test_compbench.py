"""CompBench's layout reads back what was written; broken files are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_files import a_box, an_image, assert_equal_tasks, saved
from rl_edit.data import DataConfig, open_dataset, shapes
from rl_edit.data.compbench import list_compbench, write_compbench
from rl_edit.errors import InputError
from rl_edit.types import PairedTask


def test_the_compbench_layout_reads_back_exactly_what_was_written(tmp_path: Path) -> None:
    tasks = [shapes.task("heldout", index) for index in range(18)]
    progress: list[int] = []
    assert write_compbench(tasks, tmp_path / "data", progress.append) == 18
    assert progress == list(range(1, 19))
    dataset = open_dataset(DataConfig(heldout_path=str(tmp_path / "data")), "heldout")
    assert dataset.fields == {"target", "caption", "regions"} and len(dataset) == 18
    read = {dataset[index].task_id: dataset[index] for index in range(18)}
    for task in tasks:
        assert_equal_tasks(read[task.task_id], task)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    entries = json.loads((tmp_path / "data/tasks/add/metadata.json").read_text())
    assert {"image_path", "instruction", "caption"} <= set(entries[0])
    mask = np.asarray(Image.open(tmp_path / "data/tasks/add/mask" / entries[0]["image_path"]))
    assert (
        set(np.unique(mask)) == {0, 255}
        and mask[read[entries[0]["task_id"]].edit_mask.numpy()].min() == 255
    )


def test_the_benchmark_s_own_rows_are_read_and_frames_of_one_clip_stay_together(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "tasks/remove"
    entries = [
        {"image_path": f"{clip}/0/0000{frame}.png", "instruction": "remove it", "caption": "a fish"}
        for clip in "abcdef"
        for frame in range(3)
    ]
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text(json.dumps(entries))
    for entry in entries:
        for kind in ("input_image", "edited_image"):
            clip = ord(entry["image_path"][0])
            saved(folder / kind / entry["image_path"], an_image(20, 30, seed=clip))
        saved(folder / "mask" / entry["image_path"], a_box(20, 30))
    assert list_compbench(tmp_path).requests[0].task_id == "remove/a/0/00000"
    sides = [
        open_dataset(DataConfig(path=str(tmp_path), heldout_fraction=0.5), split)
        for split in ("train", "heldout")
    ]
    clips = [
        {dataset[index].task_id.split("/")[1] for index in range(len(dataset))} for dataset in sides
    ]
    assert clips[0] and clips[1] and not clips[0] & clips[1] and len(sides[0]) + len(sides[1]) == 18
    assert type(sides[0][0]) is PairedTask and sides[0].fields == {"target", "caption"}


def test_writing_refuses_a_directory_in_use_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"not an empty directory.*Name a new directory"):
        write_compbench([shapes.task("train", 0)], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_writing_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    task = shapes.task("train", 0)
    for tasks, words in (
        ([task, task], "occurs twice"),
        ([], "no tasks"),
        ([dataclasses.replace(task, task_id="../x")], "cannot name files"),
    ):
        with pytest.raises(InputError, match=words):
            write_compbench(tasks, tmp_path / "data")
        assert list(tmp_path.iterdir()) == []


def test_writing_into_an_empty_directory_works(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_compbench([shapes.task("train", 0)], tmp_path / "data")
    assert len(list_compbench(tmp_path / "data").requests) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not readable JSON"),
        ("{}", "not an array"),
        ("[]", "no entries"),
        ('[{"image_path": "a.png"}]', "entry 1: has no 'instruction'"),
        ('[{"image_path": "../a.png", "instruction": "x"}]', "leaves its folder"),
        ('[{"image_path": "a.png", "instruction": "x"}]', "not found"),
        ("[3]", "is a int, not an object"),
    ],
)
def test_broken_compbench_metadata_is_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "tasks/add").mkdir(parents=True)
    (tmp_path / "tasks/add/metadata.json").write_text(content)
    with pytest.raises(InputError, match=words):
        open_dataset(DataConfig(path=str(tmp_path)), "train")


def test_a_region_map_that_contradicts_the_mask_is_refused(tmp_path: Path) -> None:
    write_compbench(
        [shapes.task("train", 0, task_type="add"), shapes.task("train", 1, task_type="add")],
        tmp_path / "data",
    )
    regions = tmp_path / "data/tasks/add/regions/train-000000.png"
    Image.fromarray(np.ones((64, 64), dtype=np.uint8)).save(regions)
    with pytest.raises(InputError, match="does not agree with the mask"):
        open_dataset(DataConfig(path=str(tmp_path / "data")), "train")
