"""Edit regions that nobody drew: the pure function on hand-made maps, and the verb that makes a dataset of them."""

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
from torch import Tensor

from rl_edit import wire
from rl_edit.cli import find_masks
from rl_edit.config import load_config
from rl_edit.data import DataConfig, open_dataset, open_requests, shapes
from rl_edit.data.canvas import fit
from rl_edit.data.compbench import write_compbench
from rl_edit.data.mask_finding import FoundRegions, MaskFinder, NotFound, agreement, otsu, smoothed
from rl_edit.data.rows import Row
from rl_edit.editors import Editor, load_editor
from rl_edit.errors import InputError
from rl_edit.evaluation.found_masks import Observation, observe
from rl_edit.types import EditTask, PairedRegionsTask, RegionsTask
from runs import command, metrics_of, read_json, run_inline, small_config

SIDE = 64
EVENLY = torch.full((8, 8), 1 / 64)
PLAIN: dict[str, Any] = {"attention_weight": 0.0, "smoothing": 0.0, "margin": 0.0}


def change(*places: tuple[int, int, int, int], level: float = 0.5, ground: float = 0.02) -> Tensor:
    """A map with raised rectangles (top, left, bottom, right) on a low ground."""
    found = torch.full((SIDE, SIDE), ground)
    for top, left, bottom, right in places:
        found[top:bottom, left:right] = level
    return found


def regions(automask: MaskFinder, changed: Tensor, attention: Tensor = EVENLY) -> Tensor:
    found = automask(changed, attention)
    assert isinstance(found, FoundRegions), found
    return found.regions


def refusal(automask: MaskFinder, changed: Tensor, attention: Tensor = EVENLY) -> NotFound:
    found = automask(changed, attention)
    assert isinstance(found, NotFound), found
    return found


# --- the function ----------------------------------------------------------------------------------------------------


def test_otsus_threshold_maximises_the_variance_between_both_sides() -> None:
    values = torch.rand(60, generator=torch.Generator().manual_seed(0)) ** 3
    cut = otsu(values)

    def between(threshold: float) -> float:
        low, high = values[values <= threshold].double(), values[values > threshold].double()
        return len(low) * len(high) * float(low.mean() - high.mean()) ** 2

    best = max(between(float(value)) for value in values.sort().values[:-1])
    assert between(cut) == pytest.approx(best, rel=1e-12)
    assert 0.1 < otsu(torch.tensor([0.0, 0.1, 0.9, 1.0])) < 0.9


def test_smoothing_keeps_a_constant_and_lowers_a_peak_and_none_changes_nothing() -> None:
    flat, peak = torch.full((20, 30), 0.3), torch.zeros(20, 30)
    peak[10, 15] = 1.0
    assert torch.allclose(smoothed(flat, 2.0), flat)
    assert 0 < float(smoothed(peak, 2.0).max()) == pytest.approx(1 / (2 * math.pi * 4), rel=0.02)
    assert torch.equal(smoothed(peak, 0.0), peak)


def test_the_region_is_where_the_picture_changed() -> None:
    (region,) = regions(MaskFinder(**PLAIN), change((10, 20, 26, 40)))
    expected = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    expected[10:26, 20:40] = True
    assert torch.equal(region, expected)


def test_the_margin_widens_a_region_to_every_side_by_its_share_of_the_picture() -> None:
    (region,) = regions(MaskFinder(**{**PLAIN, "margin": 3 / SIDE}), change((10, 20, 26, 40)))
    expected = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    expected[7:29, 17:43] = True
    assert torch.equal(region, expected)


def test_separate_places_are_regions_of_their_own_disjoint_and_in_reading_order() -> None:
    found = regions(MaskFinder(), change((4, 40, 16, 52), (30, 6, 44, 20)))
    assert len(found) == 2 and not bool((found[0] & found[1]).any())
    assert bool(found[0][10, 46]) and bool(found[1][37, 13])


