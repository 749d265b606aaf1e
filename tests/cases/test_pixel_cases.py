"""Pixels as cameras, scanners and programs store them: right, or refused with what was seen."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_files import a_box, an_image, saved
from rl_edit.data import DataConfig, RowsDataset, open_dataset
from rl_edit.data.images import examine_image, read_rgb
from rl_edit.errors import InputError


def grey_ramp() -> np.ndarray[Any, Any]:
    return np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16)


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def exchanged_profile() -> bytes:
    """sRGB with red and green exchanged, as no program would guess."""
    profile = bytearray(srgb_profile())
    red, green = profile.index(b"rXYZ", 128), profile.index(b"gXYZ", 128)
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


def linear_profile() -> bytes:
    """sRGB's primaries with linear light."""
    profile = srgb_profile()
    start = profile.index(b"para", 128 + 4 + 12 * profile[131])
    fixed = struct.pack(">5i", *(round(v * 65536) for v in (1, 1, 0, 1, 0)))
    return profile[: start + 12] + fixed + profile[start + 12 + len(fixed) :]


def in_linear_light(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    coded = image / 255
    light = np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)
    return np.rint(255 * light).astype(np.uint8)


def with_gamma(path: Path, gamma: int) -> Path:
    """Puts a gAMA chunk behind a PNG's header, in units of 1 / 100000."""
    content = path.read_bytes()
    chunk = b"gAMA" + struct.pack(">I", gamma)
    path.write_bytes(
        content[:33]
        + struct.pack(">I", 4)
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + content[33:]
    )
    return path


def wide_rgb_png(path: Path, values: np.ndarray[Any, Any]) -> Path:
    """Writes 16-bit RGB, which Pillow cannot write."""
    height, width, _ = values.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    )
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in parts
        )
    )
    return path


def conversions(path: Path) -> tuple[str, ...]:
    return examine_image(path, where="row 3").conversions


def refusal(path: Path) -> str:
    """The message that both the check and the reading give."""
    with pytest.raises(InputError) as read:
        read_rgb(path, where="row 3")
    with pytest.raises(InputError) as checked:
        conversions(path)
    assert str(read.value) == str(checked.value)
    assert str(read.value).startswith(f"row 3: {path}")
    return str(read.value)


def test_twelve_bits_in_a_sixteen_bit_file_are_refused_with_their_range(tmp_path: Path) -> None:
    values = (grey_ramp().astype(np.uint16) * 16).clip(32)
    for name in ("grey.png", "grey.tif"):
        assert "values from 32 to 4080 in a 16-bit file" in refusal(saved(tmp_path / name, values))
    colour = np.repeat(values[:, :, None], 3, axis=2)
    message = refusal(wide_rgb_png(tmp_path / "colour.png", colour))
    assert "about 4095 in a 16-bit file" in message and "nearly black" in message


def test_a_depth_that_the_file_declares_is_used(tmp_path: Path) -> None:
    values = grey_ramp().astype(np.uint16) * 16
    # TIFF's MaxSampleValue, as microscopes write it.
    path = saved(tmp_path / "declared.tif", values, tiffinfo={281: 4095})
    assert np.abs(read_rgb(path, where="row")[..., 0].astype(int) - grey_ramp()).max() <= 1
    assert conversions(path) == ()
    Image.fromarray(values * 16).save(tmp_path / "grey.pgm")
    assert read_rgb(tmp_path / "grey.pgm", where="row").max() == 254


def test_sixteen_bits_of_full_range_are_read_as_they_are(tmp_path: Path) -> None:
    colour = an_image(9, 7).astype(np.uint16) * 257
    path = wide_rgb_png(tmp_path / "colour.png", colour)
    assert np.array_equal(read_rgb(path, where="row"), an_image(9, 7))
    black = saved(tmp_path / "black.png", np.zeros((4, 4), dtype=np.uint16))
    assert read_rgb(black, where="row").max() == 0
    assert conversions(path) == conversions(black) == ()
    # A quarter of the range may be a dark photograph: read, and said.
    dim = saved(tmp_path / "dim.png", grey_ramp().astype(np.uint16) * 64)
    assert read_rgb(dim, where="row").max() == 16320 // 257
    assert conversions(dim) == ("dim",)


