"""Sorts the files of a plain folder by the part that their place and name give them.

Nothing is opened. A source is an image to edit; masks, targets and texts belong to a source of
their name. Sub-folders are read too: the parts of ``more/p0.jpg`` lie beside it, in ``more/masks/``
or in ``masks/more/``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rl_edit.data.file_kinds import SUFFIXES, is_image, why_unreadable
from rl_edit.data.instructions import is_table
from rl_edit.data.listing import composed, files_below, is_unicode

_SOURCE_FOLDERS = ("images", "sources")
_PART_FOLDERS = {"masks": "mask", "mask": "mask", "targets": "target", "target": "target"}
_ENDINGS = ("_mask", ".mask", "_target", ".target")
_MASK_NAMES = ("{}-mask", "{}mask", "{} mask", "{}_m", "mask_{}", "mask-{}", "{}_seg", "{}_mask_0")
_ORDER = {suffix: number for number, suffix in enumerate(SUFFIXES)}


@dataclass(frozen=True, kw_only=True)
class FolderFiles:
    """Files of a folder by part, as paths relative to it.

    Attributes:
        sources: images by their key, the path without source folder and ending; more than one
            file of a key is a fault of the folder.
        parts: masks and targets by kind, folder and stem.
        texts: by folder and stem.
        tables: of instructions, by folder.
        unread: images whose kind cannot be read, with the reason.
        dead: links to files that do not exist.
        outside: images beside a folder of sources.
        other: files of no known part.
    """

    root: Path
    sources: dict[str, list[Path]] = field(default_factory=dict)
    parts: dict[tuple[str, Path, str], list[Path]] = field(default_factory=dict)
    texts: dict[tuple[Path, str], Path] = field(default_factory=dict)
    tables: dict[Path, list[Path]] = field(default_factory=dict)
    unread: dict[Path, str] = field(default_factory=dict)
    dead: list[Path] = field(default_factory=list)
    outside: list[Path] = field(default_factory=list)
    other: list[Path] = field(default_factory=list)

    def images(self) -> list[Path]:
        """Lists the images to edit, also those that cannot be read."""
        read = [path for paths in self.sources.values() for path in paths]
        return [*read, *self.unread, *self.dead]

    def assigned(self, kind: str) -> tuple[dict[Path, list[Path]], dict[Path, int]]:
        """Finds the masks or targets of every source.

        Returns:
            the files of each source; and the number of sources that a file in a shared folder
            could belong to.
        """
        exact = {source: self._beside(source, kind) for source in self.images()}
        taken = {file for files in exact.values() for file in files}
        shared = {
            source: [file for file in self._shared(source, kind) if file not in taken]
            for source, files in exact.items()
            if not files
        }
        claims = Counter(file for files in shared.values() for file in files)
        return exact | shared, claims

    def like_masks_of(self, source: Path) -> list[Path]:
        """Lists files whose names are other usual spellings of this source's mask."""
        stems = {name.format(form) for name in _MASK_NAMES for form in (source.stem, source.name)}
        stems |= {f"{source.name}_mask", source.name}
        files = [*self.sources.values(), *self.parts.values()]
        return [file for paths in files for file in paths if file.stem in stems]

    def _beside(self, source: Path, kind: str) -> list[Path]:
        """The files that can only be this source's, the usual ending first."""
        folder, stem = source.parent, composed(source.stem)
        marked = (f"{stem}_{kind}", f"{stem}.{kind}")
        mirrored = [(place, (stem, *marked)) for place in _part_folders(folder, kind)]
        return self._files(kind, [(folder, marked), *mirrored])

    def _shared(self, source: Path, kind: str) -> list[Path]:
        """The files of this stem in a folder that other sub-folders share."""
        stem = composed(source.stem)
        stems = (stem, f"{stem}_{kind}", f"{stem}.{kind}")
        folders = (source.parent, *source.parent.parents)
        return self._files(kind, [(above / f"{kind}s", stems) for above in folders])

    def _files(self, kind: str, places: Sequence[tuple[Path, tuple[str, ...]]]) -> list[Path]:
        files = [
            file
            for folder, stems in places
            for stem in stems
            for file in self.parts.get((kind, folder, stem), ())
        ]
        return sorted(dict.fromkeys(files), key=lambda file: _ORDER.get(file.suffix.lower(), 99))


