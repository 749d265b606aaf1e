"""Checkpoints: written whole or not at all, verified when read. safetensors and JSON only, and no
tensor is unpacked here.

A directory ``step_NNNNNN`` holds the packed learner, the packed adapters that actors may still be
asked for, ``state.json`` and ``MANIFEST.json``, which names every file that counts with its size
and hash. Other files beside them are never opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from learner.controller.lease import Lease
from rl_edit.config import is_default, modern
from rl_edit.errors import InputError
from rl_edit.files import replace_directory, sync_directory, write_new
from rl_edit.types import AdapterId

MANIFEST, STATE, LEARNER = "MANIFEST.json", "state.json", "learner.safetensors"
ABSENT: Any = ...
"""The value, in ``differences``, of a setting that one side does not have."""

STEP = re.compile(r"(?:\.old-)?step_(\d{6,})")
TEMPORARY = re.compile(r"\.tmp-(\d+)-.+")
PICKLES = frozenset({".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"})


class Unsound(ValueError):
    """A directory that is no checkpoint, or not all of one: what is wrong, in words."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything a run continues from. There is no random state: seeds are keyed, and
    ``updates_done`` is the data cursor.

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
        """Size on disk, but for a few kilobytes of JSON."""
        return self.learner.nbytes + sum(packed.nbytes for packed in self.acting.values())


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
    seeds: str = "keyed by (seed, task, draw, candidate); there is no generator state, and updates_done is the data cursor"
    parent: str | None
    lease_epoch: int
    acting: tuple[_Acting, ...]


class _File(_Record):
    bytes: int
    sha256: str


class _Manifest(_Record):
    """Its own bytes have no hash, so what it says besides hashes stands in ``state.json`` too, and
    both must agree."""

    parent: str | None
    lease_epoch: int
    files: dict[str, _File]


