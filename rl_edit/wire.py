"""Records as bytes: one safetensors buffer with typed JSON metadata.

A record's tensors become entries named by their path; everything else goes to the header. Only
record types named here are read back. There is no pickle on the wire or on disk: reading a blob
can never run code.
"""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from rl_edit import messages, scores, types

Blob = NDArray[np.uint8]

SCHEMA = 5
"""Counts up with every change of a record that travels or is stored."""

_STORED = ("AdapterWeights", "AdapterId", "LearnerState")
READABLE_AS_STORED = {3: _STORED, 4: _STORED}
"""Older schemas whose stored records still read the same: checkpoints outlive a version.

Records that only travel are not listed: a group of another version means that processes run
different code.
"""

RECORDS = {
    record.__name__: record
    for record in (
        # Reading makes objects of these classes and of no other, whatever a blob says.
        types.EditTask,
        types.PairedTask,
        types.RegionsTask,
        types.PairedRegionsTask,
        types.Conditioning,
        types.AdapterId,
        types.AdapterWeights,
        types.WorkItem,
        types.Candidates,
        types.RolloutGroup,
        scores.RegionTable,
        scores.ChangeVariance,
        scores.Measures,
        types.RewardTable,
        messages.LearnerState,
    )
}


def pack(record: Any) -> Blob:
    """Writes a record as one uint8 array.

    Ray moves numpy arrays without copies; pickles of torch tensors take 20 times as long.
    """
    tensors: dict[str, Tensor] = {}
    header = _flatten(record, "", tensors)
    # One metadata key only: safetensors writes several in random order, and the same record must
    # give the same bytes.
    metadata = {"rl-edit": json.dumps({"schema": SCHEMA, "record": header})}
    return np.frombuffer(save_tensors(_unshared(tensors), metadata), dtype=np.uint8)


def unpack(blob: Blob) -> Any:
    """Reads the record of a blob.

    Raises:
        ValueError: the blob has another schema or names an unknown record type.
    """
    raw = bytes(blob)
    # safetensors: 8 bytes with the header's length, the JSON header, then the tensors.
    size = int.from_bytes(raw[:8], "little")
    content = json.loads(json.loads(raw[8 : 8 + size]).get("__metadata__", {}).get("rl-edit", "{}"))
    schema, record = content.get("schema"), content.get("record")
    if schema != SCHEMA and not _reads_as_stored(schema, record):
        raise ValueError(
            f"blob has schema {schema!r}, this version reads {SCHEMA}: actors and driver run "
            "different code"
        )
    return _restore(record, load_tensors(raw))


def _reads_as_stored(schema: Any, record: Any) -> bool:
    return isinstance(record, dict) and record.get("$record") in READABLE_AS_STORED.get(schema, ())


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies tensors to the CPU, each with memory of its own.

    safetensors refuses tensors that share it, as source and target of a task may.
    """
    separate: dict[str, Tensor] = {}
    storages: set[int] = set()
    # The first of two that share memory is not copied; contiguous() copies views by itself.
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return separate


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Returns a value as JSON and puts its tensors into ``tensors`` under their paths."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"$tensor": path}
    if is_dataclass(value):
        content = {
            f.name: _flatten(getattr(value, f.name), f"{path}/{f.name}", tensors)
            for f in fields(value)
        }
        return {"$record": type(value).__name__, "fields": content}
    # Tagged, so that a mapping of the caller's cannot be taken for a record.
    if isinstance(value, dict):
        return {"$dict": {k: _flatten(item, f"{path}/{k}", tensors) for k, item in value.items()}}
    if isinstance(value, tuple | list):
        return {"$tuple": [_flatten(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
    return value


def _restore(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Inverts :func:`_flatten`. Every mapping there carries one of its tags."""
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$dict" in value:
        return {key: _restore(item, tensors) for key, item in value["$dict"].items()}
    if "$tuple" in value:
        return tuple(_restore(item, tensors) for item in value["$tuple"])
    if value["$record"] not in RECORDS:
        raise ValueError(
            f"blob names an unknown record {value['$record']!r}; known: "
            f"{', '.join(sorted(RECORDS))}"
        )
    content = {name: _restore(item, tensors) for name, item in value["fields"].items()}
    return RECORDS[value["$record"]](**content)
