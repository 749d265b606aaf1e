"""Seams that are open: a class of yours takes the place of a built-in one, named by its ``kind``.

``kind: my_methods:Ratio`` imports the module ``my_methods`` and reads the mapping into its class
    ``Ratio``, a frozen pydantic model
whose ``kind`` is that very string. Nothing is registered anywhere.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, GetCoreSchemaHandler, ValidatorFunctionWrapHandler
from pydantic_core import CoreSchema, core_schema

from rl_edit.errors import InputError


@dataclass(frozen=True)
class Plugin:
    """Annotation of a seam: besides its built-in kinds it takes any model that does what ``law``
    asks.

    Attributes:
        where: the setting's dotted name, for errors.
        law: a runtime-checkable protocol.
        usual: the kind of a mapping that names none.
    """

    where: str
    law: type
    usual: str = ""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        inner = handler(source)

        def validate(value: Any, known: ValidatorFunctionWrapHandler) -> Any:
            if isinstance(value, Mapping) and "kind" not in value and self.usual:
                value = {"kind": self.usual, **value}
            kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
            return self._own(value, kind) if isinstance(kind, str) and ":" in kind else known(value)

        return core_schema.no_info_wrap_validator_function(
            validate,
            inner,
            serialization=core_schema.plain_serializer_function_ser_schema(_dumped, info_arg=True),
        )

    def _own(self, value: Any, kind: str) -> BaseModel:
        module, _, name = kind.partition(":")
        try:
            made: Callable[..., Any] | None = getattr(importlib.import_module(module), name, None)
        except (
            Exception,
            SystemExit,
        ) as error:  # importing runs it, and what it does then can be anything
            raise ValueError(
                f"kind {kind!r}: module {module!r} cannot be imported ({type(error).__name__}: "
                f"{error}): install it, put it on PYTHONPATH, "
                "or mend it"
            ) from error
        if not (
            isinstance(made, type)
            and issubclass(made, BaseModel)
            and made.model_config.get("frozen")
        ):
            raise ValueError(
                f"kind {kind!r}: {module!r} has no frozen pydantic model {name!r}: define one with "
                "that kind"
            )
        result = called(f"kind {kind!r}", lambda: made.model_validate(value))
        try:
            result.model_dump(mode="json")
        except Exception as error:
            raise ValueError(
                f"kind {kind!r} cannot be written into a run's config.yaml ({error}): let its "
                "settings be plain values"
            ) from error
        if not isinstance(result, self.law):
            lacking = [
                member
                for member in sorted(vars(self.law))
                if not member.startswith("_") and not hasattr(result, member)
            ]
            raise ValueError(
                f"kind {kind!r} lacks {', '.join(lacking)}, which {self.where} asks for"
            )
        if made.model_config.get("extra") != "forbid":
            raise ValueError(
                f"kind {kind!r} takes any key, so a misspelt setting would be lost: give it "
                "extra='forbid'"
            )
        return result


T = TypeVar("T")


def called(what: str, function: Callable[[], T]) -> T:
    """The result of code that is not ours, whose every error is one of the configuration."""
    try:
        return function()
    except (ValueError, InputError):
        raise
    except Exception as error:
        raise ValueError(f"{what} raised {type(error).__name__}: {error}") from error


def _dumped(value: BaseModel, info: Any) -> dict[str, Any]:
    return value.model_dump(mode=info.mode)
