"""Rows without a mask, and the command that makes a dataset with masks of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rl_edit import wire
from rl_edit.cli import find_masks
from rl_edit.config import load_config
from rl_edit.data import DataConfig, open_dataset, open_requests, shapes
from rl_edit.data.canvas import fit
from rl_edit.data.compbench import write_compbench
from rl_edit.data.rows import Row
from rl_edit.editors import Editor, load_editor
from rl_edit.errors import InputError
from rl_edit.evaluation.found_masks import Observation, observe
from rl_edit.types import EditTask, PairedRegionsTask, RegionsTask
from runs import command, metrics_of, read_json, run_inline, small_config

# --- rows without a mask -------------------------------------------------------------------------


def images(directory: Path, count: int = 4, *, masks: bool = False) -> Path:
    """JSON lines over images of the world; two instructions for the first image."""
    directory.mkdir()
    lines = []
    for index in range(count):
        task = shapes.task("train", index)
        Image.fromarray(task.source.numpy()).save(directory / f"{index}.png")
        Image.fromarray(task.edit_mask.numpy().astype(np.uint8) * 255).save(
            directory / f"{index}_mask.png"
        )
        lines.append(
            {"source": f"{index}.png", "instruction": task.instruction, "task_type": task.task_type}
        )
        lines[-1] |= {"mask": f"{index}_mask.png"} if masks else {}
    lines.append({**lines[0], "instruction": "remove everything"})
    (directory / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def test_rows_without_a_mask_are_requests_and_training_on_them_is_refused(tmp_path: Path) -> None:
    data = images(tmp_path / "data")
    requests = open_requests(DataConfig(path=str(data))).requests
    assert len(requests) == 5 and not any(isinstance(request, Row) for request in requests)
    assert {request.group for request in requests} == {f"{index}.png" for index in range(4)}
    with pytest.raises(InputError, match="has no 'mask'"):
        open_dataset(DataConfig(path=str(data)), "train")


def test_requests_of_a_folder_and_of_compbenchs_layout_have_the_masks_there_are(
    tmp_path: Path,
) -> None:
    data = images(tmp_path / "data")
    (data / "metadata.jsonl").unlink()
    (data / "1_mask.png").unlink()
    for index in range(4):
        (data / f"{index}.txt").write_text("remove it")
    Image.new("L", (64, 64)).save(data / "2_mask.png")
    result = {
        request.task_id: isinstance(request, Row)
        for request in open_requests(DataConfig(path=str(data))).requests
    }
    assert result == {"0": True, "1": False, "2": False, "3": True}
    written = tmp_path / "compbench"
    write_compbench([shapes.task("train", index) for index in range(2)], written)
    next(written.glob("tasks/*/mask/train-000001.png")).unlink()
    result = {
        request.task_id: isinstance(request, Row)
        for request in open_requests(DataConfig(path=str(written))).requests
    }
    assert result == {"train-000000": True, "train-000001": False}
    with pytest.raises(InputError, match=r"mask/train-000001\.png not found"):
        open_dataset(DataConfig(path=str(written)), "train")


def test_what_else_is_wrong_with_a_request_is_refused(tmp_path: Path) -> None:
    data = images(tmp_path / "data")
    (data / "3.png").unlink()
    with pytest.raises(InputError, match=r"3\.png not found"):
        open_requests(DataConfig(path=str(data)))


def test_a_row_with_a_region_map_and_no_target_is_a_task_with_regions_that_travels_and_is_fitted(
    tmp_path: Path,
) -> None:
    data = images(tmp_path / "data", 2, masks=True)
    two = next(
        shapes.task("train", index)
        for index in range(99)
        if shapes.task("train", index).task_type == "two_regions"
    )
    Image.fromarray(two.edit_mask.numpy().astype(np.uint8) * 255).save(data / "0_mask.png")
    labels = two.regions.numpy() * np.arange(1, 3)[:, None, None]
    Image.fromarray(labels.sum(axis=0).astype(np.uint8)).save(data / "regions.png")
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    rows[0] |= {"region_map": "regions.png", "split_group": "one"}
    rows[1] |= {"split_group": "one"}
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    dataset = open_dataset(DataConfig(path=str(data)), "train")
    assert [notice.kind for notice in dataset.notices] == ["single-image"]
    task = next(
        dataset[index] for index in range(2) if dataset[index].instruction == rows[0]["instruction"]
    )
    assert type(task) is RegionsTask and torch.equal(task.regions, two.regions)
    assert torch.equal(wire.unpack(wire.pack(task)).regions, two.regions)
    fitted = fit(task, resolution=32, multiple=8)
    assert isinstance(fitted, RegionsTask) and torch.equal(
        fitted.regions.any(dim=0), fitted.edit_mask
    )


# --- the verb ------------------------------------------------------------------------------------

Command = Callable[..., tuple[int, str, Sequence[str]]]


@pytest.fixture
def rl_edit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return lambda *arguments: command(monkeypatch, capsys, *arguments)


def perfect(editor: Editor, task: EditTask, **_: Any) -> Observation:
    """Shows the right edit of a task of the world, which is recognised by its source."""
    known = next(
        t for t in (shapes.task("train", i) for i in range(9)) if torch.equal(t.source, task.source)
    )
    changed = (known.target.float() - known.source.float()).abs().mean(dim=2) / 255
    return Observation(change=changed, attention=torch.full((8, 8), 1 / 64), edit=known.target)


@pytest.fixture
def perfectly(monkeypatch: pytest.MonkeyPatch, small_editor: str) -> str:
    """An editor whose edits are right."""
    monkeypatch.setattr(find_masks, "observe", perfect)
    return small_editor


def test_masks_found_from_right_edits_are_the_true_ones_and_the_agreement_is_written_by_task_type(
    rl_edit: Command, perfectly: str, tmp_path: Path
) -> None:
    write_compbench([shapes.task("train", index) for index in range(9)], tmp_path / "data")
    code, out, _ = rl_edit(
        "find-masks", tmp_path / "data", "--out", tmp_path / "found", "--editor", perfectly
    )
    assert code == 0 and "9 of 9 rows have a mask now" in out
    report = read_json(tmp_path / "found" / "agreement.json")
    assert (report["num_rows"], report["found"], report["not_found"]) == (9, 9, {})
    assert set(report["agreement"]) == {"all", *shapes.TASK_TYPES}
    overall = report["agreement"]["all"]
    assert (
        overall["iou"]["mean"] > 0.8
        and overall["iou"]["low"] > 0.7
        and overall["same_number"]["mean"] == 1.0
    )
    assert report["agreement"]["two_regions"]["iou"]["low"] is None
    with Image.open(tmp_path / "found" / "masks.png") as sheet:
        assert sheet.width > 500


def test_the_dataset_holds_regions_images_and_all_that_the_rows_said(
    rl_edit: Command, perfectly: str, tmp_path: Path
) -> None:
    tasks = {task.task_id: task for task in (shapes.task("train", index) for index in range(9))}
    write_compbench(tasks.values(), tmp_path / "data")
    assert (
        rl_edit(
            "find-masks", tmp_path / "data", "--out", tmp_path / "found", "--editor", perfectly
        )[0]
        == 0
    )
    dataset = open_dataset(
        DataConfig(path=str(tmp_path / "found"), heldout_path=str(tmp_path / "found")), "train"
    )
    assert len(dataset) == 9 and dataset.fields == {"target", "caption", "regions"}
    for result in (dataset[index] for index in range(9)):
        true = tasks[result.task_id]
        assert isinstance(result, PairedRegionsTask) and len(result.regions) == len(true.regions)
        assert torch.equal(result.source, true.source) and torch.equal(result.target, true.target)
        assert (result.instruction, result.caption, result.task_type) == (
            true.instruction,
            true.caption,
            true.task_type,
        )


def test_rows_without_a_region_are_counted_with_their_reason_and_left_out(
    rl_edit: Command, perfectly: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lazy(editor: Editor, task: EditTask, **more: Any) -> Observation:
        seen = perfect(editor, task, **more)
        return (
            seen
            if task.task_id != "1"
            else Observation(change=seen.change * 0, attention=seen.attention, edit=task.source)
        )

    monkeypatch.setattr(find_masks, "observe", lazy)
    code, out, _ = rl_edit(
        "find-masks",
        images(tmp_path / "data"),
        "--out",
        tmp_path / "found",
        "--editor",
        perfectly,
    )
    assert code == 0 and "4 of 5 rows have a mask now; without one: unchanged 1" in out
    report = read_json(tmp_path / "found" / "agreement.json")
    assert report["not_found"] == {"unchanged": 1} and report["agreement"] == {}
    (left_out,) = [row for row in report["rows"] if "reason" in row]
    assert left_out["task_id"] == "1" and "rise 0.000" in left_out["reason"]
    rows = [
        json.loads(line)
        for line in (tmp_path / "found" / "metadata.jsonl").read_text().splitlines()
    ]
    assert {row["id"] for row in rows} == {"0", "0#2", "2", "3"}
    same = [row for row in rows if row["id"] in ("0", "0#2")]
    assert (
        same[0]["source"] == same[1]["source"]
        and same[0]["split_group"] == same[1]["split_group"] == "0.png"
    )


def test_when_nothing_is_found_nothing_is_written(
    rl_edit: Command, perfectly: str, tmp_path: Path
) -> None:
    data = images(tmp_path / "data")
    code, _, err = rl_edit(
        "find-masks", data, "--out", tmp_path / "found", "--editor", perfectly, "mask.floor=0.99"
    )
    assert code == 2 and "no region was found in any of 5 rows (unchanged 5)" in err[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("DATA", "mask.flor=0.2"),
            "override 'mask.flor=0.2' is not mask.KEY=VALUE with a key of attention_weight, "
            "smoothing, floor",
        ),
        (("DATA", "mask.floor=high"), "mask.floor: Input should be a valid number"),
        (
            ("DATA", "--attention-weight", "2"),
            "mask.attention_weight: Input should be less than or equal to 1, got 2.0",
        ),
        (
            ("DATA", "editor.attention_layers=0", "rewards.attention=null"),
            "attention has weight 0.1 and editor.attention_layers is 0",
        ),
        (("DATA", "editor.resolutoin=64"), "did you mean 'resolution'?"),
        (
            ("builtin:shapes",),
            "has its masks, and no rows on disk: write some first with rl-edit dataset "
            "make-shapes DIR",
        ),
        (("nowhere",), "nowhere does not exist"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    rl_edit: Command, small_editor: str, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    data = images(tmp_path / "data", 1)
    written = [str(data) if argument == "DATA" else argument for argument in arguments]
    code, _, err = rl_edit(
        "find-masks", *written, "--out", tmp_path / "found", "--editor", small_editor
    )
    assert code == 2 and words in err[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_directory_of_two_datasets_and_one_that_is_taken_are_refused(
    rl_edit: Command, tmp_path: Path
) -> None:
    for split in ("train", "heldout"):
        images(tmp_path / split, 1)
    code, _, err = rl_edit("find-masks", tmp_path, "--out", tmp_path / "found")
    assert code == 2 and "holds two datasets, train and heldout: name one of them" in err[-1]
    code, _, err = rl_edit("find-masks", tmp_path / "train", "--out", tmp_path / "heldout")
    assert code == 2 and "exists and is not an empty directory" in err[-1]


def test_observing_follows_from_the_seed_and_averages_over_edits(small_editor: str) -> None:
    config = load_config(
        preset="tiny-rc-grpo", overrides=[f"editor.path={small_editor}", "editor.resolution=32"]
    )
    editor = load_editor(config.editor)
    task = fit(shapes.task("train", 0), resolution=32, multiple=editor.pixels_per_token)
    first, again, other = (
        observe(editor, task, samples=2, num_steps=2, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first.change, again.change) and torch.equal(first.attention, again.attention)
    assert not torch.equal(first.change, other.change)
    one = observe(editor, task, samples=1, num_steps=2, seed=0)
    single = (one.edit.float() - task.source.float()).abs().mean(dim=2) / 255
    assert torch.allclose(one.change, single) and torch.equal(one.edit, first.edit)
    assert float(first.attention.sum()) == pytest.approx(1.0, abs=1e-5) and first.change.shape == (
        32,
        32,
    )


def test_a_small_editor_finds_masks_of_odd_images_at_their_own_size_and_trains_on_them(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    """Photographs without masks, found at 32 px; then an update of training at the same size."""
    data = tmp_path / "data"
    data.mkdir()
    for name, size in (("a", (67, 101)), ("b", (48, 48)), ("c", (90, 60))):
        scene = Image.fromarray(shapes.task("train", ord(name)).source.numpy())
        scene.resize(size[::-1], Image.Resampling.BICUBIC).save(data / f"{name}.jpg")
        (data / f"{name}.txt").write_text("remove the red circle")
    masks = tmp_path / "found"
    loose = (
        "editor.resolution=32",
        "mask.floor=0",
        "mask.max_regions=255",
        "mask.box=false",
        "mask.margin=0",
    )
    code, _, err = rl_edit(
        "find-masks",
        data,
        "--out",
        masks,
        "--editor",
        small_editor,
        "--samples",
        2,
        "--steps",
        2,
        *loose,
    )
    assert code == 0, err
    assert read_json(masks / "agreement.json")["found"] >= 2
    config = small_config(
        small_editor, f"data.path={masks}", "train.updates=1", "train.max_dropped_groups=2"
    )
    for split in ("train", "heldout"):
        task = open_dataset(config.data, split, resolution=32, multiple=8)[0]
        assert isinstance(task, RegionsTask) and task.edit_mask.shape in {
            (67, 101),
            (48, 48),
            (90, 60),
        }
    run_inline(config, tmp_path / "run")
    (metrics,) = metrics_of(tmp_path / "run")
    assert math.isfinite(metrics["loss"])
