"""Images and masks of any common kind become arrays of one kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_files import a_box, an_image, saved
from rl_edit.data.images import examine_image, read_rgb
from rl_edit.data.masks import Foreground, Reading, read_foreground, read_mask


def foreground(path: Path) -> Foreground:
    return read_foreground(path, mask_from="auto", where="row", source=None)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_images_and_sizes(tmp_path: Path, orientation: int) -> None:
    upright = an_image(5, 7)
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
    path = saved(tmp_path / "turned.png", np.ascontiguousarray(stored), exif=exif)
    assert np.array_equal(read_rgb(path, where="row"), upright)
    assert examine_image(path, where="row").size == (5, 7)
    mask_path = saved(tmp_path / "mask.png", np.ascontiguousarray(stored[..., 0]), exif=exif)
    assert np.array_equal(read_mask(mask_path, Reading(), where="row"), upright[..., 0] >= 128)


def test_palette_grey_and_sixteen_bit_images_become_rgb(tmp_path: Path) -> None:
    colours = np.array([[[255, 0, 0], [0, 128, 0]], [[0, 0, 255], [10, 20, 30]]], dtype=np.uint8)
    Image.fromarray(colours).quantize(4).save(tmp_path / "palette.png")
    assert Image.open(tmp_path / "palette.png").mode == "P"
    assert np.array_equal(read_rgb(tmp_path / "palette.png", where="row"), colours)
    saved(tmp_path / "grey.png", colours[..., 0])
    assert np.array_equal(
        read_rgb(tmp_path / "grey.png", where="row"), np.repeat(colours[..., :1], 3, axis=2)
    )
    saved(tmp_path / "sixteen.png", colours[..., 1].astype(np.uint16) * 257)
    assert np.array_equal(
        read_rgb(tmp_path / "sixteen.png", where="row"), np.repeat(colours[..., 1:2], 3, axis=2)
    )
    Image.new("CMYK", (3, 2), (0, 0, 0, 0)).save(tmp_path / "cmyk.tif")
    assert read_rgb(tmp_path / "cmyk.tif", where="row").min() == 255
    Image.new("1", (3, 2), 1).save(tmp_path / "bits.png")
    assert read_rgb(tmp_path / "bits.png", where="row").shape == (2, 3, 3)


def test_transparency_is_composited_on_white(tmp_path: Path) -> None:
    pixels = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 128]]], dtype=np.uint8)
    path = saved(tmp_path / "glass.png", pixels)
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
        mask = foreground(saved(tmp_path / f"{name}.png", pixels))
        assert np.array_equal(mask.edit("edit_white"), expected), name
        assert not mask.zero_one


def test_zero_one_masks_are_recognised(tmp_path: Path) -> None:
    ones = (a_box(6, 9) > 0).astype(np.uint8)
    label = Image.fromarray(ones, mode=None).convert("P")
    label.putpalette([0, 0, 0, 100, 0, 0])
    label.save(tmp_path / "label.png")
    assert Image.open(tmp_path / "label.png").mode == "P"
    saved(tmp_path / "grey.png", ones)
    saved(tmp_path / "sixteen.png", ones.astype(np.uint16))
    for name in ("label", "grey", "sixteen"):
        mask = foreground(tmp_path / f"{name}.png")
        assert mask.zero_one and np.array_equal(mask.edit("edit_white"), ones > 0), name


def test_edit_black_is_the_complement_of_edit_white(tmp_path: Path) -> None:
    path = saved(tmp_path / "mask.png", a_box(8, 8))
    white, black = (
        read_mask(path, reading, where="row")
        for reading in (Reading(polarity="edit_white"), Reading(polarity="edit_black"))
    )
    assert np.array_equal(white, ~black) and white.any()
