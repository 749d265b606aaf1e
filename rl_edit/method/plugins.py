"""Seams that are open: a plugin class takes the place of a built-in one, named by its ``kind``.

``kind: my_methods:Ratio`` imports the module ``my_methods`` and reads the mapping into its class
``Ratio``, a frozen pydantic model whose ``kind`` is that very string. Nothing is registered
anywhere.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, GetCoreSchemaHandler, ValidatorFunctionWrapHandler
from pydantic_core import CoreSchema, core_schema

from rl_edit.errors import InputError, did_you_mean

T = TypeVar("T")


@dataclass(frozen=True)
class Plugin:
    """Annotation of a seam that takes plugins besides its built-in kinds.

    Attributes:
        setting: the setting's dotted name, for errors.
        protocol: what a plugin implements; a runtime-checkable protocol.
        default_kind: the kind of a mapping that names none; "" where a kind must be named.
    """

    setting: str
    protocol: type
    default_kind: str = ""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        def validate(value: Any, built_in: ValidatorFunctionWrapHandler) -> Any:
            if isinstance(value, Mapping) and "kind" not in value and self.default_kind:
                value = {"kind": self.default_kind, **value}
            kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
            # A colon marks a plugin: no built-in kind has one.
            if isinstance(kind, str) and ":" in kind:
                return self._plugin(value, kind)
            return built_in(value)

        return core_schema.no_info_wrap_validator_function(
            validate,
            handler(source),
            # The union's own serializer knows the built-in kinds only and would warn of any other.
            serialization=core_schema.plain_serializer_function_ser_schema(_dumped, info_arg=True),
        )

    def _plugin(self, value: Any, kind: str) -> BaseModel:
        """Builds the plugin from its settings and checks what can be checked before a run."""
        model = _imported_model(kind)
        plugin = plugin_result(f"kind {kind!r}", lambda: model.model_validate(value))
        # A run writes its settings into config.yaml: what has no plain form is refused now, not
        # after the run has started.
        try:
            plugin.model_dump(mode="json")
        except Exception as error:
            raise ValueError(
                f"kind {kind!r} cannot be written into a run's config.yaml ({error}): let its "
                "settings be plain values"
            ) from error
        if not isinstance(plugin, self.protocol):
            lacking = [
                member
                for member in sorted(vars(self.protocol))
                if not member.startswith("_") and not hasattr(plugin, member)
            ]
            raise ValueError(
                f"kind {kind!r} lacks {', '.join(lacking)}, which {self.setting} asks for"
            )
        if model.model_config.get("extra") != "forbid":
            raise ValueError(
                f"kind {kind!r} takes any key, so a misspelt setting would be lost: give it "
                "extra='forbid'"
            )
        return plugin


def _imported_model(kind: str) -> type[BaseModel]:
    """Imports the frozen pydantic model that ``module:Class`` names."""
    module, _, name = kind.partition(":")
    try:
        model: Any = getattr(importlib.import_module(module), name, None)
    # An import runs the module, which can raise anything and can even call sys.exit.
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"kind {kind!r}: module {module!r} cannot be imported ({type(error).__name__}: "
            f"{error}): {import_remedy(module, error)}"
        ) from error
    if not (
        isinstance(model, type)
        and issubclass(model, BaseModel)
        and model.model_config.get("frozen")
    ):
        classes = [other for other, value in _public(module) if isinstance(value, type)]
        hint = did_you_mean(name, classes) if model is None else ""
        raise ValueError(
            f"kind {kind!r}: {module!r} has no frozen pydantic model {name!r}{hint or ':'} define "
            "one with that kind"
        )
    return model


def import_remedy(module: str, error: BaseException) -> str:
    """Says how a module that cannot be imported can be."""
    if not isinstance(error, ModuleNotFoundError) or error.name != module.partition(".")[0]:
        return "mend it, or install what it imports"
    if Path(f"{error.name}.py").is_file() or Path(str(error.name), "__init__.py").is_file():
        # The installed command does not search the directory it is started in, as python does.
        return "it lies in this directory, so put that on the path: PYTHONPATH=. rl-edit ..."
    here = [file.stem for file in Path().glob("*.py")]
    if hint := did_you_mean(str(error.name), here):
        return hint.removeprefix(", ")
    return "install it, or put its folder on PYTHONPATH"


def nearest_function(module: str, name: str) -> str:
    """Suggests the callable of a module whose name is nearest, as the end of a sentence."""
    return did_you_mean(name, [other for other, value in _public(module) if callable(value)])


def _public(module: str) -> list[tuple[str, Any]]:
    content = vars(importlib.import_module(module))
    return [(name, value) for name, value in content.items() if not name.startswith("_")]


def plugin_result(what: str, function: Callable[[], T]) -> T:
    """Runs code of a plugin; its every error is one of the configuration."""
    try:
        return function()
    except (ValueError, InputError):
        raise  # pydantic and the command line report these as they are
    except Exception as error:
        raise ValueError(f"{what} raised {type(error).__name__}: {error}") from error


def _dumped(value: BaseModel, info: Any) -> dict[str, Any]:
    return value.model_dump(mode=info.mode)
