"""Checkpoints: written whole or not at all, verified when read. safetensors and JSON only."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from rl_edit.errors import InputError
from rl_edit.types import AdapterId, AdapterWeights

MANIFEST = "MANIFEST.json"
ESSENTIAL = frozenset({"learner.safetensors", "state.json"})


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything a run continues from.

    Attributes:
        updates_done: updates applied; the data cursor and every seed derive from it.
        identity: hash of everything that decides results: settings, data, editor.
        learner: named tensors of adapter and optimizer.
        acting: the adapters that groups still to be rolled out may name (the last ``max_lag + 1``), oldest first.
    """

    updates_done: int
    identity: str
    learner: dict[str, Tensor]
    acting: tuple[AdapterWeights, ...] = field(default=())


def write(directory: Path, checkpoint: Checkpoint) -> Path:
    """Writes ``directory/step_NNNNNN``: temporary folder, fsync, manifest with sha256 last, rename, parent fsync."""
    final = directory / f"step_{checkpoint.updates_done:06d}"
    temporary = directory / f".tmp-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file({name: t.contiguous() for name, t in checkpoint.learner.items()}, temporary / "learner.safetensors")
        state: dict[str, Any] = {"updates_done": checkpoint.updates_done, "identity": checkpoint.identity, "acting": []}
        for weights in checkpoint.acting:
            name = f"acting_{weights.id.step:06d}.safetensors"
            save_file(weights.tensors, temporary / name)
            state["acting"].append({"file": name, "step": weights.id.step, "sha256": weights.id.sha256})
        (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        files = sorted(p for p in temporary.iterdir())
        manifest = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for path in (*files, temporary / MANIFEST, temporary):
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
        _sync(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def newest(directory: Path, *, on_corrupt: Any = None) -> Checkpoint | None:
    """The newest checkpoint that verifies; a bad one is renamed ``.corrupt-...`` and reported through ``on_corrupt``."""
    for path in sorted(directory.glob("step_*"), reverse=True):
        problem = verify(path)
        if problem is None:
            return read(path)
        path.rename(_free_name(path.with_name(f".corrupt-{path.name}")))
        if on_corrupt is not None:
            on_corrupt("checkpoint_corrupt", path=path.name, problem=problem)
    return None


def newest_identity(directory: Path) -> str | None:
    """Whose the newest checkpoint that verifies is; unlike ``newest`` this leaves a bad one where it lies."""
    sound = (path for path in sorted(directory.glob("step_*"), reverse=True) if verify(path) is None)
    path = next(sound, None)
    return None if path is None else str(json.loads((path / "state.json").read_text())["identity"])


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when every byte is as its manifest says."""
    try:
        manifest = {name: (entry["bytes"], entry["sha256"]) for name, entry in json.loads((path / MANIFEST).read_text()).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"no readable manifest ({type(error).__name__})"
    if not manifest.keys() >= ESSENTIAL:
        return f"the manifest does not name {', '.join(sorted(ESSENTIAL - manifest.keys()))}"
    for name, (size, sha256) in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size or _sha256(file) != sha256:
            return f"{name} does not have the bytes its manifest names"
    return None


def read(path: Path) -> Checkpoint:
    state = json.loads((path / "state.json").read_text())
    acting = tuple(
        AdapterWeights(id=AdapterId(entry["step"], entry["sha256"]), tensors=load_file(path / entry["file"])) for entry in state["acting"]
    )
    return Checkpoint(
        updates_done=state["updates_done"],
        identity=state["identity"],
        learner=load_file(path / "learner.safetensors"),
        acting=acting,
    )


def require_same_run(checkpoint: Checkpoint, identity: str, where: Path) -> None:
    """Refuses a checkpoint of another run.

    Raises:
        InputError: training would silently continue something else.
    """
    if checkpoint.identity != identity:
        raise another_run(where)


def another_run(where: Path) -> InputError:
    """The error of resuming a run with settings, data or an editor that change its results."""
    return InputError(
        f"{where} belongs to another run: its settings, data or editor differ from these (names, places of processes, judge addresses "
        "and train.updates may change). Resume with the run's own config.yaml and data, or start a new --run-dir."
    )


def prune(directory: Path, keep: int) -> None:
    """Removes all but the newest ``keep`` checkpoints."""
    for path in sorted(directory.glob("step_*"))[:-keep]:
        shutil.rmtree(path)


def _free_name(path: Path) -> Path:
    """``path``, or the first ``path-N`` that does not exist: a step may be found corrupt more than once."""
    candidate, number = path, 1
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate


def _sha256(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            sha.update(chunk)
    return sha.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
