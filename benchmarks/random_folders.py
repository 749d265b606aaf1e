"""Makes folders as people bring them: good rows with one to three random faults.

Every row's drawn image and true mask are known, so that a reader of the folder can be checked. A
fault changes one row or all of them; nothing here knows how the program reads a folder.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageDraw, ImageFilter

WORDS = ("remove the red circle", "paint the circle blue", "turn the circle into a square")


@dataclass
class Row:
    """One row on its way to disk; faults change it.

    Attributes:
        truth: True where the instruction may change pixels.
        pixels: the image as drawn.
        image: writes the image file, given its path without an ending; returns the path.
        mask: the mask as it is written.
        mask_ending: of the mask's file.
        text: content of the instruction file; None writes none.
    """

    name: str
    truth: NDArray[np.bool_]
    pixels: NDArray[np.uint8]
    mask: Image.Image
    image: Callable[[Path, NDArray[np.uint8]], Path]
    target: NDArray[np.uint8] | None = None
    mask_ending: str = ".png"
    text: str | None = WORDS[0]


@dataclass
class Folder:
    """A folder before it is written.

    Attributes:
        nested: images lie in ``images/`` and masks in ``masks/``.
        extra: writes further files when the rows are written.
        hidden: names of good rows that are written by ``extra``.
        faults: names of the faults it has.
    """

    rows: list[Row]
    nested: bool
    extra: list[Callable[[Path], None]] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def write(self, root: Path) -> None:
        """Writes images, masks, targets and instructions."""
        images = root / "images" if self.nested else root
        masks = root / "masks" if self.nested else root
        for folder in {root, images, masks}:
            folder.mkdir(parents=True, exist_ok=True)
        for row in self.rows:
            row.image(images / row.name, row.pixels)
            mask = masks / (row.name if self.nested else f"{row.name}_mask")
            row.mask.save(f"{mask}{row.mask_ending}")
            if row.text is not None:
                (images / f"{row.name}.txt").write_text(row.text, encoding="utf-8")
            if row.target is not None:
                Image.fromarray(row.target).save(images / f"{row.name}_target.png")
        for write in self.extra:
            write(images)


def good_folder(chance: random.Random, num_rows: int) -> Folder:
    """Draws rows without a fault: a noisy slope, a disc on it, and the disc's margin as mask."""
    paired = chance.random() < 0.3
    rows = [_good_row(chance, f"p{index}", paired=paired) for index in range(num_rows)]
    return Folder(rows=rows, nested=chance.random() < 0.5)


def faulty_folder(seed: int) -> Folder:
    """Draws the folder of ``seed``: 3 to 8 rows and one to three different faults."""
    chance = random.Random(seed)
    folder = good_folder(chance, chance.randint(3, 8))
    for name in chance.sample(sorted(FAULTS), chance.randint(1, 3)):
        FAULTS[name](folder, chance)
        folder.faults.append(name)
    return folder


def _good_row(chance: random.Random, name: str, *, paired: bool) -> Row:
    height, width = chance.choice(((48, 64), (64, 48), (56, 56)))
    noise = np.random.default_rng(chance.getrandbits(32))
    slope = np.linspace(40, 190, width)[None, :, None] + noise.normal(0, 12, (height, width, 3))
    image = Image.fromarray(slope.clip(0, 255).astype(np.uint8))
    ground = np.asarray(image).copy()
    radius = chance.randint(7, 12)
    x, y = chance.randint(14, width - 15), chance.randint(14, height - 15)
    box = (x - radius, y - radius, x + radius, y + radius)
    ImageDraw.Draw(image).ellipse(box, fill=(220, 30, 30))
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).ellipse([v + d for v, d in zip(box, (-1, -1, 1, 1), strict=True)], 255)
    truth = np.asarray(mask) > 0
    return Row(
        name=name,
        truth=truth,
        pixels=np.asarray(image).copy(),
        mask=mask,
        image=_as_png,
        target=ground if paired else None,
        text=chance.choice(WORDS),
    )


def _as_png(stem: Path, pixels: NDArray[np.uint8]) -> Path:
    return _saved(stem, ".png", Image.fromarray(pixels))


def _saved(stem: Path, ending: str, image: Image.Image, **options: object) -> Path:
    path = stem.with_name(stem.name + ending)
    image.save(path, **options)
    return path


# --- masks ----------------------------------------------------------------------------------------


def _hole(row: Row) -> Image.Image:
    """The image itself, transparent where it may change (MagicBrush)."""
    alpha = np.where(row.truth, 0, 255).astype(np.uint8)
    return Image.fromarray(np.dstack([row.pixels, alpha]))


def _layer(row: Row) -> Image.Image:
    """Paint on a transparent ground."""
    alpha = np.where(row.truth, 255, 0).astype(np.uint8)
    return Image.fromarray(np.dstack([np.full_like(row.pixels, 90), alpha]))


