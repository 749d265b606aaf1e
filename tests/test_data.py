"""Data: the built-in world is deterministic and exact, disk layouts read back what was written, bad rows are refused in words."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from rl_edit.data import DataConfig, open_dataset, shapes
from rl_edit.data.canvas import canvas_size, fit
from rl_edit.data.compbench import read_compbench, write_compbench
from rl_edit.data.images import read_mask, read_rgb, upright_size
from rl_edit.data.shapes.scenes import compose
from rl_edit.errors import InputError
from rl_edit.types import EditTask, PairedRegionsTask, PairedTask


def assert_equal_tasks(actual: EditTask, expected: EditTask) -> None:
    assert type(actual) is type(expected)
    for field in dataclasses.fields(expected):
        ours, theirs = getattr(actual, field.name), getattr(expected, field.name)
        if isinstance(theirs, torch.Tensor):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), field.name
        else:
            assert ours == theirs, field.name


# ---------------------------------------------------------------------------------------------------------------------
# The built-in world


def test_a_task_is_the_same_bytes_in_another_process() -> None:
    code = (
        "import hashlib; from rl_edit.data import shapes; b = shapes.batch('train', 5, 40, seed=3);"
        "print(hashlib.sha256(b.source.numpy().tobytes() + b.target.numpy().tobytes() + repr(b.instructions).encode()).hexdigest())"
    )
    root = Path(__file__).parents[1]
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    ).stdout.strip()
    here = shapes.batch("train", 5, 40, seed=3)
    content = (
        here.source.numpy().tobytes()
        + here.target.numpy().tobytes()
        + repr(here.instructions).encode()
    )
    assert other == hashlib.sha256(content).hexdigest()


def test_a_batch_holds_the_same_tasks_as_one_by_one() -> None:
    batch = shapes.batch("pretrain", 11, 9, seed=2)
    for row in range(9):
        task = shapes.task("pretrain", 11 + row, seed=2)
        assert torch.equal(batch.source[row], task.source) and torch.equal(
            batch.target[row], task.target
        )
        assert torch.equal(batch.mask[row], task.edit_mask)
        assert (batch.instructions[row], batch.task_types[row]) == (
            task.instruction,
            task.task_type,
        )


def test_splits_and_seeds_share_no_scene() -> None:
    seen: dict[str, set[bytes]] = {}
    for split in shapes.SPLITS:
        for seed in (0, 1):
            batch = shapes.batch(split, 0, 1000, seed=seed)
            images = torch.cat([batch.source, batch.target]).numpy()
            seen[f"{split}{seed}"] = {hashlib.sha256(image.tobytes()).digest() for image in images}
            assert len(seen[f"{split}{seed}"]) == 2000
    assert len(set.union(*seen.values())) == sum(len(hashes) for hashes in seen.values())


def test_source_equals_target_outside_the_mask_and_differs_in_every_region() -> None:
    for index in range(900):
        task = shapes.task("train", index)
        changed = (task.source != task.target).any(dim=-1)
        assert not bool((changed & ~task.edit_mask).any())
        for region in task.regions:
            assert bool((changed & region).any())
        assert torch.equal(task.regions.any(dim=0), task.edit_mask)
        assert int(task.regions.sum(dim=0).max()) == 1
        assert len(task.regions) == (2 if task.task_type == "two_regions" else 1)


def test_the_mask_is_the_bounding_box_of_the_change_widened_by_the_margin() -> None:
    for index in range(300):
        task = shapes.task("heldout", index)
        if task.task_type == "two_regions":
            continue
        changed = (task.source != task.target).any(dim=-1).nonzero()
        top, left = (changed.min(dim=0).values - shapes.MASK_MARGIN).clamp(min=0).tolist()
        bottom, right = (
            (changed.max(dim=0).values + shapes.MASK_MARGIN).clamp(max=shapes.SIZE - 1).tolist()
        )
        expected = torch.zeros(shapes.SIZE, shapes.SIZE, dtype=torch.bool)
        expected[top : bottom + 1, left : right + 1] = True
        assert torch.equal(task.edit_mask, expected)


def test_the_edit_takes_between_5_and_20_percent_of_the_picture() -> None:
    share = shapes.batch("train", 0, 2000).mask.float().mean(dim=(1, 2))
    assert float(share.min()) >= 0.05 and float(share.max()) <= 0.20


def test_every_stretch_of_tasks_is_balanced_over_types_and_a_type_can_be_asked_for() -> None:
    types = shapes.batch("heldout", 100, 90).task_types
    assert {task_type: types.count(task_type) for task_type in shapes.TASK_TYPES} == {
        "add": 20,
        "remove": 20,
        "replace": 20,
        "recolour": 20,
        "two_regions": 10,
    }
    assert all(
        shapes.task("train", 7, task_type=task_type).task_type == task_type
        for task_type in shapes.TASK_TYPES
    )


def test_instructions_use_exactly_the_vocabulary() -> None:
    words: set[str] = set()
    for instruction in shapes.batch("pretrain", 0, 4000).instructions:
        words.update(instruction.split(" "))
    assert words == set(shapes.vocabulary())


def _objects(words: list[str]) -> list[tuple[str, str]]:
    return [
        (colour, shape)
        for colour, shape in itertools.pairwise(words)
        if colour in shapes.COLOURS and shape in shapes.SHAPES
    ]


def test_the_object_to_remove_is_there_before_and_gone_after() -> None:
    for index in range(200):
        task = shapes.task("train", index, task_type="remove")
        (named,) = _objects(task.instruction.split())
        colour = torch.tensor(shapes.COLOURS[named[0]])
        before = (task.source == colour).all(dim=-1) & task.edit_mask
        after = (task.target == colour).all(dim=-1) & task.edit_mask
        assert int(before.sum()) > 20 and int(after.sum()) == 0


def test_added_and_recoloured_objects_show_the_colour_asked_for() -> None:
    for index in range(200):
        added = shapes.task("train", index, task_type="add")
        colour = torch.tensor(shapes.COLOURS[_objects(added.instruction.split())[0][0]])
        assert int(((added.target == colour).all(dim=-1) & added.edit_mask).sum()) > 20
        painted = shapes.task("train", index, task_type="recolour")
        colour = torch.tensor(shapes.COLOURS[painted.instruction.split()[-1]])
        assert int(((painted.target == colour).all(dim=-1) & painted.edit_mask).sum()) > 20
        assert int(((painted.source == colour).all(dim=-1) & painted.edit_mask).sum()) == 0


def test_the_place_of_an_added_object_follows_from_the_words() -> None:
    corners = {
        "top left": (True, True),
        "top right": (True, False),
        "bottom left": (False, True),
        "bottom right": (False, False),
    }
    num_checked = 0
    for index in range(300):
        task = shapes.task("train", index, task_type="add")
        rows, columns = task.edit_mask.nonzero().float().mean(dim=0).tolist()
        for words, (top, left) in corners.items():
            if f"in the {words} corner" in task.instruction:
                assert (rows < 32, columns < 32) == (top, left)
                num_checked += 1
        if "to the left of the" in task.instruction:
            anchor = torch.tensor(shapes.COLOURS[_objects(task.instruction.split())[1][0]])
            assert ((task.source == anchor).all(dim=-1)).nonzero()[:, 1].float().max() > columns
            num_checked += 1
    assert num_checked > 100


def test_no_name_of_a_scene_is_used_twice_before_or_after() -> None:
    for index in range(2000):
        scene = compose(shapes.TASK_TYPES[index % 5], random.Random(index))
        for state in ("before", "after"):
            changed = [getattr(change, state) for change in scene.changes]
            things = [thing for thing in (*changed, *scene.bystanders) if thing is not None]
            assert len({thing.name for thing in things}) == len(things)
        things = [*(change.place for change in scene.changes), *scene.bystanders]
        assert 2 <= len(things) <= 4
        for this in things:
            assert (
                min(this.x, this.y) - this.radius >= 1
                and max(this.x, this.y) + this.radius <= shapes.SIZE - 1
            )


def test_objects_stand_out_from_the_ground() -> None:
    for index in range(200):
        task = shapes.task("validation", index, task_type="remove")
        change = (task.source.float() - task.target.float()).norm(dim=-1)
        assert float(change.max()) > 60


def test_every_region_has_a_caption() -> None:
    for index in range(90):
        task = shapes.task("train", index)
        captions = task.caption.split("|")
        assert len(captions) == len(task.regions) and all(captions)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: shapes.task("test", 0), "Use one of pretrain, train"),
        (lambda: shapes.task("train", 0, task_type="rotate"), "Use one of add, remove"),
        (lambda: shapes.task("train", -1), "index >= 0"),
        (lambda: shapes.batch("train", 0, 0), "count >= 1"),
    ],
)
def test_shapes_refuses_what_it_cannot_draw(call: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


# ---------------------------------------------------------------------------------------------------------------------
# CompBench's layout


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
            _save(folder / kind / entry["image_path"], _image(20, 30))
        _save(folder / "mask" / entry["image_path"], _box(20, 30))
    assert read_compbench(tmp_path)[0].task_id == "remove/a/0/00000"
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
    assert len(read_compbench(tmp_path / "data")) == 1


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


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and masks


def _image(height: int, width: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _box(height: int, width: int) -> np.ndarray[Any, Any]:
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[height // 4 : height // 2, width // 3 : width // 2] = 255
    return mask


def _save(path: Path, pixels: np.ndarray[Any, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_images_and_sizes(tmp_path: Path, orientation: int) -> None:
    upright = _image(5, 7)
    # The inverse of each EXIF turn, written out: stored pixels whose display is ``upright``.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = _save(tmp_path / "turned.png", np.ascontiguousarray(stored), exif=exif)
    assert np.array_equal(read_rgb(path, where="row"), upright)
    assert upright_size(path, where="row") == (5, 7)
    mask_path = _save(tmp_path / "mask.png", np.ascontiguousarray(stored[..., 0]), exif=exif)
    assert np.array_equal(
        read_mask(mask_path, polarity="edit_white", where="row").edit, upright[..., 0] >= 128
    )


def test_palette_grey_and_sixteen_bit_images_become_rgb(tmp_path: Path) -> None:
    colours = np.array([[[255, 0, 0], [0, 128, 0]], [[0, 0, 255], [10, 20, 30]]], dtype=np.uint8)
    Image.fromarray(colours).quantize(4).save(tmp_path / "palette.png")
    assert Image.open(tmp_path / "palette.png").mode == "P"
    assert np.array_equal(read_rgb(tmp_path / "palette.png", where="row"), colours)
    _save(tmp_path / "grey.png", colours[..., 0])
    assert np.array_equal(
        read_rgb(tmp_path / "grey.png", where="row"), np.repeat(colours[..., :1], 3, axis=2)
    )
    _save(tmp_path / "sixteen.png", colours[..., 1].astype(np.uint16) * 257)
    assert np.array_equal(
        read_rgb(tmp_path / "sixteen.png", where="row"), np.repeat(colours[..., 1:2], 3, axis=2)
    )
    Image.new("CMYK", (3, 2), (0, 0, 0, 0)).save(tmp_path / "cmyk.tif")
    assert read_rgb(tmp_path / "cmyk.tif", where="row").min() == 255
    Image.new("1", (3, 2), 1).save(tmp_path / "bits.png")
    assert read_rgb(tmp_path / "bits.png", where="row").shape == (2, 3, 3)


def test_transparency_is_composited_on_white(tmp_path: Path) -> None:
    pixels = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 128]]], dtype=np.uint8)
    path = _save(tmp_path / "glass.png", pixels)
    assert read_rgb(path, where="row")[0].tolist() == [
        [200, 0, 0],
        [255, 255, 255],
        [127, 127, 127],
    ]


def test_masks_of_any_mode_are_split_at_half(tmp_path: Path) -> None:
    soft = np.array([[0, 100, 127, 128, 255]], dtype=np.uint8)
    expected = soft >= 128
    paint = np.zeros((1, 5, 3), dtype=np.uint8)
    paint[..., 0] = soft
    strokes = np.zeros((1, 5, 4), dtype=np.uint8)
    strokes[..., :3], strokes[..., 3] = 255, soft
    for name, pixels in {
        "grey": soft,
        "red paint": paint,
        "strokes": strokes,
        "sixteen": soft.astype(np.uint16) * 257,
    }.items():
        mask = read_mask(
            _save(tmp_path / f"{name}.png", pixels), polarity="edit_white", where="row"
        )
        assert np.array_equal(mask.edit, expected), name
        assert not mask.zero_one


def test_zero_one_masks_are_recognised(tmp_path: Path) -> None:
    ones = (_box(6, 9) > 0).astype(np.uint8)
    label = Image.fromarray(ones, mode=None).convert("P")
    label.putpalette([0, 0, 0, 100, 0, 0])
    label.save(tmp_path / "label.png")
    assert Image.open(tmp_path / "label.png").mode == "P"
    _save(tmp_path / "grey.png", ones)
    _save(tmp_path / "sixteen.png", ones.astype(np.uint16))
    for name in ("label", "grey", "sixteen"):
        mask = read_mask(tmp_path / f"{name}.png", polarity="edit_white", where="row")
        assert mask.zero_one and np.array_equal(mask.edit, ones > 0), name


def test_edit_black_is_the_complement_of_edit_white(tmp_path: Path) -> None:
    path = _save(tmp_path / "mask.png", _box(8, 8))
    white, black = (
        read_mask(path, polarity=polarity, where="row").edit
        for polarity in ("edit_white", "edit_black")
    )
    assert np.array_equal(white, ~black) and white.any()


# ---------------------------------------------------------------------------------------------------------------------
# A person's own data


def _folder(root: Path, num_rows: int = 4, height: int = 37, width: int = 53) -> Path:
    for index in range(num_rows):
        _save(root / f"p{index}.png", _image(height, width, seed=index))
        _save(root / f"p{index}_mask.png", _box(height, width))
        (root / f"p{index}.txt").write_text(f"  edit\n number {index} ")
    return root


def _jsonl(root: Path, *rows: dict[str, Any]) -> Path:
    path = root / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def _all(path: Path, **options: Any) -> list[EditTask]:
    dataset = open_dataset(
        DataConfig(path="builtin:shapes", heldout_path=str(path), **options), "heldout"
    )
    return sorted((dataset[index] for index in range(len(dataset))), key=lambda task: task.task_id)


def test_a_plain_folder_is_read_with_masks_and_instructions_beside_the_pictures(
    tmp_path: Path,
) -> None:
    tasks = _all(_folder(tmp_path))
    assert [task.task_id for task in tasks] == ["p0", "p1", "p2", "p3"]
    assert [task.instruction for task in tasks] == [f"edit number {index}" for index in range(4)]
    for index, task in enumerate(tasks):
        assert type(task) is EditTask and task.task_type == "edit"
        assert np.array_equal(task.source.numpy(), _image(37, 53, seed=index))
        assert np.array_equal(task.edit_mask.numpy(), _box(37, 53) > 0)


@pytest.mark.parametrize("layout", ["images", "sources", "dotted"])
def test_other_folder_layouts_are_read(tmp_path: Path, layout: str) -> None:
    place = tmp_path / layout if layout != "dotted" else tmp_path
    _save(place / "A.JPG", _image(20, 24), format="JPEG")
    _save(tmp_path / ("A.mask.png" if layout == "dotted" else "masks/A.png"), _box(20, 24))
    _save(
        tmp_path / ("A_target.png" if layout == "dotted" else "targets/A.png"),
        _image(20, 24, seed=1),
    )
    if layout == "images":
        (tmp_path / "instructions.json").write_text('{"A": "do it"}')
    elif layout == "sources":
        (tmp_path / "instructions.csv").write_text('name,instruction\nA.JPG,"do it"\n')
    else:
        (tmp_path / "A.txt").write_text("do it", encoding="utf-8-sig")
    (task,) = _all(tmp_path)
    assert isinstance(task, PairedTask) and task.instruction == "do it"
    assert np.array_equal(task.target.numpy(), _image(20, 24, seed=1))


def test_json_lines_take_every_spelling_of_their_keys_and_paths_relative_to_the_file(
    tmp_path: Path,
) -> None:
    _folder(tmp_path / "photos")
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
    tasks = _all(_jsonl(tmp_path, *rows))
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
    _folder(tmp_path)
    _jsonl(
        tmp_path, {"source": "p0.png", "instruction": "only this", "mask": "p0_mask.png"}
    ).rename(tmp_path / "metadata.jsonl")
    assert [task.instruction for task in _all(tmp_path)] == ["only this"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"source": "p0.png", "mask": "p0_mask.png"},
            r"line 1: has no 'instruction' \(read from: instruction, prompt\)",
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
    _folder(tmp_path)
    with pytest.raises(InputError, match=words):
        _all(_jsonl(tmp_path, row))


def test_lines_that_are_not_json_or_missing_altogether_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{source: 3}\n")
    with pytest.raises(InputError, match="line 1: is not JSON"):
        _all(path)
    path.write_text("\n\n")
    with pytest.raises(InputError, match=r"has no rows.*Write one JSON object a line"):
        _all(path)


def test_all_rows_are_checked_and_the_first_five_problems_shown(tmp_path: Path) -> None:
    path = _jsonl(
        tmp_path,
        *(
            {"source": f"gone{index}.png", "instruction": "x", "mask": "m.png"}
            for index in range(12)
        ),
    )
    with pytest.raises(InputError) as caught:
        _all(path)
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
    _folder(tmp_path, num_rows=1)
    whole = _save(tmp_path / f"cut.{suffix}", _image(37, 53)).read_bytes()
    (tmp_path / f"cut.{suffix}").write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(InputError, match=rf"line 1: .*cut.{suffix} cannot be read as an image"):
        _all(
            _jsonl(tmp_path, {"source": f"cut.{suffix}", "instruction": "x", "mask": "p0_mask.png"})
        )


def test_a_mask_of_another_size_is_refused_naming_both(tmp_path: Path) -> None:
    _folder(tmp_path)
    _save(tmp_path / "p2_mask.png", _box(30, 53))
    with pytest.raises(
        InputError,
        match=r"p2_mask.png is 53x30 but .*p2.png is 53x37.*Save both with the same width and height",
    ):
        _all(tmp_path)


def test_a_mask_drawn_on_unturned_pixels_is_told_about_the_exif_rotation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    _save(tmp_path / "photo.jpg", _image(30, 40), exif=exif)
    (tmp_path / "photo.txt").write_text("x")
    _save(tmp_path / "photo_mask.png", _box(30, 40))
    with pytest.raises(InputError, match="carries an EXIF rotation"):
        _all(tmp_path)
    _save(tmp_path / "photo_mask.png", _box(40, 30))
    (task,) = _all(tmp_path)
    assert tuple(task.edit_mask.shape) == (40, 30) and tuple(task.source.shape) == (40, 30, 3)


@pytest.mark.parametrize("value", [0, 255])
def test_an_empty_or_full_mask_is_an_error_or_skipped_and_counted(
    tmp_path: Path, value: int
) -> None:
    _folder(tmp_path)
    _save(tmp_path / "p1_mask.png", np.full((37, 53), value, dtype=np.uint8))
    with pytest.raises(
        InputError,
        match=r"p1_mask.png is empty or full: a mask must leave something to edit and something to keep.*skip",
    ):
        _all(tmp_path)
    dataset = open_dataset(DataConfig(heldout_path=str(tmp_path), empty_mask="skip"), "heldout")
    assert (len(dataset), dataset.skipped) == (3, 1)


def test_skipping_every_row_is_an_error_that_points_at_the_polarity(tmp_path: Path) -> None:
    _folder(tmp_path)
    for index in range(4):
        _save(tmp_path / f"p{index}_mask.png", np.zeros((37, 53), dtype=np.uint8))
    with pytest.raises(InputError, match=r"every mask \(4\) is empty or full.*data.mask_polarity"):
        _all(tmp_path, empty_mask="skip")


def test_zero_one_masks_are_warned_about_once(tmp_path: Path) -> None:
    _folder(tmp_path)
    for index in range(3):
        _save(tmp_path / f"p{index}_mask.png", _box(37, 53) // 255)
    with pytest.warns(
        UserWarning, match="3 masks hold only the values 0 and 1.*1 is read as edit"
    ) as caught:
        tasks = _all(tmp_path)
    assert len(caught) == 1
    assert all(np.array_equal(task.edit_mask.numpy(), _box(37, 53) > 0) for task in tasks)


def test_polarity_turns_masks_of_a_dataset(tmp_path: Path) -> None:
    (task, *_) = _all(_folder(tmp_path), mask_polarity="edit_black")
    assert np.array_equal(task.edit_mask.numpy(), _box(37, 53) == 0)


def test_a_folder_without_a_dataset_says_what_was_looked_for_and_found(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("x")
    _jsonl(tmp_path, {})
    with pytest.raises(
        InputError,
        match=r"Looked for metadata.jsonl.*NAME_mask.png.*Found readme.md, rows.jsonl. Is it data.path=.*rows.jsonl",
    ):
        open_dataset(DataConfig(path=str(tmp_path)), "train")
    with pytest.raises(InputError, match="does not exist"):
        open_dataset(DataConfig(path=str(tmp_path / "nowhere")), "train")
    with pytest.raises(InputError, match=r"not .jsonl"):
        open_dataset(DataConfig(path=str(tmp_path / "readme.md")), "train")


def test_incomplete_pairs_are_refused_by_name(tmp_path: Path) -> None:
    _folder(tmp_path)
    (tmp_path / "p0_mask.png").unlink()
    (tmp_path / "p1.txt").unlink()
    _save(tmp_path / "p2.jpg", _image(37, 53))
    _save(tmp_path / "p3_mask.jpg", _box(37, 53))
    _save(tmp_path / "other_mask.png", _box(37, 53))
    with pytest.raises(InputError) as caught:
        _all(tmp_path)
    for words in (
        "p0.png: has no mask (looked for p0_mask.png",
        "p1.png: has no instruction (looked for p1.txt",
        "has the same name as p2.png",
        "has more than one mask (p3_mask.png and p3_mask.jpg)",
        "other_mask.png is a mask or target, but its image",
    ):
        assert words in str(caught.value)


def test_ids_used_twice_are_refused(tmp_path: Path) -> None:
    _folder(tmp_path)
    row = {"id": "same", "source": "p0.png", "instruction": "x", "mask": "p0_mask.png"}
    with pytest.raises(InputError, match="'same' is used more than once"):
        _all(_jsonl(tmp_path, row, row))


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
    _folder(tmp_path)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match="instructions"):
        _all(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Splits and configuration


def _ids(path: Path, split: Any, **options: Any) -> set[str]:
    dataset = open_dataset(DataConfig(path=str(path), **options), split)
    return {dataset[index].task_id for index in range(len(dataset))}


def test_the_split_is_a_partition_that_stays_when_rows_are_added(tmp_path: Path) -> None:
    _folder(tmp_path, num_rows=30, height=8, width=9)
    train, heldout = (
        _ids(tmp_path, "train", heldout_fraction=0.3),
        _ids(tmp_path, "heldout", heldout_fraction=0.3),
    )
    assert not train & heldout and len(train | heldout) == 30 and 3 <= len(heldout) <= 16
    _folder(tmp_path, num_rows=40, height=8, width=9)
    assert train <= _ids(tmp_path, "train", heldout_fraction=0.3)
    assert heldout <= _ids(tmp_path, "heldout", heldout_fraction=0.3)


def test_rows_of_one_image_are_on_one_side(tmp_path: Path) -> None:
    _folder(tmp_path, num_rows=6)
    rows = (
        {"source": f"p{index % 6}.png", "instruction": "x", "mask": f"p{index % 6}_mask.png"}
        for index in range(24)
    )
    path = _jsonl(tmp_path, *rows)
    sides = [
        {task_id.split("#")[0] for task_id in _ids(path, split, heldout_fraction=0.5)}
        for split in ("train", "heldout")
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_tiny_data_keeps_a_row_on_each_side(tmp_path: Path, fraction: float) -> None:
    _folder(tmp_path, num_rows=2)
    assert len(_ids(tmp_path, "train", heldout_fraction=fraction)) == 1
    assert len(_ids(tmp_path, "heldout", heldout_fraction=fraction)) == 1


def test_a_single_image_serves_both_sides_with_a_warning(tmp_path: Path) -> None:
    _folder(tmp_path, num_rows=1)
    for split in ("train", "heldout"):
        with pytest.warns(UserWarning, match="single image.*data.heldout_path"):
            assert _ids(tmp_path, split) == {"p0"}


def test_train_and_heldout_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    for split, count in (("train", 9), ("heldout", 5)):
        write_compbench([shapes.task(split, index) for index in range(count)], tmp_path / split)
    for split, count in (("train", 9), ("heldout", 5)):
        assert _ids(tmp_path, split) == {f"{split}-{index:06d}" for index in range(count)}


def test_a_heldout_path_leaves_all_of_path_for_training(tmp_path: Path) -> None:
    _folder(tmp_path / "a", num_rows=3)
    _folder(tmp_path / "b", num_rows=2)
    options = {"heldout_path": str(tmp_path / "b")}
    assert (
        len(_ids(tmp_path / "a", "train", **options)),
        len(_ids(tmp_path / "a", "heldout", **options)),
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
    path = _folder(tmp_path / "a")
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
    with pytest.raises(InputError, match=r"no task of type rotate; it has add, recolour"):
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


# ---------------------------------------------------------------------------------------------------------------------
# The canvas


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.sampled_from([32, 64, 100, 512]),
    st.sampled_from([4, 8, 16]),
)
def test_a_canvas_has_about_the_area_asked_for_in_whole_steps(
    height: int, width: int, resolution: int, multiple: int
) -> None:
    rows, columns = canvas_size(height, width, resolution, multiple)
    assert rows % multiple == 0 and columns % multiple == 0 and min(rows, columns) >= 2 * multiple
    assert 0.5 * resolution**2 <= rows * columns <= 2 * resolution**2
    if 1 / 3 <= height / width <= 3 and resolution >= 8 * multiple:
        assert 0.75 <= (rows / columns) / (height / width) <= 1.33


def test_a_canvas_smaller_than_two_steps_is_refused() -> None:
    with pytest.raises(InputError, match="Set resolution to 32 or more"):
        canvas_size(64, 64, 24, 16)


def test_fit_is_the_identity_at_the_canvas_size() -> None:
    task = shapes.task("train", 0)
    assert fit(task, resolution=64, multiple=16) is task


@settings(deadline=None, max_examples=60)
@given(st.integers(5, 90), st.integers(5, 90), st.integers(0, 2**31), st.sampled_from([16, 32, 48]))
def test_fit_marks_a_pixel_exactly_when_it_covers_a_marked_pixel(
    height: int, width: int, seed: int, resolution: int
) -> None:
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), dtype=bool)
    mask[rng.integers(height), rng.integers(width)] = True
    mask[rng.integers(height), : width // 2] = True
    image = torch.from_numpy(_image(height, width))
    task = EditTask(
        task_id="t",
        task_type="edit",
        source=image,
        instruction="x",
        edit_mask=torch.from_numpy(mask),
    )
    fitted = fit(task, resolution=resolution, multiple=8)
    rows, columns = fitted.edit_mask.shape
    assert tuple(fitted.source.shape) == (rows, columns, 3) and fitted.source.dtype == torch.uint8
    expected = torch.zeros(rows, columns, dtype=torch.bool)
    for y, x in mask.nonzero() and zip(*mask.nonzero(), strict=True):
        # Squares [y, y+1) x [x, x+1) of the original, in units of new pixels, as exact integer bounds.
        expected[
            y * rows // height : -(-(y + 1) * rows // height),
            x * columns // width : -(-(x + 1) * columns // width),
        ] = True
    assert torch.equal(fitted.edit_mask, expected)


def test_fit_keeps_the_record_and_the_agreement_of_a_pair_outside_its_mask() -> None:
    for index in range(18):
        task = shapes.task("train", index)
        for resolution in (32, 48, 100, 128):
            fitted = fit(task, resolution=resolution, multiple=4)
            assert type(fitted) is PairedRegionsTask
            assert (fitted.task_id, fitted.instruction, fitted.caption) == (
                task.task_id,
                task.instruction,
                task.caption,
            )
            assert torch.equal(fitted.regions.any(dim=0), fitted.edit_mask) and len(
                fitted.regions
            ) == len(task.regions)
            assert torch.equal(fitted.source[~fitted.edit_mask], fitted.target[~fitted.edit_mask])
            assert not torch.equal(fitted.source[fitted.edit_mask], fitted.target[fitted.edit_mask])


def test_fit_does_not_touch_a_target_that_differs_outside_its_mask() -> None:
    task = shapes.task("train", 0)
    shifted = dataclasses.replace(task, target=(task.target // 2))
    fitted = fit(shifted, resolution=32, multiple=8)
    assert not torch.equal(fitted.source[~fitted.edit_mask], fitted.target[~fitted.edit_mask])


def test_fit_refuses_a_mask_that_becomes_full() -> None:
    mask = torch.ones(64, 64, dtype=torch.bool)
    mask[10, 10] = False
    task = EditTask(
        task_id="big",
        task_type="edit",
        source=torch.zeros(64, 64, 3, dtype=torch.uint8),
        instruction="x",
        edit_mask=mask,
    )
    with pytest.raises(InputError, match=r"'big'.*covers every pixel.*Raise the resolution"):
        fit(task, resolution=16, multiple=8)


def test_odd_sizes_from_disk_reach_the_canvas(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tasks = _all(_folder(tmp_path, height=101, width=67))
    for task in tasks:
        fitted = fit(task, resolution=64, multiple=8)
        assert tuple(fitted.source.shape) == (80, 56, 3) and tuple(fitted.edit_mask.shape) == (
            80,
            56,
        )


def test_a_mask_that_leaves_no_background_on_the_canvas_is_refused_or_skipped_and_counted(
    tmp_path: Path,
) -> None:
    root = _folder(tmp_path / "data", num_rows=4, height=64, width=64)
    wide = np.zeros((64, 64), dtype=np.uint8)
    wide[5:60, 5:60] = 255
    _save(root / "p0_mask.png", wide)
    canvas = {"resolution": 32, "multiple": 8}
    assert len(open_dataset(DataConfig(path=str(root), heldout_path=str(root)), "train")) == 4
    with pytest.raises(
        InputError,
        match=r"1 problems in 4 rows.*touches every 8 px token.*raise editor\.resolution",
    ):
        open_dataset(DataConfig(path=str(root), heldout_path=str(root)), "train", **canvas)
    kept = open_dataset(
        DataConfig(path=str(root), heldout_path=str(root), empty_mask="skip"), "train", **canvas
    )
    assert (len(kept), kept.skipped) == (3, 1)
    assert "p0" not in " ".join(kept[index].task_id for index in range(3))
    finer = open_dataset(
        DataConfig(path=str(root), heldout_path=str(root)), "train", resolution=64, multiple=4
    )
    assert (len(finer), finer.skipped) == (4, 0)
