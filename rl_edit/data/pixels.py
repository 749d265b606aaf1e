"""Turns pixels of any stored kind into RGB 0..255, or refuses them with the range that was seen.

Colour comes out as a viewer shows it: profiles and a declared gamma are converted to sRGB, wide
integers are scaled by the depth that the file declares. Where no depth is declared and two would
be possible, nothing is guessed: the wrong one gives an image that is nearly black. Everything that
was converted or left out is named, so that a dataset can count it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from rl_edit.data.notices import NUM_EXAMPLES, Notice
from rl_edit.data.stored import Stored
from rl_edit.errors import InputError

Conversion = Literal[
    "frames", "profile", "bad_profile", "adobe_rgb", "cmyk", "gamma", "transparent", "dim"
]

CONVERSIONS: dict[Conversion, str] = {
    "frames": "hold several frames or pages, of which the first is used. Save the one you mean as "
    "PNG if it is another",
    "profile": "have a colour profile other than sRGB and are converted to sRGB",
    "bad_profile": "have a colour profile that cannot be applied and are read as sRGB, so their "
    "colours may be off. Convert them to sRGB",
    "adobe_rgb": "say in their EXIF data that they are Adobe RGB, but lack the profile, and are "
    "read as sRGB: colours are paler than meant. Convert them to sRGB",
    "cmyk": "hold printing colours (CMYK) without a profile, so their colours are approximate. "
    "Convert them to sRGB in the program that made them",
    "gamma": "declare another gamma than sRGB's (linear light, for example) and are converted to "
    "sRGB",
    "transparent": "have transparent pixels, which are shown on white",
    "dim": "use less than a quarter of the range of their 16 bits and are read as dark images. If "
    "they have 14 bits or fewer, save them with 8",
}
"""Continuations of "3 of 6 images ...", by kind of conversion."""

COLOUR_CHANGES = frozenset({"pixels-profile", "pixels-gamma"})
"""Kinds of notice about images whose values become others than those in the file."""

# Pillow's modes of one channel wider than 8 bits.
WIDE = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_WHITE = 65535
# Of 65535; in 8 bits this is 15. An image with no brighter pixel looks black in every viewer.
_NEARLY_BLACK = 4095
_DIM = 16383
# Rounding of a profile's tables; sRGB comes in dozens of near-equal profiles.
_SAME_COLOUR = 2
# PNG's gAMA of sRGB is 1 / 2.2.
_SRGB_GAMMA = 0.45455


def conversion_notices(
    images: Sequence[tuple[Path, tuple[Conversion, ...]]],
) -> tuple[Notice, ...]:
    """Counts the conversions of a dataset's images, by kind.

    Args:
        images: each file once, with what is converted in it.
    """
    by_kind = {
        kind: [path for path, conversions in images if kind in conversions] for kind in CONVERSIONS
    }
    return tuple(
        Notice(
            kind=f"pixels-{kind.replace('_', '-')}",
            count=len(paths),
            message=f"{len(paths)} of {len(images)} images {CONVERSIONS[kind]}.",
            examples=tuple(str(path) for path in paths[:NUM_EXAMPLES]),
        )
        for kind, paths in by_kind.items()
        if paths
    )


def convert(
    stored: Stored, *, path: Path, where: str
) -> tuple[NDArray[np.uint8], tuple[Conversion, ...]]:
    """Returns the image as ``[height, width, 3]``, and what had to be converted.

    Args:
        where: names the row in errors.

    Raises:
        InputError: white is unknown, with the range of the values.
    """
    names = list(header_conversions(stored))
    image = _with_colour(_eight_bits(stored, names, path, where))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] != 255:
            names.append("transparent")
        # As on a page: what lies behind a transparent pixel is white.
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    try:
        return np.array(image.convert("RGB"), dtype=np.uint8), tuple(names)
    except ValueError as error:
        raise InputError(
            f"{where}: {path} has mode {image.mode}, which has no defined RGB colours. Save it as "
            "an 8-bit RGB PNG."
        ) from error


def needs_values(stored: Stored) -> bool:
    """Checks that its values decide what is converted, not its header alone."""
    image = stored.image
    return image.mode in ("F", *WIDE) or ";16" in stored.rawmode or image.has_transparency_data


def header_conversions(stored: Stored) -> tuple[Conversion, ...]:
    """Names what will be converted, as far as no pixel has to be read for it."""
    image, names = stored.image, list[Conversion]()
    if stored.frames > 1:
        names.append("frames")
    profile = image.info.get("icc_profile")
    if profile:
        transform = _to_srgb(profile, _colour_mode(image))
        if transform is None:
            names.append("bad_profile")
        elif transform is not _unchanged:
            names.append("profile")
    elif stored.adobe_rgb:
        names.append("adobe_rgb")
    # A profile that works gives printing colours a meaning.
    if image.mode == "CMYK" and "profile" not in names:
        names.append("cmyk")
    if _own_gamma(image) is not None:
        names.append("gamma")
    return tuple(names)


def _eight_bits(stored: Stored, names: list[Conversion], path: Path, where: str) -> Image.Image:
    """Scales wide channels to 8 bits, or refuses them."""
    image = stored.image
    if image.mode == "F":
        low, high = _float_range(np.asarray(image))
        raise InputError(
            f"{where}: {path} holds floating-point values from {low:g} to {high:g}, which have no "
            "fixed white and may be linear light, so its colours would be a guess. Save it as sRGB "
            "with 8 or 16 bits per channel."
        )
    if image.mode in WIDE:
        levels = np.asarray(image, dtype=np.int64)
        white = _white(stored, levels, path, where)
        if stored.white is None and 0 < int(levels.max()) <= _DIM:
            names.append("dim")
        levels = white - levels if stored.white_is_zero else levels
        # White is 65535 most often, and 65535 / 257 = 255.
        grey = levels // 257 if white == _WHITE else np.rint(levels * 255 / white)
        narrow = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
        narrow.info = {k: v for k, v in image.info.items() if k in ("icc_profile", "gamma", "srgb")}
        return narrow
    if ";16" in stored.rawmode:
        # Pillow has kept the upper 8 of 16 bits.
        highest = int(np.asarray(image.convert("RGB")).max())
        if 0 < highest <= _NEARLY_BLACK // 256:
            raise _unknown_white(path, where, "0", f"about {highest * 256 + 255}", "16-bit")
        if 0 < highest <= _DIM // 256:
            names.append("dim")
    return image


def _white(stored: Stored, levels: NDArray[np.int64], path: Path, where: str) -> int:
    """Returns the value of white of a wide channel.

    Raises:
        InputError: it cannot be known.
    """
    low, high = int(levels.min()), int(levels.max())
    if low == high == 0 and not stored.white_is_zero:
        return _WHITE  # black at any scale
    if stored.white is not None and low >= 0 and high <= stored.white:
        return stored.white
    if stored.image.mode == "I":
        raise _unknown_white(path, where, str(low), str(high), "32-bit or signed")
    if high <= _NEARLY_BLACK:
        raise _unknown_white(path, where, str(low), str(high), "16-bit")
    return _WHITE


def _unknown_white(path: Path, where: str, low: str, high: str, kind: str) -> InputError:
    return InputError(
        f"{where}: {path} holds values from {low} to {high} in a {kind} file that does not say "
        "which value is white: read with the full range it would be nearly black, and any other "
        "range would be a guess. Scale it so that white is 255 and save it with 8 bits per channel."
    )


def _float_range(values: NDArray[np.generic]) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (np.nan, np.nan)


Transform = Callable[[Image.Image], Image.Image]


def _unchanged(image: Image.Image) -> Image.Image:
    """Marks a profile that is sRGB: the pixels stay as they are, bit for bit."""
    return image


def _with_colour(image: Image.Image) -> Image.Image:
    """Applies the colour profile, or else the gamma, of an 8-bit image."""
    profile, gamma = image.info.get("icc_profile"), _own_gamma(image)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None
        return converted
    change = _to_srgb(profile, _colour_mode(image)) if profile else None
    if gamma is not None:
        change = _gamma_change(gamma)
    if change is None or change is _unchanged:
        return image
    # Profiles know no palette and no transparency; the latter is put back afterwards.
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    converted = change(image.convert(_colour_mode(image)))
    if alpha is not None:
        converted = converted.convert("RGB")
        converted.putalpha(alpha)
    return converted


def _colour_mode(image: Image.Image) -> str:
    """Returns the mode whose channels a colour profile describes."""
    if image.mode in ("1", "L", "LA", "La", *WIDE):
        return "L"
    return image.mode if image.mode in ("CMYK", "LAB") else "RGB"


@lru_cache(maxsize=64)
def _to_srgb(profile: bytes, mode: str) -> Transform | None:
    """Returns the conversion of a profile to sRGB; None where it cannot be applied."""
    if mode == "LAB":
        return _unchanged  # these channels have one meaning, with or without a profile
    try:
        transform = ImageCms.buildTransform(
            ImageCms.getOpenProfile(BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            # The default of Pillow and of most viewers, written out.
            renderingIntent=ImageCms.Intent.PERCEPTUAL,
        )
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None

    def apply(image: Image.Image) -> Image.Image:
        converted = ImageCms.applyTransform(image, transform)
        assert converted is not None
        return converted

    # Measured, not read from its name: sRGB goes by many.
    ramp = np.linspace(0, 255, 16).astype(np.uint8)
    if mode == "RGB":
        cube = np.stack(np.meshgrid(ramp, ramp, ramp), axis=-1).reshape(64, 64, 3)
        probe = Image.fromarray(np.ascontiguousarray(cube))
    elif mode == "L":
        probe = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    else:
        return apply
    change = np.asarray(apply(probe), dtype=int) - np.asarray(probe.convert("RGB"), dtype=int)
    return _unchanged if np.abs(change).max() <= _SAME_COLOUR else apply


def _own_gamma(image: Image.Image) -> float | None:
    """Returns the gamma that a PNG declares, where it is another than sRGB's and decides."""
    gamma = image.info.get("gamma")
    # A profile and the sRGB chunk come before it (PNG specification, 11.3.2).
    if not gamma or image.info.get("icc_profile") or "srgb" in image.info:
        return None
    return None if abs(float(gamma) / _SRGB_GAMMA - 1) < 0.05 else float(gamma)


def _gamma_change(gamma: float) -> Transform:
    """Converts values stored as ``light ** gamma`` to sRGB."""
    light = (np.arange(256) / 255) ** (1 / gamma)
    # IEC 61966-2-1: linear near black, a power above.
    coded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    table = np.rint(255 * coded).astype(int).tolist()

    def apply(image: Image.Image) -> Image.Image:
        image = image if image.mode == "L" else image.convert("RGB")
        return image.point(table * len(image.getbands()))

    return apply