def write(directory: Path, checkpoint: Checkpoint, *, lease: Lease) -> Path:
    """Writes ``directory/step_NNNNNN``: temporary folder, every file synced, manifest last, lease
    asked again, rename.

    Raises:
        Fenced: another attempt holds the run directory; nothing was renamed.
        OSError: the disk is full, for instance. Earlier checkpoints are as they were.
    """
    lease.check()
    final = directory / f"step_{checkpoint.updates_done:06d}"
    temporary = final.with_name(f".tmp-{lease.epoch}-{final.name}")
    if not directory.is_dir():
        directory.mkdir(parents=True)
        sync_directory(directory.parent)
    before = [
        number for number in map(_number, _steps(directory)) if number < checkpoint.updates_done
    ]
    parent = f"step_{before[-1]:06d}" if before else None
    packed = {LEARNER: checkpoint.learner}
    acting = []
    for adapter, weights in checkpoint.acting.items():
        acting.append(
            _Acting(
                file=f"acting_{adapter.step:06d}.safetensors",
                step=adapter.step,
                sha256=adapter.sha256,
            )
        )
        packed[acting[-1].file] = weights
    assert not any(map(_instead_of_safetensors, packed.values())), (
        "only packed records are written: anything else is refused when read"
    )
    state = _State(
        updates_done=checkpoint.updates_done,
        settings=checkpoint.settings,
        code_version=checkpoint.code_version,
        ledger=checkpoint.ledger,
        parent=parent,
        lease_epoch=lease.epoch,
        acting=tuple(acting),
    )
    contents: dict[str, bytes | memoryview] = {
        **{name: array.data for name, array in packed.items()},
        STATE: _json(state),
    }
    files = {
        name: _File(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        for name, content in contents.items()
    }
    contents[MANIFEST] = _json(_Manifest(parent=parent, lease_epoch=lease.epoch, files=files))

    def fill(partial: Path) -> None:
        for name, content in contents.items():
            write_new(partial / name, content)
        sync_directory(partial)
        # Asked last: nothing may be renamed once a newer attempt owns the directory.
        lease.check()

    replace_directory(final, temporary, fill)
    return final


def newest(directory: Path, on_corrupt: Callable[..., object]) -> Checkpoint | None:
    """The newest checkpoint that verifies; a bad one is renamed ``.corrupt-...`` and reported
    through ``on_corrupt``."""
    for path in reversed(_steps(directory)):
        try:
            return read(path)
        except Unsound as problem:
            path.rename(_free_name(path.with_name(f".corrupt-{path.name}")))
            on_corrupt("checkpoint_corrupt", path=path.name, problem=str(problem))
    return None


def peek(directory: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; unlike ``newest`` this leaves a bad one where it
    lies."""
    for path in reversed(_steps(directory)):
        with contextlib.suppress(Unsound):
            return read(path)
    return None


def read(path: Path) -> Checkpoint:
    """A checkpoint whose every byte is as its manifest says.

    Raises:
        Unsound: it is damaged, incomplete, or not a checkpoint of this package. Nothing but
            safetensors and JSON was opened.
        OSError: the disk cannot be read, which says nothing about the checkpoint.
    """
    if not (path / MANIFEST).is_file():
        pickles = sorted(file.name for file in path.glob("*") if file.suffix in PICKLES)
        raise Unsound(
            f"{MANIFEST} is missing"
            + (f"; it holds {', '.join(pickles)}, and pickles are never opened" if pickles else "")
        )
    manifest = _parse(_Manifest, MANIFEST, (path / MANIFEST).read_bytes())
    for name in manifest.files:
        if Path(name).name != name or "\\" in name:
            raise Unsound(f"{MANIFEST} names {name!r}, which is not a plain file name")
        if Path(name).suffix not in (".safetensors", ".json"):
            raise Unsound(
                f"{MANIFEST} names {name!r}: only .safetensors and .json are opened, for a pickle "
                "may run code"
            )
    if missing := {LEARNER, STATE} - manifest.files.keys():
        raise Unsound(f"{MANIFEST} does not name {', '.join(sorted(missing))}")
    contents = {name: _verified(path / name, file) for name, file in manifest.files.items()}
    state = _parse(_State, STATE, contents[STATE].tobytes())
    if (state.parent, state.lease_epoch) != (manifest.parent, manifest.lease_epoch):
        raise Unsound(f"{MANIFEST} and {STATE} disagree about the checkpoint before or the lease")
    if missing := {entry.file for entry in state.acting} - contents.keys():
        raise Unsound(f"{STATE} names {', '.join(sorted(missing))}, which {MANIFEST} does not")
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


def require_same_run(
    found: Checkpoint, settings: Mapping[str, Any], where: Path, allow: frozenset[str] = frozenset()
) -> None:
    """Refuses a checkpoint of another run, and says what differs.

    Args:
        settings: of this run, in the form of ``Checkpoint.settings``.
        allow: dotted settings that may differ.

    Raises:
        InputError: training would silently continue something else.
    """
    drift = {
        name: (there, here)
        for name, (there, here) in differences(modern(found.settings), settings).items()
        if there != ABSENT or not is_default(name, settings)
    }
    if refused := {name: pair for name, pair in drift.items() if name not in allow}:
        listed = "; ".join(
            f"{name}: {_shown(there)} there, {_shown(here)} here"
            for name, (there, here) in refused.items()
        )
        raise InputError(
            f"{where} belongs to another run ({listed}): one run would mix the results of both. "
            "Resume with the run's own config.yaml, "
            f"accept changes with {' '.join(f'--allow-config-drift {name}' for name in refused)}, "
            "or start a new --run-dir."
        )


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (value there, value here) of every setting that differs; ``ABSENT`` where one
    side has none."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*there, *here}):
        one, other = there.get(key, ABSENT), here.get(key, ABSENT)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found |= {f"{key}.{name}": pair for name, pair in differences(one, other).items()}
        elif one != other:
            found[key] = (one, other)
    return found


def prune(directory: Path, keep: int, *, lease: Lease) -> None:
    """Removes all but the newest ``keep`` checkpoints, and what killed attempts of earlier epochs
    were writing.

    Raises:
        Fenced: what lies there belongs to another attempt now.
    """
    lease.check()
    steps = _steps(directory)
    kept = sorted({_number(path) for path in steps})[-keep:]
    for path in steps:
        replaced = (
            path.name.startswith(".old-")
            and path.with_name(path.name.removeprefix(".old-")) in steps
        )
        if replaced or _number(path) not in kept:
            shutil.rmtree(path)
    for path in directory.glob(".tmp-*"):
        if (match := TEMPORARY.fullmatch(path.name)) and int(match[1]) < lease.epoch:
            shutil.rmtree(path)


def disk_space_problem(directory: Path, nbytes: int) -> str:
    """ "" when two checkpoints of ``nbytes`` fit on the disk of ``directory``; else a sentence that
    says so."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free >= 2 * nbytes:
        return ""
    return (
        f"{free / 1e9:.2f} GB are free for {directory}, but a checkpoint takes {nbytes / 1e9:.2f} "
        "GB and a new one is written before an "
        "old one is removed."
    )


def _steps(directory: Path) -> list[Path]:
    """Checkpoints by number; the replaced copy of a step, which a killed write may leave, comes
    before the step itself."""
    found = [path for path in directory.glob("*") if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (_number(path), path.name.startswith("step_")))


def _number(path: Path) -> int:
    match = STEP.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _verified(file: Path, expected: _File) -> np.ndarray:
    if not file.is_file():
        raise Unsound(f"{file.name} is missing")
    content: np.ndarray = np.fromfile(file, dtype=np.uint8)
    if (
        content.nbytes != expected.bytes
        or hashlib.sha256(content.data).hexdigest() != expected.sha256
    ):
        raise Unsound(f"{file.name} does not have the bytes its manifest names")
    if file.suffix == ".safetensors" and (kind := _instead_of_safetensors(content)):
        raise Unsound(
            f"{file.name} is {kind}, not safetensors: it is not opened, for a pickle may run code"
        )
    return content


def _instead_of_safetensors(content: np.ndarray) -> str:
    """ "" for safetensors, which begin with the length of a JSON header and the header; else what
    the bytes seem to be.

    Asked in this order because the length of a sound header may well spell the first bytes of a
    pickle.
    """
    head = content[:9].tobytes()
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= content.nbytes - 8:
        return ""
    if head.startswith(b"PK"):
        return "a zip archive (as torch.save writes)"
    return "a pickle" if head.startswith(b"\x80") else "something else"


def _parse(record: type[R], name: str, content: bytes) -> R:
    try:
        return record.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Unsound(
            f"{name} cannot be read{f' at {where}' if where else ''}: {first['msg']}"
        ) from error


def _json(record: _Record) -> bytes:
    # Not pydantic's writer, which turns the infinities that settings may hold into null.
    return json.dumps(record.model_dump(), indent=2).encode() + b"\n"


def _shown(value: Any) -> str:
    text = "absent" if value is ABSENT else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _free_name(path: Path) -> Path:
    """``path``, or the first ``path-N`` that does not exist: a step may be found corrupt more than
    once."""
    candidate, number = path, 1
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate
