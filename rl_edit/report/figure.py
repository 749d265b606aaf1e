"""One PNG of an evaluated run, for a README: source, edit mask, base, trained and difference.

The rows follow a fixed rule and no score: the first evaluated example of each kind of edit. The
colours suit a light and a dark page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from rl_edit.errors import InputError
from rl_edit.evaluation.examples import Example, Pixels, read_example
from rl_edit.report.outlines import outline, resized
from rl_edit.report.run_files import RunFiles, number, read_run
from rl_edit.report.strips import amplified_difference, mask_image
from rl_edit.report.tables import METRICS

# Pixels for each unit of the layout: 1600 pixels are sharp at 800 on a screen of high density.
SCALE = 2
# Layout in units: figure, border, gaps, side of a panel, heading, footer.
WIDTH, MARGIN, GAP, PANEL, HEAD, FOOT = 800, 16, 8, 96, 34, 46
# Factor on the difference, twice the report's: a small image on a dark card would look black.
GAIN = 8
PANELS = ("source", "edit mask", "base", "trained", f"difference x {GAIN}")
# Metrics beside each row, with their labels: one inside the mask, one outside.
CAPTIONS = {"instruction": "instruction score", "background_psnr_masked": "background PSNR"}
# A dark card has enough contrast on a white page and does not glare on a dark one.
CARD, INK, SOFT, LINE = (22, 27, 34), (230, 237, 243), (150, 160, 171), (255, 255, 255)
# Colours of the palette: a PNG of a third of the size, without a visible difference.
MAX_COLOURS = 256


def write_figure(run_dir: Path, path: Path) -> Path:
    """Draws the figure of a run, writes it to ``path`` and returns that.

    Raises:
        InputError: as :func:`draw_figure`, or ``path`` is no PNG or cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"--figure {path} is no PNG: give a name that ends in .png")
    # Without dithering: its dots would look like noise of the editor.
    palette = draw_figure(run_dir).quantize(MAX_COLOURS, kmeans=3, dither=Image.Dither.NONE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        palette.save(path, format="PNG", optimize=True)
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error.strerror}). Give a writable place."
        ) from error
    return path


def draw_figure(run_dir: Path) -> Image.Image:
    """Draws the figure of a run.

    Raises:
        InputError: the run has no evaluated examples, or a file of one is damaged.
    """
    files = read_run(run_dir)
    if not files.examples:
        raise InputError(
            f"{run_dir} has no evaluated examples, and a figure shows them. "
            f"Evaluate first: rl-edit evaluate {run_dir}"
        )
    rows = first_of_each_type(read_example(directory) for directory in files.examples)
    height = HEAD + len(rows) * (PANEL + GAP) + FOOT
    figure = Image.new("RGB", (WIDTH * SCALE, height * SCALE), CARD)
    draw = ImageDraw.Draw(figure)
    columns = range(len(PANELS))
    # Panels are laid from the right edge; the captions get what remains on the left.
    lefts = [WIDTH - MARGIN - PANEL - (PANEL + GAP) * index for index in reversed(columns)]
    for left, name in zip(lefts, PANELS, strict=True):
        _write(draw, (left + PANEL / 2, HEAD / 2 + 2), name, size=13, fill=SOFT, anchor="mm")
    for index, example in enumerate(rows):
        top = HEAD + index * (PANEL + GAP)
        _caption(draw, example, top, width=lefts[0] - MARGIN - GAP)
        for left, pixels in zip(lefts, _panels(example), strict=True):
            _paste(figure, pixels, left, top)
    for index, line in enumerate(_footer(files)):
        _write(draw, (MARGIN, height - FOOT + 6 + 16 * index), line, size=11, fill=SOFT)
    return figure


def first_of_each_type(examples: Iterable[Example]) -> list[Example]:
    """Takes the first example of each task type, in order of appearance."""
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(example.record.task_type, example)
    return list(first.values())


def _panels(example: Example) -> Sequence[Pixels]:
    """Paints the panels of a row, at twice the layout's units."""
    base, trained = example.edited["base"], example.edited["trained"]
    size = _enlarged_size(example.source)
    difference = resized(amplified_difference(trained, base, GAIN), size)
    # The outline separates the requested change from changes of the background.
    difference[outline(example.mask, size, thickness=SCALE)] = LINE
    return (
        resized(example.source, size),
        resized(mask_image(example.mask), size),
        resized(base, size),
        resized(trained, size),
        difference,
    )


