"""The package of a job: the project's sources, and the files that the job's command names.

A folder that is uploaded as it stands takes along what was not meant: data sets behind links, runs,
keys. Here every file has a reason, and links out of a tree are refused by name.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rl_edit.errors import InputError
from rl_edit.jobs.command import Command
from rl_edit.jobs.modules import local_modules
from rl_edit.provenance import SOURCES

MIB = 2**20
LIMIT_MIB = 100
"""Default limit. Sources and settings have a few MiB; data belongs on the cluster's own disks."""

RAY_LIMIT_MIB = 512
"""Limit of Ray's own store for packages."""

SHIPPED = ("*.py", "presets/*.yaml", "report/*.html*", "audit/*.html*", "editors/tiny/*")
"""Files of the project's packages, as pyproject.toml ships them; ``*`` also crosses folders."""

LARGEST = 5
"""Files that are named when a package is too large."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """Files of a job, and its command as it runs there.

    Attributes:
        files: sources on this machine, by their name in the job's directory.
        arguments: the command's words; files of other places have their name in the package.
        left_out: what was met and not taken, in words.
    """

    files: Mapping[str, Path]
    arguments: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())

    def write(self, folder: Path) -> None:
        """Copies the files into an empty folder; links become the files that they name."""
        for name, source in self.files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def lines(self) -> list[str]:
        """Describes the package, a line for each thing to know."""
        sources = [name for name in self.files if name.partition("/")[0] in SOURCES]
        others = [name for name in self.files if name not in set(sources)]
        # A folder of many files is one entry.
        shown = list(dict.fromkeys(name if "/" not in name else _above(name) for name in others))
        more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
        return [
            f"the job takes along {len(self.files)} files, {_mib(self.num_bytes)}: "
            + ", ".join([f"the {len(sources)} of rl-edit", *shown[:8]])
            + f"{more}; --include PATH adds others",
            *self.left_out,
        ]


def packed(
    arguments: Sequence[str],
    *,
    here: Path,
    include: Sequence[str] = (),
    search: Sequence[Path] = (),
    limit_mib: int = LIMIT_MIB,
) -> Package:
    """Collects what a command needs.

    Args:
        arguments: a verb of rl-edit and its arguments.
        here: the directory that the command's relative paths are meant from.
        include: further files and folders, relative to ``here`` or absolute.
        search: other folders with modules of the user's, as on PYTHONPATH.

    Raises:
        InputError: a path that the job would not find, a link out of a tree, two files of one name,
            or too many bytes; the message names them.
    """
    collected = _Collected()
    for package in SOURCES:
        root = _root_of(package)
        collected.add_tree(root, package, only=SHIPPED, say=False)
    for path in include:
        collected.add_any(_absolute(path, here), _name_in_job(path, here))
    command = Command.read(arguments, here=here, present=collected.holds)
    for name, source in command.configs.items():
        collected.add(name, source)
    for name, source in local_modules(command.modules, folders=(here, *search)).items():
        if source.is_dir():
            collected.add_tree(source, name, only=("*.py",))
        else:
            collected.add(name, source)
    result = Package(
        files=dict(sorted(collected.files.items())),
        arguments=command.arguments,
        left_out=tuple(collected.left_out),
    )
    _require_size(result, limit_mib)
    return result


class _Collected:
    """Files so far, by their name in the package."""

    def __init__(self) -> None:
        self.files: dict[str, Path] = {}
        self.left_out: list[str] = []

    def holds(self, name: str) -> bool:
        """Tests for a file, or for a folder with files."""
        return name in self.files or any(other.startswith(f"{name}/") for other in self.files)

    def add(self, name: str, source: Path) -> None:
        """Takes one file."""
        if not os.access(source, os.R_OK):
            raise InputError(f"{source} is to go with the job and cannot be read by this user.")
        before = self.files.setdefault(name, source)
        if not before.samefile(source):
            raise InputError(
                f"{before} and {source} would both be {name} in the job's directory: rename one."
            )

    def add_any(self, source: Path, name: str) -> None:
        """Takes a file or a folder that was asked for by name."""
        package = name.partition("/")[0]
        if package in SOURCES and _root_of(package) not in (source, *source.parents):
            raise InputError(
                f"--include {source} would take the place of rl-edit's own {package}: rename it."
            )
        if source.is_dir():
            self.add_tree(source, name)
        elif source.is_file():
            self.add(name, source)
        else:
            raise InputError(f"--include {source}: there is no such file or folder.")

    def add_tree(
        self, root: Path, name: str, *, only: Sequence[str] = ("*",), say: bool = True
    ) -> None:
        """Takes the files of a folder, and counts those that are left out."""
        hidden = others = 0
        for path, is_hidden in _walk(root):
            relative = path.relative_to(root).as_posix()
            if is_hidden:
                hidden += 1
            elif not any(fnmatch.fnmatch(relative, pattern) for pattern in only):
                others += 1
            else:
                self.add(f"{name}/{relative}", _followed(path, root))
        if say and hidden:
            self.left_out.append(f"{hidden} hidden files and folders in {root} are left out")
        if say and others:
            self.left_out.append(
                f"{others} files in {root} that are no Python sources are left out; "
                f"--include {name} takes them"
            )


def _walk(root: Path) -> Iterator[tuple[Path, bool]]:
    """Yields files of a tree, and whether they are hidden; what is in hidden folders is not seen.

    Raises:
        InputError: a link to a folder: followed, it could lead out of the tree or in circles.
    """
    for folder, folders, files in os.walk(root):
        for name in sorted(folders):
            path = Path(folder, name)
            if name.startswith(".") or name in ("__pycache__", "node_modules"):
                folders.remove(name)
                if name.startswith("."):
                    yield path, True
            elif path.is_symlink():
                raise InputError(
                    f"{path} is a link to the folder {os.readlink(path)}, and a job's package "
                    "follows no link to a folder: remove it, or --include that folder itself."
                )
        folders.sort()
        for name in sorted(files):
            yield Path(folder, name), name.startswith(".")


def _followed(path: Path, root: Path) -> Path:
    """Returns the file that a path names.

    Raises:
        InputError: a link out of the tree or to nothing, or no plain file.
    """
    target = path.resolve()
    if path.is_symlink() and root.resolve() not in target.parents:
        raise InputError(
            f"{path} is a link to {os.readlink(path)}, which is not in {root}: a job's package "
            "follows no link out of a folder. Copy the file, or remove the link."
        )
    try:
        mode = target.stat().st_mode
    except OSError as error:
        raise InputError(
            f"{path} cannot go with the job ({target}: {error.strerror}): remove it."
        ) from error
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is no plain file (a socket, pipe or device): remove it.")
    return target


def _require_size(package: Package, limit_mib: int) -> None:
    """Refuses a package that is larger than the limit, and names its largest files."""
    if not 1 <= limit_mib <= RAY_LIMIT_MIB:
        raise InputError(
            f"the limit of {limit_mib} MiB cannot be used: Ray takes 1 to {RAY_LIMIT_MIB} MiB."
        )
    if package.num_bytes <= limit_mib * MIB:
        return
    sizes = {name: path.stat().st_size for name, path in package.files.items()}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:LARGEST]
    raise InputError(
        f"the job's package has {_mib(package.num_bytes)} in {len(sizes)} files and the limit is "
        f"{limit_mib} MiB. The largest are "
        + ", ".join(f"{name} ({_mib(sizes[name])})" for name in largest)
        + ". Put data where every node can read it and give its absolute path, or raise --limit "
        f"(Ray takes {RAY_LIMIT_MIB} MiB)."
    )


def _root_of(package: str) -> Path:
    """Finds a package of the project without importing it."""
    spec = importlib.util.find_spec(package)
    (root,) = (spec and spec.submodule_search_locations) or (package,)
    return Path(root).resolve()


def _absolute(path: str, here: Path) -> Path:
    return Path(os.path.normpath(here / path))


def _name_in_job(path: str, here: Path) -> str:
    """Returns the path from ``here``, or the last part of one that lies elsewhere."""
    relative = os.path.relpath(_absolute(path, here), here)
    if relative == ".":
        raise InputError(
            "--include . would upload all of the current directory: name the files and folders "
            "that the job needs."
        )
    return Path(relative).as_posix() if not relative.startswith("..") else Path(relative).name


def _above(name: str) -> str:
    return name.rpartition("/")[0] + "/"


def _mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB"
