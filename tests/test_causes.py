"""The line about a file that is no readable image names the cause that was seen."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from data_files import a_box, all_tasks, an_image, saved, write_folder
from rl_edit.data import file_kinds, images
from rl_edit.errors import InputError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "cause", "remedy"),
    [
        (LFS, "Git LFS pointer in place of the image of 12345 bytes", "git lfs pull"),
        (b"", r"empty \(0 bytes\)", "Copy it again"),
        (bytes(5000), "5000 bytes that begin with zeros", "Copy it again"),
        (
            b"<!DOCTYPE html><html><head><title>404 Not Found</title></head>",
            r"an HTML page \('404 Not Found'\)",
            "download it again",
        ),
        (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "AccessDenied", "download it again"),
        (b'{"error": "rate limit"}', "rate limit", "download it again"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing", "export it as PNG"),
        (b"../../blobs/3f2a", "'../../blobs/3f2a'", "Copy the file that it names"),
        (b"%PDF-1.7 ...", "a PDF document", "export its page"),
        (b"PK\x03\x04zip", "a ZIP archive", "unpack it"),
        (b"\xff\x0ajxl", "JPEG XL", "convert it to PNG"),
        (b"\0\0\0\x18ftypmp42", "a video", "save a frame"),
        (b"hello world", "text \\('hello world'\\)", "save it again as PNG"),
        (b"\x80\x81\x05 what is this", "unknown kind", "Copy it again from its origin"),
    ],
)
def test_the_message_names_the_content_and_a_remedy(
    tmp_path: Path, content: bytes, cause: str, remedy: str
) -> None:
    write_folder(tmp_path)
    (tmp_path / "p1.png").write_bytes(content)
    with pytest.raises(InputError, match=rf"p1.png cannot be read as an image.*{cause}") as caught:
        all_tasks(tmp_path)
    assert remedy in str(caught.value)


def test_an_image_over_the_limit_of_pillow_is_said_to_be_large_not_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "large.png", an_image(60, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"has 3,000 pixels, more than the 2,000") as caught:
        images.read_rgb(path, where="row 1")
    assert "cut short" not in str(caught.value) and "smaller copy" in str(caught.value)


def test_a_real_image_that_is_cut_short_is_still_called_so(tmp_path: Path) -> None:
    path = saved(tmp_path / "cut.jpg", an_image(90, 90))
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(InputError, match=r"cut short, damaged"):
        images.read_rgb(path, where="row 1")


def test_a_heic_image_under_another_name_is_recognised_by_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rl_edit.data import causes

    monkeypatch.setattr(causes, "HAS_HEIF", False)
    write_folder(tmp_path)
    (tmp_path / "p1.png").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(InputError, match=r"a HEIC image, whatever its name: pip install"):
        all_tasks(tmp_path)


def test_a_link_without_its_file_names_the_file(tmp_path: Path) -> None:
    os.symlink("nowhere.png", tmp_path / "link.png")
    with pytest.raises(
        InputError, match=r"link.png is a link to nowhere.png, which does not exist"
    ):
        images.read_rgb(tmp_path / "link.png", where="row 1")


@pytest.mark.parametrize("suffix", [".jfif", ".avif", ".jp2", ".tga", ".ppm", ".JPE", ".qoi"])
def test_every_kind_that_pillow_opens_is_read_from_a_folder(tmp_path: Path, suffix: str) -> None:
    if suffix == ".avif" and not file_kinds.HAS_AVIF:
        pytest.skip("this Pillow has no AVIF")
    buffer = io.BytesIO()
    kind = Image.registered_extensions()[suffix.lower()]
    Image.fromarray(an_image(37, 53)).save(buffer, format=kind)
    (tmp_path / f"a{suffix}").write_bytes(buffer.getvalue())
    (tmp_path / "a.txt").write_text("go")
    saved(tmp_path / "a_mask.png", a_box(37, 53))
    (task,) = all_tasks(tmp_path)
    assert tuple(task.source.shape) == (37, 53, 3)
