"""Finds out why a file cannot be read as an image, from its first bytes.

A message that guesses ("cut short?") sends people the wrong way: the file may be a pointer of Git
LFS, an error page, or an image that is only too large. Nothing here decodes pixels.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

from PIL import Image

from rl_edit.data.file_kinds import HAS_AVIF, HAS_HEIF, is_image

_FIRST_BYTES = 1024
_SHOWN = 60
"""Characters of a text that a message quotes."""

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
_AVIF_BRANDS = (b"avif", b"avis")
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"%PDF", "a PDF document: export its page as PNG"),
    (b"PK\x03\x04", "a ZIP archive: unpack it and name the image inside"),
    (b"\x1f\x8b", "a gzip archive: unpack it (gunzip)"),
    (b"7z\xbc\xaf", "a 7-Zip archive: unpack it"),
    (b"\xff\x0a", "a JPEG XL image, which Pillow cannot read: convert it to PNG"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image, which Pillow cannot read: convert it to PNG"),
    (b"\x93NUMPY", "a NumPy array: save it as an 8-bit PNG"),
    (b"v/1\x01", "an OpenEXR image, which has no fixed white: save it as an 8-bit PNG"),
)


def why_missing(path: Path) -> str:
    """Says why there is no such file, as the rest of a sentence that begins with the path."""
    if path.is_symlink():
        return f"is a link to {os.readlink(path)}, which does not exist: copy the file it named"
    if path.is_dir():
        return "is a directory, not a file"
    if near := _other_spelling(path):
        return f"not found, but there is {near}: correct the name"
    return "not found"


def why_unreadable_image(path: Path, error: BaseException) -> str:
    """Says why no image was read and what helps, as the rest of a sentence after the path.

    Args:
        error: the exception of Pillow or of the file system.
    """
    if isinstance(error, FileNotFoundError):
        missing = why_missing(path)
        if missing == "not found":
            return "does not exist. Correct the path or remove the row."
        return f"{missing}."
    if isinstance(error, PermissionError):
        return "may not be read (permission denied): give yourself the right (chmod u+r)."
    if isinstance(error, Image.DecompressionBombError):
        return _too_large(error)
    try:
        with path.open("rb") as file:
            first = file.read(_FIRST_BYTES)
    except OSError as unread:
        return f"cannot be read ({unread.strerror or unread}): check the disk or the path."
    cause = _of_content(first, path.stat().st_size)
    if cause:
        return f"cannot be read as an image: it is {cause}."
    return (
        f"cannot be read as an image ({error}): it is cut short, damaged or of an unknown kind. "
        "Copy it again from its origin, or open it in a viewer and save it again as PNG or JPEG, "
        "or remove the row."
    )


def _other_spelling(path: Path) -> str | None:
    """A file beside the missing one with its name in another case or with another ending."""
    names = _names_in(path.parent)
    return names.get(path.name.casefold()) or names.get(path.stem.casefold())


@functools.lru_cache(maxsize=16)
def _names_in(folder: Path) -> dict[str, str]:
    """Names of images by folded name and by folded stem. Many missing files share a folder."""
    try:
        images = sorted(file.name for file in folder.iterdir() if is_image(file))
    except OSError:
        return {}
    by_stem = {Path(name).stem.casefold(): name for name in images}
    return by_stem | {name.casefold(): name for name in images}


def _too_large(error: Image.DecompressionBombError) -> str:
    # "Image size (200000000 pixels) exceeds limit of 178956970 pixels, ..."
    numbers = [int(number) for number in re.findall(r"(\d+) pixels", str(error))]
    seen = f"{numbers[0]:,} pixels" if numbers else "too many pixels"
    limit = f"{numbers[1]:,}" if len(numbers) > 1 else "Pillow's limit"
    return (
        f"has {seen}, more than the {limit} that Pillow opens (larger files could fill the "
        "memory). The file may be in order: save a smaller copy, of 4096 pixels a side, say."
    )


def _of_content(first: bytes, size: int) -> str:
    """Names a known kind of content with its remedy, or returns ""."""
    if not size:
        return "empty (0 bytes): a copy or download did not finish. Copy it again"
    if not first.strip(b"\0"):
        return f"{size} bytes that begin with zeros: a copy did not finish. Copy it again"
    if first.startswith(b"version https://git-lfs.github.com/spec"):
        stated = re.search(rb"^size (\d+)", first, re.M)
        of = f" of {int(stated[1])} bytes" if stated else ""
        return f"a Git LFS pointer in place of the image{of}: run 'git lfs pull' in its repository"
    for signature, cause in _SIGNATURES:
        if first.startswith(signature):
            return cause
    if first[4:8] == b"ftyp":
        return _of_container(first[8:12])
    return _of_text(first, size)


def _of_container(brand: bytes) -> str:
    """Names what an ISO media file holds that Pillow could not open."""
    if brand in _HEIF_BRANDS and not HAS_HEIF:
        return "a HEIC image, whatever its name: pip install pillow-heif, or save it as JPEG"
    if brand in _AVIF_BRANDS and not HAS_AVIF:
        return "an AVIF image: pip install -U pillow, or save it as PNG"
    if brand in (*_HEIF_BRANDS, *_AVIF_BRANDS):
        return ""
    return "a video: save a frame of it as PNG"


def _of_text(first: bytes, size: int) -> str:
    """Names what a text under an image's name is, or returns ""."""
    try:
        # The first bytes may end within a character.
        text = first.decode("utf-8", errors="ignore" if size > _FIRST_BYTES else "strict").strip()
    except UnicodeDecodeError:
        return ""
    if not text or any(not (char.isprintable() or char.isspace()) for char in text):
        return ""
    start = text[:300].lower().lstrip("\ufeff")
    quoted = repr(" ".join(text.split())[:_SHOWN])
    if "<svg" in text.lower():
        return "an SVG drawing, which has no pixels: export it as PNG"
    if start.startswith(("<!doctype html", "<html", "<head", "<body")):
        title = re.search(r"<title>\s*(.*?)\s*</title>", text, re.I | re.S)
        name = f" ({title[1][:_SHOWN]!r})" if title else ""
        return (
            f"an HTML page{name} saved under an image's name: the server answered the download "
            "with a page. Check the address and download it again"
        )
    if start.startswith(("<?xml", "{", "[", "<")):
        return f"a server's text ({quoted}) saved under an image's name: download it again"
    if len(text.split()) == 1 and "/" in text:
        return (
            f"the name of another file ({quoted}): a link that was copied as text (git without "
            "links, some archives). Copy the file that it names"
        )
    return f"text ({quoted}). Name an image, or save it again as PNG or JPEG"