def test_boxes_that_meet_become_one_and_without_boxes_outlines_stay() -> None:
    corner = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    corner[8:40, 8:12] = corner[36:40, 8:40] = True
    bar = torch.zeros_like(corner)
    bar[12:16, 30:36] = True
    changed = torch.where(corner | bar, 0.5, 0.02)
    outlined = regions(MaskFinder(**{**PLAIN, "box": False}), changed)
    assert len(outlined) == 2 and torch.equal(outlined.any(dim=0), corner | bar)
    (boxed,) = regions(MaskFinder(**PLAIN), changed)
    expected = torch.zeros_like(corner)
    expected[8:40, 8:40] = True
    assert torch.equal(boxed, expected)


def test_a_picture_that_does_not_change_has_no_mask_and_the_reason_has_the_numbers() -> None:
    found = refusal(MaskFinder(), change((10, 20, 26, 40), level=0.06))
    assert (
        found.kind == "unchanged"
        and "rise 0.040 above the 0.020" in found.reason
        and "floor is 0.1" in found.reason
    )


def test_a_shift_of_the_whole_picture_is_no_change_of_a_place() -> None:
    assert [refusal(MaskFinder(), change(ground=level)).kind for level in (0.05, 0.6)] == [
        "unchanged",
        "everywhere",
    ]
    place = (10, 20, 26, 40)
    shifted, still = (
        regions(MaskFinder(), change(place, level=ground + 0.4, ground=ground))
        for ground in (0.5, 0.0)
    )
    assert torch.equal(shifted, still)


def test_specks_are_dropped_and_nothing_but_specks_is_no_region() -> None:
    automask = MaskFinder(**PLAIN)
    found = regions(automask, change((10, 20, 26, 40), (50, 50, 52, 52)))
    assert len(found) == 1 and not bool(found[0][50:52, 50:52].any())
    specks = refusal(automask, change((50, 50, 52, 52)))
    assert specks.kind == "specks" and "0.10% of the picture, the least is 0.50%" in specks.reason


def test_a_change_everywhere_or_in_too_many_places_is_no_region() -> None:
    assert refusal(MaskFinder(**PLAIN), change((0, 0, 64, 60))).kind == "everywhere"
    grown = refusal(MaskFinder(**{**PLAIN, "margin": 6 / SIDE}), change((8, 8, 52, 52)))
    assert (
        grown.kind == "everywhere" and "cover 77% of the picture, the most is 70%" in grown.reason
    )
    (most_of_it,) = regions(MaskFinder(**PLAIN), change((0, 0, 64, 40)))
    assert float(most_of_it.float().mean()) == 40 / 64
    spots = [
        (6 + 18 * row, 6 + 18 * column, 14 + 18 * row, 14 + 18 * column)
        for row in range(3)
        for column in range(3)
    ]
    scattered = refusal(MaskFinder(**PLAIN), change(*spots))
    assert scattered.kind == "scattered" and "9 separate parts, the most is 8" in scattered.reason
    assert len(regions(MaskFinder(**PLAIN), change(*spots[:8]))) == 8


def test_a_mask_that_touches_every_token_is_no_region_however_small_it_is() -> None:
    """On a grid of 2 x 2 tokens, a cross in the middle."""
    crossing = change((28, 28, 36, 36))
    assert refusal(MaskFinder(**PLAIN), crossing, torch.full((2, 2), 0.25)).kind == "everywhere"
    assert len(regions(MaskFinder(**PLAIN), crossing)) == 1


