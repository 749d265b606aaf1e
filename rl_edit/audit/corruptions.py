"""Corrupts correct edits by known strengths.

The strength gives the order in which a reward should rank the results. Nothing here scores. All
randomness follows from a seed, so the same task under the same seed is corrupted in the same way.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor

from rl_edit.measures.pixels import gaussian_mean, unit_range

Side = Literal["inside", "outside"]
SIDES: tuple[Side, ...] = ("inside", "outside")
LEVELS = 4
"""Strengths of every graded corruption, from hardly visible to gross. Level 0 is the clean edit."""

# Strengths by level. The units stand behind each line.
_NOISE = (4, 10, 25, 60)  # standard deviation, of 255
_BLUR = (0.5, 1.0, 2.0, 4.0)  # sigma, pixels of an image with _REFERENCE_SIZE
_JPEG = (85, 50, 20, 5)  # quality
_SHIFT = (1, 2, 4, 8)  # pixels of an image with _REFERENCE_SIZE
_TINT = (0.06, 0.15, 0.35, 0.7)  # share of the tint
_REVERTED = (0.25, 0.5, 0.75, 1.0)  # share of the source
# Blur and shift are given for an image of this many pixels a side and grow with it.
_REFERENCE_SIZE = 64
_PALETTE = {
    "red": (224, 32, 32),
    "green": (32, 176, 64),
    "blue": (32, 64, 224),
    "yellow": (240, 208, 32),
}

RGB = UInt8[Tensor, "height width 3"]
Place = Bool[Tensor, "height width"]


def generator(*key: object) -> torch.Generator:
    """Makes random numbers that follow from ``key`` alone."""
    digest = hashlib.blake2b(
        json.dumps([str(part) for part in key]).encode(), digest_size=8
    ).digest()
    # manual_seed takes a signed 64-bit number, so the lowest bit is dropped.
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def noise(image: RGB, where: Place, level: int, random: torch.Generator) -> RGB:
    """Adds white noise, one pattern for all levels."""
    # Equal seeds draw equal patterns, so a level differs from the next in strength alone.
    pattern = torch.randn(image.shape, generator=random, dtype=torch.float64)
    return to_bytes(unit_range(image) + pattern * _NOISE[level - 1] / 255)


def blur(image: RGB, where: Place, level: int, random: torch.Generator) -> RGB:
    """Averages under a Gaussian of three sigma."""
    sigma = _BLUR[level - 1] * _unit(image)
    return to_bytes(gaussian_mean(unit_range(image), sigma=sigma, radius=max(1, round(3 * sigma))))


def jpeg(image: RGB, where: Place, level: int, random: torch.Generator) -> RGB:
    """Encodes and decodes as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(image.numpy()).save(buffer, format="JPEG", quality=_JPEG[level - 1])
    return torch.from_numpy(np.array(Image.open(buffer).convert("RGB"), dtype=np.uint8))


def shift(image: RGB, where: Place, level: int, random: torch.Generator) -> RGB:
    """Moves the content sideways; the region stays in place."""
    direction = 1 if torch.rand((), generator=random) < 0.5 else -1
    return image.roll(round(_SHIFT[level - 1] * _unit(image)) * direction, dims=1)


def recolour(image: RGB, where: Place, level: int, random: torch.Generator) -> RGB:
    """Tints towards the most contrasting palette colour."""
    _, colour = contrasting(image, where)
    share = _TINT[level - 1]
    return to_bytes((1 - share) * unit_range(image) + share * colour)


Corruption = Callable[[RGB, Place, int, torch.Generator], RGB]
GRADED: dict[str, Corruption] = {
    "noise": noise,
    "blur": blur,
    "JPEG": jpeg,
    "shift": shift,
    "recolour": recolour,
}
"""By name. Each returns a whole corrupted image, of which one side is then used."""
REVERTED = "no edit"
"""The edit taken back by a share. It exists inside the mask only: source and edit agree outside."""


def graded(
    clean: RGB, source: RGB, edit_mask: Place, *, key: tuple[object, ...]
) -> dict[tuple[str, Side], tuple[RGB, ...]]:
    """Applies every corruption on either side, level by level.

    Args:
        clean: the correct edit.
        key: seeds the random ones, together with the corruption and its side.
    """
    images: dict[tuple[str, Side], tuple[RGB, ...]] = {}
    for name, corrupt in GRADED.items():
        for side, where in zip(SIDES, (edit_mask, ~edit_mask), strict=True):
            # A new generator for every level, with one key: all levels share their pattern.
            images[name, side] = tuple(
                within(where, corrupt(clean, where, level, generator(*key, name, side)), clean)
                for level in range(1, LEVELS + 1)
            )
    images[REVERTED, "inside"] = tuple(
        within(edit_mask, blend(clean, source, share), clean) for share in _REVERTED
    )
    return images


def contrasting(image: RGB, where: Place) -> tuple[str, Tensor]:
    """Finds the palette colour farthest from the region's mean.

    Returns:
        Its name and its RGB in 0..1.
    """
    mean = unit_range(image)[where].mean(dim=0)
    colours = {name: torch.tensor(rgb, dtype=torch.float64) / 255 for name, rgb in _PALETTE.items()}
    name = max(colours, key=lambda name: float((colours[name] - mean).square().sum()))
    return name, colours[name]


def blend(image: RGB, other: RGB, share: float) -> RGB:
    """Mixes ``share`` of ``other`` into ``image``."""
    return to_bytes((1 - share) * unit_range(image) + share * unit_range(other))


def within(where: Place, corrupted: RGB, clean: RGB) -> RGB:
    """Limits ``corrupted`` to a place, with ``clean`` elsewhere."""
    return torch.where(where[:, :, None], corrupted, clean)


def to_bytes(image: Tensor) -> RGB:
    """Converts 0..1 to 0..255, clipped and rounded."""
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def _unit(image: RGB) -> float:
    """Scales lengths in pixels with the image, at least by 1."""
    return max(min(image.shape[:2]) / _REFERENCE_SIZE, 1.0)
