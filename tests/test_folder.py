"""A user's data in JSON lines and plain folders; bad rows are refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_files import a_box, all_tasks, an_image, saved, write_folder, write_lines
from rl_edit.data import DataConfig, open_dataset
from rl_edit.errors import InputError
from rl_edit.types import EditTask, PairedTask


def test_a_plain_folder_is_read_with_masks_and_instructions_beside_the_images(
    tmp_path: Path,
) -> None:
    tasks = all_tasks(write_folder(tmp_path))
    assert [task.task_id for task in tasks] == ["p0", "p1", "p2", "p3"]
    assert [task.instruction for task in tasks] == [f"edit number {index}" for index in range(4)]
    for index, task in enumerate(tasks):
        assert type(task) is EditTask and task.task_type == "edit"
        assert np.array_equal(task.source.numpy(), an_image(37, 53, seed=index))
        assert np.array_equal(task.edit_mask.numpy(), a_box(37, 53) > 0)


@pytest.mark.parametrize("layout", ["images", "sources", "dotted"])
def test_other_folder_layouts_are_read(tmp_path: Path, layout: str) -> None:
    place = tmp_path / layout if layout != "dotted" else tmp_path
    saved(place / "A.JPG", an_image(20, 24), format="JPEG")
    saved(tmp_path / ("A.mask.png" if layout == "dotted" else "masks/A.png"), a_box(20, 24))
    saved(
        tmp_path / ("A_target.png" if layout == "dotted" else "targets/A.png"),
        an_image(20, 24, seed=1),
    )
    if layout == "images":
        (tmp_path / "instructions.json").write_text('{"A": "do it"}')
    elif layout == "sources":
        (tmp_path / "instructions.csv").write_text('name,instruction\nA.JPG,"do it"\n')
    else:
        (tmp_path / "A.txt").write_text("do it", encoding="utf-8-sig")
    (task,) = all_tasks(tmp_path)
    assert isinstance(task, PairedTask) and task.instruction == "do it"
    assert np.array_equal(task.target.numpy(), an_image(20, 24, seed=1))


def test_json_lines_take_every_spelling_of_their_keys_and_paths_relative_to_the_file(
    tmp_path: Path,
) -> None:
    write_folder(tmp_path / "photos")
    names = [("source", "instruction"), ("image", "prompt"), ("input_image", "prompt")]
    rows: list[dict[str, Any]] = [
        {
            source: f"photos/p{index}.png",
            text: "go",
            "mask": f"photos/p{index}_mask.png",
            "width": 3,
            "caption": None,
        }
        for index, (source, text) in enumerate(names)
    ]
    rows.append(
        rows[0]
        | {
            "instruction": "again",
            "task_type": "add",
            "caption": "a hat",
            "target": "photos/p1.png",
        }
    )
    rows.append(rows[1] | {"id": 77})
    tasks = all_tasks(write_lines(tmp_path, *rows))
    assert [task.task_id for task in tasks] == [
        "77",
        "photos/p0",
        "photos/p0#2",
        "photos/p1",
        "photos/p2",
    ]
    assert isinstance(tasks[2], PairedTask) and (tasks[2].caption, tasks[2].task_type) == (
        "a hat",
        "add",
    )
    assert type(tasks[0]) is EditTask


def test_metadata_jsonl_in_a_folder_comes_before_the_pairs(tmp_path: Path) -> None:
    write_folder(tmp_path)
    write_lines(
        tmp_path, {"source": "p0.png", "instruction": "only this", "mask": "p0_mask.png"}
    ).rename(tmp_path / "metadata.jsonl")
    assert [task.instruction for task in all_tasks(tmp_path)] == ["only this"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"source": "p0.png", "mask": "p0_mask.png"},
            r"line 1: has no 'instruction' \(read from: instruction, prompt; the row has: ",
        ),
        ({"source": "p0.png", "instruction": " ", "mask": "p0_mask.png"}, "has no 'instruction'"),
        (
            {"source": "p0.png", "instruction": "x", "mask": "p0_mask.png", "tagret": "p1.png"},
            "did you mean 'target'",
        ),
        ({"source": 3, "instruction": "x", "mask": "p0_mask.png"}, "'source' is a int, not text"),
        (
            {"source": "p0.png", "image": "p1.png", "instruction": "x", "mask": "p0_mask.png"},
            "gives 'source' twice",
        ),
        (
            {"source": "gone.png", "instruction": "x", "mask": "p0_mask.png"},
            r"rows.jsonl line 1: .*gone.png not found",
        ),
        (
            {"source": "p0.txt", "instruction": "x", "mask": "p0_mask.png"},
            "p0.txt cannot be read as an image.*save it again",
        ),
        ([1], "is a JSON list, not an object"),
    ],
)
def test_broken_rows_are_refused_with_their_line(tmp_path: Path, row: Any, words: str) -> None:
    write_folder(tmp_path)
    with pytest.raises(InputError, match=words):
        all_tasks(write_lines(tmp_path, row))


def test_lines_that_are_not_json_or_missing_altogether_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{source: 3}\n")
    with pytest.raises(InputError, match="line 1: is not JSON"):
        all_tasks(path)
    path.write_text("\n\n")
    with pytest.raises(InputError, match=r"has no rows.*Write one JSON object a line"):
        all_tasks(path)


def test_all_rows_are_checked_and_the_first_five_problems_shown(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path,
        *(
            {"source": f"gone{index}.png", "instruction": "x", "mask": "m.png"}
            for index in range(12)
        ),
    )
    with pytest.raises(InputError) as caught:
        all_tasks(path)
    message = str(caught.value)
    assert (
        "12 problems in 12 rows" in message
        and message.count("not found") == 5
        and "and 7 more" in message
        and "\n" not in message
    )


@pytest.mark.parametrize(("suffix", "keep"), [("png", 0.6), ("jpg", 0.6), ("webp", 0.6)])
def test_a_truncated_image_is_found_when_the_dataset_is_opened(
    tmp_path: Path, suffix: str, keep: float
) -> None:
    write_folder(tmp_path, num_rows=1)
    content = saved(tmp_path / f"cut.{suffix}", an_image(37, 53)).read_bytes()
    (tmp_path / f"cut.{suffix}").write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(InputError, match=rf"line 1: .*cut.{suffix} cannot be read as an image"):
        all_tasks(
            write_lines(
                tmp_path, {"source": f"cut.{suffix}", "instruction": "x", "mask": "p0_mask.png"}
            )
        )


def test_a_mask_of_another_size_is_refused_naming_both(tmp_path: Path) -> None:
    write_folder(tmp_path)
    saved(tmp_path / "p2_mask.png", a_box(30, 53))
    with pytest.raises(
        InputError,
        match=r"p2_mask.png is 53x30 but .*p2.png is 53x37.*"
        r"Save both with the same width and height",
    ):
        all_tasks(tmp_path)


def test_a_mask_drawn_on_unturned_pixels_is_refused_and_the_exif_rotation_named(
    tmp_path: Path,
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    saved(tmp_path / "photo.jpg", an_image(30, 40), exif=exif)
    (tmp_path / "photo.txt").write_text("x")
    saved(tmp_path / "photo_mask.png", a_box(30, 40))
    with pytest.raises(InputError, match="carries an EXIF rotation"):
        all_tasks(tmp_path)
    saved(tmp_path / "photo_mask.png", a_box(40, 30))
    (task,) = all_tasks(tmp_path)
    assert tuple(task.edit_mask.shape) == (40, 30) and tuple(task.source.shape) == (40, 30, 3)


@pytest.mark.parametrize("value", [0, 255])
def test_an_empty_or_full_mask_is_an_error_or_skipped_and_counted(
    tmp_path: Path, value: int
) -> None:
    write_folder(tmp_path)
    saved(tmp_path / "p1_mask.png", np.full((37, 53), value, dtype=np.uint8))
    with pytest.raises(
        InputError,
        match=r"p1_mask.png is empty or full: a mask must leave something to edit and something "
        r"to keep.*skip",
    ):
        all_tasks(tmp_path)
    dataset = open_dataset(DataConfig(heldout_path=str(tmp_path), empty_mask="skip"), "heldout")
    assert (len(dataset), dataset.skipped) == (3, 1)


def test_skipping_every_row_is_an_error_that_points_at_the_polarity(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for index in range(4):
        saved(tmp_path / f"p{index}_mask.png", np.zeros((37, 53), dtype=np.uint8))
    with pytest.raises(InputError, match=r"every mask \(4\) is empty or full.*data.mask_polarity"):
        all_tasks(tmp_path, empty_mask="skip")


def test_zero_one_masks_are_warned_about_once(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for index in range(3):
        saved(tmp_path / f"p{index}_mask.png", a_box(37, 53) // 255)
    tasks = all_tasks(tmp_path)
    dataset = open_dataset(DataConfig(path=str(tmp_path)), "train")
    (notice,) = (found for found in dataset.notices if found.kind == "zero-one-masks")
    assert (notice.kind, notice.count) == ("zero-one-masks", 3)
    assert "3 masks hold only the values 0 and 1; 1 is read as edit" in notice.message
    assert all(np.array_equal(task.edit_mask.numpy(), a_box(37, 53) > 0) for task in tasks)


def test_polarity_turns_masks_of_a_dataset(tmp_path: Path) -> None:
    (task, *_) = all_tasks(write_folder(tmp_path), mask_polarity="edit_black")
    assert np.array_equal(task.edit_mask.numpy(), a_box(37, 53) == 0)


def test_a_folder_without_a_dataset_says_what_was_looked_for_and_found(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("x")
    write_lines(tmp_path, {})
    with pytest.raises(
        InputError,
        match=r"Looked for metadata.jsonl.*NAME_mask.png.*Found readme.md, rows.jsonl. Is it "
        r"data.path=.*rows.jsonl",
    ):
        open_dataset(DataConfig(path=str(tmp_path)), "train")
    with pytest.raises(InputError, match="does not exist"):
        open_dataset(DataConfig(path=str(tmp_path / "nowhere")), "train")
    with pytest.raises(InputError, match=r"not .jsonl"):
        open_dataset(DataConfig(path=str(tmp_path / "readme.md")), "train")


def test_incomplete_pairs_are_refused_by_name(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "p0_mask.png").unlink()
    (tmp_path / "p1.txt").unlink()
    saved(tmp_path / "p2.jpg", an_image(37, 53))
    saved(tmp_path / "p3_mask.jpg", a_box(37, 53))
    saved(tmp_path / "other_mask.png", a_box(37, 53))
    with pytest.raises(InputError) as caught:
        all_tasks(tmp_path)
    for words in (
        "p0.png: has no mask (looked for p0_mask.png",
        "p1.png: has no instruction (looked for p1.txt",
        "has the same name as p2.png",
        "has more than one mask (p3_mask.png and p3_mask.jpg)",
        "Also: 1 mask is not used: no image of its name is here (first: other_mask.png)",
    ):
        assert words in str(caught.value)


def test_ids_used_twice_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    row = {"id": "same", "source": "p0.png", "instruction": "x", "mask": "p0_mask.png"}
    with pytest.raises(InputError, match="'same' is used more than once"):
        all_tasks(write_lines(tmp_path, row, row))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("instructions.json", '["a"]'),
        ("instructions.json", "{"),
        ("instructions.csv", "file,text\na,b\n"),
        ("instructions.csv", b"\xff\xfe\xfa"),
    ],
)
def test_broken_instruction_files_are_refused_by_name(
    tmp_path: Path, name: str, content: str | bytes
) -> None:
    write_folder(tmp_path)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match="instructions"):
        all_tasks(tmp_path)


def test_targets_that_are_their_sources_are_counted(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for index in range(4):
        image = an_image(37, 53, seed=index)
        # One target is edited.
        saved(tmp_path / f"p{index}_target.png", np.where(index < 3, image, 255 - image))
    kinds = {
        notice.kind: notice
        for notice in open_dataset(
            DataConfig(path=str(tmp_path), heldout_path=str(tmp_path)), "train"
        ).notices
    }
    assert kinds["targets-without-edit"].count == 3
    assert "show no edit" in kinds["targets-without-edit"].message
