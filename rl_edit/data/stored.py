"""Opens an image file and keeps what decides the meaning of its values: depth, white, frames."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, TiffImagePlugin

_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLES = 258, 262, 277
_TIFF_MAX_VALUE, _TIFF_FORMAT = 281, 339
_TIFF_KINDS = {1: "unsigned integers", 2: "signed integers", 3: "floating-point values"}
_EXIF_ORIENTATION = 0x0112
# EXIF names the rules of a file here; "R03" is Adobe RGB (DCF 2.0).
_EXIF_INTEROPERABILITY = 0xA005
# Pillow scales these by the depth that they declare, so white is 65535 for sure.
_SCALED = ("PPM", "JPEG2000")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """An image as its file stores it.

    Attributes:
        image: decoded and upright.
        size: (height, width) of the upright image, also where ``image`` is a small one.
        rawmode: Pillow's name of the layout in the file. It shows 16-bit channels, which Pillow
            reads with 8 bits where there are three.
        frames: frames of an animation, or pages.
        white: value of white that the file declares for one wide channel; None where it does not.
        white_is_zero: the file stores a wide channel as a negative (TIFF's WhiteIsZero).
        adobe_rgb: EXIF names Adobe RGB.
    """

    image: Image.Image
    size: tuple[int, int]
    rawmode: str = ""
    frames: int = 1
    white: int | None = None
    white_is_zero: bool = False
    adobe_rgb: bool = False


def open_stored(path: Path, *, small: bool = False) -> Stored:
    """Opens an image and decodes its first frame.

    Args:
        small: decode a JPEG at an eighth of its size, which still shows damage and takes far less
            time.

    Raises:
        OSError, SyntaxError, ValueError, EOFError: it is damaged, or no image.
    """
    with Image.open(path) as image:
        rawmode = _rawmode(image)
        tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
        # A phone's MPO holds a gain map or a preview behind the photograph, no other image.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        width, height = image.size
        if small and image.format == "JPEG":
            image.draft(None, (max(width // 8, 1), max(height // 8, 1)))
        image.load()
        exif = image.getexif()
        turned = exif.get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
        return Stored(
            size=(width, height) if turned else (height, width),
            image=ImageOps.exif_transpose(image),
            rawmode=rawmode,
            frames=frames,
            white=65535 if image.format in _SCALED else _declared_white(tags),
            white_is_zero=tags.get(_TIFF_PHOTOMETRIC) == 0 and image.mode.startswith("I"),
            adobe_rgb=exif.get_ifd(_EXIF_INTEROPERABILITY).get(1) == "R03",
        )


def tiff_layout(path: Path) -> str:
    """Describes the values of a TIFF file that Pillow cannot read; "" for any other file."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
            if head[:4] not in (b"II*\0", b"MM\0*"):
                return ""
            tags = TiffImagePlugin.ImageFileDirectory_v2(head)
            file.seek(tags.next)
            tags.load(file)
    # Damaged as well: then the usual message is the right one.
    except Exception:
        return ""
    bits, kinds = tags.get(_TIFF_BITS, (1,)), tags.get(_TIFF_FORMAT, (1,))
    kind = _TIFF_KINDS.get(kinds[0], "values of an unknown kind")
    return f"{tags.get(_TIFF_SAMPLES, 1)} channels of {bits[0]}-bit {kind}"


def _rawmode(image: Image.Image) -> str:
    """Returns the layout of the first tile; it is gone once the image is decoded."""
    tiles = getattr(image, "tile", None)
    if not tiles:
        return ""
    layout = tiles[0][3]
    name = layout[0] if isinstance(layout, tuple) and layout else layout
    return name if isinstance(name, str) else ""


def _declared_white(tags: Mapping[int, Any]) -> int | None:
    """Returns white as a TIFF's tags give it, for one wide channel."""
    bits = tags.get(_TIFF_BITS, (8,))
    if len(bits) == 1 and 8 < bits[0] < 16:
        return int(2 ** bits[0] - 1)
    # Programs write the largest value of the image there, too. Only a complete depth is believed.
    highest = tags.get(_TIFF_MAX_VALUE)
    value = highest[0] if isinstance(highest, tuple) and highest else highest
    if isinstance(value, int) and value in {2**depth - 1 for depth in range(8, 16)}:
        return value
    return None
