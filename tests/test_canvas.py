"""Tasks on the canvas of an editor: size, mask and agreement of a pair."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_files import all_tasks, an_image, saved, write_folder
from rl_edit.data import DataConfig, open_dataset, shapes
from rl_edit.data.canvas import canvas_size, fit
from rl_edit.errors import InputError
from rl_edit.types import EditTask, PairedRegionsTask


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


@pytest.mark.parametrize(
    ("height", "width", "resolution", "multiple", "expected"),
    [
        # A strip: the short side takes two steps, the area alone decides the long one, rounded up.
        (3000, 1, 64, 8, (256, 16)),
        (1, 3000, 64, 8, (16, 256)),
        (3000, 1, 100, 8, (632, 16)),
        (1, 3000, 100, 8, (16, 632)),
        # Two steps by rounding and not by the floor: the aspect ratio stays.
        (1184, 346, 64, 16, (112, 32)),
        (346, 1184, 64, 16, (32, 112)),
        # The smallest canvas is square, whatever the image.
        (3000, 1, 32, 16, (32, 32)),
        (1, 3000, 32, 16, (32, 32)),
    ],
)
def test_the_canvas_of_an_extreme_image_has_the_area_of_any_other(
    height: int, width: int, resolution: int, multiple: int, expected: tuple[int, int]
) -> None:
    assert canvas_size(height, width, resolution, multiple) == expected


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
    image = torch.from_numpy(an_image(height, width))
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
        # Squares [y, y+1) x [x, x+1) of the original, in new pixels, as exact integer bounds.
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
        tasks = all_tasks(write_folder(tmp_path, height=101, width=67))
    for task in tasks:
        fitted = fit(task, resolution=64, multiple=8)
        assert tuple(fitted.source.shape) == (80, 56, 3) and tuple(fitted.edit_mask.shape) == (
            80,
            56,
        )


def test_a_mask_that_leaves_no_background_on_the_canvas_is_refused_or_skipped_and_counted(
    tmp_path: Path,
) -> None:
    root = write_folder(tmp_path / "data", num_rows=4, height=64, width=64)
    wide = np.zeros((64, 64), dtype=np.uint8)
    wide[5:60, 5:60] = 255
    saved(root / "p0_mask.png", wide)
    canvas = {"resolution": 32, "multiple": 8}
    assert len(open_dataset(DataConfig(path=str(root), heldout_path=str(root)), "train")) == 4
    with pytest.raises(
        InputError,
        match=r"1 problem in 4 rows.*touches every 8 px token.*raise editor\.resolution",
    ):
        open_dataset(DataConfig(path=str(root), heldout_path=str(root)), "train", **canvas)
    usable = open_dataset(
        DataConfig(path=str(root), heldout_path=str(root), empty_mask="skip"), "train", **canvas
    )
    assert (len(usable), usable.skipped) == (3, 1)
    assert "p0" not in " ".join(usable[index].task_id for index in range(3))
    finer = open_dataset(
        DataConfig(path=str(root), heldout_path=str(root)), "train", resolution=64, multiple=4
    )
    assert (len(finer), finer.skipped) == (4, 0)
