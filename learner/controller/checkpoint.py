"""Checkpoints: written completely or not at all, verified when read.

A directory ``step_NNNNNN`` holds the packed learner, the packed adapters that groups may still
name, ``state.json`` and ``MANIFEST.json``. The manifest names every file that counts, with its size
and hash. Other files beside them are never opened. Files are safetensors and JSON only, and no
tensor is unpacked here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from learner.controller.lease import Lease
from rl_edit.files import replace_directory, sync_directory, write_new
from rl_edit.types import AdapterId

MANIFEST, STATE, LEARNER = "MANIFEST.json", "state.json", "learner.safetensors"
# Six digits or more: names sort by number up to a million updates; `_steps` sorts by value.
STEP = re.compile(r"(?:\.old-)?step_(\d{6,})")
TEMPORARY = re.compile(r"\.tmp-(\d+)-.+")
# Never opened; named in messages only, so that a user knows why a directory is refused.
PICKLES = frozenset({".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"})


class CorruptCheckpoint(ValueError):
    """A directory is no checkpoint, or not all of one; the message says what is wrong."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything a run continues from.

    There is no random state: seeds are keyed, and ``updates_done`` is the data cursor.

    Attributes:
        settings: everything that decides results, as JSON: settings, and the hashes of data and
            editor under ``content``.
        code_version: of the package that wrote it.
        ledger: what the controller counts across attempts, as JSON.
        learner: packed ``LearnerState``.
        acting: packed ``AdapterWeights`` that groups still to be rolled out may name, oldest first.
    """

    updates_done: int
    settings: dict[str, Any]
    code_version: str
    ledger: dict[str, Any]
    learner: np.ndarray
    acting: dict[AdapterId, np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size on disk, without a few kilobytes of JSON."""
        return self.learner.nbytes + sum(packed.nbytes for packed in self.acting.values())


# Strict: an unknown key means another version or a damaged file, not something to ignore.
class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


R = TypeVar("R", bound=_Record)


class _Acting(_Record):
    file: str
    step: int
    sha256: str


class _State(_Record):
    updates_done: int
    settings: dict[str, Any]
    code_version: str
    ledger: dict[str, Any]
    seeds: str = (
        "keyed by (seed, task, draw, candidate); there is no generator state, and updates_done is "
        "the data cursor"
    )
    parent: str | None
    lease_epoch: int
    acting: tuple[_Acting, ...]


class _File(_Record):
    bytes: int
    sha256: str


class _Manifest(_Record):
    """The names, sizes and hashes of a checkpoint's files.

    Nothing hashes the manifest itself. Its other entries therefore stand in ``state.json`` too, and
    both must agree.
    """

    parent: str | None
    lease_epoch: int
    files: dict[str, _File]


def write(directory: Path, checkpoint: Checkpoint, *, lease: Lease) -> Path:
    """Writes ``directory/step_NNNNNN`` and returns it.

    The order is: a temporary folder, every file synced, the lease checked again, a rename.

    Raises:
        Fenced: another attempt owns the run directory; nothing was renamed.
        OSError: the disk is full, for instance. Earlier checkpoints are as they were.
    """
    lease.check()
    final = directory / f"step_{checkpoint.updates_done:06d}"
    # The epoch in the name says later whose remainder it is, should this process be killed.
    temporary = final.with_name(f".tmp-{lease.epoch}-{final.name}")
    if not directory.is_dir():
        directory.mkdir(parents=True)
        sync_directory(directory.parent)
    contents = _contents(checkpoint, parent=_parent(directory, checkpoint), lease_epoch=lease.epoch)

    def fill(partial: Path) -> None:
        for name, content in contents.items():
            write_new(partial / name, content)
        sync_directory(partial)
        # Asked last: nothing may be renamed once a newer attempt owns the directory.
        lease.check()

    # A rename is the commit: before it the step does not exist, after it the step is complete.
    replace_directory(final, temporary, fill)
    return final


def _parent(directory: Path, checkpoint: Checkpoint) -> str | None:
    """Names the newest checkpoint before this one."""
    numbers = map(_number, _steps(directory))
    before = [number for number in numbers if number < checkpoint.updates_done]
    return f"step_{before[-1]:06d}" if before else None