def test_attention_decides_where_it_alone_has_weight_and_is_not_read_where_it_has_none() -> None:
    looked = EVENLY.clone()
    looked[1:3, 5:7] = 20 / 64
    changed = change((40, 8, 56, 24))
    attended = regions(MaskFinder(attention_weight=1.0), changed, looked)
    assert len(attended) == 1 and bool(attended[0][16, 48]) and not bool(attended[0][48, 16])
    unmeasured = torch.full((8, 8), math.nan)
    seen = regions(MaskFinder(attention_weight=0.0), changed, unmeasured)
    assert bool(seen[0][48, 16]) and not bool(seen[0][16, 48])
    with pytest.raises(ValueError, match=r"attention_weight is 0\.1 and no attention was measured"):
        MaskFinder()(changed, unmeasured)


def test_agreement_counts_pixels_and_places() -> None:
    found, true = torch.zeros(4, 8, dtype=torch.bool), torch.zeros(4, 8, dtype=torch.bool)
    found[:, 0:4] = true[:, 2:5] = True
    measured = agreement(found, true)
    assert (measured.iou, measured.precision, measured.recall) == (8 / 20, 8 / 16, 8 / 12)
    assert measured.same_number
    true[0, 7] = True
    assert not agreement(found, true).same_number


# --- rows without a mask ---------------------------------------------------------------------------------------------


def pictures(directory: Path, count: int = 4, *, masks: bool = False) -> Path:
    """JSON lines over pictures of the world; two instructions for the first picture."""
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
    data = pictures(tmp_path / "data")
    requests = open_requests(DataConfig(path=str(data)))
    assert len(requests) == 5 and not any(isinstance(request, Row) for request in requests)
    assert {request.group for request in requests} == {f"{index}.png" for index in range(4)}
    with pytest.raises(InputError, match="has no 'mask'"):
        open_dataset(DataConfig(path=str(data)), "train")


def test_requests_of_a_folder_and_of_compbenchs_layout_have_the_masks_there_are(
    tmp_path: Path,
) -> None:
    data = pictures(tmp_path / "data")
    (data / "metadata.jsonl").unlink()
    (data / "1_mask.png").unlink()
    for index in range(4):
        (data / f"{index}.txt").write_text("remove it")
    Image.new("L", (64, 64)).save(data / "2_mask.png")
    found = {
        request.task_id: isinstance(request, Row)
        for request in open_requests(DataConfig(path=str(data)))
    }
    assert found == {"0": True, "1": False, "2": False, "3": True}
    written = tmp_path / "compbench"
    write_compbench([shapes.task("train", index) for index in range(2)], written)
    next(written.glob("tasks/*/mask/train-000001.png")).unlink()
    found = {
        request.task_id: isinstance(request, Row)
        for request in open_requests(DataConfig(path=str(written)))
    }
    assert found == {"train-000000": True, "train-000001": False}
    with pytest.raises(InputError, match=r"mask/train-000001\.png not found"):
        open_dataset(DataConfig(path=str(written)), "train")


