"""Before/after strips: the panels of one evaluated example, made from its directory and embedded as PNG data.

The difference and the attention overlay are computed here, at full resolution; shrinking comes last.
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rl_edit.errors import InputError
from rl_edit.report.run_files import number

DIFFERENCE_GAIN = 4
MAX_THUMBNAIL = 256
# Up to this size a pixel is worth seeing as a square; above it, smooth scaling reads better.
MAX_PIXELATED = 160
# Dark violet to pale yellow, evenly rising in lightness, so that it also reads in grey.
HEAT_STOPS = np.array(
    [(0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191)], dtype=np.float32
)

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture of a strip. ``outlined`` panels show the border of the edit mask on top."""

    title: str
    data: str
    pixelated: bool
    outlined: bool


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One example: its words, its pictures, and the mask's border as an SVG path in pixels of ``width`` x ``height``."""

    task_id: str
    task_type: str
    instruction: str
    base: dict[str, float]
    trained: dict[str, float]
    panels: tuple[Panel, ...]
    outline: str
    width: int
    height: int


def read_strip(directory: Path) -> Strip:
    """The strip of one ``evaluation/images/<task_id>/`` directory.

    Raises:
        InputError: a needed picture is missing, unreadable, or not of the source's size. The caller lists such examples.
    """
    about = _read_about(directory / "task.json")
    source, base, trained = (
        _rgb(directory / f"{name}.png") for name in ("source", "base", "trained")
    )
    mask = _grey(directory / "mask.png") > 127
    for name, picture in (("mask", mask), ("base", base), ("trained", trained)):
        if picture.shape[:2] != source.shape[:2]:
            raise InputError(
                f"{name}.png is {_size(picture)} but source.png is {_size(source)}: pixels cannot be compared. Evaluate again."
            )
    height, width = mask.shape
    panels = [
        _panel("source, mask outlined", source, outlined=True),
        _panel(
            "mask (white may change)", np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 255
        ),
    ]
    if (directory / "target.png").is_file():
        panels.append(_panel("target", _rgb(directory / "target.png")))
    panels += [
        _panel("base", base),
        _panel("trained", trained),
        _panel(
            f"|trained \u2212 base| \u00d7 {DIFFERENCE_GAIN}",
            amplified_difference(trained, base),
            outlined=True,
        ),
    ]
    attention = {
        name: _grey(path)
        for name in ("base", "trained")
        if (path := directory / f"attention_{name}.png").is_file()
    }
    peak = max((float(values.max()) for values in attention.values()), default=0.0)
    for name, values in attention.items():
        panels.append(
            _panel(f"attention, {name}", heat_overlay(source, values, peak=peak), outlined=True)
        )
    metrics = about.get("metrics")
    return Strip(
        task_id=str(about.get("task_id", directory.name)),
        task_type=str(about.get("task_type", "")),
        instruction=str(about.get("instruction", "")),
        base=_numbers(metrics, "base"),
        trained=_numbers(metrics, "trained"),
        panels=tuple(panels),
        outline=mask_outline(mask),
        width=width,
        height=height,
    )


def amplified_difference(first: Pixels, second: Pixels) -> Pixels:
    """``|first - second|`` times ``DIFFERENCE_GAIN``, clipped to 255."""
    gap = np.abs(first.astype(np.int32) - second.astype(np.int32)) * DIFFERENCE_GAIN
    amplified: Pixels = np.minimum(gap, 255).astype(np.uint8)
    return amplified


def heat_overlay(source: Pixels, attention: Pixels, *, peak: float) -> Pixels:
    """``attention`` as a heat map over the greyed source: nearest upscaling keeps each token a visible square.

    Args:
        peak: the attention value shown as hottest; the same for base and trained, so that the two compare.
    """
    height, width = source.shape[:2]
    rows = np.arange(height) * attention.shape[0] // height
    columns = np.arange(width) * attention.shape[1] // width
    level = attention[rows][:, columns].astype(np.float32) / (peak or 1.0)
    place = np.clip(level, 0.0, 1.0) * (len(HEAT_STOPS) - 1)
    lower = np.minimum(place.astype(np.int64), len(HEAT_STOPS) - 2)
    share = (place - lower)[..., None]
    heat = HEAT_STOPS[lower] * (1.0 - share) + HEAT_STOPS[lower + 1] * share
    grey = source.astype(np.float32).mean(axis=2, keepdims=True)
    opacity = (0.25 + 0.6 * np.clip(level, 0.0, 1.0))[..., None]
    overlay: Pixels = np.rint((1.0 - opacity) * grey + opacity * heat).astype(np.uint8)
    return overlay


def mask_outline(mask: NDArray[np.bool_]) -> str:
    """The border of ``mask`` as an SVG path along pixel edges, in pixel units; straight runs are one segment."""
    padded = np.pad(mask, 1)
    parts: list[str] = []
    for y, edge in enumerate(padded[1:, 1:-1] != padded[:-1, 1:-1]):
        parts += [f"M{start} {y}H{stop}" for start, stop in _runs(edge)]
    for x, edge in enumerate((padded[1:-1, 1:] != padded[1:-1, :-1]).T):
        parts += [f"M{x} {start}V{stop}" for start, stop in _runs(edge)]
    return "".join(parts)


def _runs(edge: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """[start, stop) of each stretch of True."""
    steps = np.flatnonzero(np.diff(np.pad(edge.astype(np.int8), 1)))
    return [(int(start), int(stop)) for start, stop in steps.reshape(-1, 2)]


def _panel(title: str, pixels: Pixels, *, outlined: bool = False) -> Panel:
    image = Image.fromarray(pixels)
    if max(image.size) > MAX_THUMBNAIL:
        image.thumbnail((MAX_THUMBNAIL, MAX_THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    data = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return Panel(
        title=title, data=data, pixelated=max(image.size) <= MAX_PIXELATED, outlined=outlined
    )


def _open(path: Path, mode: str) -> Pixels:
    if not path.is_file():
        raise InputError(
            f"{path.name} is missing: the strip cannot be drawn without it. Evaluate again."
        )
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert(mode), dtype=np.uint8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{path.name} is not a readable picture ({error}): the strip cannot be drawn. Evaluate again."
        ) from error


def _rgb(path: Path) -> Pixels:
    return _open(path, "RGB")


def _grey(path: Path) -> Pixels:
    return _open(path, "L")


def _size(picture: NDArray[Any]) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]}"


def _read_about(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(
            "task.json is missing: the strip has no instruction or numbers. Evaluate again."
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"task.json is not readable JSON ({error}): the strip has no instruction or numbers. Evaluate again."
        ) from error
    if not isinstance(value, dict):
        raise InputError(
            f"task.json holds a {type(value).__name__}, not an object. Evaluate again."
        )
    return value


def _numbers(metrics: object, side: str) -> dict[str, float]:
    values = metrics.get(side) if isinstance(metrics, dict) else None
    if not isinstance(values, dict):
        return {}
    return {str(name): value for name, raw in values.items() if (value := number(raw)) is not None}