def _contents(
    checkpoint: Checkpoint, *, parent: str | None, lease_epoch: int
) -> dict[str, bytes | memoryview]:
    """Returns the files of a checkpoint, the manifest last."""
    files = {adapter: f"acting_{adapter.step:06d}.safetensors" for adapter in checkpoint.acting}
    packed = {LEARNER: checkpoint.learner}
    packed |= {files[adapter]: weights for adapter, weights in checkpoint.acting.items()}
    assert not any(map(_foreign_format, packed.values())), (
        "only packed records are written: anything else is refused when read"
    )
    state = _State(
        updates_done=checkpoint.updates_done,
        settings=checkpoint.settings,
        code_version=checkpoint.code_version,
        ledger=checkpoint.ledger,
        parent=parent,
        lease_epoch=lease_epoch,
        acting=tuple(
            _Acting(file=file, step=adapter.step, sha256=adapter.sha256)
            for adapter, file in files.items()
        ),
    )
    contents: dict[str, bytes | memoryview] = {
        **{name: array.data for name, array in packed.items()},
        STATE: _json(state),
    }
    entries = {
        name: _File(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        for name, content in contents.items()
    }
    # Last, also on the disk: a folder with a manifest has everything that the manifest names.
    contents[MANIFEST] = _json(_Manifest(parent=parent, lease_epoch=lease_epoch, files=entries))
    return contents


def newest(directory: Path, on_corrupt: Callable[..., object]) -> Checkpoint | None:
    """Returns the newest checkpoint that verifies.

    A corrupt one is renamed ``.corrupt-...`` and reported through ``on_corrupt``.
    """
    for path in reversed(_steps(directory)):
        try:
            return read(path)
        except CorruptCheckpoint as problem:
            # Renamed, not removed: a person may want to find out what happened to it.
            path.rename(_unused_path(path.with_name(f".corrupt-{path.name}")))
            on_corrupt("checkpoint_corrupt", path=path.name, problem=str(problem))
    return None


def peek(directory: Path) -> Checkpoint | None:
    """Returns the newest checkpoint that verifies, and changes nothing."""
    for path in reversed(_steps(directory)):
        with contextlib.suppress(CorruptCheckpoint):
            return read(path)
    return None


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint and verifies every byte against its manifest.

    Raises:
        CorruptCheckpoint: it is damaged, incomplete, or not a checkpoint of this package. Nothing
            but safetensors and JSON was opened.
        OSError: the disk cannot be read, which says nothing about the checkpoint.
    """
    if not (path / MANIFEST).is_file():
        pickles = sorted(file.name for file in path.glob("*") if file.suffix in PICKLES)
        raise CorruptCheckpoint(
            f"{MANIFEST} is missing"
            + (f"; it holds {', '.join(pickles)}, and pickles are never opened" if pickles else "")
        )
    manifest = _parse(_Manifest, MANIFEST, (path / MANIFEST).read_bytes())
    # Names are checked before any file is opened: a manifest is input, and may be hostile.
    for name in manifest.files:
        if Path(name).name != name or "\\" in name:
            raise CorruptCheckpoint(f"{MANIFEST} names {name!r}, which is not a plain file name")
        if Path(name).suffix not in (".safetensors", ".json"):
            raise CorruptCheckpoint(
                f"{MANIFEST} names {name!r}: only .safetensors and .json are opened, for a pickle "
                "may run code"
            )
    if missing := {LEARNER, STATE} - manifest.files.keys():
        raise CorruptCheckpoint(f"{MANIFEST} does not name {', '.join(sorted(missing))}")
    contents = {name: _verified(path / name, file) for name, file in manifest.files.items()}
    # From here on every byte has been verified; only the content can still be wrong.
    state = _parse(_State, STATE, contents[STATE].tobytes())
    if (state.parent, state.lease_epoch) != (manifest.parent, manifest.lease_epoch):
        raise CorruptCheckpoint(
            f"{MANIFEST} and {STATE} disagree about the checkpoint before or the lease"
        )
    if missing := {entry.file for entry in state.acting} - contents.keys():
        raise CorruptCheckpoint(
            f"{STATE} names {', '.join(sorted(missing))}, which {MANIFEST} does not"
        )
    return Checkpoint(
        updates_done=state.updates_done,
        settings=state.settings,
        code_version=state.code_version,
        ledger=state.ledger,
        learner=contents[LEARNER],
        acting={
            AdapterId(entry.step, entry.sha256): contents[entry.file] for entry in state.acting
        },
    )


def prune(directory: Path, keep: int, *, lease: Lease) -> None:
    """Removes all but the newest ``keep`` checkpoints, and remainders of killed attempts.

    Raises:
        Fenced: the directory belongs to another attempt now.
    """
    lease.check()
    steps = _steps(directory)
    retained = sorted({_number(path) for path in steps})[-keep:]
    for path in steps:
        replaced = (
            path.name.startswith(".old-")
            and path.with_name(path.name.removeprefix(".old-")) in steps
        )
        # A replaced copy goes once its successor is there: until then it is the only one.
        if replaced or _number(path) not in retained:
            shutil.rmtree(path)
    for path in directory.glob(".tmp-*"):
        # Those of this epoch may be under way in another thread.
        if (match := TEMPORARY.fullmatch(path.name)) and int(match[1]) < lease.epoch:
            shutil.rmtree(path)


def disk_space_problem(directory: Path, nbytes: int) -> str:
    """Returns a sentence when two checkpoints of ``nbytes`` do not fit on the disk, else ""."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free >= 2 * nbytes:
        return ""
    return (
        f"{free / 1e9:.2f} GB are free for {directory}, but a checkpoint takes {nbytes / 1e9:.2f} "
        "GB and a new one is written before an old one is removed."
    )


def _steps(directory: Path) -> list[Path]:
    """Returns the checkpoints by number.

    The replaced copy of a step, which a killed write may leave, comes before the step itself.
    """
    paths = [path for path in directory.glob("*") if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(paths, key=lambda path: (_number(path), path.name.startswith("step_")))


def _number(path: Path) -> int:
    match = STEP.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _verified(file: Path, expected: _File) -> np.ndarray:
    """Reads a file that has the bytes and the format that its manifest names."""
    if not file.is_file():
        raise CorruptCheckpoint(f"{file.name} is missing")
    # Read once and hashed in memory: a file that changes between two reads would go unnoticed.
    content: np.ndarray = np.fromfile(file, dtype=np.uint8)
    if (
        content.nbytes != expected.bytes
        or hashlib.sha256(content.data).hexdigest() != expected.sha256
    ):
        raise CorruptCheckpoint(f"{file.name} does not have the bytes its manifest names")
    if file.suffix == ".safetensors" and (kind := _foreign_format(content)):
        raise CorruptCheckpoint(
            f"{file.name} is {kind}, not safetensors: it is not opened, for a pickle may run code"
        )
    return content


def _foreign_format(content: np.ndarray) -> str:
    """Returns what bytes seem to be when they are not safetensors; "" for safetensors.

    A safetensors file begins with the length of a JSON header, and the header.
    """
    # In this order, because the length of a valid header may spell the first bytes of a pickle.
    head = content[:9].tobytes()
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= content.nbytes - 8:
        return ""
    # Zip and pickle differ in the message only; both are refused.
    if head.startswith(b"PK"):
        return "a zip archive (as torch.save writes)"
    return "a pickle" if head.startswith(b"\x80") else "something else"


def _parse(record: type[R], name: str, content: bytes) -> R:
    try:
        return record.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise CorruptCheckpoint(
            f"{name} cannot be read{f' at {where}' if where else ''}: {first['msg']}"
        ) from error


def _json(record: _Record) -> bytes:
    # Not pydantic's writer, which turns the infinities that settings may hold into null.
    return json.dumps(record.model_dump(), indent=2).encode() + b"\n"


def _unused_path(path: Path) -> Path:
    """Returns ``path``, or the first ``path-N`` that does not exist.

    The same step may be corrupt more than once.
    """
    candidate, number = path, 1
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate
