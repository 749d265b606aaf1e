"""Makes rows of a plain folder: an image, its mask and its instructions have one name.

Every file of the folder becomes a row, a part of a row, or one of a counted kind that a notice
names. An image that has only one of mask and instruction is a fault: it was meant to be a row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rl_edit.data.folder_files import FolderFiles, sort_files
from rl_edit.data.instructions import TextLines, text_lines
from rl_edit.data.listing import Listing, composed, counted
from rl_edit.data.notices import Notice
from rl_edit.data.problems import refuse
from rl_edit.data.rows import Request, Row
from rl_edit.data.table_texts import TableTexts
from rl_edit.errors import InputError

_SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "eval", "heldout")


def read_pairs(root: Path, *, masked: bool, lines: TextLines | None = None) -> Listing:
    """Lists the rows of a plain folder. Without an image it lists none.

    Args:
        masked: every row must have a mask.
        lines: the meaning of several lines in one text. None splits them, and says so.

    Raises:
        InputError: for all faulty images, in one message; the folder holds several splits.
    """
    files = sort_files(root)
    _require_one_split(files)
    pairs = _Pairs(files, lines=lines)
    problems = pairs.read(masked=masked)
    notices = tuple(pairs.notices())
    refuse(problems, num_rows=len(files.sources), source=str(root), notices=notices)
    return Listing(requests=tuple(pairs.rows), notices=notices)


def _require_one_split(files: FolderFiles) -> None:
    """Refuses to mix a test set into training.

    Raises:
        InputError: images lie in folders of several splits.
    """
    folders = {
        path.parts[0] for paths in files.sources.values() for path in paths[:1] if path.parent.parts
    }
    splits = sorted(name for name in folders if name.lower() in _SPLITS)
    if len(splits) > 1:
        train = next((name for name in splits if name.lower().startswith("train")), splits[0])
        other = next(name for name in splits if name != train)
        raise InputError(
            f"{files.root} holds several splits ({', '.join(f'{name}/' for name in splits)}), and "
            f"training on all would mix them. Set data.path={files.root / train} and "
            f"data.heldout_path={files.root / other}."
        )


class _Pairs:
    """Joins the parts of each image, and counts the parts that are left."""

    def __init__(self, files: FolderFiles, *, lines: TextLines | None) -> None:
        self.rows: list[Request] = []
        self._files = files
        self._lines = lines
        self._tables = TableTexts(files)
        self._assigned = {kind: files.assigned(kind) for kind in ("mask", "target")}
        self._bare: list[str] = []
        self._hinted = False
        self._conflicts: list[str] = []
        self._repeated: list[str] = []
        self._several_lines: list[str] = []

    def read(self, *, masked: bool) -> list[str]:
        """Makes the rows, and returns the problems of images."""
        problems: list[str] = []
        for key, paths in sorted(self._files.sources.items()):
            try:
                if len(paths) > 1:
                    raise InputError(
                        f"has the same name as {paths[1]}: masks and instructions could belong to "
                        "either"
                    )
                self._add(key, paths[0], masked=masked)
            except InputError as problem:
                problems.append(f"{paths[0]}: {problem}")
        return problems

    def notices(self) -> Iterator[Notice]:
        """Says what of the folder is in no row, and what was a choice."""
        yield from self._unused_images()
        yield from self._parts_without_image()
        yield from self._tables.notices()
        yield from counted(
            "text-beside-table",
            self._conflicts,
            "1 image has other words in its .txt file than in the table; the .txt file is used",
            "{count} images have other words in their .txt files than in the table; the .txt files "
            "are used",
        )
        yield from counted(
            "repeated-instructions",
            self._repeated,
            "1 image has the same instruction twice; it is used once",
            "{count} images have the same instruction twice; it is used once",
        )
        if self._lines is None:
            yield from counted(
                "several-lines",
                self._several_lines,
                "1 text has several lines; each is an instruction of its own. Set data.text_lines="
                "join if they are one, or split to confirm",
                "{count} texts have several lines; each line is an instruction of its own. Set "
                "data.text_lines=join if they are one, or split to confirm",
            )
        yield from counted(
            "other-files",
            [file.as_posix() for file in self._files.other],
            "1 other file is not used; a table of instructions must be called instructions.csv or "
            "instructions.json",
            "{count} other files are not used; a table of instructions must be called "
            "instructions.csv or instructions.json",
        )

    def _add(self, key: str, source: Path, *, masked: bool) -> None:
        """Adds the rows of one image: one for each of its instructions."""
        mask, target = (self._part(source, kind) for kind in ("mask", "target"))
        texts = self._texts(source)
        if mask is None and masked:
            if not texts:
                self._bare.append(source.as_posix())
                return
            stem = source.stem
            # One example is enough, and a search for every image would be slow.
            like = [] if self._hinted else self._files.like_masks_of(source)
            self._hinted = self._hinted or bool(like)
            rename = f"; rename {like[0]} if it is the mask" if like else ""
            raise InputError(
                f"has no mask (looked for {stem}_mask.png, {stem}.mask.png and masks/{stem}.png, "
                f"any image ending){rename}"
            )
        if not texts:
            stem = source.stem
            empty = (source.parent, composed(stem)) in self._files.texts
            raise InputError(
                f"has no instruction ({stem}.txt is empty; write the instruction there)"
                if empty
                else f"has no instruction (looked for {stem}.txt, instructions.json and "
                "instructions.csv)"
            )
        root = self._files.root
        for number, text in enumerate(texts, start=1):
            common: dict[str, Any] = {
                "task_id": key if number == 1 else f"{key}#{number}",
                "task_type": "edit",
                "where": str(source) if number == 1 else f"{source} instruction {number}",
                "group": key,
                "instruction": text,
                "source": root / source,
                "target": None if target is None else root / target,
            }
            self.rows.append(Request(**common) if mask is None else Row(**common, mask=root / mask))

    def _part(self, source: Path, kind: str) -> Path | None:
        """The mask or target of an image."""
        assigned, claims = self._assigned[kind]
        files = assigned[source]
        if len(files) > 1:
            names = " and ".join(map(str, files))
            raise InputError(f"has more than one {kind} ({names}): keep one")
        if files and claims.get(files[0], 0) > 1:
            raise InputError(
                f"and another image of that name could have the {kind} {files[0]}: put it beside "
                f"its image as {source.stem}_{kind}{files[0].suffix}"
            )
        return files[0] if files else None

    def _texts(self, source: Path) -> list[str]:
        """The instructions of an image."""
        of_table = self._tables.texts.get(source, [])
        texts = of_table
        file = self._files.texts.get((source.parent, composed(source.stem)))
        if file is not None:
            lines = text_lines(self._files.root / file, self._lines or "split")
            if len(lines) > 1:
                self._several_lines.append(file.as_posix())
            # A text beside the image wins over a table, for it is the more particular.
            texts = lines or of_table
            if lines and set(of_table) - {*lines, " ".join(lines)}:
                self._conflicts.append(source.as_posix())
        texts = [text for text in texts if text]
        unique = list(dict.fromkeys(texts))
        if len(unique) < len(texts):
            self._repeated.append(source.as_posix())
        return unique

    def _unused_images(self) -> Iterator[Notice]:
        """Counts images that are in no row, by reason."""
        files = self._files
        total = len(files.images()) + len(files.outside)
        by_reason: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        for file, reason in files.unread.items():
            by_reason["unreadable-kinds", reason].append(file.as_posix())
        for file in files.dead:
            reason = "a link whose file does not exist (copy the files with cp -L or rsync -L)"
            by_reason["dead-links", reason].append(file.as_posix())
        for file in files.outside:
            reason = "beside images/ or sources/, which holds the images to edit"
            by_reason["images-outside", reason].append(file.as_posix())
        for name in self._bare:
            by_reason["bare-images", "without mask and without instruction"].append(name)
        for (kind, reason), names in by_reason.items():
            yield from counted(
                kind,
                names,
                f"1 of {total} images is not used: {reason}",
                f"{{count}} of {total} images are not used: {reason}",
            )

    def _parts_without_image(self) -> Iterator[Notice]:
        """Counts masks, targets and texts that belong to no image."""
        files = self._files
        for kind, (assigned, _) in self._assigned.items():
            used = {file for parts in assigned.values() for file in parts}
            left = [
                file.as_posix()
                for (part, _, _), parts in files.parts.items()
                for file in parts
                if part == kind and file not in used
            ]
            yield from counted(
                f"{kind}s-without-image",
                left,
                f"1 {kind} is not used: no image of its name is here",
                f"{{count}} {kind}s are not used: no images of their names are here",
            )
        known = {(path.parent, composed(path.stem)) for path in files.images()}
        yield from counted(
            "texts-without-image",
            [file.as_posix() for place, file in files.texts.items() if place not in known],
            "1 .txt file is not used: no image of its name is beside it",
            "{count} .txt files are not used: no images of their names are beside them",
        )