def test_a_negative_of_sixteen_bits_is_turned(tmp_path: Path) -> None:
    values = 65535 - grey_ramp().astype(np.uint16) * 257
    path = saved(tmp_path / "negative.tif", values, tiffinfo={262: 0})
    with Image.open(path) as image:
        assert image.tag_v2[262] == 0  # type: ignore[attr-defined]
    assert np.array_equal(read_rgb(path, where="row")[..., 0], grey_ramp())


def test_wide_integers_and_floating_point_are_refused_with_their_range(tmp_path: Path) -> None:
    integers = grey_ramp().astype(np.int32) + 3
    assert "values from 3 to 258 in a 32-bit" in refusal(saved(tmp_path / "i32.tif", integers))
    floats = (grey_ramp() / 255).astype(np.float32)
    message = refusal(saved(tmp_path / "float.tif", floats))
    assert "floating-point values from 0 to 1" in message and "linear light" in message


def test_a_tiff_that_pillow_cannot_read_is_named_by_its_layout(tmp_path: Path) -> None:
    # Three channels of 32-bit floating point, written by hand: two pixels and nine tags.
    tags = [
        *((256, 3, 1, 2), (257, 3, 1, 1), (258, 3, 3, 200), (259, 3, 1, 1), (262, 3, 1, 2)),
        *((273, 4, 1, 220), (277, 3, 1, 3), (279, 4, 1, 24), (339, 3, 3, 206)),
    ]
    content = b"II*\0" + struct.pack("<IH", 8, len(tags))
    content += b"".join(struct.pack("<HHII", *tag) for tag in tags) + struct.pack("<I", 0)
    content = content.ljust(200, b"\0") + struct.pack("<3H", 32, 32, 32)
    content += struct.pack("<3H", 3, 3, 3) + b"\0" * 8 + struct.pack("<6f", *range(6))
    path = tmp_path / "light.tif"
    path.write_bytes(content)
    assert "a TIFF of 3 channels of 32-bit floating-point values" in refusal(path)


def test_a_profile_is_applied_and_srgb_is_left_alone(tmp_path: Path) -> None:
    image = an_image(24, 18)
    for suffix in ("png", "tif", "webp"):
        options = {"lossless": True} if suffix == "webp" else {}
        same = saved(tmp_path / f"srgb.{suffix}", image, icc_profile=srgb_profile(), **options)
        assert np.array_equal(read_rgb(same, where="row"), image), suffix
        assert conversions(same) == ()
        other = saved(
            tmp_path / f"other.{suffix}", image, icc_profile=exchanged_profile(), **options
        )
        change = read_rgb(other, where="row").astype(int) - image[..., (1, 0, 2)]
        assert np.abs(change).max() <= 3, suffix
        assert conversions(other) == ("profile",)


def test_a_profile_keeps_transparency_and_works_on_a_palette(tmp_path: Path) -> None:
    pixels = np.zeros((2, 2, 4), dtype=np.uint8)
    pixels[0] = (200, 0, 0, 255)
    path = saved(tmp_path / "glass.png", pixels, icc_profile=exchanged_profile())
    read = read_rgb(path, where="row").astype(int)
    assert np.abs(read[0] - (0, 200, 0)).max() <= 3 and read[1].min() == 255
    assert conversions(path) == ("profile", "transparent")
    Image.new("RGB", (4, 4), (200, 0, 0)).quantize(2).save(
        tmp_path / "palette.png", icc_profile=exchanged_profile()
    )
    read = read_rgb(tmp_path / "palette.png", where="row").astype(int)
    assert np.abs(read - (0, 200, 0)).max() <= 3


def test_linear_light_becomes_srgb(tmp_path: Path) -> None:
    image = an_image(24, 18) // 2 + 100
    stored = in_linear_light(image)
    by_profile = saved(tmp_path / "profile.png", stored, icc_profile=linear_profile())
    by_gamma = with_gamma(saved(tmp_path / "gamma.png", stored), 100000)
    for path, name in ((by_profile, "profile"), (by_gamma, "gamma")):
        assert np.abs(read_rgb(path, where="row").astype(int) - image).max() <= 3, name
        assert conversions(path) == (name,)
    usual = with_gamma(saved(tmp_path / "usual.png", image), 45455)
    assert np.array_equal(read_rgb(usual, where="row"), image)
    assert conversions(usual) == ()