def sort_files(root: Path) -> FolderFiles:
    """Sorts the files of a folder and its sub-folders."""
    files = FolderFiles(root=root)
    images: list[Path] = []
    for file in files_below(root):
        if (root / file).is_symlink() and not (root / file).exists():
            files.dead.append(file)
        elif is_image(file):
            images.append(file)
        elif reason := why_unreadable(file.suffix):
            files.unread[file] = reason
        elif file.suffix.lower() == ".txt":
            files.texts[file.parent, composed(file.stem)] = file
        elif is_table(file):
            files.tables.setdefault(file.parent, []).append(file)
        else:
            files.other.append(file)
    _sort_images(files, images)
    return files


def key_of(source: Path) -> str:
    """The name of a source: its path without source folder and ending."""
    parts = [part for part in source.parts[:-1] if part.lower() not in _SOURCE_FOLDERS]
    return "/".join([*parts, source.stem])


def base_of(stem: str) -> tuple[str, str] | None:
    """The image's name and the kind, if ``stem`` is that of a mask or a target."""
    # A file that is called just "_mask.png" is an image, for there is no name before the ending.
    for ending in _ENDINGS:
        if stem.endswith(ending) and stem != ending:
            return stem.removesuffix(ending), ending[1:]
    return None


def _spelt(stem: str) -> str:
    """Spells the ending of a mask or target as it is looked for: "p0_Mask" is read as "p0_mask"."""
    ending = next((ending for ending in _ENDINGS if stem.lower().endswith(ending)), "")
    return stem[: len(stem) - len(ending)] + ending


def _sort_images(files: FolderFiles, images: list[Path]) -> None:
    with_sources = {
        Path(*file.parts[:number])
        for file in images
        for number, part in enumerate(file.parts[:-1])
        if part.lower() in _SOURCE_FOLDERS
    }
    for file in images:
        folders = [part.lower() for part in file.parts[:-1]]
        kind = next((_PART_FOLDERS[part] for part in folders if part in _PART_FOLDERS), None)
        stem = _spelt(file.stem)
        base = base_of(stem)
        if kind:
            # The folder is spelt as it is looked for: "Mask/" is read as "masks/".
            folder = Path(
                *(
                    f"{_PART_FOLDERS[part.lower()]}s" if part.lower() in _PART_FOLDERS else part
                    for part in file.parts[:-1]
                )
            )
            files.parts.setdefault((kind, folder, composed(file.stem)), []).append(file)
        elif base is not None:
            files.parts.setdefault((base[1], file.parent, composed(stem)), []).append(file)
        elif _is_hidden(file, with_sources):
            files.outside.append(file)
        elif not is_unicode(str(file)):
            # Its id could be written to no file of a run.
            files.unread[file] = "its name is no UTF-8 (rename it)"
        else:
            files.sources.setdefault(key_of(file), []).append(file)


def _is_hidden(file: Path, with_sources: set[Path]) -> bool:
    """True for an image beside a folder of sources, which is then something else."""
    return any(
        Path(*file.parts[:number]) in with_sources and part.lower() not in _SOURCE_FOLDERS
        for number, part in enumerate(file.parts)
    )


def _part_folders(folder: Path, kind: str) -> list[Path]:
    """The folders of parts that mirror the folder of a source."""
    places = []
    for above in (folder, *folder.parents):
        below = [
            part for part in folder.relative_to(above).parts if part.lower() not in _SOURCE_FOLDERS
        ]
        places.append(above.joinpath(f"{kind}s", *below))
    return list(dict.fromkeys(places))