def test_what_else_is_wrong_with_a_request_is_refused(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data")
    (data / "3.png").unlink()
    with pytest.raises(InputError, match=r"3\.png not found"):
        open_requests(DataConfig(path=str(data)))


def test_a_row_with_a_region_map_and_no_target_is_a_task_with_regions_that_travels_and_is_fitted(
    tmp_path: Path,
) -> None:
    data = pictures(tmp_path / "data", 2, masks=True)
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
    with pytest.warns(UserWarning, match="a single image"):
        dataset = open_dataset(DataConfig(path=str(data)), "train")
    task = next(
        dataset[index] for index in range(2) if dataset[index].instruction == rows[0]["instruction"]
    )
    assert type(task) is RegionsTask and torch.equal(task.regions, two.regions)
    assert torch.equal(wire.unpack(wire.pack(task)).regions, two.regions)
    fitted = fit(task, resolution=32, multiple=8)
    assert isinstance(fitted, RegionsTask) and torch.equal(
        fitted.regions.any(dim=0), fitted.edit_mask
    )


# --- the verb --------------------------------------------------------------------------------------------------------

Command = Callable[..., tuple[int, str, Sequence[str]]]


@pytest.fixture
def rl_edit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return lambda *arguments: command(monkeypatch, capsys, *arguments)


def perfect(editor: Editor, task: EditTask, **_: Any) -> Observation:
    """What an editor would show that makes the right edit of every task of the world, found by its source."""
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
    told = read_json(tmp_path / "found" / "agreement.json")
    assert (told["num_rows"], told["found"], told["not_found"]) == (9, 9, {})
    assert set(told["agreement"]) == {"all", *shapes.TASK_TYPES}
    overall = told["agreement"]["all"]
    assert (
        overall["iou"]["mean"] > 0.8
        and overall["iou"]["low"] > 0.7
        and overall["same_number"]["mean"] == 1.0
    )
    assert told["agreement"]["two_regions"]["iou"]["low"] is None
    with Image.open(tmp_path / "found" / "masks.png") as sheet:
        assert sheet.width > 500


def test_the_dataset_holds_regions_pictures_and_all_that_the_rows_said(
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
    for found in (dataset[index] for index in range(9)):
        true = tasks[found.task_id]
        assert isinstance(found, PairedRegionsTask) and len(found.regions) == len(true.regions)
        assert torch.equal(found.source, true.source) and torch.equal(found.target, true.target)
        assert (found.instruction, found.caption, found.task_type) == (
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
        pictures(tmp_path / "data"),
        "--out",
        tmp_path / "found",
        "--editor",
        perfectly,
    )
    assert code == 0 and "4 of 5 rows have a mask now; without one: unchanged 1" in out
    told = read_json(tmp_path / "found" / "agreement.json")
    assert told["not_found"] == {"unchanged": 1} and told["agreement"] == {}
    (left_out,) = [row for row in told["rows"] if "reason" in row]
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
    data = pictures(tmp_path / "data")
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
            "override 'mask.flor=0.2' is not mask.KEY=VALUE with a key of attention_weight, smoothing, floor",
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
            "has its masks, and no rows on disk: write some first with rl-edit dataset make-shapes DIR",
        ),
        (("nowhere",), "nowhere does not exist"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    rl_edit: Command, small_editor: str, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    data = pictures(tmp_path / "data", 1)
    given = [str(data) if argument == "DATA" else argument for argument in arguments]
    code, _, err = rl_edit(
        "find-masks", *given, "--out", tmp_path / "found", "--editor", small_editor
    )
    assert code == 2 and words in err[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_directory_of_two_datasets_and_one_that_is_taken_are_refused(
    rl_edit: Command, tmp_path: Path
) -> None:
    for split in ("train", "heldout"):
        pictures(tmp_path / split, 1)
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
    alone = (one.edit.float() - task.source.float()).abs().mean(dim=2) / 255
    assert torch.allclose(one.change, alone) and torch.equal(one.edit, first.edit)
    assert float(first.attention.sum()) == pytest.approx(1.0, abs=1e-5) and first.change.shape == (
        32,
        32,
    )


def test_a_small_editor_finds_masks_of_odd_pictures_at_their_own_size_and_trains_on_them(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    """The whole way: photographs without masks, found at 32 px, one update of training at the same size."""
    data = tmp_path / "data"
    data.mkdir()
    for name, size in (("a", (67, 101)), ("b", (48, 48)), ("c", (90, 60))):
        scene = Image.fromarray(shapes.task("train", ord(name)).source.numpy())
        scene.resize(size[::-1], Image.Resampling.BICUBIC).save(data / f"{name}.jpg")
        (data / f"{name}.txt").write_text("remove the red circle")
    found = tmp_path / "found"
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
        found,
        "--editor",
        small_editor,
        "--samples",
        2,
        "--steps",
        2,
        *loose,
    )
    assert code == 0, err
    assert read_json(found / "agreement.json")["found"] >= 2
    config = small_config(
        small_editor, f"data.path={found}", "train.updates=1", "train.max_dropped_groups=2"
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
