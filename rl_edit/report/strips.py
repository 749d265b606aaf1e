"""Before/after strips: the panels of one evaluated example, embedded as PNG data.

The difference and the attention overlay are computed here, at full resolution; shrinking comes
last.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rl_edit.evaluation.examples import Example, Pixels, read_example
from rl_edit.report.run_files import number

# Base and trained differ little; without amplification the panel would look black.
DIFFERENCE_GAIN = 4
# Pixels of an embedded image on its longest side; it bounds the size of a page of many strips.
MAX_THUMBNAIL = 256
# Up to this size a pixel is worth seeing as a square; above it, smooth scaling reads better.
MAX_PIXELATED = 160
# Dark violet to pale yellow, evenly rising in lightness, so that it also reads in grey.
HEAT_STOPS = np.array(
    [(0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191)], dtype=np.float32
)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One image of a strip; ``outlined`` panels show the border of the edit mask on top."""

    title: str
    data: str
    pixelated: bool
    outlined: bool


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One example on the page.

    Attributes:
        base, trained: the finite metrics of either side.
        outline: border of the edit mask, an SVG path in pixels of ``width`` x ``height``.
    """

    task_id: str
    task_type: str
    instruction: str
    base: Mapping[str, float]
    trained: Mapping[str, float]
    panels: tuple[Panel, ...]
    outline: str
    width: int
    height: int


def read_strip(directory: Path) -> Strip:
    """Makes the strip of one ``evaluation/images/<task_id>/`` directory.

    Raises:
        InputError: as :func:`read_example`. The caller lists such examples.
    """
    example = read_example(directory)
    record = example.record
    height, width = example.mask.shape
    return Strip(
        task_id=record.task_id,
        task_type=record.task_type,
        instruction=record.instruction,
        base=_finite(record.metrics.get("base", {})),
        trained=_finite(record.metrics.get("trained", {})),
        panels=_panels(example),
        outline=mask_outline(example.mask),
        width=width,
        height=height,
    )


def _panels(example: Example) -> tuple[Panel, ...]:
    base, trained = example.edited["base"], example.edited["trained"]
    # The order of the page: the task, both results, and where they differ and look.
    panels = [
        _panel("source, mask outlined", example.source, outlined=True),
        _panel("mask (white may change)", mask_image(example.mask)),
    ]
    if example.target is not None:
        panels.append(_panel("target", example.target))
    panels += [
        _panel("base", base),
        _panel("trained", trained),
        _panel(
            f"|trained \u2212 base| \u00d7 {DIFFERENCE_GAIN}",
            amplified_difference(trained, base),
            outlined=True,
        ),
    ]
    # Both maps share one scale, else each would be hottest somewhere.
    peak = max((float(heat.max()) for heat in example.attention.values()), default=0.0)
    panels += [
        _panel(f"attention, {side}", heat_overlay(example.source, heat, peak=peak), outlined=True)
        for side, heat in example.attention.items()
    ]
    return tuple(panels)


def mask_image(mask: NDArray[np.bool_]) -> Pixels:
    """Paints a mask: white where the instruction may change pixels."""
    return np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * np.uint8(255)


def amplified_difference(first: Pixels, second: Pixels, gain: int = DIFFERENCE_GAIN) -> Pixels:
    """``|first - second|`` times ``gain``, clipped to 255."""
    # In int32: uint8 would wrap around below zero.
    gap = np.abs(first.astype(np.int32) - second.astype(np.int32)) * gain
    amplified: Pixels = np.minimum(gap, 255).astype(np.uint8)
    return amplified


def heat_overlay(source: Pixels, attention: Pixels, *, peak: float) -> Pixels:
    """Draws ``attention`` as a heat map over the greyed source.

    Nearest upscaling keeps each token a visible square.

    Args:
        peak: the attention value shown as hottest; the same for base and trained, so that the two
            compare.
    """
    height, width = source.shape[:2]
    rows = np.arange(height) * attention.shape[0] // height
    columns = np.arange(width) * attention.shape[1] // width
    level = attention[rows][:, columns].astype(np.float32) / (peak or 1.0)
    # The colour is mixed linearly between the two stops around the level.
    place = np.clip(level, 0.0, 1.0) * (len(HEAT_STOPS) - 1)
    lower = np.minimum(place.astype(np.int64), len(HEAT_STOPS) - 2)
    share = (place - lower)[..., None]
    heat = HEAT_STOPS[lower] * (1.0 - share) + HEAT_STOPS[lower + 1] * share
    grey = source.astype(np.float32).mean(axis=2, keepdims=True)
    # Cold tokens stay nearly transparent, so that the source is seen where nothing is looked at.
    opacity = (0.25 + 0.6 * np.clip(level, 0.0, 1.0))[..., None]
    overlay: Pixels = np.rint((1.0 - opacity) * grey + opacity * heat).astype(np.uint8)
    return overlay


def mask_outline(mask: NDArray[np.bool_]) -> str:
    """Writes the border of ``mask`` as an SVG path along pixel edges, in pixel units.

    Straight runs are one segment.
    """
    # Padding makes the border of the image an edge of the mask; an edge lies between two pixels
    # that differ, first across horizontal lines, then across vertical ones.
    padded = np.pad(mask, 1)
    parts: list[str] = []
    for y, edge in enumerate(padded[1:, 1:-1] != padded[:-1, 1:-1]):
        parts += [f"M{start} {y}H{stop}" for start, stop in _runs(edge)]
    for x, edge in enumerate((padded[1:-1, 1:] != padded[1:-1, :-1]).T):
        parts += [f"M{x} {start}V{stop}" for start, stop in _runs(edge)]
    return "".join(parts)


def png_data(pixels: Pixels, *, longest_side: int) -> str:
    """Encodes an image as a ``data:`` URL, shrunk to ``longest_side`` where it is larger."""
    image = Image.fromarray(pixels)
    if max(image.size) > longest_side:
        image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _runs(edge: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """[start, stop) of each stretch of True."""
    steps = np.flatnonzero(np.diff(np.pad(edge.astype(np.int8), 1)))
    return [(int(start), int(stop)) for start, stop in steps.reshape(-1, 2)]


def _panel(title: str, pixels: Pixels, *, outlined: bool = False) -> Panel:
    return Panel(
        title=title,
        data=png_data(pixels, longest_side=MAX_THUMBNAIL),
        pixelated=min(max(pixels.shape[:2]), MAX_THUMBNAIL) <= MAX_PIXELATED,
        outlined=outlined,
    )


def _finite(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, raw in metrics.items() if (value := number(raw)) is not None}
