"""Images for a sheet: enlarged without blur, with outlines of masks painted on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]


def resized(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resizes to (width, height): squares for pixels when enlarged, smooth when shrunk."""
    enlarged = max(size) >= max(pixels.shape[:2])
    method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    return np.array(Image.fromarray(pixels).resize(size, method))


def outline(mask: Mask, size: tuple[int, int], *, thickness: int) -> Mask:
    """Returns the inner border of a mask, ``thickness`` pixels wide, at (width, height)."""
    grey = Image.fromarray(mask.astype(np.uint8) * np.uint8(255))
    scaled = np.asarray(grey.resize(size, Image.Resampling.NEAREST)) > 0
    # A pixel lies inside where the mask also covers its neighbours at this distance; the padding
    # makes the border of the image a border of the mask.
    inside = np.pad(scaled, thickness)
    for axis in (0, 1):
        inside = inside & np.roll(inside, thickness, axis) & np.roll(inside, -thickness, axis)
    border: Mask = scaled & ~inside[thickness:-thickness, thickness:-thickness]
    return border