def _enlarged_size(pixels: Pixels) -> tuple[int, int]:
    """Fits (width, height) into a panel; enlarging takes a whole factor, for even pixels."""
    height, width = pixels.shape[:2]
    scale = PANEL * SCALE / max(height, width)
    if scale >= 1:
        scale = math.floor(scale)
    return max(round(width * scale), 1), max(round(height * scale), 1)


def _paste(figure: Image.Image, pixels: Pixels, left: int, top: int) -> None:
    """Pastes an image into the middle of its panel."""
    height, width = pixels.shape[:2]
    place = (
        left * SCALE + (PANEL * SCALE - width) // 2,
        top * SCALE + (PANEL * SCALE - height) // 2,
    )
    figure.paste(Image.fromarray(pixels), place)


def _caption(draw: ImageDraw.ImageDraw, example: Example, top: int, *, width: int) -> None:
    """Writes kind, instruction and metrics of a row."""
    record = example.record
    _write(draw, (MARGIN, top + 2), record.task_type.replace("_", " "), size=11, fill=SOFT)
    for index, line in enumerate(_wrapped(draw, record.instruction, width=width, size=14)):
        _write(draw, (MARGIN, top + 18 + 18 * index), line, size=14, fill=INK)
    # Numbers stand at the bottom of the row, whether the instruction takes one line or two.
    numbers = _numbers(record.metrics)
    for index, line in enumerate(numbers):
        bottom = top + PANEL - 15 * (len(numbers) - index) - 1
        _write(draw, (MARGIN, bottom), line, size=11, fill=SOFT)


def _numbers(metrics: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """Writes base and trained value of each metric that both have."""
    lines = []
    for name, label in CAPTIONS.items():
        base, trained = (number(metrics.get(side, {}).get(name)) for side in ("base", "trained"))
        if base is not None and trained is not None:
            unit = f" {METRICS[name].unit}" if METRICS[name].unit else ""
            # The built-in font of Pillow has no arrow, hence "to".
            lines.append(f"{label} {base:.1f} to {trained:.1f}{unit}")
    return lines


def _footer(files: RunFiles) -> list[str]:
    """Says how the rows were chosen, and what the whole evaluation measured."""
    name = files.run.name or files.directory.resolve().name
    # A few rows prove nothing: the means over all tasks stand under them, with intervals.
    evaluation = files.evaluation
    adapter = "" if evaluation is None else f", adapter {evaluation.meta.get('adapter', 'unknown')}"
    lines = [f"{name}{adapter}. Rows: the first held-out task of each kind, not chosen by score."]
    if evaluation is not None:
        changes = [
            f"{label} {delta.mean:+.2f}{unit} [{delta.low:+.2f}, {delta.high:+.2f}]"
            for metric, label in CAPTIONS.items()
            if (delta := evaluation.delta.get(metric)) is not None and math.isfinite(delta.low)
            for unit in [f" {METRICS[metric].unit}" if METRICS[metric].unit else ""]
        ]
        if changes:
            tasks = evaluation.meta.get("num_tasks", "the")
            lines.append(f"All {tasks} tasks, trained minus base: {', '.join(changes)}.")
    return lines


def _wrapped(draw: ImageDraw.ImageDraw, text: str, *, width: int, size: int) -> list[str]:
    """Breaks text at spaces into at most two lines of ``width`` units; more ends in dots."""

    def fits(line: str) -> bool:
        return draw.textlength(line, font=_font(size)) <= width * SCALE

    words, lines = text.split(), [""]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or fits(longer):
            lines[-1] = longer
        elif len(lines) == 1:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} ..."
            break
    # A single word, or the dots, may still be too wide.
    return [_cut(line, fits) for line in lines]


def _cut(line: str, fits: Callable[[str], bool]) -> str:
    while line and not fits(line):
        line = line.removesuffix("...").rstrip()[:-1] + "..."
    return line


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    *,
    size: int,
    fill: tuple[int, int, int],
    anchor: str = "la",
) -> None:
    """Writes one line; ``place`` is in units."""
    position = (place[0] * SCALE, place[1] * SCALE)
    draw.text(position, text, font=_font(size), fill=fill, anchor=anchor)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * SCALE)
