"""Folders of images whose masks are stored as people store them. The true region is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Pixels = NDArray[Any]
Form = Callable[[Pixels, Pixels], Image.Image]

HEIGHT, WIDTH = 80, 96


def photograph(seed: int) -> Pixels:
    """Gradients, texture and a red circle."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    base = np.stack([rows / HEIGHT, columns / WIDTH, 0.5 + 0.3 * np.sin(columns / 9)], axis=-1)
    noisy = base * 200 + generator.normal(0, 8, size=(HEIGHT, WIDTH, 3)) + 20
    image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    ImageDraw.Draw(image).ellipse((24, 20, 48, 40), fill=(220, 40, 30))
    return np.asarray(image)


def region(seed: int) -> Pixels:
    """The circle with a margin, of another size in each row."""
    image = Image.new("L", (WIDTH, HEIGHT))
    margin = 3 + seed % 4
    ImageDraw.Draw(image).ellipse((24 - margin, 20 - margin, 48 + margin, 40 + margin), fill=255)
    return np.asarray(image) > 0


def grey(region: Pixels, value: int = 255) -> Image.Image:
    return Image.fromarray(np.where(region, value, 0).astype(np.uint8))


def _with_alpha(pixels: Pixels, opaque: Pixels) -> Image.Image:
    return Image.fromarray(np.dstack([pixels, np.where(opaque, 255, 0)]).astype(np.uint8))


def _flat(colour: Sequence[int]) -> Pixels:
    return np.full((HEIGHT, WIDTH, 3), colour, dtype=np.uint8)


def _painted(source: Pixels, region: Pixels, colour: Sequence[int]) -> Image.Image:
    return Image.fromarray(np.where(region[..., None], _flat(colour), source))


def _palette(region: Pixels, label: int) -> Image.Image:
    image = grey(region, label)
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 64, 64, 0])
    return image


def _three_labels(region: Pixels, factor: int) -> Image.Image:
    thirds = np.broadcast_to(np.arange(WIDTH) % 39 // 13 + 1, region.shape)
    return Image.fromarray(np.where(region, thirds * factor, 0).astype(np.uint8))


def _as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    stream = BytesIO()
    image.save(stream, format="JPEG", quality=quality)
    return Image.open(stream)


ORDINARY: dict[str, Form] = {
    "grey": lambda _, region: grey(region),
    "one bit": lambda _, region: grey(region).convert("1"),
    "RGB": lambda _, region: grey(region).convert("RGB"),
    "opaque RGBA": lambda _, region: grey(region).convert("RGBA"),
    "RGBA all transparent": lambda _, region: _with_alpha(
        np.asarray(grey(region).convert("RGB")), region & False
    ),
    "palette of grey": lambda _, region: grey(region).convert("P"),
    "anti-aliased": lambda _, region: grey(region).filter(ImageFilter.GaussianBlur(0.7)),
    "JPEG": lambda _, region: _as_jpeg(grey(region), 60),
    "white strokes": lambda _, region: _with_alpha(_flat((255, 255, 255)), region),
    "red on black": lambda _, region: Image.fromarray(
        np.where(region[..., None], _flat((255, 0, 0)), 0).astype(np.uint8)
    ),
    "16 bits": lambda _, region: Image.fromarray(np.where(region, 65535, 0).astype(np.uint16)),
}
"""Black and white in some way: nothing is to be said."""

RECOGNISED: dict[str, tuple[str, str, Form]] = {
    "hole in the image": ("alpha", "edit_black", lambda source, r: _with_alpha(source, ~r)),
    "hole in black": ("alpha", "edit_black", lambda _, r: _with_alpha(_flat((0, 0, 0)), ~r)),
    "hole in white": ("alpha", "edit_black", lambda _, r: _with_alpha(_flat((255,) * 3), ~r)),
    "black layer": ("alpha", "edit_white", lambda _, r: _with_alpha(_flat((0, 0, 0)), r)),
    "cut-out": ("alpha", "edit_white", lambda source, r: _with_alpha(source, r)),
    "white paint": ("painted", "edit_white", lambda s, r: _painted(s, r, (255, 255, 255))),
    "green paint": ("painted", "edit_white", lambda s, r: _painted(s, r, (0, 255, 0))),
    "white paint, JPEG": (
        "painted",
        "edit_white",
        lambda s, r: _as_jpeg(_painted(s, r, (255, 255, 255)), 85),
    ),
    "label 3": ("labels", "edit_white", lambda _, r: grey(r, 3)),
    "dim grey": ("labels", "edit_white", lambda _, r: grey(r, 100)),
    "labels 1..3": ("labels", "edit_white", lambda _, r: _three_labels(r, 1)),
    "labels 85, 170, 255": ("labels", "edit_white", lambda _, r: _three_labels(r, 85)),
    "dark palette": ("labels", "edit_white", lambda _, r: _palette(r, 3)),
}
"""(form, polarity, writer) of masks that are read right, and said."""

INVERTED: Form = lambda _, region: grey(~region)  # noqa: E731
SOFT: Form = lambda _, region: grey(region).filter(ImageFilter.GaussianBlur(6))  # noqa: E731


def write_rows(
    root: Path, forms: Sequence[Form], *, instruction: str = "remove the red circle"
) -> Path:
    """A plain folder, one row for each form."""
    root.mkdir(parents=True, exist_ok=True)
    for seed, form in enumerate(forms):
        source = photograph(seed)
        Image.fromarray(source).save(root / f"p{seed}.png")
        form(source, region(seed)).save(root / f"p{seed}_mask.png")
        (root / f"p{seed}.txt").write_text(instruction)
    return root


def write_target(root: Path, seed: int) -> None:
    """Writes the right result of row ``seed``: the circle is gone, and nothing else changed."""
    source = photograph(seed)
    target = np.where(region(seed)[..., None], 255 - source, source).astype(np.uint8)
    Image.fromarray(target).save(root / f"p{seed}_target.png")
