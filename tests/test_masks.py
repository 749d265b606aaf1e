"""Masks in every form that people bring are read right, said, or refused; never their negative."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cases.mask_forms import (
    INVERTED,
    ORDINARY,
    RECOGNISED,
    SOFT,
    Form,
    grey,
    photograph,
    region,
    write_rows,
    write_target,
)
from rl_edit.data import DataConfig, RowsDataset, open_dataset, open_requests, shapes
from rl_edit.data.compbench import write_compbench
from rl_edit.data.masks import read_foreground
from rl_edit.data.rows import Row
from rl_edit.errors import InputError
from rl_edit.report.overlays import write_contact_sheet, write_mask_files
from runs import command

GREY = ORDINARY["grey"]
HOLE = RECOGNISED["hole in the image"][2]


def opened(root: Path, **options: Any) -> RowsDataset:
    dataset = open_dataset(
        DataConfig(path="builtin:shapes", heldout_path=str(root), **options), "heldout"
    )
    assert isinstance(dataset, RowsDataset)
    return dataset


def kinds(dataset: RowsDataset) -> dict[str, int]:
    return {notice.kind: notice.count for notice in dataset.notices}


def worst_iou(dataset: RowsDataset) -> float:
    """The lowest agreement of an edit region with the true one."""
    values = []
    for index in range(len(dataset)):
        task = dataset[index]
        edit, true = task.edit_mask.numpy(), region(int(task.task_id.removeprefix("p")))
        values.append(float((edit & true).sum() / (edit | true).sum()))
    return min(values)


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_mask_is_read_without_a_word(tmp_path: Path, name: str) -> None:
    dataset = opened(write_rows(tmp_path, [ORDINARY[name]] * 3))
    assert worst_iou(dataset) > 0.95
    assert dataset.notices == ()
    assert {(row.form, row.polarity) for row in dataset.masks} == {("luminance", "edit_white")}


@pytest.mark.parametrize("name", RECOGNISED)
def test_another_form_is_recognised_and_said_with_the_settings_that_keep_it(
    tmp_path: Path, name: str
) -> None:
    form, polarity, writer = RECOGNISED[name]
    dataset = opened(write_rows(tmp_path, [writer] * 3))
    assert worst_iou(dataset) > 0.95
    assert {(row.form, row.polarity) for row in dataset.masks} == {(form, polarity)}
    (notice,) = (notice for notice in dataset.notices if notice.kind == "mask-form")
    assert notice.count == 3
    assert f"data.mask_from={form} data.mask_polarity={polarity}" in notice.message
    named = opened(tmp_path, mask_from=form, mask_polarity=polarity)
    assert worst_iou(named) > 0.95
    assert "mask-form" not in kinds(named)


@pytest.mark.parametrize("name", ["white paint", "label 3", "hole in the image"])
def test_one_mask_of_another_form_among_many_is_said(tmp_path: Path, name: str) -> None:
    dataset = opened(write_rows(tmp_path, [*[GREY] * 7, RECOGNISED[name][2]]))
    assert worst_iou(dataset) > 0.95
    (notice,) = (notice for notice in dataset.notices if notice.kind == "mask-forms-differ")
    assert notice.count == 1 and "p7_mask.png" in notice.examples[0]


def test_one_inverted_mask_among_many_is_named(tmp_path: Path) -> None:
    dataset = opened(write_rows(tmp_path, [*[GREY] * 7, INVERTED]))
    (notice,) = dataset.notices
    assert (notice.kind, notice.count) == ("mask-share", 1)
    assert "p7_mask.png" in notice.examples[0]
    assert "100% of its outermost pixels" in notice.message
    assert [row.id for row in dataset.masks if row.remark] == ["p7"]


def test_inverted_masks_are_refused_until_the_polarity_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path, [INVERTED] * 3)
    with pytest.raises(InputError, match=r"cover 90%.*data.mask_polarity=edit_black.*p0 91%"):
        opened(tmp_path)
    turned = opened(tmp_path, mask_polarity="edit_black")
    assert worst_iou(turned) == 1 and turned.notices == ()
    kept = opened(tmp_path, mask_polarity="edit_white")
    assert kinds(kept) == {"mask-share": 3}
    assert "data.mask_polarity=edit_black" in kept.notices[0].message


def test_the_refusal_names_a_command_that_shows_the_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    write_rows(tmp_path / "rows", [INVERTED] * 3)
    with pytest.raises(InputError) as refused:
        opened(tmp_path / "rows")
    words = shlex.split(str(refused.value).partition("rl-edit ")[2])
    assert words[-1] == "sheets"
    code, out, _ = command(monkeypatch, capsys, *words[:-1], tmp_path / "sheets")
    assert code == 0 and (tmp_path / "sheets" / "masks.png").is_file()
    assert "set data.mask_polarity=edit_black" in " ".join(out.split())


def test_targets_prove_the_polarity(tmp_path: Path) -> None:
    write_rows(tmp_path, [INVERTED] * 3)
    for seed in range(3):
        write_target(tmp_path, seed)
    dataset = opened(tmp_path)
    assert worst_iou(dataset) == 1
    assert kinds(dataset) == {"mask-form": 3}


def test_a_target_that_changes_the_other_side_names_its_row(tmp_path: Path) -> None:
    write_rows(tmp_path, [*[GREY] * 4, INVERTED])
    for seed in range(5):
        write_target(tmp_path, seed)
    dataset = opened(tmp_path)
    assert kinds(dataset) == {"mask-share": 1}
    assert "the target changes pixels outside" in dataset.notices[0].message


def test_a_large_mask_of_a_new_background_is_no_surprise(tmp_path: Path) -> None:
    write_rows(tmp_path, [INVERTED] * 3, instruction="replace the background by a beach")
    dataset = opened(tmp_path)
    assert dataset.notices == ()
    assert min(row.edit_share for row in dataset.masks) > 0.8


def test_soft_masks_are_split_at_half_and_said(tmp_path: Path) -> None:
    dataset = opened(write_rows(tmp_path, [SOFT] * 3))
    assert kinds(dataset) == {"soft-masks": 3}


def test_an_image_that_is_no_mask_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path, [lambda _, __: Image.fromarray(photograph(9)[::-1])] * 3)
    with pytest.raises(InputError, match=r"do not look like masks.*data\.mask_from"):
        opened(tmp_path)


def test_an_edited_image_in_place_of_a_mask_is_refused(tmp_path: Path) -> None:
    def edited(source: Any, region: Any) -> Image.Image:
        return Image.fromarray(np.where(region[..., None], 255 - source, source))

    write_rows(tmp_path, [edited] * 3)
    with pytest.raises(InputError, match=r"do not look like masks.*as an edited image does"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("mask_from", "form", "words"),
    [
        ("alpha", GREY, "has no transparency"),
        ("painted", GREY, "is no painted copy of its image"),
        ("labels", lambda source, _: Image.fromarray(source), "too many colours for a label map"),
    ],
)
def test_a_named_form_that_the_file_does_not_have_is_refused(
    tmp_path: Path, mask_from: str, form: Form, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        opened(write_rows(tmp_path, [form] * 2), mask_from=mask_from)


def test_paint_over_parts_of_its_own_colour_is_filled(tmp_path: Path) -> None:
    source = photograph(0).copy()
    source[28:32, 34:38] = 255  # lies inside the region
    Image.fromarray(source).save(tmp_path / "a.png")
    painted = np.where(region(0)[..., None], 255, source).astype(np.uint8)
    Image.fromarray(painted).save(tmp_path / "a_mask.png")
    mask = read_foreground(
        tmp_path / "a_mask.png", mask_from="auto", where="row", source=tmp_path / "a.png"
    )
    assert mask.form == "painted" and bool(mask.marked[28:32, 34:38].all())


def test_the_reading_of_masks_belongs_to_the_fingerprint(tmp_path: Path) -> None:
    grey_root = write_rows(tmp_path / "grey", [GREY] * 3)
    assert (
        opened(grey_root).fingerprint == opened(grey_root, mask_polarity="edit_white").fingerprint
    )
    assert (
        opened(grey_root).fingerprint != opened(grey_root, mask_polarity="edit_black").fingerprint
    )
    holes = write_rows(tmp_path / "holes", [HOLE] * 3)
    prints = {
        opened(holes, mask_from=form, mask_polarity="edit_black").fingerprint
        for form in ("auto", "luminance")
    }
    assert len(prints) == 2


def test_requests_are_read_as_datasets_are(tmp_path: Path) -> None:
    write_rows(tmp_path, [HOLE] * 3)
    (tmp_path / "p0_mask.png").unlink()
    requests = open_requests(DataConfig(path=str(tmp_path))).requests
    masked = {row.task_id: row.edit_mask() for row in requests if isinstance(row, Row)}
    assert {name: np.array_equal(edit, region(int(name[1:]))) for name, edit in masked.items()} == {
        "p1": True,
        "p2": True,
    }


def test_the_built_in_world_on_disk_needs_no_notice(tmp_path: Path) -> None:
    write_compbench((shapes.task("train", index) for index in range(64)), tmp_path / "shapes")
    dataset = opened(tmp_path / "shapes")
    assert dataset.notices == () and len(dataset) == 64


def test_the_contact_sheet_shows_unusual_rows_first_in_colour(tmp_path: Path) -> None:
    dataset = opened(write_rows(tmp_path / "rows", [*[GREY] * 30, INVERTED]))
    write_mask_files(dataset, tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "masks.png").convert("RGB")).astype(int)
    # The first cell's region is the image without the circle, so its corner is tinted.
    first = sheet[40:60, 20:40].reshape(-1, 3).mean(axis=0)
    assert first[0] > first[2] + 40
    table = json.loads((tmp_path / "data_masks.json").read_text())
    assert len(table["rows"]) == 31
    (odd,) = (row for row in table["rows"] if row["remark"])
    assert odd["id"] == "p30" and odd["edit_share"] > 0.8


def test_a_contact_sheet_needs_only_the_rows(tmp_path: Path) -> None:
    dataset = opened(write_rows(tmp_path / "rows", [GREY] * 2))
    write_contact_sheet(dataset.rows, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").width > 300


def test_training_leaves_the_masks_in_its_directory(
    tmp_path: Path, small_editor: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    data, run = write_rows(tmp_path / "rows", [HOLE] * 4), tmp_path / "run"
    small = (
        "actors.runtime=inline", "actors.threads=1", "train.updates=1", "train.groups_per_update=1",
        "rollout.group_size=4", "rollout.num_steps=3",
        "algorithm.objective={kind: neighbor, num_anchors: 2}", "train.allow_unrewarded_edit=true",
    )  # fmt: skip
    places = (f"data.path={data}", f"editor.path={small_editor}", "--run-dir", run)
    code, out, err = command(
        monkeypatch, capsys, "train", "--preset", "tiny-rc-grpo", *small, *places
    )
    text = " ".join([out, *err])
    assert code == 0, text
    assert "4 masks are read as transparency" in " ".join(text.split())
    assert (run / "masks.png").is_file()
    rows = json.loads((run / "data_masks.json").read_text())["rows"]
    assert len(rows) == 4 and max(row["edit_share"] for row in rows) < 0.2


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path, [GREY] * 2)
    grey(region(0)[:-1]).save(tmp_path / "p0_mask.png")
    with pytest.raises(InputError, match=r"p0_mask\.png is 96x79"):
        opened(tmp_path)
