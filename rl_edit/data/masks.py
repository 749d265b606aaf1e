"""Reads masks of every common form. Only this file knows how masks are stored.

A stored mask has a *foreground*: the bright pixels, the opaque ones, the labels other than 0, or
the paint on a copy of the source. Its polarity says whether the foreground is the edit region
(``edit_white``) or what should stay (``edit_black``). A mask becomes True where the instruction
may change pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rl_edit.data.images import open_upright, read_rgb
from rl_edit.data.mask_pixels import (
    BLACK,
    WHITE,
    Pixels,
    Values,
    alpha_channel,
    alpha_varies,
    brightest,
    edge_values,
    filled,
    grey_levels,
    has_noise_of_jpeg,
    iou,
    is_binary,
    is_flat,
    levels,
    opaque_pixels,
    present_values,
    ragged,
    ragged_edges,
    rgb_of,
    share_of_colour,
    two_sided,
    varies_alike,
)
from rl_edit.errors import InputError

Polarity = Literal["edit_white", "edit_black"]
MaskPolarity = Literal["auto", "edit_white", "edit_black"]
MaskForm = Literal["luminance", "alpha", "labels", "painted"]
MaskFrom = Literal["auto", "luminance", "alpha", "labels", "painted"]

MAX_COLOURS = 256
"""Different values that a label map may have when it is named as one."""

MAX_LABELS = 32
"""Different values of a label map that is recognised; photographs and soft edges have more."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Says how a mask is read.

    Example:
        ``Reading(form="alpha", polarity="edit_black")`` is MagicBrush's: the transparent hole may
        change.
    """

    form: MaskForm = "luminance"
    polarity: Polarity = "edit_white"


@dataclass(frozen=True, kw_only=True)
class Foreground:
    """The pixels that a stored mask marks, before its polarity is applied.

    Attributes:
        marked: ``[height, width]``, True for bright, opaque, labelled or painted.
        transparent: pixels that stay under either polarity; None where there are none.
        form: the form it was read in.
        zero_one: it has the values 0 and 1 rather than black and white. A viewer shows it black.
        labels: the values of a label map, else empty.
        agreement: IoU of the mask split at half with the mask split at a quarter or at three
            quarters, whichever is lower. Low where much of it is soft.
        bright: for transparency, opaque pixels are bright: brightness says the same.
        doubt: what contradicts its being a mask at all, or "".
    """

    marked: Pixels
    form: MaskForm
    transparent: Pixels | None = None
    zero_one: bool = False
    labels: tuple[int, ...] = ()
    agreement: float = 1.0
    bright: bool = False
    doubt: str = ""

    def edit(self, polarity: Polarity) -> Pixels:
        """Returns the edit region under a polarity."""
        edit = self.marked if polarity == "edit_white" else ~self.marked
        return np.ascontiguousarray(edit if self.transparent is None else edit & ~self.transparent)


def read_mask(path: Path, reading: Reading, *, where: str, source: Path | None = None) -> Pixels:
    """Reads a mask as ``[height, width]``, True where the instruction may change pixels.

    The size is not checked here, because the file does not know its image.

    Args:
        source: the image that a painted mask is a copy of.
    """
    foreground = read_foreground(path, mask_from=reading.form, where=where, source=source)
    return foreground.edit(reading.polarity)


def read_foreground(
    path: Path, *, mask_from: MaskFrom, where: str, source: Path | None
) -> Foreground:
    """Reads a mask in the form that is named, or in the one that is recognised.

    Raises:
        InputError: the file cannot be read, or not in the form that is named.
    """
    image = open_upright(path, where=where)
    copy = _Copy(path=path, where=where, source=source)
    if mask_from == "auto":
        return _recognised(image, copy)
    if mask_from == "painted":
        painted = _painted(image, copy)
        if painted is None:
            raise InputError(
                f"{where}: {path} is no painted copy of its image: too few pixels are equal, or "
                "none is painted. Paint on a copy of the same size, or set data.mask_from to what "
                "it is."
            )
        return painted
    if mask_from == "labels":
        return _labels(image, copy)
    if mask_from == "alpha":
        if not image.has_transparency_data:
            raise InputError(
                f"{where}: {path} has no transparency, so data.mask_from=alpha finds no mask in "
                "it. Save it with transparency, or set data.mask_from=luminance."
            )
        return _alpha(image)
    return _luminance(image)


def read_labels(path: Path, *, where: str) -> NDArray[np.uint8]:
    """Reads a label map as ``[height, width]``.

    It is a one-channel 8-bit image whose values are labels, not brightness.
    """
    image = open_upright(path, where=where)
    if image.mode not in ("L", "P"):
        raise InputError(
            f"{where}: {path} has mode {image.mode}, but a label map needs one 8-bit channel: its "
            "values number the regions. Save it as an 8-bit grey PNG with 0 for background."
        )
    return np.array(image, dtype=np.uint8)


@dataclass(frozen=True, kw_only=True)
class _Copy:
    """The files of a mask that may be a copy of its image."""

    path: Path
    where: str
    source: Path | None

    def pixels(self) -> NDArray[np.uint8] | None:
        """Reads the image; None without one."""
        return None if self.source is None else read_rgb(self.source, where=self.where)


def _recognised(image: Image.Image, copy: _Copy) -> Foreground:
    """Reads a mask in the form that its pixels suggest."""
    if alpha_varies(image):
        # Black and white under some transparency is a mask with, say, round corners.
        inside = rgb_of(image)[opaque_pixels(image)]
        if two_sided(inside) and not _shows_source(image, copy):
            return _luminance(image)
        return _alpha(image)
    bright = _luminance(image)
    grey = grey_levels(image)
    labels = _labels_if_any(image, grey)
    # A drawing in black and white differs from a mask by its many lines only.
    simple = grey is not None and is_binary(grey, max_middle=0.15) and not ragged(bright.marked)
    if not simple and (painted := _painted(image, copy)) is not None:
        return painted
    # Where both readings agree, a palette or a dark colour changes nothing.
    if labels is None or np.array_equal(labels.marked, bright.marked):
        return bright
    return labels


# Luminance: split at half brightness.


def _luminance(image: Image.Image) -> Foreground:
    """Splits a mask at half brightness.

    Paint of any colour counts as bright: the brightest channel decides. Transparent pixels stay.
    """
    values, white = levels(image)
    top = int(values.max())
    zero_one = top == 1 and white > 1
    if zero_one:
        return Foreground(marked=values >= 1, form="luminance", zero_one=True)
    half, quarter, three_quarters = ((white + 1) * part // 4 for part in (2, 1, 3))
    marked = values >= half
    transparent = ~opaque_pixels(image) if alpha_varies(image) else None
    agreement = min(iou(marked, values >= level) for level in (quarter, three_quarters))
    middle = ((values > white * BLACK // 255) & (values < white * WHITE // 255)).mean()
    coloured = share_of_colour(image)
    doubt = ""
    if middle > 0.35 and ragged_edges(values, white):
        doubt = f"{middle:.0%} of it is neither black nor white, as in a photograph"
    elif coloured > 0.02 and middle > 0.1:
        doubt = f"{coloured:.0%} of it has colours, as in a photograph"
    return Foreground(
        marked=marked,
        form="luminance",
        transparent=transparent,
        agreement=agreement,
        doubt=doubt,
    )


# Alpha: split at half transparency.


def _alpha(image: Image.Image) -> Foreground:
    alpha = alpha_channel(image)
    top = max(int(alpha.max()), 1)
    marked = alpha >= (top + 1) // 2
    agreement = min(iou(marked, alpha >= (top + 1) * part // 4) for part in (1, 3))
    bright = _luminance(image).edit("edit_white")
    return Foreground(
        marked=marked, form="alpha", agreement=agreement, bright=np.array_equal(marked, bright)
    )


# Labels: every value but that of the background.


def _labels_if_any(image: Image.Image, grey: Values | None) -> Foreground | None:
    """Reads a label map if the image is one: few values, in flat patches."""
    values = _label_values(image) if image.mode == "P" or grey is None else grey
    if values is None:
        return None
    present = present_values(values)
    if not 2 <= len(present) <= MAX_LABELS or 0 not in present or not is_flat(values):
        return None
    # Black and white with the ringing of JPEG is no label map.
    if image.mode != "P" and grey is not None and has_noise_of_jpeg(grey):
        return None
    return Foreground(marked=values != 0, form="labels", labels=tuple(map(int, present)))


def _labels(image: Image.Image, copy: _Copy) -> Foreground:
    grey = grey_levels(image)
    values = _label_values(image) if image.mode == "P" or grey is None else grey
    present = np.zeros(0) if values is None else present_values(values)
    if values is None or len(present) > MAX_COLOURS:
        raise InputError(
            f"{copy.where}: {copy.path} has too many colours for a label map, whose values number "
            "the regions. Save it as an 8-bit grey PNG with 0 for background, or set "
            "data.mask_from=auto."
        )
    return Foreground(
        marked=np.asarray(values != 0), form="labels", labels=tuple(map(int, present))
    )


def _label_values(image: Image.Image) -> Values | None:
    """Numbers the colours of an image, with 0 for black or else the colour of its border."""
    # Pillow stops counting early, as sorting the colours of a photograph takes seconds.
    if image.mode != "P" and image.convert("RGB").getcolors(MAX_COLOURS) is None:
        return None
    rgb = rgb_of(image).astype(np.int64)
    packed = (rgb[..., 0] << 16) | (rgb[..., 1] << 8) | rgb[..., 2]
    if image.mode == "P":
        indices = np.asarray(image).astype(np.int64)
        # Index 0 is the background of every segmentation tool that writes palettes.
        if len(present_values(indices)) <= MAX_LABELS and indices.min() == 0:
            black = packed[indices == 0][0] == 0 or not (packed == 0).any()
            return indices if black else np.where(packed == 0, 0, indices + 1)
    colours = np.unique(packed)
    border, counts = np.unique(edge_values(packed), return_counts=True)
    background = 0 if (packed == 0).any() else border[counts.argmax()]
    return np.where(packed == background, 0, np.searchsorted(colours, packed) + 1)


# Painted: differences from the source.


def _painted(image: Image.Image, copy: _Copy) -> Foreground | None:
    """Reads paint on a copy of the source; None if it is no copy or nothing is painted."""
    source = copy.pixels()
    if source is None or source.shape[:2] != (image.height, image.width):
        return None
    mask = rgb_of(image).astype(np.int16)
    difference = brightest(np.abs(mask - source))
    equal, changed = difference <= 24, difference > 40
    if equal.mean() < 0.1 or (equal | changed).mean() < 0.85 or not changed.any():
        return None
    if not varies_alike(mask[equal].mean(axis=1), source[equal].mean(axis=1)):
        return None
    colour = np.median(mask[changed], axis=0)
    distance = brightest(np.abs(mask - colour))
    flat = float((distance[changed] <= 48).mean())
    if flat < 0.7:
        return Foreground(
            marked=changed,
            form="painted",
            doubt=f"it differs from its image in {changed.mean():.0%} of the pixels, in no one "
            "colour, as an edited image does",
        )
    marked = (difference > 16) & (distance <= 48)
    return Foreground(marked=filled(marked, distance <= 24), form="painted")


def _shows_source(image: Image.Image, copy: _Copy) -> bool:
    """True when the opaque part of a mask is the source itself."""
    source = copy.pixels()
    if source is None or source.shape[:2] != (image.height, image.width):
        return False
    opaque, rgb = opaque_pixels(image), rgb_of(image).astype(np.int16)
    return float((brightest(np.abs(rgb - source)) <= 24)[opaque].mean()) > 0.8
