"""Names the kinds of files that lie in folders of data.

A kind follows from a file's name alone; :mod:`rl_edit.data.causes` looks at contents. Every file
that a folder may hold is an image that can be read, an image that cannot (with the reason), or
none.
"""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path

from PIL import Image, features

# Pillow refuses at twice its limit with an error of its own. The warning below that is no news for
# a user, and Python would print a source line with it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_COMMON = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_HEIF = (".heic", ".heif", ".hif")
_AVIF = (".avif", ".avifs")
# Pillow knows these names, but loads them only with another program, or not at all.
_NO_PIXELS = frozenset({"BUFR", "GRIB", "HDF5", "WMF", "MPEG", "EPS"})
_RAW = (".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2", ".pef", ".srw")
_VIDEO = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
_DRAWING = (".svg", ".eps", ".ai", ".pdf", ".wmf", ".emf", ".ps")
_FLOAT = (".exr", ".hdr", ".npy", ".npz")
_NOT_OF_THE_DATA = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir")
_ABOUT_THE_DATA = (
    "readme",
    "license",
    "licence",
    "copying",
    "citation",
    "changelog",
    "dataset_inf",
)


def _register_heif() -> bool:
    """Lets Pillow open HEIC, if pillow-heif is installed. Every process does so on import."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except (ImportError, OSError, AttributeError):
        return False
    return True


def _suffixes() -> tuple[str, ...]:
    """Lists what Pillow opens, the common endings first."""
    Image.init()
    opened = {
        suffix.lower()
        for suffix, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in _NO_PIXELS
    }
    return (*_COMMON, *sorted(opened - {*_COMMON}))


HAS_HEIF = _register_heif()
HAS_AVIF = bool(features.check("avif"))
SUFFIXES = _suffixes()
"""File endings taken for images when a folder is searched, in any case.

These are all that Pillow opens. A file that is named may have any ending.
"""


def is_image(path: Path) -> bool:
    """True if the name is that of an image which can be read."""
    return path.suffix.lower() in SUFFIXES


def why_unreadable(suffix: str) -> str | None:
    """Explains why images of this ending cannot be read; None if the ending is none of an image."""
    suffix = suffix.lower()
    if suffix in SUFFIXES:
        return None
    if suffix in _HEIF:
        return f"{suffix} needs pillow-heif (pip install pillow-heif)"
    if suffix in _AVIF:
        return f"{suffix} needs a newer Pillow (pip install -U pillow)"
    if suffix in _RAW:
        return f"{suffix} is a camera's raw file (export it as JPEG or PNG)"
    if suffix in _DRAWING:
        return f"{suffix} is a drawing without pixels (export it as PNG)"
    if suffix in _VIDEO:
        return f"{suffix} is a video (save its frames as PNG)"
    if suffix == ".jxl":
        return ".jxl cannot be read by Pillow (convert it to PNG)"
    if suffix in _FLOAT:
        return f"{suffix} holds numbers without a fixed white (save 8-bit PNG)"
    return None


def is_ignored(name: str) -> bool:
    """True for hidden files, files of operating systems, and files about the data.

    They are no part of a dataset, and no notice counts them.
    """
    lower = name.lower()
    stem = lower.split(".")[0]
    return (
        lower.startswith((".", "~$"))
        or lower in _NOT_OF_THE_DATA
        or stem.startswith(_ABOUT_THE_DATA)
        or lower.endswith((".md", ".rst", ".tmp", ".log"))
    )