def _labels(row: Row) -> Image.Image:
    labels = row.truth.astype(np.uint8)
    labels[row.truth.shape[0] // 2 :] *= 2
    return Image.fromarray(labels)


def _painted(row: Row) -> Image.Image:
    return Image.fromarray(np.where(row.truth[..., None], 255, row.pixels).astype(np.uint8))


def _sixteen(row: Row) -> Image.Image:
    return Image.fromarray(np.where(row.truth, 65535, 0).astype(np.uint16))


def _binary(row: Row) -> Image.Image:
    return Image.fromarray(np.where(row.truth, 255, 0).astype(np.uint8))


MASKS: dict[str, Callable[[Row], Image.Image]] = {
    "hole": _hole,
    "layer": _layer,
    "labels": _labels,
    "painted": _painted,
    "sixteen": _sixteen,
    "inverted": lambda row: Image.fromarray(np.where(row.truth, 0, 255).astype(np.uint8)),
    "soft": lambda row: _binary(row).filter(ImageFilter.GaussianBlur(2)),
    "zero-one": lambda row: Image.fromarray(row.truth.astype(np.uint8)),
    "one-bit": lambda row: _binary(row).convert("1"),
    "palette": lambda row: _binary(row).convert("P"),
    "rgb": lambda row: _binary(row).convert("RGB"),
    "rgba": lambda row: _binary(row).convert("RGBA"),
    "red": lambda row: Image.fromarray((row.truth[..., None] * [255, 0, 0]).astype(np.uint8)),
    "black": lambda row: Image.new("L", row.mask.size),
    "white": lambda row: Image.new("L", row.mask.size, 255),
    "smaller": lambda row: _binary(row).resize((24, 24)),
}


def _mask_fault(form: str, *, every: bool) -> Callable[[Folder, random.Random], None]:
    def fault(folder: Folder, chance: random.Random) -> None:
        for row in folder.rows if every else [chance.choice(folder.rows)]:
            row.mask, row.mask_ending = MASKS[form](row), ".png"

    return fault


def _jpeg_masks(folder: Folder, chance: random.Random) -> None:
    for row in folder.rows:
        if row.mask.mode in ("L", "RGB", "1", "P"):
            row.mask, row.mask_ending = row.mask.convert("RGB"), ".jpg"


# --- pixels ---------------------------------------------------------------------------------------


def _grey(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(pixels).convert("L"))


def _transparent(stem: Path, pixels: NDArray[np.uint8]) -> Path:
    alpha = np.full(pixels.shape[:2], 255, dtype=np.uint8)
    alpha[:4] = 0
    return _saved(stem, ".png", Image.fromarray(np.dstack([pixels, alpha])))


def _animated(stem: Path, pixels: NDArray[np.uint8]) -> Path:
    frames = [Image.fromarray(pixels), Image.fromarray(255 - pixels)]
    return _saved(stem, ".webp", frames[0], save_all=True, append_images=frames[1:], lossless=True)


def _profiled(stem: Path, pixels: NDArray[np.uint8]) -> Path:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return _saved(stem, ".png", Image.fromarray(pixels), icc_profile=profile)


def _turned(stem: Path, pixels: NDArray[np.uint8]) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise, so it is stored turned back
    image = Image.fromarray(np.ascontiguousarray(np.rot90(pixels)))
    return _saved(stem, ".jpg", image, exif=exif, quality=95)


PIXELS: dict[str, Callable[[Path, NDArray[np.uint8]], Path]] = {
    "twelve-bits": lambda stem, p: _saved(
        stem, ".png", Image.fromarray(_grey(p).astype(np.uint16) * 16)
    ),
    "sixteen-bits": lambda stem, p: _saved(
        stem, ".png", Image.fromarray(_grey(p).astype(np.uint16) * 257)
    ),
    "int32": lambda stem, p: _saved(stem, ".tif", Image.fromarray(_grey(p).astype(np.int32) * 257)),
    "float": lambda stem, p: _saved(
        stem, ".tif", Image.fromarray(_grey(p).astype(np.float32) / 255)
    ),
    "float-wide": lambda stem, p: _saved(
        stem, ".tif", Image.fromarray(_grey(p).astype(np.float32) * 7)
    ),
    "cmyk": lambda stem, p: _saved(stem, ".jpg", Image.fromarray(p).convert("CMYK"), quality=95),
    "grey-alpha": lambda stem, p: _saved(stem, ".png", Image.fromarray(_grey(p)).convert("LA")),
    "palette-image": lambda stem, p: _saved(stem, ".png", Image.fromarray(p).quantize(255)),
    "transparent": _transparent,
    "animated": _animated,
    "profile": _profiled,
    "turned": _turned,
    "jpeg": lambda stem, p: _saved(stem, ".jpg", Image.fromarray(p), quality=90),
    "jfif": lambda stem, p: _saved(stem, ".jfif", Image.fromarray(p), format="JPEG", quality=90),
    "heic-name": lambda stem, p: _saved(stem, ".heic", Image.fromarray(p), format="JPEG"),
    "cut": lambda stem, p: _cut(stem, p),
    "lfs": lambda stem, p: _written(
        stem, b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12345\n"
    ),
    "html": lambda stem, p: _written(stem, b"<!DOCTYPE html><html>404 Not Found</html>"),
    "no-bytes": lambda stem, p: _written(stem, b""),
}


def _cut(stem: Path, pixels: NDArray[np.uint8]) -> Path:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return _written(stem, buffer.getvalue()[: len(buffer.getvalue()) // 2])


def _written(stem: Path, content: bytes) -> Path:
    path = stem.with_name(stem.name + ".png")
    path.write_bytes(content)
    return path


def _pixel_fault(form: str) -> Callable[[Folder, random.Random], None]:
    def fault(folder: Folder, chance: random.Random) -> None:
        for row in chance.sample(folder.rows, chance.choice((1, len(folder.rows)))):
            row.image = PIXELS[form]

    return fault


# --- files and text -------------------------------------------------------------------------------


def _text_fault(text: str | None) -> Callable[[Folder, random.Random], None]:
    def fault(folder: Folder, chance: random.Random) -> None:
        chance.choice(folder.rows).text = text

    return fault


def _stray(name: str, content: bytes) -> Callable[[Folder, random.Random], None]:
    def fault(folder: Folder, chance: random.Random) -> None:
        folder.extra.append(lambda images: _write_stray(images / name, content))

    return fault


def _write_stray(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _dead_link(folder: Folder, chance: random.Random) -> None:
    folder.extra.append(lambda images: (images / "gone.png").symlink_to(images / "nowhere.png"))


def _twins(folder: Folder, chance: random.Random) -> None:
    first, second = chance.sample(folder.rows, 2)
    second.pixels, second.truth, second.mask = first.pixels, first.truth, first.mask
    second.image, second.mask_ending, second.target = first.image, first.mask_ending, first.target


def _subfolder(folder: Folder, chance: random.Random) -> None:
    row = _good_row(chance, "deep", paired=False)

    def write(images: Path) -> None:
        (images / "more").mkdir(exist_ok=True)
        _as_png(images / "more" / "deep", row.pixels)
        row.mask.save(images / "more" / "deep_mask.png")
        (images / "more" / "deep.txt").write_text(WORDS[0])

    folder.extra.append(write)
    folder.hidden.append("deep")


def _table(kind: str) -> Callable[[Folder, random.Random], None]:
    def fault(folder: Folder, chance: random.Random) -> None:
        names = [row.name for row in folder.rows]
        if kind == "absent":
            names.append("nobody")
        if kind == "two":
            names.append(names[0])
        separator = ";" if kind == "semicolon" else ","
        lines = [separator.join(("Name", "Instruction") if kind == "case" else HEADER)]
        lines += [f"{name}.png{separator}{WORDS[i % 3]}" for i, name in enumerate(names)]
        for row in folder.rows:
            row.text = None
        content = "\n".join(lines).encode()
        folder.extra.append(lambda images: _write_table(images, content))

    return fault


HEADER = ("name", "instruction")


def _write_table(images: Path, content: bytes) -> None:
    root = images.parent if images.name == "images" else images
    (root / "instructions.csv").write_bytes(content)


def _json_table(folder: Folder, chance: random.Random) -> None:
    content = json.dumps({row.name: [WORDS[0], WORDS[1]] for row in folder.rows}).encode()
    folder.extra.append(lambda images: _write_stray(images / "instructions.json", content))


FAULTS: dict[str, Callable[[Folder, random.Random], None]] = {
    **{f"masks/{form}/all": _mask_fault(form, every=True) for form in MASKS},
    **{f"masks/{form}/one": _mask_fault(form, every=False) for form in MASKS},
    "masks/jpeg": _jpeg_masks,
    **{f"pixels/{form}": _pixel_fault(form) for form in PIXELS},
    "files/mask-alone": _stray("p99_mask.png", b"no image"),
    "files/text-alone": _stray("p98.txt", b"make it blue"),
    "files/image-alone": _stray("lonely.png", b"not an image"),
    "files/junk": _stray(".DS_Store", b"\0\1"),
    "files/avif": _stray("p97.avif", b"\0\0\0 ftypavif"),
    "files/video": _stray("clip.mp4", b"\0\0\0 ftyp"),
    "files/dead-link": _dead_link,
    "files/twins": _twins,
    "files/subfolder": _subfolder,
    "files/table": _table("plain"),
    "files/table-absent": _table("absent"),
    "files/table-two": _table("two"),
    "files/table-semicolon": _table("semicolon"),
    "files/table-case": _table("case"),
    "files/json-lists": _json_table,
    "text/none": _text_fault(None),
    "text/empty": _text_fault("  \n"),
    "text/lines": _text_fault("\n".join(WORDS)),
    "text/long": _text_fault("remove the red circle " * 200),
    "text/german": _text_fault("entferne den roten Kreis"),
    "text/chinese": _text_fault("把红色的圆去掉"),
}
"""Faults by name. Each changes a folder in place."""
