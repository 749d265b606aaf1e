"""The examples in the docstrings of records are true."""

from __future__ import annotations

import doctest
import inspect
from dataclasses import is_dataclass
from types import ModuleType
from typing import Any

import pytest
import torch

import rl_edit.scores
import rl_edit.types


def records(module: ModuleType) -> list[type]:
    """The records that a module defines, in the order of the file."""
    return [
        member
        for member in vars(module).values()
        if inspect.isclass(member) and is_dataclass(member) and member.__module__ == module.__name__
    ]


@pytest.mark.parametrize("module", [rl_edit.scores, rl_edit.types], ids=lambda m: m.__name__)
def test_every_record_has_an_example_that_runs(module: ModuleType) -> None:
    assert len(records(module)) >= 4
    # Examples build on the ones above them. Shapes are checked here as everywhere in tests.
    names: dict[str, Any] = {"torch": torch, **vars(module)}
    for record in records(module):
        examples = doctest.DocTestParser().get_examples(inspect.getdoc(record) or "")
        assert any(f"{record.__name__}(" in each.source for each in examples), record
        for example in examples:
            if example.want:
                result = eval(example.source, names)
                assert f"{result!r}\n" == example.want, example.source
            else:
                exec(example.source, names)
