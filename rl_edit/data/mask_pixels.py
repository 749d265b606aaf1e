"""Measures of stored masks: their values, transparency, colours and patches.

Nothing here decides what a mask means; :mod:`rl_edit.data.masks` does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from rl_edit.data.images import SIXTEEN_BIT
from rl_edit.method.regions import labelled_regions

Pixels = NDArray[np.bool_]
Values = NDArray[np.int64]

BLACK, WHITE = 40, 215
"""Up to the first a value counts as black, from the second on as white."""


def levels(image: Image.Image) -> tuple[Values, int]:
    """Returns values ``[height, width]`` and the one that stands for white."""
    if image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        scale = 255.0 if values.max() <= 1.0 else 1.0
        return np.rint(np.nan_to_num(values) * scale).astype(np.int64), 255
    if image.mode in SIXTEEN_BIT:
        levels = np.asarray(image).astype(np.int64)
        # Values of 8, 10 or 12 bits are often stored in 16, so the largest decides the scale.
        scales = (255, 1023, 4095, 65535)
        return levels, next((scale for scale in scales if levels.max() <= scale), 65535)
    if image.mode == "P" and not image.has_transparency_data:
        brightness = brightest(rgb_of(image)).astype(np.int64)
        indices = np.asarray(image).astype(np.int64)
        # Label images store 0 and 1 under palettes that make both dark.
        one_sided = (brightness >= 128).all() or not (brightness >= 128).any()
        if one_sided and indices.min() == 0 and indices.max() == 1:
            return indices, 255
        return brightness, 255
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L")).astype(np.int64), 255
    if alpha_varies(image):
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    # Constant transparency says nothing, so it is left out.
    return brightest(rgb_of(image)).astype(np.int64), 255


def alpha_channel(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image.convert("RGBA"))[..., 3]


def opaque_pixels(image: Image.Image) -> Pixels:
    alpha = alpha_channel(image)
    return np.asarray(alpha >= (max(int(alpha.max()), 1) + 1) // 2)


def alpha_varies(image: Image.Image) -> bool:
    if not image.has_transparency_data:
        return False
    alpha = alpha_channel(image)
    # A few levels less than opaque are rounding of a program, not a hole.
    return int(alpha.max()) - int(alpha.min()) > 16


def is_flat(values: Values) -> bool:
    """True when most labelled pixels equal their right and lower neighbours."""
    inner = values[:-1, :-1]
    equal = (inner == values[:-1, 1:]) & (inner == values[1:, :-1])
    # Only values between background and the brightest distinguish labels from a soft edge.
    middle = (inner > 0) & (inner < values.max())
    chosen = middle if middle.sum() > 0.002 * inner.size else inner > 0
    return bool(chosen.any()) and float(equal[chosen].mean()) > 0.5


def has_noise_of_jpeg(values: Values) -> bool:
    """True for values on both sides close to black and white, as JPEG leaves them."""
    near_white = (values >= 240) & (values < 255)
    middle = (values >= 48) & (values < 208)
    return bool(near_white.any()) and float(middle.mean()) < 0.05


def varies_alike(mask: NDArray[np.float64], source: NDArray[np.float64]) -> bool:
    """True when equal pixels show content: a black background equals a dark photograph."""
    if mask.std() < 8 or source.std() < 8:
        return False
    return float(np.corrcoef(mask, source)[0, 1]) > 0.8


def filled(marked: Pixels, colour: Pixels) -> Pixels:
    """Adds pixels of the paint's colour that the paint encloses: the source had it there."""
    candidates = colour & ~marked
    if not candidates.any():
        return marked
    regions = labelled_regions(torch.from_numpy(np.ascontiguousarray(candidates))).numpy()
    # A pixel next to a region that is neither paint nor of its colour opens it.
    outside = ~(marked | colour)
    open_side = np.pad(outside, 1, constant_values=True)
    touched = np.zeros_like(outside)
    for row in (0, 1, 2):
        for column in (0, 1, 2):
            height, width = outside.shape
            touched |= open_side[row : row + height, column : column + width]
    opened = np.unique(regions[touched])
    return marked | (candidates & ~np.isin(regions, opened))


def rgb_of(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode == "P" and image.has_transparency_data:
        image = image.convert("RGBA")
    if image.mode in SIXTEEN_BIT or image.mode == "F":
        values, white = levels(image)
        grey = np.clip(values * 255 // white, 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    # Dropping alpha keeps the colours that lie under it.
    return np.asarray(image.convert("RGB"))


def brightest(rgb: NDArray[Any]) -> NDArray[Any]:
    """Returns the highest channel of ``[height, width, 3]``."""
    # Many times faster than a maximum over the last axis.
    return np.asarray(np.maximum(np.maximum(rgb[..., 0], rgb[..., 1]), rgb[..., 2]))


def grey_levels(image: Image.Image) -> Values | None:
    """Returns the values of an image without colours; None for one with colours."""
    values, white = levels(image)
    if white != 255:
        return values * 255 // white
    return values if share_of_colour(image) < 0.001 else None


def share_of_colour(image: Image.Image) -> float:
    if image.mode in ("1", "L", "LA", "F", *SIXTEEN_BIT):
        return 0.0
    rgb = rgb_of(image).astype(np.int16)
    # JPEG moves grey by a few levels.
    return float((brightest(rgb) + brightest(-rgb) > 24).mean())


def is_binary(values: Values, *, max_middle: float) -> bool:
    """True when nearly all values are black or white, and both occur.

    Args:
        max_middle: share of other values, as soft edges and JPEG leave them.
    """
    if values.max() <= 1:
        return True
    white, middle = values >= WHITE, (values > 4) & (values < WHITE)
    return bool(white.any()) and float(middle.mean()) <= max_middle


def two_sided(pixels: NDArray[np.uint8]) -> bool:
    """True when colourless pixels are black or white, and both occur."""
    if not len(pixels):
        return False
    brightness = pixels.max(axis=1)
    grey = (brightness.astype(np.int16) - pixels.min(axis=1) <= 24).mean()
    black, white = (brightness <= BLACK).mean(), (brightness >= WHITE).mean()
    return bool(grey > 0.98 and black + white > 0.95 and min(black, white) > 0.01)


def ragged(marked: Pixels) -> bool:
    """True when lines change sides often, as they do in drawings and photographs."""
    return changes(marked) > 8


def ragged_edges(values: Values, white: int) -> bool:
    """True when mid-tones have content: large steps between neighbours, or many sides."""
    steps = np.abs(np.diff(values, axis=1)) > white // 24
    return bool(steps.mean() > 0.1) or changes(values >= (white + 1) // 2) > 8


def changes(marked: Pixels) -> float:
    return float(
        (marked[:, 1:] != marked[:, :-1]).sum(axis=1).mean()
        + (marked[1:] != marked[:-1]).sum(axis=0).mean()
    )


def edge_values(values: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])


def present_values(values: Values) -> Values:
    """Lists the different values of a mask, which are none below 0, in order."""
    # Counting is many times faster than the sorting of np.unique.
    return np.flatnonzero(np.bincount(values.ravel()))


def iou(one: Pixels, other: Pixels) -> float:
    either = int((one | other).sum())
    return float((one & other).sum()) / either if either else 1.0
