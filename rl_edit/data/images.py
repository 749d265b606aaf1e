"""Reads images from files of any common kind.

An image becomes RGB 0..255 the way a viewer would show it. It is turned as its EXIF orientation
says; palette, grey, CMYK and 16-bit values are converted; transparency is composited on white.
Masks are read in ``masks.py``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from rl_edit.data import pixels
from rl_edit.data.causes import why_unreadable_image
from rl_edit.data.pixels import Conversion
from rl_edit.data.stored import Stored, open_stored, tiff_layout
from rl_edit.errors import InputError

# Pillow raises these on files that are cut short, damaged, or no images at all.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """Facts about an image that are known without keeping its pixels.

    Attributes:
        size: (height, width) as :func:`read_rgb` returns it.
        conversions: what it converts or leaves out.
    """

    size: tuple[int, int]
    conversions: tuple[Conversion, ...]


def read_rgb(path: Path, *, where: str) -> NDArray[np.uint8]:
    """Reads an image, upright, as ``[height, width, 3]``.

    Args:
        where: names the row in errors.
    """
    return pixels.convert(_stored(path, where=where), path=path, where=where)[0]


def examine_image(path: Path, *, where: str) -> ImageFacts:
    """Checks an image and finds out what :func:`read_rgb` will make of it.

    Raises:
        InputError: it cannot be read, or the meaning of its values is unknown.
    """
    stored = _stored(path, where=where, small=True)
    if pixels.needs_values(stored):
        conversions = pixels.convert(stored, path=path, where=where)[1]
    else:
        conversions = pixels.header_conversions(stored)
    return ImageFacts(size=stored.size, conversions=conversions)


def has_turn(path: Path) -> bool:
    """True when EXIF turns the image by a quarter.

    This is the usual cause of masks that do not fit.
    """
    with Image.open(path) as image:
        return image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)


def open_upright(path: Path, *, where: str) -> Image.Image:
    """Opens an image, turned as its EXIF orientation says."""
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except _DAMAGE as error:
        raise _unreadable(path, where, error) from error
    if upright.mode == "F":
        raise InputError(
            f"{where}: {path} holds floating-point values, which have no fixed white, so its "
            "colours would be a guess. Save it with 8 or 16 bits per channel."
        )
    return upright


def _stored(path: Path, *, where: str, small: bool = False) -> Stored:
    try:
        return open_stored(path, small=small)
    except _DAMAGE as error:
        raise _unreadable(path, where, error) from error


def _unreadable(path: Path, where: str, error: BaseException) -> InputError:
    if layout := tiff_layout(path):
        return InputError(
            f"{where}: {path} is a TIFF of {layout}, which cannot be read as colours ({error}). "
            "Save it as sRGB with 8 bits per channel, or remove the row."
        )
    return InputError(f"{where}: {path} {why_unreadable_image(path, error)}")
