"""Records as bytes: one safetensors buffer with typed JSON metadata. No pickle on the wire or on disk.

A record's tensors become entries named by their path, everything else goes to the header. Only record types named here
can be read back.
"""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from rl_edit import messages, types

SCHEMA = 3
RECORDS = {
    record.__name__: record
    for record in (
        types.EditTask,
        types.PairedTask,
        types.RegionsTask,
        types.PairedRegionsTask,
        types.NegativePrompt,
        types.Conditioning,
        types.AdapterId,
        types.AdapterWeights,
        types.WorkItem,
        types.Candidates,
        types.RolloutGroup,
        types.RewardTable,
        messages.LearnerState,
    )
}


def pack(record: Any) -> np.ndarray:
    """A record as one uint8 array (Ray moves numpy arrays without copies; torch pickles are 20 times slower)."""
    tensors: dict[str, Tensor] = {}
    header = _flatten(record, "", tensors)
    # One metadata key only: safetensors writes several in random order, and the same record must give the same bytes.
    metadata = {"rl-edit": json.dumps({"schema": SCHEMA, "record": header})}
    return np.frombuffer(save_tensors(_unshared(tensors), metadata), dtype=np.uint8)


def unpack(blob: np.ndarray) -> Any:
    """The record of a blob.

    Raises:
        ValueError: for another schema or an unknown record type.
    """
    raw = bytes(blob)
    size = int.from_bytes(raw[:8], "little")
    content = json.loads(json.loads(raw[8 : 8 + size]).get("__metadata__", {}).get("rl-edit", "{}"))
    if content.get("schema") != SCHEMA:
        raise ValueError(
            f"blob has schema {content.get('schema')!r}, this version reads {SCHEMA}: actors and driver run different code"
        )
    return _restore(content["record"], load_tensors(raw))


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """CPU tensors, each with memory of its own: safetensors refuses fields that share it, as source and target of a task may."""
    own: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        own[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in taken else tensor
        taken.add(tensor.untyped_storage().data_ptr())
    return own


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"$tensor": path}
    if is_dataclass(value):
        name = type(value).__name__
        return {
            "$record": name,
            "fields": {
                f.name: _flatten(getattr(value, f.name), f"{path}/{f.name}", tensors)
                for f in fields(value)
            },
        }
    if isinstance(value, dict):
        return {
            "$dict": {key: _flatten(item, f"{path}/{key}", tensors) for key, item in value.items()}
        }
    if isinstance(value, tuple | list):
        return {"$tuple": [_flatten(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
    return value


def _restore(value: Any, tensors: dict[str, Tensor]) -> Any:
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
            f"blob names an unknown record {value['$record']!r}; known: {', '.join(sorted(RECORDS))}"
        )
    return RECORDS[value["$record"]](
        **{name: _restore(item, tensors) for name, item in value["fields"].items()}
    )
