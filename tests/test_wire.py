"""Records as bytes: an editor's own tensors pass unread, and stored records outlive a schema."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rl_edit import wire
from rl_edit.messages import LearnerState
from rl_edit.types import AdapterId, AdapterWeights, Conditioning, moved

CONDITIONING = Conditioning(
    source_latents=torch.ones(2, 3),
    grid=(1, 2),
    tensors={
        "words": torch.arange(4, dtype=torch.int16),
        "half": torch.ones(2, dtype=torch.bfloat16),
    },
)
STORED = (
    AdapterWeights(id=AdapterId(3, "ab"), tensors={"w": torch.ones(2)}, exploration={"add": 0.5}),
    LearnerState(updates_done=2, tensors={"policy/w": torch.ones(2)}),
)


def test_the_tensors_of_an_editor_come_back_whatever_their_names_and_types() -> None:
    back = wire.unpack(wire.pack(CONDITIONING))
    assert back.grid == (1, 2) and back.tensors.keys() == CONDITIONING.tensors.keys()
    for name, value in CONDITIONING.tensors.items():
        assert back.tensors[name].dtype == value.dtype
        assert torch.equal(back.tensors[name], value)


def test_the_tensors_of_an_editor_move_with_their_record() -> None:
    there = moved(CONDITIONING, "meta")
    assert there.source_latents.is_meta
    assert all(value.is_meta for value in there.tensors.values())
    assert not any(value.is_meta for value in CONDITIONING.tensors.values())


@pytest.mark.parametrize("record", STORED, ids=lambda record: type(record).__name__)
def test_a_stored_record_of_the_schema_before_is_read(
    record: AdapterWeights | LearnerState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "SCHEMA", 3)
    blob = wire.pack(record)
    monkeypatch.undo()
    assert np.array_equal(wire.pack(wire.unpack(blob)), wire.pack(record))


@pytest.mark.parametrize("schema", [2, 3, 6])
def test_a_record_that_only_travels_is_read_under_its_own_schema_alone(
    schema: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "SCHEMA", schema)
    blob = wire.pack(CONDITIONING)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=f"schema {schema}, this version reads {wire.SCHEMA}"):
        wire.unpack(blob)
