"""Places of editors: the built-in directory, a directory of yours, or the Hugging Face hub.

Shared by the families whose editors are diffusers pipelines, each a directory with a
``model_index.json``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl_edit.errors import InputError
from rl_edit.files import nearest_path

BUILTIN = "builtin:tiny-kontext"
BUILTIN_WEIGHTS = Path(__file__).parent / "tiny" / "weights"
INDEX = "model_index.json"

_LARGE = 64 << 20
_HEAD = 1 << 20
"""Of a file larger than ``_LARGE`` bytes only the first ``_HEAD`` are hashed, beside its size."""


@dataclass(frozen=True, kw_only=True)
class Location:
    """One place of an editor.

    Attributes:
        name: a directory, or a repository id on the hub.
        local: whether it is a directory.
        revision: commit of a repository id; None is the newest.
    """

    name: str
    local: bool
    revision: str | None = None

    def read_json(self, file: str) -> Any:
        """Reads a small file of the editor; on the hub it is downloaded once.

        Raises:
            InputError: it cannot be read, with what to do.
        """
        try:
            return json.loads(self._path(file).read_text())
        # The hub raises errors of several libraries; each means that the file cannot be had.
        except Exception as error:
            raise self.unreachable(error) from error

    def _path(self, file: str) -> Path:
        if self.local:
            return Path(self.name) / file
        # Imported here: a local editor needs no hub, and the import takes a second.
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.name, file, revision=self.revision))

    def files(self) -> frozenset[str] | None:
        """Lists all files by their names within the editor; None where the hub does not answer."""
        if self.local:
            return _names_in(Path(self.name))
        from huggingface_hub import HfApi

        try:
            return frozenset(HfApi().list_repo_files(self.name, revision=self.revision))
        # Offline, or no answer: what an earlier download has left is what can be loaded.
        except Exception:
            snapshot = self._snapshot()
            return None if snapshot is None else _names_in(snapshot)

    def offers(self, file: str) -> bool:
        """Returns True where a small file can be had."""
        try:
            self.read_json(file)
        except InputError:
            return False
        return True

    def local_path(self, file: str) -> Path | None:
        """Finds a file on this machine; None for one that is still on the hub."""
        root = Path(self.name) if self.local else self._snapshot()
        path = None if root is None else root / file
        return path if path is not None and path.is_file() else None

    def _snapshot(self) -> Path | None:
        """Finds the directory that the hub's files were downloaded into."""
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self.name, revision=self.revision, local_files_only=True))
        except Exception:
            return None

    def unreachable(self, error: Exception) -> InputError:
        """Turns an error of loading into one line with what to do."""
        lines = str(error).strip().splitlines()
        reason = lines[0].rstrip(".") if lines else type(error).__name__
        remedy = (
            "Is it a directory written by a diffusers pipeline's save_pretrained?"
            if self.local
            else "Check the id and the network, and that you may read it "
            "(gated weights: accept the licence, then hf auth login); or give a local directory."
        )
        origin = "" if self.local else " from the Hugging Face hub"
        return InputError(f"cannot load the editor {self.name}{origin}: {reason}. {remedy}")


def locate(path: str, revision: str | None = None) -> Location:
    """Finds the place that a configured path names.

    Raises:
        InputError: there is nothing at the path, and it is no repository id.
    """
    # A local directory comes first: ORG/NAME may be one, and then no network is needed.
    name = str(BUILTIN_WEIGHTS if path == BUILTIN else path)
    local = Path(name).is_dir()
    if path == BUILTIN and not local:
        raise InputError(
            f"the built-in editor is missing at {name}: reinstall, or make it with: "
            f"rl-edit pretrain {name}"
        )
    # ids have exactly one slash; everything else was meant as a path.
    is_file = Path(name).is_file()
    if not local and (is_file or name.startswith((".", "/")) or name.count("/") != 1):
        near = nearest_path(Path(name))
        hint = " (it is a file)" if is_file else f", did you mean {near}?" if near else ""
        raise InputError(
            f"no editor at {name}{hint}: give a directory written by save_pretrained, a Hugging "
            f"Face id such as ORG/NAME, or {BUILTIN}"
        )
    if local and revision is not None:
        raise InputError(
            f"editor.revision is {revision!r}, and {path} is a directory on this machine, which "
            "has no revisions: it would be ignored. Leave editor.revision out, or give the id of a "
            "repository that is no directory here"
        )
    return Location(name=name, local=local, revision=revision)


def _names_in(directory: Path) -> frozenset[str]:
    return frozenset(
        entry.relative_to(directory).as_posix() for entry in directory.rglob("*") if entry.is_file()
    )


def local_pipeline(path: str) -> str | None:
    """Reads the pipeline class of an editor on this machine; None where it cannot be known."""
    name = local_value(str(BUILTIN_WEIGHTS) if path == BUILTIN else path, INDEX, "_class_name")
    return name if isinstance(name, str) else None


def local_value(path: str, file: str, name: str) -> Any:
    """Reads a value of a small file of an editor on this machine; None where there is none."""
    try:
        content = json.loads((Path(path) / file).read_text(encoding="utf-8"))
    # Missing or damaged: loading the editor says so, with what to do.
    except (OSError, ValueError):
        return None
    return content.get(name) if isinstance(content, dict) else None


def identity_of(path: str, revision: str | None = None) -> str:
    """Names an editor's weights: a hash of its directory's files, or repository id and revision.

    Files above 64 MiB enter with their size and first MiB, which holds a safetensors file's table
    of tensors.
    """
    directory = BUILTIN_WEIGHTS if path == BUILTIN else Path(path)
    if not directory.is_dir():
        return f"{path}@{revision or 'main'}"
    sha = hashlib.sha256()
    endings = (".safetensors", ".json", ".txt", ".model")
    for file in sorted(entry for entry in directory.rglob("*") if entry.suffix in endings):
        size = file.stat().st_size
        # Names relative to the directory: a copy elsewhere is the same editor.
        sha.update(f"{file.relative_to(directory)}:{size};".encode())
        with file.open("rb") as stream:
            sha.update(stream.read() if size <= _LARGE else stream.read(_HEAD))
    return sha.hexdigest()