def test_printing_colours_come_out_right_and_are_named(tmp_path: Path) -> None:
    path = tmp_path / "red.jpg"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path, quality=95)
    red = read_rgb(path, where="row").astype(int)
    assert np.abs(red - (255, 0, 0)).max() <= 4
    assert conversions(path) == ("cmyk",)
    # A profile of another colour space cannot be applied.
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path, icc_profile=srgb_profile())
    assert conversions(path) == ("bad_profile", "cmyk")


def test_a_damaged_profile_is_named_and_left_out(tmp_path: Path) -> None:
    image = an_image(6, 6)
    path = saved(tmp_path / "p.png", image, icc_profile=b"no profile at all")
    assert np.array_equal(read_rgb(path, where="row"), image)
    assert conversions(path) == ("bad_profile",)


def test_lab_becomes_rgb(tmp_path: Path) -> None:
    Image.new("LAB", (4, 4), (128, 128, 128)).save(tmp_path / "lab.tif")
    grey = read_rgb(tmp_path / "lab.tif", where="row").astype(int)
    assert np.abs(grey - 119).max() <= 3  # L* 50 is sRGB 119


def test_of_an_animation_the_first_frame_is_used_and_named(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    for suffix in ("webp", "gif", "png", "tif"):
        path = tmp_path / f"moving.{suffix}"
        options = {"lossless": True} if suffix == "webp" else {}
        first.save(path, save_all=True, append_images=[second], **options)
        assert read_rgb(path, where="row")[0, 0].tolist() == [255, 0, 0], suffix
        assert conversions(path) == ("frames",), suffix


def test_transparency_of_every_mode_is_shown_on_white_and_named(tmp_path: Path) -> None:
    for mode, colour in (("LA", (0, 0)), ("RGBA", (0, 0, 0, 0))):
        path = tmp_path / f"{mode}.png"
        Image.new(mode, (4, 4), colour).save(path)
        assert read_rgb(path, where="row").min() == 255
        assert conversions(path) == ("transparent",)
    solid = tmp_path / "solid.png"
    Image.new("RGBA", (4, 4), (9, 9, 9, 255)).save(solid)
    assert read_rgb(solid, where="row").max() == 9 and conversions(solid) == ()
    Image.new("P", (4, 4), 0).save(tmp_path / "palette.png", transparency=0)
    assert conversions(tmp_path / "palette.png") == ("transparent",)


def test_a_dark_image_of_eight_bits_stays_as_it_is(tmp_path: Path) -> None:
    dark = an_image(8, 8) // 32
    path = saved(tmp_path / "dark.png", dark)
    assert np.array_equal(read_rgb(path, where="row"), dark)
    assert conversions(path) == ()


def test_a_dataset_counts_what_was_converted(tmp_path: Path) -> None:
    for index in range(4):
        saved(tmp_path / f"p{index}_mask.png", a_box(24, 18))
        (tmp_path / f"p{index}.txt").write_text("remove it")
        options = {"icc_profile": exchanged_profile()} if index < 3 else {}
        saved(tmp_path / f"p{index}.png", an_image(24, 18, seed=index), **options)
    dataset = open_dataset(DataConfig(path=str(tmp_path)), "train")
    (notice,) = (n for n in dataset.notices if n.kind == "pixels-profile")
    assert notice.count == 3 and "3 of 4 images have a colour profile" in notice.message
    # A run of an earlier version saw other pixels: it must not go on as if nothing had changed.
    plain = replace(dataset, notices=()) if isinstance(dataset, RowsDataset) else None
    assert plain is not None and plain.fingerprint != dataset.fingerprint
    with pytest.raises(InputError, match="3 of 4 images have a colour profile"):
        open_dataset(DataConfig(path=str(tmp_path), strict=True), "train")
