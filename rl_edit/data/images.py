"""Reads images and masks from files of any common kind.

An image becomes RGB 0..255 the way a viewer would show it. It is turned as its EXIF orientation
says; palette, grey, CMYK and 16-bit values are converted; transparency is composited on white. A
mask becomes True where the instruction may change pixels. Only this file knows the polarity of
stored masks.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from rl_edit.data import pixels
from rl_edit.data.causes import why_unreadable_image
from rl_edit.data.pixels import Conversion
from rl_edit.data.stored import Stored, open_stored, tiff_layout
from rl_edit.errors import InputError

MaskPolarity = Literal["edit_white", "edit_black"]

# Pillow raises these on files that are cut short, damaged, or no images at all.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True, kw_only=True)
class Mask:
    """A mask as read from a file.

    Attributes:
        edit: ``[height, width]``, True where the instruction may change pixels.
        zero_one: the file has the values 0 and 1 rather than black and white. Worth a warning,
            because a viewer shows it black.
    """

    edit: NDArray[np.bool_]
    zero_one: bool

    @property
    def usable(self) -> bool:
        """True when it leaves something to edit and something to keep."""
        return bool(self.edit.any()) and not bool(self.edit.all())


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


def read_mask(path: Path, *, polarity: MaskPolarity, where: str) -> Mask:
    """Reads a mask of any mode, split at half brightness.

    Soft, hand-drawn edges are fine. Paint of any colour counts as white: the brightest channel
    decides. Transparency counts as "keep". Values 0 and 1 only, grey or palette, are recognised.
    The size is not checked here, because the file does not know its image.
    """
    image = _open(path, where=where)
    marked: NDArray[np.bool_]
    zero_one = False
    if image.mode == "P" and not image.has_transparency_data:
        labels = np.asarray(image)
        marked = _brightness(image, polarity) >= 128
        # Label images store 0 and 1 under palettes that make both dark.
        if labels.max() == 1 and labels.min() == 0 and marked.all() == marked.any():
            marked, zero_one = labels == 1, True
    elif image.mode in _SIXTEEN_BIT:
        levels = np.asarray(image, dtype=np.int64)
        # 8-bit values are often stored in 16-bit files, so the largest value decides the scale.
        zero_one = bool(levels.max() == 1)
        marked = levels >= (1 if zero_one else 128 if levels.max() <= 255 else 32768)
    else:
        values = _brightness(image, polarity)
        zero_one = bool(values.max() == 1)
        marked = values >= (1 if zero_one else 128)
    return Mask(
        edit=np.ascontiguousarray(marked if polarity == "edit_white" else ~marked),
        zero_one=zero_one,
    )


def read_labels(path: Path, *, where: str) -> NDArray[np.uint8]:
    """Reads a label map as ``[height, width]``.

    It is a one-channel 8-bit image whose values are labels, not brightness.
    """
    image = _open(path, where=where)
    if image.mode not in ("L", "P"):
        raise InputError(
            f"{where}: {path} has mode {image.mode}, but a label map needs one 8-bit channel: its "
            "values number the regions. Save it as an 8-bit grey PNG with 0 for background."
        )
    return np.array(image, dtype=np.uint8)


def has_turn(path: Path) -> bool:
    """True when EXIF turns the image by a quarter.

    This is the usual cause of masks that do not fit.
    """
    with Image.open(path) as image:
        return image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)


def _open(path: Path, *, where: str) -> Image.Image:
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


def _brightness(image: Image.Image, polarity: MaskPolarity) -> NDArray[np.uint8]:
    """The brightest channel, ``[height, width]``. Transparent pixels take the value of "keep"."""
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        keep = 0 if polarity == "edit_white" else 255
        image = Image.alpha_composite(Image.new("RGBA", image.size, (keep, keep, keep, 255)), image)
    return np.asarray(np.asarray(image.convert("RGB")).max(axis=2), dtype=np.uint8)


def _unreadable(path: Path, where: str, error: BaseException) -> InputError:
    if layout := tiff_layout(path):
        return InputError(
            f"{where}: {path} is a TIFF of {layout}, which cannot be read as colours ({error}). "
            "Save it as sRGB with 8 bits per channel, or remove the row."
        )
    return InputError(f"{where}: {path} {why_unreadable_image(path, error)}")
