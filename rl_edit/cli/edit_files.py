"""The files that ``rl-edit edit`` reads and writes: all are found before an editor is loaded."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from rl_edit.data.folder_files import FolderFiles, sort_files
from rl_edit.data.images import examine_image
from rl_edit.data.listing import counted
from rl_edit.data.notices import Notice
from rl_edit.data.pixels import conversion_notices
from rl_edit.errors import InputError
from rl_edit.files import replace_file

FORMATS = (".png", ".jpg", ".jpeg", ".webp")
MANY = Path("edited")
"""Folder of several results, unless another one is asked for."""

BASE, SOURCE, STRIP = "base", "source", "strip"
"""Names that no adapter gets: of the editor without one, of the image, and of all in a row."""

GAP, LABEL = 4, 16
"""Pixels between the images of a strip, and above each for its name."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """An image to edit.

    Attributes:
        stem: what its results are named by, with the folders below the one that was given.
        size: (height, width), upright.
    """

    path: Path
    stem: str
    size: tuple[int, int]


def find_sources(places: Sequence[Path]) -> tuple[list[Source], list[Notice]]:
    """Finds the images of files and folders, in the order given.

    Of a folder these are the images that training would edit: masks and targets are left out.

    Returns:
        the images, and what was left out or will be converted.

    Raises:
        InputError: none is there, one cannot be read, or two would have one result.
    """
    named: list[tuple[Path, str]] = []
    notices: list[Notice] = []
    for place in places:
        if place.is_dir():
            files = sort_files(place)
            images = sorted(path for paths in files.sources.values() for path in paths)
            named += [(place / path, str(path.with_suffix(""))) for path in images]
            notices += _left_out(files)
        elif place.is_file():
            named.append((place, place.stem))
        else:
            raise InputError(f"no image at {place}: give an existing image file or folder")
    if not named:
        raise InputError(
            f"no image in {', '.join(map(str, places))}: give files, or folders that hold some"
        )
    paths = Counter(path for path, _ in named)
    if twice := [path for path, times in paths.items() if times > 1]:
        raise InputError(f"{twice[0]} is given twice: give it once")
    facts = [(path, examine_image(path, where=str(path))) for path, _ in named]
    notices += conversion_notices([(path, fact.conversions) for path, fact in facts])
    sources = [
        Source(path=path, stem=stem, size=fact.size)
        for (path, stem), (_, fact) in zip(named, facts, strict=True)
    ]
    return sources, notices


def _left_out(files: FolderFiles) -> list[Notice]:
    """Counts the files of a folder that are not edited."""
    root, parts, tables = files.root, files.parts.values(), files.tables.values()
    masks = [*(path for paths in parts for path in paths), *files.outside]
    others = [*files.texts.values(), *(path for paths in tables for path in paths), *files.other]
    unread = [f"{root / path}: {reason}" for path, reason in files.unread.items()]
    unread += [f"{root / path}: a link to nothing" for path in files.dead]
    shown = {
        ("a mask or target", "masks or targets"): [str(root / path) for path in masks],
        ("no image", "no images"): [str(root / path) for path in others],
        ("an image that cannot be read", "images that cannot be read"): unread,
    }
    return [
        notice
        for (one, many), paths in shown.items()
        for notice in counted(
            "left-out",
            paths,
            f"1 file of a folder is {one} and is left out.",
            f"{{count}} files of a folder are {many} and are left out.",
        )
    ]


def adapter_names(adapters: Sequence[Path]) -> list[str]:
    """Names adapters by their run, or by their file; equal names get a number."""
    names: list[str] = []
    for place in adapters:
        folder = place if place.is_dir() else place.parent
        in_run = folder.name in ("adapter", "adapter_best")
        file = place.resolve()
        name = (
            folder.resolve().parent.name if in_run else file.name if place.is_dir() else file.stem
        )
        name += "-best" * (folder.name == "adapter_best")
        taken = {BASE, SOURCE, STRIP, *names}
        # The first keeps its name, unless that means something else here.
        numbered = (f"{name}-{number}" for number in count(2))
        names.append(name if name not in taken else next(n for n in numbered if n not in taken))
    return names


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Names the file of each result.

    Attributes:
        file: the only result; None where there are several.
        folder: of several results.
        variants: names of what edits each image; one variant is not part of a file's name.
    """

    file: Path | None
    folder: Path
    variants: tuple[str, ...]

    @classmethod
    def of(
        cls, sources: Sequence[Source], variants: Sequence[str], output: Path | None, *, strip: bool
    ) -> Targets:
        """Plans the results.

        Raises:
            InputError: the output is of no known kind, or cannot be written.
        """
        single = len(sources) == 1 and len(variants) == 1 and not strip
        if single and not (output is not None and output.is_dir()):
            file = output or Path(f"{sources[0].stem}_edited.png")
            if file.suffix.lower() not in FORMATS:
                raise InputError(f"cannot write {file}: use a .png, .jpg or .webp name")
            if not file.parent.is_dir():
                raise InputError(f"cannot write {file}: {file.parent} is not a directory")
            return cls(file=file, folder=file.parent, variants=tuple(variants))
        folder = output or MANY
        if folder.suffix.lower() in FORMATS or (folder.exists() and not folder.is_dir()):
            raise InputError(
                f"{folder} is one file, and there are several results: give --output a folder"
            )
        targets = cls(file=None, folder=folder, variants=tuple(variants))
        targets._require_distinct(sources, [*variants, *([STRIP] if strip else [])])
        return targets

    def _require_distinct(self, sources: Sequence[Source], kinds: Sequence[str]) -> None:
        by_file: dict[str, Source] = {}
        for source in sources:
            for kind in kinds:
                # Where case makes no difference, one file would replace the other.
                other = by_file.setdefault(str(self.path(source, kind)).lower(), source)
                if other is not source:
                    raise InputError(
                        f"{other.path} and {source.path} would have one result: edit them by two "
                        "commands, with another --output"
                    )

    def path(self, source: Source, variant: str) -> Path:
        """Returns the file of a result."""
        if self.file is not None:
            return self.file
        name = "edited" if len(self.variants) == 1 and variant != STRIP else variant
        return self.folder / f"{source.stem}_{name}.png"


def write_image(path: Path, image: Image.Image) -> None:
    """Writes an image: all of it or nothing."""
    # Made only now: a refused command leaves no folder behind.
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = io.BytesIO()
    image.save(encoded, format=Image.registered_extensions()[path.suffix.lower()])
    replace_file(path, encoded.getvalue())


def strip(images: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Draws images side by side, each below its name."""
    height = max(image.height for _, image in images)
    width = sum(image.width for _, image in images) + GAP * (len(images) - 1)
    drawn = Image.new("RGB", (width, LABEL + height), "white")
    draw, font, left = ImageDraw.Draw(drawn), ImageFont.load_default(size=11), 0
    for name, image in images:
        shown = name
        while len(shown) > 1 and draw.textlength(shown, font=font) > image.width:
            # Names of runs often begin alike: the end is what differs.
            shown = f"…{shown.lstrip('…')[1:]}"
        draw.text((left, 1), shown, fill="black", font=font)
        drawn.paste(image, (left, LABEL))
        left += image.width + GAP
    return drawn
